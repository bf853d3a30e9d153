"""Buffers that model code allocates and fills slice by slice are the slices one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.ops import is_in_place
from tokcompile.capture.sizes import equal
from tokcompile.capture.trace import inline

aten = torch.ops.aten
_ALLOCATIONS = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
    aten.ones.default,
    aten.ones_like.default,
    aten.new_ones.default,
}


@dataclass(eq=False)
class _Write:
    """``buffer[..., start:end, ...].copy_(values)`` along ``dim``."""

    node: fx.Node
    views: list[fx.Node]
    dim: int
    start: int
    end: int
    values: fx.Node


def join_writes(captured: Captured) -> int:
    """``b = empty(..); b[.., :n].copy_(x); b[.., n:].copy_(y)``  ->  ``cat([x, y], -1)``; returns how many were joined.

    Only where the slices cover the buffer without overlap, are written before anything reads it, and nothing else is
    written in between.
    """
    order = {node: i for i, node in enumerate(captured.graph.nodes)}
    in_place = [order[node] for node in captured.graph.nodes if node.op == "call_function" and is_in_place(node)]
    return sum(
        _join(captured, node, order, in_place) for node in list(captured.graph.nodes) if node.target in _ALLOCATIONS
    )


def _join(captured: Captured, buffer: fx.Node, order: dict[fx.Node, int], in_place: list[int]) -> bool:
    writes = [found for user in buffer.users for found in [_write(buffer, user)] if found is not None]
    dims = {write.dim for write in writes}
    if len(writes) < 2 or len(dims) != 1:
        return False
    (dim,), size = dims, buffer.meta["val"].shape
    writes.sort(key=lambda write: write.start)
    ends = [0, *(write.end for write in writes)]
    if [write.start for write in writes] != ends[:-1] or not isinstance(size[dim], int) or ends[-1] != size[dim]:
        return False
    places = [order[write.node] for write in writes]
    last = max(writes, key=lambda write: order[write.node]).node
    readers = [user for user in buffer.users if not any(user in write.views for write in writes)]
    if any(order.get(user, -1) < order[last] for user in readers):
        return False
    if any(min(places) < i < max(places) and i not in places for i in in_place):
        return False  # what was written may have changed since

    def joined(*values: torch.Tensor) -> torch.Tensor:
        dtype, device = buffer.meta["val"].dtype, buffer.meta["val"].device
        parts = []
        for write, value in zip(writes, values, strict=True):
            shape = [*size[:dim], write.end - write.start, *size[dim + 1 :]]
            part = value.to(dtype=dtype, device=device)
            parts.append(_expanded(part, shape, values))
        return torch.cat(parts, dim)

    whole = inline(captured, joined, [write.values for write in writes], last)
    for reader in readers:
        reader.replace_input_with(buffer, whole)
    for write in writes:
        for node in [write.node, *write.views]:
            captured.graph.erase_node(node)
    captured.graph.erase_node(buffer)
    return True


def _expanded(part: torch.Tensor, shape: Sequence[Any], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """``part`` at the sizes ``shape``; one that is a symbol is read off one of ``values`` that has it."""
    lead = len(shape) - part.dim()
    if not lead and all(map(equal, part.shape, shape)):
        return part
    sizes = []
    for i, size in enumerate(shape):
        if i >= lead and equal(part.shape[i - lead], size):
            sizes.append(-1)
            continue
        full = (v.shape[i] for v in values if v.dim() == len(shape) and equal(v.shape[i], size))
        sizes.append(size if isinstance(size, int) else next(full, size))
    return part.expand(sizes)


def _write(buffer: fx.Node, view: fx.Node) -> _Write | None:
    """The write that a slice of the buffer is made for, and nothing else."""
    views: list[fx.Node] = []
    shape: Any = buffer.meta["val"].shape
    found: tuple[int, int, int] | None = None
    while view.target is aten.slice.Tensor and len(view.users) == 1:
        given: tuple[Any, ...] = (*view.args[1:], *(0, 0, None, 1)[len(view.args) - 1 :])
        dim, start, end, step = given
        views.insert(0, view)
        dim = int(dim) % len(shape)
        size = shape[dim]
        if view.meta["val"].shape[dim] is not size and not (
            isinstance(size, int) and view.meta["val"].shape[dim] == size
        ):
            if found is not None or step != 1 or not isinstance(size, int):
                return None
            if not all(isinstance(edge, int | None) for edge in (start, end)):
                return None
            low, high, _ = slice(start, end).indices(size)
            found = (dim, low, high)
        (view,) = view.users
    if found is None or view.target is not aten.copy_.default or view.users or view.args[0] is not views[0]:
        return None
    values = view.args[1]
    return _Write(view, views, *found, values) if isinstance(values, fx.Node) and values is not views[0] else None

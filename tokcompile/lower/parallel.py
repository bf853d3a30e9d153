"""Layers of tensor parallelism, written out: one rank's part of the product, and what goes over the network.

See :mod:`tokcompile.capture.parallel` for how they came to be one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.known_trace import UntraceableError
from tokcompile.capture.ops import op_name
from tokcompile.capture.parallel import Role, is_sharded

c10d = torch.ops._c10d_functional


def add_up(value: Tensor, group: str) -> Tensor:
    """The sum over all ranks."""
    return c10d.wait_tensor(c10d.all_reduce(value, "sum", group))  # type: ignore[no-any-return]


def join(value: Tensor, ranks: int, group: str) -> Tensor:
    """The parts ``[..., D / ranks]`` of all ranks, one behind the other."""
    parts = c10d.wait_tensor(c10d.all_gather_into_tensor(value.contiguous(), ranks, group))
    return parts.unflatten(0, (ranks, value.shape[0])).movedim(0, -2).flatten(-2)  # type: ignore[no-any-return]


def from_first(value: Tensor, group: str) -> Tensor:
    """What rank 0 has."""
    return c10d.wait_tensor(c10d.broadcast(value, 0, group))  # type: ignore[no-any-return]


def _reduce(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, group: str, **_: int) -> Tensor:
    result = add_up(F.linear(x, weight), group)
    return result if bias is None else result + bias


def _split_reduce(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, ranks: int, rank: int, **more: Any
) -> Tensor:
    width = -(-x.shape[-1] // ranks)
    return _reduce(x[..., rank * width : (rank + 1) * width], weight, bias, **more)


def _gather(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, ranks: int, group: str, **_: int) -> Tensor:
    return join(F.linear(x, weight, bias), ranks, group)


def _lookup(weight: Tensor, ids: Tensor, *_: Any, start: int, group: str, **__: int) -> Tensor:
    place = ids - start
    own = (place >= 0) & (place < weight.shape[0])
    rows = F.embedding(torch.where(own, place, 0), weight)
    return add_up(torch.where(own.unsqueeze(-1), rows, 0), group)


def _lookup_gather(weight: Tensor, ids: Tensor, *_: Any, ranks: int, group: str, **__: int) -> Tensor:
    return join(F.embedding(ids, weight), ranks, group)


_FORMS: dict[tuple[str, str], Callable[..., Tensor]] = {
    ("linear", "reduce"): _reduce,
    ("linear", "split_reduce"): _split_reduce,
    ("linear", "gather"): _gather,
    ("embedding", "lookup"): _lookup,
    ("embedding", "lookup_gather"): _lookup_gather,
}


def write_out(captured: Captured) -> bool:
    """Let the operations on sharded weights do what these say, in place; whether there are any.

    Raises:
        UntraceableError: something else reads a weight of which a rank has a part only.
    """
    sharded = [node for node in captured.placeholders if "sharded" in node.meta]
    for weight in sharded:
        for user in list(weight.users):
            if weight.meta["parallel"]:
                _write(user, weight, weight.meta["parallel"])
    if sharded:
        captured.graph_module.recompile()
    return bool(sharded)


def _write(user: fx.Node, weight: fx.Node, roles: dict[str, Role]) -> None:
    place = {"linear": 1, "embedding": 0}.get(op_name(user))
    if place is None or [i for i, arg in enumerate(user.args) if arg is weight] != [place]:
        at = ", ".join(part for part in (module_path(user), source_line(user)) if part)
        raise UntraceableError(
            f"{user.name} [{at}] reads a weight of which each rank has a part (class DTensor); a rewrite that needs "
            "the whole weight is made before the model is sharded"
        )
    role = roles["embedding" if place == 0 else "linear"]
    user.target = _FORMS[role.operation, role.kind]
    user.kwargs = {"group": role.group, "ranks": role.ranks, "rank": role.rank, "start": role.start}


def of_this_rank(captured: Captured, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, called with this rank's part of each sharded argument."""
    places = [i for i, node in enumerate(captured.placeholders) if "sharded" in node.meta or "unused" in node.meta]
    if not places:
        return run

    def call(*args: Any) -> Any:
        given = list(args)
        for i in places:
            given[i] = given[i].to_local() if is_sharded(given[i]) else 0
        return run(*given)

    return call


def local_example(node: fx.Node) -> Any:
    """What a placeholder takes, where it is a sharded weight: this rank's part."""
    value: Tensor = node.meta["val"]
    shape: Sequence[int] = node.meta["sharded"]
    return value if tuple(value.shape) == tuple(shape) else value.new_empty(shape)

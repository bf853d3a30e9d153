"""Which components of a head RoPE rotates together, read off the graph by running it.

A rotation mixes two components of a head, a plane: (i, i + D/2) in models that rotate halves, (2i, 2i + 1) in models
that interleave. Between the last value that is not rotated and the query the graph is linear; its matrix for one token,
with other numbers in the place of cosines and sines, shows the planes whatever the code looks like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tokcompile.capture.ops import JOIN, LAYOUT, NORM, POINTWISE, REDUCE, SELECT, TRIVIAL
from tokcompile.regions.flow import Flow
from tokcompile.regions.model import AttentionRegion
from tokcompile.rewrite.context import Context

#: What a rotation is made of, and what may stand between it and the projection.
_OPS = (
    TRIVIAL
    | LAYOUT
    | SELECT
    | JOIN
    | POINTWISE
    | NORM
    | REDUCE
    | {
        "view_as_complex",
        "view_as_real",
        "view_as",
        "new_empty",
        "empty",
        "zeros",
        "new_zeros",
        "empty_like",
        "zeros_like",
        "_conj",
        "index",
        "index_select",
        "matmul",
        "bmm",
    }
)


@dataclass(frozen=True)
class Rope:
    """Planes of a head of D components.

    Attributes:
        planes: pairs of components that are rotated together, ascending by the first.
        still: components that are not rotated (partial rotary), ascending.
        pairing: "halves", "interleaved" or "other".
    """

    planes: tuple[tuple[int, int], ...]
    still: tuple[int, ...]
    pairing: str

    def chunks(self) -> list[tuple[int, ...]]:
        """Planes, and after them the components that are not rotated, two by two."""
        return [*self.planes, *(self.still[i : i + 2] for i in range(0, len(self.still), 2))]


def read_rope(ctx: Context, region: AttentionRegion, query: fx.Node) -> Rope:
    """The planes of the RoPE of an attention region.

    Args:
        query: [B, H, S, D], as it enters the attention.

    Raises:
        NarrowError: no rotation is recognised; names the node that is read instead.
    """
    flow = Flow(ctx.captured.graph)
    source = region.query
    projection = region.query_proj
    if projection is None:
        raise ctx.refuse(source, "no projection makes this query, so its RoPE cannot be read")
    walk = flow.back(source, _OPS, stop=lambda n: n is projection)
    width = int(query.meta["val"].shape[-1])
    error = ""
    for start in [*walk.passed, projection]:
        if (
            start is source
            or not isinstance(start.meta["val"], Tensor)
            or not (flow.reaches(projection, start) and _all_through(flow, projection, start, source))
        ):
            continue
        try:
            matrix = _matrix(flow, start, source, width)
        except Exception as caught:  # any operation of the model's own
            error = f" ({start.name}: {type(caught).__name__}: {str(caught).splitlines()[0][:120]})"
            continue
        if matrix is None:
            break  # not linear any more
        rope = _planes(matrix)
        if rope is not None:
            return rope
    raise ctx.refuse(
        source,
        "no rotary position embedding is recognised between the projection and this query"
        f"{error}; a model without RoPE can take tokenselect",
    )


def _between(flow: Flow, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The nodes on the way from ``start`` to ``end``, without ``start``, in order."""
    return [
        n
        for n in flow.nodes[flow.position[start] + 1 : flow.position[end] + 1]
        if flow.reaches(start, n) and flow.reaches(n, end)
    ]


def _all_through(flow: Flow, projection: fx.Node, node: fx.Node, end: fx.Node) -> bool:
    """Whether all that ``projection`` gives to ``end`` goes through ``node``."""
    inside = {node, *_between(flow, node, end)}
    return all(
        source in inside or not flow.reaches(projection, source)
        for n in inside
        if n is not node
        for source in n.all_input_nodes
        if source in flow.position
    )


def _matrix(flow: Flow, start: fx.Node, end: fx.Node, width: int) -> Tensor | None:
    """The map from ``start`` to the first head of ``end`` [.., D]: -> [D, numbers of start], None if not linear."""
    nodes = _between(flow, start, end)
    inside = {start, *nodes}
    generator = torch.Generator().manual_seed(0)
    fixed: dict[fx.Node, Any] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside and source not in fixed:
                fixed[source] = _stand_in(source, generator)
    shape = [_number(s) for s in start.meta["val"].shape]

    def run(value: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {**fixed, start: value}
        for node in nodes:
            values[node] = _call(node, values)
        result = values[end]
        return result.reshape(-1, result.shape[-1])[0]

    point = torch.randn(shape, generator=generator).requires_grad_(True)
    with torch.enable_grad():
        result = run(point)
        rows = [torch.autograd.grad(result[i], point, retain_graph=True)[0].flatten() for i in range(width)]
    matrix = torch.stack(rows)
    with torch.no_grad():
        linear = torch.allclose(matrix @ point.flatten(), result, rtol=1e-3, atol=1e-4)
    return matrix if linear else None


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    def value(n: fx.Node) -> Any:
        return values[n] if n in values else _number(n.meta["val"])

    args, kwargs = torch.fx.node.map_aggregate(fx.map_arg((node.args, node.kwargs), value), _wide)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _wide(value: Any) -> Any:
    """The matrix is computed in fp32 on the host, whatever the model's type and device."""
    if value in (torch.float16, torch.bfloat16):
        return torch.float32
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _stand_in(node: fx.Node, generator: torch.Generator) -> Any:
    """Numbers of the shape of ``node``, all different and positive; 1 for a symbolic size."""
    known = node.meta["val"]
    if not isinstance(known, Tensor):
        return _number(known)
    shape = [_number(s) for s in known.shape]
    if known.is_complex():
        angle = torch.rand(shape, generator=generator) + 0.25
        return torch.polar(torch.rand(shape, generator=generator) + 0.5, angle)
    if known.is_floating_point():
        return torch.rand(shape, generator=generator) + 0.5
    return torch.zeros(shape, dtype=known.dtype)


def _number(size: Any) -> Any:
    return 1 if isinstance(size, torch.SymInt) else size


def _planes(matrix: Tensor) -> Rope | None:
    """Planes of a matrix of rotations; None where it has another structure, or rotates nothing."""
    width = matrix.shape[0]
    support = [tuple(int(i) for i in row.nonzero().flatten()) for row in matrix]
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, columns in enumerate(support):
        groups.setdefault(columns, []).append(row)
    planes, still = [], []
    for columns, rows in groups.items():
        if len(columns) == 1 and len(rows) == 1:
            still += rows
        elif len(columns) == 2 and len(rows) == 2:
            block = matrix[rows][:, list(columns)]
            if not bool(block[0, 0] * block[1, 1] * block[0, 1] * block[1, 0] < 0):
                return None  # a rotation has one sign that differs from the others
            planes.append((rows[0], rows[1]))
        else:
            return None
    if not planes:
        return None
    rotated = 2 * len(planes)
    first = planes[0][0]
    pairing = "other"
    if all(b == a + rotated // 2 for a, b in planes):
        pairing = "halves"
    elif all(b == a + 1 and (a - first) % 2 == 0 for a, b in planes):
        pairing = "interleaved"
    assert rotated + len(still) == width
    return Rope(tuple(planes), tuple(sorted(still)), pairing)

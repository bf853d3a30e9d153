"""Sizes of an attention by name, whatever layout its operands have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from tokcompile.capture.ops import NORM, TRIVIAL

from .flow import Flow
from .model import AttentionRegion, Size


@dataclass(frozen=True)
class HeadSizes:
    """See :class:`~tokcompile.regions.model.AttentionRegion`."""

    batch: Size
    heads: Size
    kv_heads: Size
    queries: Size
    keys: Size
    head_dim: Size


def _einsum_sizes(flow: Flow, region: AttentionRegion) -> HeadSizes | None:
    """Sizes by the letters of the equation of the scores, ``b q h d, b k h d -> b h q k`` in any order."""
    scores = region.scores
    if scores is None or flow.op[scores] != "einsum" or not isinstance(scores.args[0], str):
        return None
    left, _, out = scores.args[0].replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != 2 or len(out) != 4 or "." in left:
        return None
    sizes = dict(zip(terms[1], flow.sizes(region.key), strict=False))
    sizes |= dict(zip(terms[0], flow.sizes(region.query), strict=False))
    shared = [c for c in out if c in terms[0] and c in terms[1]]
    inner = [c for c in terms[0] if c in terms[1] and c not in out]
    rows = [c for c in out if c in terms[0] and c not in terms[1]]
    columns = [c for c in out if c in terms[1] and c not in terms[0]]
    if (len(shared), len(inner), len(rows), len(columns)) != (2, 1, 1, 1):
        return None
    return HeadSizes(*(sizes[letter] for letter in (*shared, shared[1], rows[0], columns[0], inner[0])))


def head_sizes(flow: Flow, region: AttentionRegion) -> HeadSizes:
    """Sizes of the query and key that enter the contraction."""
    named = _einsum_sizes(flow, region)
    if named is not None:
        return named
    query, key = _four_axes(flow, region.query), _four_axes(flow, region.key)
    sizes, key_sizes = flow.sizes(query), flow.sizes(key)
    last = sizes[-2], key_sizes[-2], sizes[-1]
    if len(sizes) >= 4:
        return HeadSizes(sizes[0], sizes[-3], _kv_heads(flow, key), *last)
    heads = _folded_heads(flow, region, sizes[-1]) if len(sizes) == 3 else 1
    return HeadSizes(sizes[0] // heads if len(sizes) == 3 else 1, heads, heads, *last)


def _folded_heads(flow: Flow, region: AttentionRegion, width: Any) -> Any:
    """Heads of a [B*H, S, Dh] query, from the width of its projection; 1 when there is no telling."""
    projection = flow.linear(region.query_proj) if region.query_proj is not None else None
    if projection is None or not isinstance(projection.features, int) or not isinstance(width, int):
        return 1
    share = 3 if region.key_proj is projection.node else 1
    return max(projection.features // (share * width), 1)


def _four_axes(flow: Flow, node: fx.Node) -> fx.Node:
    """The [B, H, S, Dh] form of a [B*H, S, Dh] operand, when the graph has it."""
    dims = flow.dims(node) or ()
    current = node
    while len(dims) == 3:
        source = flow.primary(current) if flow.op[current] not in NORM else None
        if source is None:
            return node
        current = source
        other = flow.dims(current) or ()
        if len(other) == 4 and other[-1] == dims[-1] and other[-2] == dims[-2]:
            return current
        if len(other) == 4 and {other[-1], other[-2]} == {dims[-1], dims[-2]}:
            return node
    return node


def _kv_heads(flow: Flow, key: fx.Node) -> Any:
    """Heads before ``expand`` or ``repeat_interleave`` gave every query head its copy."""
    node = key
    while flow.op[node] in TRIVIAL and flow.inputs[node]:
        node = flow.inputs[node][0]
    if flow.op[node] == "repeat_interleave":
        return flow.sizes(flow.inputs[node][0])[-3]
    if flow.op[node] in ("reshape", "view", "flatten", "_unsafe_view", "contiguous", "clone"):
        inner = flow.canonical(flow.inputs[node][0])
        if flow.op[inner] in ("expand", "repeat", "broadcast_to") and len(flow.dims(inner) or ()) == 5:
            source = flow.sizes(flow.inputs[inner][0])
            return source[1] if len(source) == 5 else flow.sizes(key)[-3]
    if flow.op[node] in ("expand", "broadcast_to") and flow.inputs[node]:
        source = flow.sizes(flow.inputs[node][0])
        if len(source) == 4:
            return source[-3]
    return flow.sizes(key)[-3]

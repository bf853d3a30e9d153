"""Attention rows for scoring, read off a layer that was found in the graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from tokcompile.capture.sizes import equal, shape_of
from tokcompile.formulas.attention import AttentionForm, read_attention
from tokcompile.regions.model import Layer
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.selection import keep_index, row_attention


def attention_rows(
    ctx: Context, layer: Layer, rows: int | fx.Node | None, *, most: int | fx.Node | None = None
) -> fx.Node:
    """Attention probabilities of some queries of ``layer``: fp32 ``[B, H, R, T]``, computed beside the attention.

    Soft cap, mask, causal order, window, shared key heads and sinks are those of the layer. Only the rows asked for are
    computed; where the layer has weights without a mask in the graph (the eager form) they are taken from there. A
    query that sees no key, and a place without a query, have a row of zeros.

    Args:
        rows: which queries: the first so many; all (None); a node, int64 ``[B, R]``: those at these places (-1: none);
            or a node, bool ``[B, S]``: the last ``most`` of those where it is true, right-aligned.
        most: rows that a bool ``rows`` gives, a number or a size in the graph.

    Raises:
        NarrowError: the layer has no attention, or one whose formula is not known.
    """
    source = rows_source(ctx, layer)
    if isinstance(rows, fx.Node) and rows.meta["val"].dtype == torch.bool:
        if most is None:
            raise ValueError("attention_rows: queries given by a bool mask need most=, the number of rows")
        rows = last_places(ctx, rows, most)
    return _taken(ctx, source, rows) if isinstance(source, fx.Node) else _computed(ctx, source, rows)


def last_places(ctx: Context, chosen: fx.Node, most: int | fx.Node) -> fx.Node:
    """int64 ``[B, R]``: the last ``most`` places where bool ``chosen [B, S]`` is true, right-aligned; -1: none."""
    sized = (most,) if isinstance(most, fx.Node) else ()
    return ctx.emit(keep_index, chosen, most, before=ctx.after(chosen, *sized))  # type: ignore[no-any-return]


def rows_source(ctx: Context, layer: Layer) -> fx.Node | AttentionForm:
    """What :func:`attention_rows` reads: weights that are in the graph, or the formula. Emits nothing that is used.

    Raises:
        NarrowError: as there; for a pass that has to know before it changes anything.
    """
    attention = layer.attention
    if attention is None:
        raise ctx.refuse(layer.output, f"layer {layer.index} has no attention to score with")
    weights, scores = attention.softmax, attention.scores
    if attention.mask is None and weights is not None and scores is not None and _by_head(weights, scores):
        return weights  # no row of these is hidden
    return read_attention(ctx, attention, dropout=True)


def _by_head(weights: fx.Node, scores: fx.Node) -> bool:
    """Whether weights are [B, H, S, T]; with sinks there is one column more."""
    shape = shape_of(weights)
    return len(shape) == 4 and equal(shape[3], shape_of(scores)[-1])


def _taken(ctx: Context, weights: fx.Node, rows: int | fx.Node | None) -> fx.Node:
    """Rows of weights ``[B, H, S, T]`` that are in the graph."""
    chosen = [rows] if isinstance(rows, fx.Node) else []

    def take(weights: Tensor, *index: Tensor) -> Tensor:
        return _blank(_pick(weights, rows, *index).to(torch.float32), *index)

    return ctx.emit(take, weights, *chosen, before=ctx.after(weights, *chosen))  # type: ignore[no-any-return]


def _computed(ctx: Context, form: AttentionForm, rows: int | fx.Node | None) -> fx.Node:
    """Rows of the weights of an attention, by its formula."""
    named = {"query": form.query, "key": form.key, "mask": form.mask, "sink": form.sink}
    nodes = {name: node for name, node in named.items() if node is not None}
    chosen = [rows] if isinstance(rows, fx.Node) else []
    # masks and sinks that are the same for every query have one row, or none
    rowed = {name for name in ("mask", "sink") if name in nodes and _has_rows(nodes[name])}

    def compute(*values: Tensor) -> Tensor:
        v, index = dict(zip(nodes, values, strict=False)), values[len(nodes) :]
        query, key = v["query"], v["key"]
        for name in rowed:
            full = v[name][(None,) * (4 - v[name].dim())]
            v[name] = _pick(full.expand(query.shape[0], *full.shape[1:]) if index else full, rows, *index)
        mask = v.get("mask")
        if form.causal:
            mask = _and_causal(mask, query.shape[2], key.shape[2], rows, *index, device=key.device)
        found = row_attention(_pick(query, rows, *index), key, form.scale, mask, form.softcap or None, v.get("sink"))
        return _blank(found, *index)

    inputs = [*nodes.values(), *chosen]
    return ctx.emit(compute, *inputs, before=ctx.after(*inputs))  # type: ignore[no-any-return]


def _has_rows(node: fx.Node) -> bool:
    shape = shape_of(node)
    return len(shape) > 1 and not equal(shape[-2], 1)


def _pick(x: Tensor, rows: int | fx.Node | None, *index: Tensor) -> Tensor:
    """Rows of ``x [B, H, S, N]``: the first, all, or those at ``index [B, R]``."""
    if index:
        place = index[0].clamp(min=0)[:, None, :, None]
        return x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3]))
    return x if rows is None else x[:, :, :rows]


def _and_causal(
    mask: Tensor | None, queries: int, keys: int, rows: int | fx.Node | None, *index: Tensor, device: torch.device
) -> Tensor:
    """``mask`` (of the picked rows) where the query comes no earlier than the key; as many queries as keys."""
    place = torch.arange(queries, device=device)[None] if not index else index[0]
    if isinstance(rows, int):
        place = place[:, :rows]
    seen = torch.arange(keys, device=device) <= place[:, None, :, None]
    if mask is None:
        return seen
    return torch.logical_and(seen, mask) if mask.dtype == torch.bool else torch.where(seen, mask, -math.inf)


def _blank(weights: Tensor, *index: Tensor) -> Tensor:
    """``weights [B, H, R, T]`` with zeros in rows whose place is -1."""
    return torch.where((index[0] >= 0)[:, None, :, None], weights, 0.0) if index else weights


def class_row(ctx: Context, layer: Layer) -> fx.Node:
    """Attention of the class token (row 0) of ``layer``: fp32 ``[B, H, T]``."""
    row = attention_rows(ctx, layer, 1)
    return ctx.emit(lambda r: r[:, :, 0], row, before=ctx.after(row))  # type: ignore[no-any-return]

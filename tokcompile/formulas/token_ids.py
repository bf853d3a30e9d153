"""Which input of a graph holds the ids of the tokens that a layer works on, and which of these come first in a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcompile.capture.graph import ancestors
from tokcompile.capture.ops import LAYOUT, TRIVIAL, is_in_place
from tokcompile.capture.sizes import dims_of, shape_of
from tokcompile.errors import NarrowError
from tokcompile.formulas.attention import AttentionForm, read_attention
from tokcompile.formulas.mask import MaskForm, is_visible, read_mask
from tokcompile.regions.flow import Flow
from tokcompile.regions.model import AttentionRegion, DecoderStack, FeedForwardRegion, Layer, MergePoint, MoeRegion
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.visual_mask import feature_mask


def layer_with(ctx: Context, region: FeedForwardRegion | MoeRegion) -> tuple[DecoderStack, Layer] | None:
    """The decoder stack, and its layer, that has ``region`` as its feed-forward part."""
    for stack in ctx.regions.of(DecoderStack):
        for layer in stack.layers:
            if layer.feed_forward is region:
                return stack, layer
    return None


def embedding_of(ctx: Context, region: FeedForwardRegion | MoeRegion) -> tuple[fx.Node, fx.Node]:
    """The lookup that the residual stream of a region starts with: -> (ids [B, S], table [V, d]), graph inputs.

    Raises:
        NarrowError: the region is in no stack of layers, or its stream does not start with a lookup of token ids.
    """
    found = layer_with(ctx, region)
    where = region.input
    if found is None:
        raise ctx.refuse(where, "the layer belongs to no stack of layers over tokens, so no token ids go with it")
    start, flow = found[0].layers[0].input, Flow(ctx.captured.graph)
    placeholders = set(ctx.captured.placeholders)
    lookups: list[tuple[fx.Node, fx.Node]] = []
    for node in flow.by_op.get("embedding", []):
        table: Any = node.args[0]
        ids: Any = node.args[1]
        while flow.op[ids] in TRIVIAL | LAYOUT and ids.meta["val"].dim() <= 2 and flow.inputs[ids]:
            ids = flow.inputs[ids][0]
        if (
            flow.reaches(node, start)
            and ids in placeholders
            and table in placeholders
            and (ids.meta["val"].dim() == 2 and not ids.meta["val"].is_floating_point())
        ):
            lookups.append((ids, table))
    if not lookups:
        raise ctx.refuse(
            where,
            "no input_ids in the graph: the tokens of this layer do not come from a lookup of ids "
            "[B, S]; call the model with input_ids, not with inputs_embeds or pixel values",
        )

    # token types and learned positions are looked up too, in smaller tables
    return max(lookups, key=lambda lookup: lookup[1].meta["val"].shape[0])


def ids_for(
    ctx: Context, region: FeedForwardRegion | MoeRegion, like: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Token ids for the tokens of ``like``: int64, its shape without the last axis; -1 at images and empty slots.

    After earlier steps removed tokens, the ids of those that are left.

    Returns:
        The ids, the table of the embedding [V, d], and the positions of image features in the ids (bool, or None).

    Raises:
        NarrowError: there are no ids, or they do not fit the tokens.
    """
    ids, table = embedding_of(ctx, region)
    stack, layer = layer_with(ctx, region)  # type: ignore[misc]
    flow = Flow(ctx.captured.graph)
    visual = [feature_mask(ctx, m) for m in ctx.regions.of(MergePoint) if flow.reaches(m.output, stack.layers[0].input)]
    parts = [ids, *visual]
    masked = ctx.emit(_masked, *parts, before=ctx.after(*parts)) if visual else ids
    sizes = flow.dims(layer.input)
    kept = [None, *(k.node for k in ctx.cuts.kept)]
    fitting = [k for k in kept if _dims(k or masked) == (None if sizes is None else sizes[:2])]
    if not fitting:
        raise ctx.refuse(
            like,
            f"the ids are {tuple(ids.meta['val'].shape)}, the tokens of this layer "
            f"{tuple(layer.input.meta['val'].shape[:2])}",
        )
    if fitting[0] is not None:
        masked = ctx.emit(_left, masked, fitting[0], before=ctx.after(masked, fitting[0]))
    if like.meta["val"].dim() == 2:
        masked = ctx.emit(lambda i: i.reshape(-1), masked, before=ctx.after(masked))
    if _dims(masked) != _dims(like)[:-1]:
        raise ctx.refuse(
            like, f"the ids are {tuple(masked.meta['val'].shape)}, the tokens here {tuple(like.meta['val'].shape[:-1])}"
        )
    return masked, table, visual[0] if visual else None


def first_for(ctx: Context, region: FeedForwardRegion | MoeRegion, count: int) -> fx.Node:
    """bool [B or 1, S]: the first ``count`` visible tokens of each row, of those that a layer works on.

    Read off the mask of the attention beside it (or of another one over the same tokens): such a token sees at most
    ``count`` keys, itself included. So padding in front of a row does not count, a token behind a cache of ``count`` or
    more keys is none of them, and each of several texts in one row has its own.

    Raises:
        NarrowError: no attention over these tokens shows which keys a token sees.
    """
    found = layer_with(ctx, region)
    where = region.input
    if found is None:
        raise ctx.refuse(where, "the layer belongs to no stack of layers over tokens, so none of these comes first")
    stack, layer = found
    flow = Flow(ctx.captured.graph)
    sizes = flow.dims(layer.input)
    beside = [layer, *(other for other in stack.layers if other is not layer)]
    reasons = []
    for other in (other for other in beside if flow.dims(other.input) == sizes):
        try:
            if other.attention is not None:
                return _in_front(ctx, _first(ctx, flow, layer, other.attention, count), where)
        except NarrowError as error:
            reasons.append(error.reason)
    raise ctx.refuse(
        where,
        "no attention over these tokens shows which of them comes first: "
        f"{reasons[0] if reasons else 'none is left in the graph'}; set dense_first: 0, or put "
        "this step in front of those that rewrite attention",
    )


def _in_front(ctx: Context, node: fx.Node, where: fx.Node) -> fx.Node:
    """``node``, moved in front of ``where`` with all that it is computed from where that stands further down.

    Raises:
        NarrowError: it is computed from ``where``, or memory that it writes to is read in between.
    """
    order = {n: i for i, n in enumerate(ctx.captured.graph.nodes)}
    flow, start = Flow(ctx.captured.graph), order[where]
    if order[node] < start:
        return node
    above = {*ancestors([node]), node}
    known = [n for n in above if n in flow.position]  # what writes to these is no ancestor
    below = [n for n in ctx.captured.graph.nodes if order[n] > start]
    chain = [n for n in below if n in above or (n in flow.position and any(flow.reaches(n, m) for m in known))]
    for n in chain:
        between = [m for m in flow.nodes if start < order[m] < order[n] and m not in chain and n.args[0] in m.args]
        if where in ancestors([n]) or (is_in_place(n) and between):
            raise ctx.refuse(n, "which tokens come first is known only below the layer")
    for n in chain:
        where.prepend(n)
    return node


def _first(ctx: Context, flow: Flow, layer: Layer, attention: AttentionRegion, count: int) -> fx.Node:
    form = read_attention(ctx, attention, dropout=True)  # training; which keys are seen is the same
    queries, keys = (_dims(n)[2] for n in (form.query, form.key))
    place = ("first", form.mask, form.causal, queries, keys, count)
    if place not in ctx.shared:
        mask = read_mask(ctx, form)
        if queries != 1 and not mask.causal and (mask.rest is None or not attention.causal):
            raise ctx.refuse(form.output, "its tokens see later ones too")
        if mask.window is not None and mask.window <= count:
            raise ctx.refuse(form.output, f"its window of {mask.window} keys does not reach beyond the first {count}")
        ctx.shared[place] = _seen(ctx, form, mask, layer.input, count)
    return ctx.shared[place]  # type: ignore[no-any-return]


def _seen(ctx: Context, form: AttentionForm, mask: MaskForm, tokens: fx.Node, count: int) -> fx.Node:
    """The tokens [B, S, .] that see 1 to ``count`` keys, bool [B or 1, S]; a window cuts off none of so few."""
    given = {"tokens": tokens, "keys": mask.keys, "rest": mask.rest}
    if mask.keys is None and mask.rest is None and _dims(form.key)[2] != _dims(form.query)[2]:
        given["key"] = form.key  # else the graph need not come to the keys first
    nodes = {name: node for name, node in given.items() if node is not None}

    def first(*values: torch.Tensor) -> torch.Tensor:
        v = dict(zip(nodes, values, strict=True))
        queries, device = v["tokens"].shape[1], v["tokens"].device
        length = (
            v["keys"].shape[1]
            if "keys" in v
            else v["rest"].shape[-1]
            if "rest" in v
            else (v["key"].shape[2] if "key" in v else queries)
        )
        position = torch.arange(length - queries, length, device=device)
        if "rest" in v:
            rest = is_visible(v["rest"])
            visible = rest[(None,) * (4 - rest.ndim)].any(1)
            if mask.causal:
                visible = visible & (torch.arange(length, device=device) <= position.unsqueeze(1))
            number = (visible & v["keys"].unsqueeze(1) if "keys" in v else visible).sum(-1)
        elif "keys" in v:
            number = v["keys"].cumsum(1)[:, length - queries :]
        else:
            number = (position + 1).unsqueeze(0)
        return (number > 0) & (number <= count)

    return ctx.emit(first, *nodes.values(), before=ctx.after(*nodes.values()))  # type: ignore[no-any-return]


def _masked(ids: torch.Tensor, *visual: torch.Tensor) -> torch.Tensor:
    for mask in visual:
        ids = torch.where(mask, -1, ids)
    return ids


def _left(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return torch.where(positions >= 0, ids.gather(1, positions.clamp(min=0)), -1)


def _dims(node: fx.Node) -> tuple[Any, ...]:
    return dims_of(shape_of(node))

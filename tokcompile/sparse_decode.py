"""Attention of a decode step over some of the keys in the cache: what the passes that choose them share.

::

    before   query [B, H, 1, D], keys and values [B, Hkv, T, .] -> attention over all T keys
    after    scores of the keys -> list of C keys: the first, the best, the last -> attention over the list

A pass is a way to score keys. The first visible keys of a row (attention sinks) and the last ones (the token of this
step among them) are always in the list; padding never is. Nothing leaves the cache: the next step chooses anew.

Choosing reads keys too, so a short cache is served by the dense attention. That is decided by the length alone, once
for each compiled graph: one graph serves shorter caches, one the longer ones, and a guard on the length tells them
apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from tokcompile.attention_form import AttentionForm, read_attention, with_sink
from tokcompile.errors import UnprofitableError
from tokcompile.kernels.token_list_attention import token_list_attention
from tokcompile.mask_form import read_mask
from tokcompile.plan import Context, Pass
from tokcompile.recipe import Budget
from tokcompile.regions.flow import Flow
from tokcompile.regions.model import Region
from tokcompile.regions.ops import LAYOUT, TRIVIAL, is_in_place, op_name
from tokcompile.registry import PassParams, about

#: Bytes that dense attention moves in the time that a choice takes whatever its length (a dozen small operations), by
#: device. CPU, measured (docs/kernels.md: 9 query heads, 3 key heads of width 64, fp32, 256 keys, one thread): fasa is
#: even with dense attention at about 4,800 tokens and tokenselect at 5,800; with this constant 5,700 and 6,400 are
#: predicted, without it 1,600 and 1,800. CUDA, not measured: twelve launches of 3 us at 3 TB/s.
FIXED = {"cpu": 3_000_000, "cuda": 108_000_000}


class SparseDecodeParams(PassParams):
    """What every choice of keys has to be told."""

    budget: Budget = Field(description="Keys that a query attends to, sinks and recent ones included.")
    sinks: int = Field(4, ge=0, description="First visible keys of a row, always attended to.",
                       json_schema_extra=about(unit="tokens"))
    recent: int = Field(1, ge=1, description="Last visible keys, always attended to; the last is the token itself.",
                        json_schema_extra=about(unit="tokens"))
    dense_below: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="Shorter caches are served by the dense attention; auto: those for which choosing and "
                            "attending to the chosen is predicted to move as many bytes.",
        json_schema_extra=about(unit="tokens"))

    def model_post_init(self, context: Any) -> None:
        if self.budget.is_count and self.budget.num <= self.sinks + self.recent:
            raise ValueError(f"budget {self.budget} leaves nothing to choose beside {self.sinks} sinks and "
                             f"{self.recent} recent keys; raise it above {self.sinks + self.recent}")


class SparseDecode(Pass):
    """Base of the passes: a subclass scores the keys (:meth:`score`)."""

    regions = "attention"
    stage = "decode"
    #: float32 numbers written for each key and row of the batch, in key heads and in query heads.
    written: ClassVar[tuple[int, int]] = (1, 0)
    #: Whether scoring reads the keys.
    reads_keys: ClassVar[bool] = True

    def inputs(self, ctx: Context, region: Region, form: AttentionForm) -> tuple[Sequence[fx.Node], dict[str, Any]]:
        """Nodes that :meth:`score` takes beside query, keys and candidates, and details for the report.

        Raises:
            NarrowError: keys of this region cannot be scored.
        """
        return (), {}

    def score(self, query: Tensor, key: Tensor, candidate: Tensor, scale: float, softcap: float, layer: int,
              *more: Tensor) -> Tensor:
        """Scores of keys: the higher, the sooner chosen. Traceable.

        Args:
            query: [B, H, 1, D]. key: [B, Hkv, T, D].
            candidate: bool [B or 1, T]: the keys that can be chosen; scores of others are not used.
            scale, softcap: of the attention. layer: its number in the stack, 0 outside of one.
            more: values of :meth:`inputs`.

        Returns:
            float [B or 1, M, T], M = Hkv (a list for each key head) or 1 (one list for all heads).
        """
        raise NotImplementedError

    def apply(self, ctx: Context, region: Region) -> dict[str, Any]:
        form = decode_form(ctx, region)
        more, details = self.inputs(ctx, region, form)
        visible = visible_keys(ctx, form)
        threshold = self._gate(ctx, region, form)
        ends = _ends(ctx, form, visible, self.params.sinks, self.params.recent)
        sink = [] if form.sink is None else [form.sink]
        best, choice = self.choose(ctx, region, form, ends, more)

        def attention(query: Tensor, key: Tensor, value: Tensor, best: Tensor, oldest: Tensor, newest: Tensor,
                      *sink: Tensor) -> Tensor:
            index = joined(best, oldest, newest)
            index = index.expand(query.shape[0], key.shape[1], index.shape[2])
            output, lse = token_list_attention(query, key, value, index, None, form.scale, False, form.softcap)
            return with_sink(output, lse, sink[0]) if sink else output

        form.replace(ctx, attention, form.query, form.key, form.value, best, *ends[1:], *sink)
        return {"budget": str(self.params.budget), "dense_below": threshold, **details, **choice}

    def choose(self, ctx: Context, region: Region, form: AttentionForm, ends: tuple[fx.Node, ...],
               more: Sequence[fx.Node]) -> tuple[fx.Node, dict[str, Any]]:
        """Node of the best candidates, int64 [B or 1, M, .], and details for the report.

        Args:
            ends: nodes of :func:`ends`. more: of :meth:`inputs`.
        """
        layer = (ctx.layer(region) or (0, 0))[0]

        def best(query: Tensor, key: Tensor, candidate: Tensor, oldest: Tensor, newest: Tensor,
                 *more: Tensor) -> Tensor:
            scores = self.score(query, key, candidate, form.scale, form.softcap, layer, *more)
            return chosen(scores, candidate, self.params.budget.count(key.shape[2]) - _width(oldest, newest))

        return ctx.emit(best, form.query, form.key, *ends, *more, before=form.output), {}

    def _gate(self, ctx: Context, region: Region, form: AttentionForm) -> int:
        """Raise where the dense attention serves caches of this length better; puts a guard on the length.

        Returns:
            The length from which on keys are chosen.
        """
        params = self.params
        least = least_length(params.budget, params.sinks, params.recent)
        threshold = self._even(form) if params.dense_below == "auto" else params.dense_below
        if threshold is None:
            raise UnprofitableError(
                f"choosing keys and attending to {params.budget} of them is predicted to move as many bytes as dense "
                "attention at any length; lower the budget, or set dense_below",
                node=form.output.name, path=region.path, source=region.source)
        threshold = max(threshold, least)
        if form.key.meta["val"].shape[2] < threshold:
            raise UnprofitableError(
                f"the dense attention serves caches of less than {threshold} tokens, where choosing keys and attending "
                f"to {params.budget} of them is not expected to pay (dense_below: {params.dense_below})",
                node=form.output.name, path=region.path, source=region.source)
        return threshold

    def _even(self, form: AttentionForm) -> int | None:
        """The length at which both move as many bytes; None: the dense attention never moves more.

        Keys are read once for the scores (the cache stores whole rows), scores are written and read twice (softmax or
        comparison, choice); the kernel reads listed rows in place, the host copies them first; and :data:`FIXED`.
        """
        key, value = form.key.meta["val"], form.value.meta["val"]
        heads, kv_heads = form.heads
        size, width, value_width = key.element_size(), int(key.shape[3]), int(value.shape[3])
        scoring = (kv_heads * width * size if self.reads_keys else 0) + 12 * (
            self.written[0] * kv_heads + self.written[1] * heads)
        row = (1 if key.device.type == "cuda" else 3) * kv_heads * (width + value_width) * size
        saved = kv_heads * (width + value_width) * size - scoring
        budget, fixed = self.params.budget, FIXED["cuda" if key.device.type == "cuda" else "cpu"]
        if budget.is_count:
            return None if saved <= 0 else -(-(budget.num * row + fixed) // saved)
        left = saved * budget.den - row * budget.num
        return None if left <= 0 else -(-fixed * budget.den // left)


def least_length(budget: Budget, sinks: int, recent: int) -> int:
    """The shortest cache of which ``budget`` lets at least one key be chosen and no more than there are."""
    if budget.is_count:
        return budget.num
    return (sinks + recent) * budget.den // budget.num + 1


def decode_form(ctx: Context, region: Region) -> AttentionForm:
    """The formula of the self-attention of one new token over a cache.

    Raises:
        NarrowError: the region is something else.
    """
    output = region.roles["output"]
    queries = region.shapes.get("S")
    if not (isinstance(queries, int) and queries == 1):
        raise ctx.refuse(output, "the attention of several queries at a time; keys are chosen in decode steps only")
    if region.variant["cache"] != "yes" or region.variant["cross"] == "cross":
        raise ctx.refuse(output, "not the self-attention of a token over a cache of keys; cross-attention stays dense")
    form = read_attention(ctx, region)
    heads, kv_heads = form.heads
    if heads % kv_heads:
        raise ctx.refuse(output, f"{heads} query heads cannot share {kv_heads} key heads: the number does not divide")
    return form


def visible_keys(ctx: Context, form: AttentionForm) -> fx.Node | None:
    """bool [B or 1, T]: the keys that the query of a decode step sees; None: all.

    Raises:
        NarrowError: the mask adds numbers (ALiBi, relative positions), or differs between heads.
    """
    mask = read_mask(ctx, form)
    if mask.rest is not None:
        raise ctx.refuse(form.output, "the mask adds a bias to the scores (ALiBi, relative positions), or differs "
                                      "between heads; the attention over listed keys knows only visible and hidden")
    window = mask.window
    if window is None:
        return mask.keys
    nodes = [form.key] if mask.keys is None else [form.key, mask.keys]

    def inside(key: Tensor, *keys: Tensor) -> Tensor:
        length = key.shape[2]
        seen = (torch.arange(length, device=key.device) >= length - window).unsqueeze(0)
        return seen & keys[0] if keys else seen

    return ctx.emit(inside, *nodes, before=ctx.after(*nodes))  # type: ignore[no-any-return]


#: In-place operations that put new keys into a buffer and leave the others where they are.
_WRITES = {"index_copy", "index_put"}


@dataclass(frozen=True)
class Followed:
    """Where the keys of a layer come from and go to, from one decode step to the next.

    Attributes:
        past: input of the graph. grown: output of the graph, the keys so far and the new one; None: written in place.
        rows: axis of ``past`` that is the batch; None: the batch is a number in the graph.
    """

    past: fx.Node
    grown: fx.Node | None
    rows: int | None


def followed_keys(ctx: Context, form: AttentionForm) -> Followed | None:
    """How a next step finds the keys of this one, each at its place; None: it does not (a window drops old ones)."""
    flow, outputs = Flow(ctx.captured.graph), set(ctx.captured.graph.output_node().all_input_nodes)
    total, node, grown = _expr(form.key.meta["val"].shape[2]), form.key, None
    while node.op != "placeholder":
        op, source = op_name(node), node.args[0] if node.args else None
        if op in ("cat", "concat") and grown is None and node in outputs:
            axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
            if _expr(node.meta["val"].shape[axis]) != total:
                return None
            grown, source = node, source[0]  # type: ignore[index]
        elif op not in (TRIVIAL | LAYOUT) - {"roll"} and not (op in _WRITES and is_in_place(node)) and not (
                op == "slice" and isinstance(source, fx.Node) and _sizes(source) == _sizes(node)):
            return None
        if not isinstance(source, fx.Node):
            return None
        node = source
    writes = {op_name(n) for n in flow.writes(node, form.output)}
    if writes - _WRITES or bool(writes) == (grown is not None):  # a buffer that is rolled is copied to
        return None
    rows = form.query.meta["val"].shape[0]
    if isinstance(rows, int):
        return Followed(node, grown, None)
    sizes = _sizes(node)
    return Followed(node, grown, sizes.index(_expr(rows))) if _expr(rows) in sizes else None


def _sizes(node: fx.Node) -> list[Any]:
    return [_expr(size) for size in node.meta["val"].shape]


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _ends(ctx: Context, form: AttentionForm, visible: fx.Node | None, sinks: int, recent: int) -> tuple[fx.Node, ...]:
    """Nodes of :func:`ends`; once for all layers that see the same keys."""
    if visible is None:
        return tuple(ctx.emit(lambda key: ends(None, key.shape[2], sinks, recent, key.device), form.key,
                              before=form.output))
    return tuple(ctx.emit_once(f"ends {sinks} {recent}", lambda v: ends(v, v.shape[1], sinks, recent, v.device),
                               visible))


def ends(visible: Tensor | None, length: Any, sinks: int, recent: int,
         device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The keys that are always in the list, and those between them.

    Args:
        visible: bool [B or 1, T]; None: all T = ``length`` keys.

    Returns:
        candidate bool [B or 1, T]; the first ``sinks`` and the last ``recent`` visible keys, int64 [B or 1, .]. A row
        that has fewer holds -1, and no key twice.
    """
    position = torch.arange(length, device=device).unsqueeze(0)
    if visible is None:
        candidate = (position >= sinks) & (position < length - recent)
        return candidate, position[:, :sinks], position[:, length - recent:]
    newest = torch.topk(torch.where(visible, position, -1), recent, dim=1).values
    first = torch.where(newest < 0, length, newest).amin(1, keepdim=True)
    before = visible & (position < first)
    if sinks == 0:
        return before, newest[:, :0], newest
    oldest = torch.topk(torch.where(before, -position, -length), sinks, dim=1).values.neg()
    oldest = torch.where(oldest < length, oldest, -1)
    return before & (position > oldest.amax(1, keepdim=True)), oldest, newest


def listed(scores: Tensor, candidate: Tensor, oldest: Tensor, newest: Tensor, count: Any) -> Tensor:
    """The list of a decode step: the best candidates between the first and the last keys.

    Args:
        scores: float [B or 1, M, T]. candidate, oldest, newest: see :func:`ends`.
        count: length of the list, at least one more than ``oldest`` and ``newest`` together have.

    Returns:
        int64 [B or 1, M, count]; -1: an empty slot.
    """
    return joined(chosen(scores, candidate, count - _width(oldest, newest)), oldest, newest)


def _width(oldest: Tensor, newest: Tensor) -> Any:
    return oldest.shape[1] + newest.shape[1]


def joined(best: Tensor, oldest: Tensor, newest: Tensor) -> Tensor:
    """The list of the first keys, the best ones [B or 1, M, .] and the last ones, int64 [B or 1, M, .]."""
    rows, lists = best.shape[:2]
    return torch.cat([oldest.unsqueeze(1).expand(rows, lists, oldest.shape[1]), best,
                      newest.unsqueeze(1).expand(rows, lists, newest.shape[1])], 2)


def chosen(scores: Tensor, candidate: Tensor, count: Any) -> Tensor:
    """The ``count`` best candidates, int64 [B or 1, M, count]; -1 where there are fewer."""
    scores = torch.where(candidate.unsqueeze(1), scores, -torch.inf)
    best = torch.topk(scores, count, dim=2)
    return torch.where(best.values == -torch.inf, -1, best.indices)

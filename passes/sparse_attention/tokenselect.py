"""TokenSelect: all heads of a layer vote for keys, and attend to those that get most of the votes.

    before   softmax(q_h.k) over all T keys, in each head h
    after    votes of a key: sum over the heads of softmax(q_h.k) -> the best keys -> softmax(q_h.k) over these, exact

A vote by probability keeps a head with large products from deciding alone. One list serves all heads of a layer.

With ``reuse`` a step whose query resembles the one that the last list was chosen for takes that list, and no key is
read to choose (the Selection Cache, Algorithm 1)::

    cos(query, query of the list) >= reuse ?  the list  :  vote, and keep query and list

Compared are the queries of all heads of a layer as one vector, in each row of the batch. Sinks and recent keys are not
part of a kept list, they are those of the step; keys of it that are hidden by now are left out. A list belongs to the
cache: one that was reordered (beam search), cropped or otherwise changed between two steps has none.
``tokcompile.record`` says which rows reused theirs. A key that came after the list was chosen is attended to only as
long as it is recent, so ``recent`` has to be more than the token itself: on SmolLM2-135M a threshold of 0.9 spares 18 %
of the choices; that costs 1.4 of perplexity with ``recent: 1``, and nothing with 16 (docs/language.md).

Source: "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV
Cache Selection", arXiv 2411.02886. The paper votes with keys that are not rotated, to go beyond the trained length;
here keys are as the model caches them, so this does not extrapolate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from tokcompile.families.scores import Scores
from tokcompile.families.sparse_attention.decode.base import SparseDecode, SparseDecodeParams
from tokcompile.families.sparse_attention.decode.followed_keys import followed_keys
from tokcompile.families.sparse_attention.decode.lists import chosen
from tokcompile.formulas.attention import AttentionForm
from tokcompile.kernels.token_votes import token_votes, votes
from tokcompile.regions.model import AttentionRegion
from tokcompile.registry import about, register
from tokcompile.rewrite.context import Context


@register
class TokenSelect(SparseDecode):
    """Attend to the keys that the heads of a layer vote for, in decode steps."""

    name = "tokenselect"
    one_list = True
    written = (0, 1)

    class Params(SparseDecodeParams):
        votes: Literal["attention", "raw"] = Field(
            "attention",
            description="Probabilities of the attention itself, or of the bare products.",
            json_schema_extra=about(source="arXiv 2411.02886 votes with bare products"),
        )
        reuse: float | None = Field(
            None,
            ge=-1,
            description="Least cosine of a query and the one that the last list was chosen for at which "
            "that list is taken again; null: every step chooses. Raise recent with it.",
            json_schema_extra=about(source="arXiv 2411.02886: 0.9"),
        )

        def model_post_init(self, context: Any) -> None:
            super().model_post_init(context)
            if self.reuse is not None and not self.budget.is_count:
                raise ValueError(
                    f"reuse keeps lists of one length, budget {self.budget} grows with the cache; give "
                    "budget as a number of keys"
                )

    def score(
        self, query: Tensor, key: Tensor, candidate: Tensor, scale: float, softcap: float, layer: int, *more: Tensor
    ) -> Scores:
        return Scores(votes(query, key, candidate, *self._factors(scale, softcap)).unsqueeze(1))

    def choose(
        self,
        ctx: Context,
        region: AttentionRegion,
        form: AttentionForm,
        ends: tuple[fx.Node, ...],
        more: Sequence[fx.Node],
    ) -> tuple[fx.Node, dict[str, Any]]:
        if self.params.reuse is None:
            return super().choose(ctx, region, form, ends, more)
        followed = followed_keys(ctx, form) if ctx.added.memories is not None else None
        if followed is None:
            node, _ = super().choose(ctx, region, form, ends, more)
            return node, {"reuse": "off: this layer does not hand all its keys on to the next step (a sliding window)"}
        query, count = form.query.meta["val"], self.params.budget.num - self.params.sinks - self.params.recent
        width = int(query.shape[1]) * int(query.shape[3])
        rows, axis = query.shape[0], followed.rows

        def fresh(past: Tensor) -> list[Tensor]:
            size = int(rows) if axis is None else past.shape[axis]
            return [
                torch.full((size, width), torch.nan, dtype=query.dtype, device=past.device),
                torch.full((size, count), -1, device=past.device),
            ]

        memory = ctx.remember(
            region, followed.past, followed.grown, fresh, ((rows, width), query.dtype), ((rows, count), torch.int64)
        )

        def select(query: Tensor, key: Tensor, candidate: Tensor, before: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
            return self.select(query, key, candidate, form.scale, form.softcap, before, kept)

        best, *memory.outputs, memory.reused = ctx.emit(
            select, form.query, form.key, ends[0], *memory.inputs, before=form.output
        )
        return best, {"reuse": self.params.reuse}

    def select(
        self, query: Tensor, key: Tensor, candidate: Tensor, scale: float, softcap: float, before: Tensor, kept: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The list of a step, by a vote where the kept one does not fit. Traceable; nothing is copied to the host.

        Args:
            query: [B, H, 1, D]. key: [B, Hkv, T, D]. candidate: bool [B or 1, T].
            before: [B, H * D]: the queries that the lists were chosen for; NaN: there is none.
            kept: int64 [B, k]: the lists; -1: an empty slot.

        Returns:
            The keys to attend to, int64 [B, 1, k]; ``before`` and ``kept`` for the next step; bool [B]: rows that took
            the kept list.
        """
        assert self.params.reuse is not None
        now = query.detach().flatten(1)
        one, other = now.float(), before.float()
        cosine = (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))
        reused = cosine >= self.params.reuse
        scores = token_votes(query.detach(), key.detach(), candidate, reused, *self._factors(scale, softcap))
        voted = chosen(scores.unsqueeze(1), candidate, kept.shape[1]).squeeze(1)
        kept = torch.where(reused.unsqueeze(1), kept, voted)
        visible = candidate.expand(kept.shape[0], -1).gather(1, kept.clamp(min=0)) & (kept >= 0)
        best = torch.where(visible, kept, -1).unsqueeze(1)
        return best, torch.where(reused.unsqueeze(1), before, now), kept, reused

    def _factors(self, scale: float, softcap: float) -> tuple[float, float]:
        return (scale, softcap) if self.params.votes == "attention" else (1.0, 0.0)

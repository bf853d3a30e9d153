"""FASA: keys are scored by the dominant frequency chunks of RoPE alone, and a query attends to the best of them.

    before   softmax(q.k over all D components) over all T keys
    after    sum of q.k over the components of a few planes -> the best keys -> softmax(q.k) over these, exact

RoPE rotates planes of two components, each at its own frequency; for many heads a few planes say nearly which keys get
the attention. Which, is calibrated: the share of the best keys of the whole product that a plane finds by itself,
averaged over tokens. Planes are read off the graph (rotated halves, interleaved, partial), never assumed.

Query heads that share a key head share planes and list, so a list costs no memory per query head: their agreement is
averaged, their scores are added. The cache stays as the model stores it, so scoring reads whole rows of keys: at best
half of the bytes of dense attention are saved. The split cache of the paper, which saves more, is not built here.

Source: "FASA: Frequency-aware Sparse Attention", arXiv 2602.03152. Its code takes neighbouring components as a plane
also for models that rotate halves; here a plane is what the model rotates together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx

from tokcompile.errors import CalibrationError
from tokcompile.families.scores import Scores
from tokcompile.families.sparse_attention.decode.base import SparseDecode, SparseDecodeParams
from tokcompile.formulas.attention import AttentionForm, read_attention
from tokcompile.formulas.mask import is_visible
from tokcompile.formulas.rope import read_rope
from tokcompile.kernels.precision import matmul
from tokcompile.plan.pass_base import Seen
from tokcompile.regions.model import AttentionRegion
from tokcompile.registry import about, register
from tokcompile.rewrite.context import Context


@register
class Fasa(SparseDecode):
    """Attend to the keys that the dominant RoPE planes score highest, in decode steps."""

    name = "fasa"
    calibration = "required"

    class Params(SparseDecodeParams):
        planes: int = Field(
            16,
            ge=1,
            description="Dominant planes of a key head, two components each.",
            json_schema_extra=about(unit="planes", source="arXiv 2602.03152: 16 of 64"),
        )
        queries: int = Field(
            8,
            ge=1,
            description="Tokens of each calibration sequence whose attention is compared; in "
            "generated text every new token is.",
        )

    def observe(self, ctx: Context, region: AttentionRegion, seen: Seen) -> None:
        if region.cross:
            raise ctx.refuse(region.output, "cross-attention stays dense")
        form = read_attention(ctx, region)
        rope = read_rope(ctx, region, form.query)
        chunks = rope.chunks()
        width = int(form.query.meta["val"].shape[3])
        member = torch.zeros(width, len(chunks))
        for number, chunk in enumerate(chunks):
            member[list(chunk), number] = 1
        seen.facts.update(pairing=rope.pairing, chunks=chunks, kv_heads=form.heads[1], width=width)

        def add(query: Tensor, key: Tensor, *masks: Tensor) -> None:
            length, new = key.shape[2], query.shape[2]
            visible = torch.ones(new, length, dtype=torch.bool, device=key.device).tril(length - new)[None, None]
            for mask in masks:
                visible = is_visible(mask)
            visible = visible.expand(query.shape[0], -1, new, length)
            rows = torch.linspace(new // 2, new - 1, min(self.params.queries, new)).round().long().unique()
            for row in rows.tolist():
                for batch in range(query.shape[0]):
                    self._compare(
                        query[batch, :, row], key[batch][:, visible[batch, 0, row]], member.to(key.device), seen
                    )

        ctx.observe(add, form.query, form.key, *([] if form.mask is None else [form.mask]))

    def _compare(self, query: Tensor, key: Tensor, member: Tensor, seen: Seen) -> None:
        """Add what each plane finds of the best keys of ``query [H, D]`` among ``key [Hkv, t, D]``."""
        heads, length = query.shape[0], key.shape[1]
        # a budget near the length would make every plane look good
        count = min(int(self.params.budget.count(length)), max(1, length // 4))
        if length < 4:
            return
        query, key = query.float(), key.float().repeat_interleave(heads // key.shape[0], 0)
        best = torch.zeros(heads, length, dtype=torch.bool, device=query.device)
        best.scatter_(1, torch.einsum("hd,htd->ht", query, key).topk(count).indices, True)
        parts = torch.einsum("htd,dp->hpt", key * query[:, None], member)
        found = best[:, None].expand_as(parts).gather(2, parts.topk(count).indices).sum(2) / count
        seen.sums["agreement"] = seen.sums.get("agreement", 0) + found.double().cpu()
        seen.sums["tokens"] = seen.sums.get("tokens", 0) + 1

    def prepare(self, seen: dict[str, Seen]) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
        result: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}
        for key, layer in seen.items():
            if not layer.sums.get("tokens"):
                raise CalibrationError(
                    f"fasa: {key}: no sequence of the calibration data has 4 tokens or more; give "
                    "longer ones, a few times the budget or more"
                )
            chunks, heads = layer.facts["chunks"], layer.facts["kv_heads"]
            if self.params.planes > len(chunks):
                raise CalibrationError(
                    f"fasa: {key}: planes is {self.params.planes}, and a head of "
                    f"{layer.facts['width']} components has {len(chunks)}"
                )
            agreement = (layer.sums["agreement"] / layer.sums["tokens"]).unflatten(0, (heads, -1)).mean(1)
            best = agreement.topk(self.params.planes).indices
            mask = torch.zeros(heads, layer.facts["width"])
            for head, numbers in enumerate(best.tolist()):
                mask[head, [c for n in numbers for c in chunks[n]]] = 1
            facts = {
                "pairing": layer.facts["pairing"],
                "tokens": layer.sums["tokens"],
                "agreement": round(float(agreement.gather(1, best).mean()), 4),
                "agreement_of_all": round(float(agreement.mean()), 4),
            }
            result[key] = {"components": mask}, facts
        return result

    def inputs(
        self, ctx: Context, region: AttentionRegion, form: AttentionForm
    ) -> tuple[Sequence[fx.Node], dict[str, Any]]:
        rope = read_rope(ctx, region, form.query)
        state, facts = ctx.state(self.name, region)
        heads, width = state["components"].meta["val"].shape
        if (heads, width) != (form.heads[1], int(form.key.meta["val"].shape[3])):
            raise ctx.refuse(
                form.output,
                f"the calibration was made for {heads} key heads of {width} components, this "
                f"attention has {form.heads[1]} of {form.key.meta['val'].shape[3]}; "
                "calibrate again with this model",
            )
        return [state["components"]], {"planes": self.params.planes, **facts, "pairing": rope.pairing}

    def score(
        self, query: Tensor, key: Tensor, candidate: Tensor, scale: float, softcap: float, layer: int, *more: Tensor
    ) -> Scores:
        groups = query.unflatten(1, (key.shape[1], -1)).sum(2)  # scores add up over the heads that share a key head
        masked = groups * more[0].to(query.dtype).unsqueeze(1)
        return Scores(matmul(masked.to(key.dtype), key.transpose(-1, -2)).squeeze(2).float())

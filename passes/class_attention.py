"""Drop image patches that the class token attends to least, at a few depths of a vision encoder.

    before   [class | patches] -> layer 0 .. L-1
    after    [class | patches] -> layers -> score of the last layer -> keep -> layers on fewer tokens -> ...

The score of patch i is ``sum_h c[h, i] * r[h, i]``: the class token's attention in head h, weighted by the share that
head h has in the norm of the patch's own context. An encoder without a class token is scored by the attention that
each patch receives from all patches (mean over heads and queries). Kept ratios are fixed, so shapes stay static;
nothing is trained. Class and register tokens are always kept.

Source: score of "Adaptive Sparse ViT", IJCAI 2023, arXiv 2209.13802 (there with trained thresholds).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tokcompile.plan import Context, Pass
from tokcompile.recipes import Budget
from tokcompile.regions.model import Region
from tokcompile.registry import PassParams, about, register
from tokcompile.scores import attention_rows
from tokcompile.selection import budgets, budgets_count, keep_mask, segments


@register
class ClassAttention(Pass):
    """Keep the patches that the class token looks at."""

    name = "class_attention"
    regions = "vision_encoder"

    class Params(PassParams):
        keep: list[Budget] = Field(min_length=1, description="Patches kept at each stage: ratio of those before the "
                                                             "stage, in (0, 1], or a count.")
        at: list[float] = Field(min_length=1, description="Depth of each stage, in (0, 1), ascending.",
                                json_schema_extra=about(unit="fraction of the depth",
                                                        source="the paper uses 1/3, 7/12, 5/6"))

        @model_validator(mode="after")
        def _stages(self) -> ClassAttention.Params:
            if len(self.keep) != len(self.at):
                raise ValueError(f"keep has {len(self.keep)} stages and at has {len(self.at)}; they need as many")
            if sorted(set(self.at)) != self.at or not all(0 < f < 1 for f in self.at):
                raise ValueError("at needs ascending fractions between 0 and 1")
            return self

    def apply(self, ctx: Context, region: Region) -> dict[str, Any]:
        depth, prefix = len(region.layers), int(region.shapes.get("prefix", 0))
        stages = [max(1, min(depth - 1, round(f * depth))) for f in self.params.at]
        if len(set(stages)) != len(stages):
            raise ctx.refuse(region.roles["tokens"], f"{len(stages)} stages do not fit into {depth} layers; give "
                                                     "fewer, or depths further apart")
        for stage in stages:
            attention = region.layers[stage - 1].attention
            if attention is None:
                raise ctx.refuse(region.layers[stage - 1].output, f"layer {stage - 1} has no attention to score with")
            ctx.check(region.layers[stage - 1].output, prefix=prefix)
        first = region.layers[stages[0] - 1].output.meta["val"].shape[1]
        counts = [int(first.node.hint) if isinstance(first, torch.SymInt) else int(first)]
        for stage, keep in zip(stages, self.params.keep, strict=True):
            counts.append(self._cut(ctx, region, stage, keep, prefix))
        return {"tokens_before": counts[0], "tokens_after": counts[-1], "tokens_by_layer": dict(
            zip(stages, counts[1:], strict=True))}

    def _cut(self, ctx: Context, region: Region, stage: int, keep: Budget, prefix: int) -> int:
        layer = region.layers[stage - 1]
        attention, node = layer.attention, layer.output
        assert attention is not None
        context = attention.roles["output"]
        if context.meta["val"].dim() != 4:
            raise ctx.refuse(context, "attention with batch and heads flattened together cannot be scored")
        rows = attention_rows(ctx, layer, 1 if prefix else None)

        def choose(x: Tensor, context: Tensor, rows: Tensor) -> Tensor:
            weights = rows.mean(2)[:, :, prefix:]  # [B, H, patches]
            if prefix:
                norm = torch.linalg.vector_norm(context[:, :, prefix:].to(torch.float32), dim=-1)
                weights = weights * (norm / (norm.sum(1, keepdim=True) + 1e-8))
            scores = weights.sum(1)
            position = torch.arange(x.shape[1], device=x.device)
            patch = (position >= prefix)[None].expand(x.shape[0], x.shape[1])
            segment = segments(patch)
            budget = budgets_count(segment, keep.num) if keep.is_count else budgets(segment, keep.num, keep.den)
            scores = torch.cat([scores.new_zeros(x.shape[0], prefix), scores], 1)
            return keep_mask(scores, segment, budget)

        kept = ctx.emit(choose, node, context, rows, before=ctx.after(node, context, rows))
        count = node.meta["val"].shape[1]
        if isinstance(count, torch.SymInt):
            size: Any = ctx.emit(lambda x: keep.count(x.shape[1] - prefix) + prefix, node, before=ctx.after(node))
            number = int(size.meta["val"].node.hint)
        else:
            size = number = keep.count(count - prefix) + prefix
        ctx.cut(node, kept, size, stack=region.path or "encoder", layer=region.layers[stage], index=stage,
                prefix=prefix)
        return number


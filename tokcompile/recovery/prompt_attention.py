"""How much of the attention of each token falls on its prompt, in the last layer: what ssToken scores with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tokcompile.capture.canonical import canonicalise
from tokcompile.capture.ops import sdpa_arguments
from tokcompile.errors import RecoveryError
from tokcompile.kinds import Stage
from tokcompile.regions import find_regions
from tokcompile.regions.model import DecoderStack
from tokcompile.rewrite.context import Context
from tokcompile.runtime.install import install, share
from tokcompile.runtime.session import Session


class PromptAttention(Session):
    """Runs a model as it is, captured, and notes the attention of its last layer.

    Attributes:
        model: a copy over the same weights; call it in the place of the original.
        prompt: bool ``[B, S]``, set before each call.
        mass: fp32 ``[B, S]`` in 0..1 after each call: the share of a token's attention (mean of all heads) on the
            prompt of its row.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(None, lowering="eager", on_no_match="ignore", model=type(model).__name__)
        self.prompt: Tensor | None = None
        self.mass: Tensor | None = None
        self.model = share(model)
        install(self.model, self)

    def rewrite(self, ctx: Context, stage: Stage) -> None:
        if stage is Stage.ENCODER:
            return
        canonicalise(ctx.captured)
        stacks = find_regions(ctx.captured.graph).of(DecoderStack)
        found = [layer.attention for layer in stacks[-1].layers if layer.attention is not None] if stacks else []
        if not found:
            raise RecoveryError(
                "tokens='sstoken' looks at the attention of the teacher's last layer, and no decoder "
                "stack with attention was found; use SsToken(gamma=1), or Tip()"
            )
        node = found[-1].softmax
        if node is not None:
            ctx.observe(self._from_weights, node)
            return
        self._fused(ctx, found[-1].output)

    def _fused(self, ctx: Context, node: fx.Node) -> None:
        """One value column that is 1 at the prompt makes the attention itself add the weights up."""
        given = sdpa_arguments(node)
        fixed: dict[str, Any] = {n: getattr(given, n) for n in ("is_causal", "scale", "enable_gqa")}

        def note(query: Tensor, key: Tensor, *masks: Tensor) -> None:
            assert self.prompt is not None
            column = self.prompt[:, None, :, None].expand(*key.shape[:-1], 1).to(query.dtype)
            out = F.scaled_dot_product_attention(query, key, column, masks[0] if masks else None, **fixed)
            self.mass = out.float().mean((1, 3))

        ctx.observe(note, given.query, given.key, *([] if given.mask is None else [given.mask]))

    def _from_weights(self, weights: Any) -> None:
        assert self.prompt is not None
        rows, length = self.prompt.shape
        weights = weights.reshape(rows, -1, *weights.shape[-2:])[..., :length].float()
        self.mass = (weights * self.prompt[:, None, None]).sum(-1).mean(1)


def prompt_mass(probe: PromptAttention, prompt: Tensor, kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
    """Run the model: -> (its output, share of the attention of each token on the prompt, fp32 ``[B, S]``)."""
    probe.prompt, probe.mass = prompt, None
    with torch.no_grad():
        output = probe.model(**kwargs)
    if probe.mass is None or probe.mass.shape != prompt.shape:
        raise RecoveryError(
            f"tokens='sstoken': the teacher's last layer has attention over "
            f"{None if probe.mass is None else tuple(probe.mass.shape)} tokens, the labels are "
            f"{tuple(prompt.shape)}; use SsToken(gamma=1), or Tip()"
        )
    return output, probe.mass

"""The models that are measured, and their FLOPs counted by hand.

Weights are random where no time hangs on them. Sizes come in two sets: the real one, and a tiny one for ``--quick``
and the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE_TOKEN = 3
TEXT_TOKENS = 64


def vlm(quick: bool = False, layers: int | None = None) -> LlavaForConditionalGeneration:
    """A LLaVA with the text tower of Qwen2-0.5B (24 layers, d 896, GQA 14:2, FFN 4864) and a token vision tower.

    The image features are handed in (:func:`vlm_inputs`), so the tower never runs; it is as small as it can be. The
    vocabulary is 32,000 to save memory: only the last token's logits are computed.
    """
    torch.manual_seed(0)
    width, inner, heads, depth = (64, 128, 4, 4) if quick else (896, 4864, 14, 24)
    side = 8 if quick else 24
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            projection_dim=32,
            num_attention_heads=2,
            image_size=14 * side,
            patch_size=14,
        ),
        text_config=Qwen2Config(
            hidden_size=width,
            intermediate_size=inner,
            num_attention_heads=heads,
            num_key_value_heads=2,
            num_hidden_layers=layers or depth,
            vocab_size=32_000,
            max_position_embeddings=4096,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=side * side,
    )
    return LlavaForConditionalGeneration(config).eval()


def vlm_inputs(model: LlavaForConditionalGeneration) -> dict[str, Any]:
    """One prompt: 8 text tokens, the image, 56 text tokens; ready-made image features; logits of the last token."""
    generator = torch.Generator().manual_seed(0)
    count, width = model.config.image_seq_length, model.config.text_config.hidden_size
    words = torch.randint(10, 32_000, (1, TEXT_TOKENS), generator=generator)
    ids = torch.cat([words[:, :8], torch.full((1, count), IMAGE_TOKEN), words[:, 8:]], dim=1)
    # image features differ much less from one another than words do: a common part and a smaller own one
    features = torch.randn(1, 1, width, generator=generator) + 0.5 * torch.randn(1, count, width, generator=generator)
    return {"input_ids": ids, "features": features * 0.02}


def vlm_call(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """The prefill, as ``generate`` does it: a fresh cache, the logits of the last token."""
    return model(**prefill_kwargs(inputs))


def prefill_kwargs(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of ``forward`` (made anew for each call: a forward may change the dict of features)."""
    features = BaseModelOutputWithPooling(pooler_output=tuple(inputs["features"].unbind(0)))
    return {
        "input_ids": inputs["input_ids"],
        "mm_encoder_outputs": {"image": features},
        "use_cache": True,
        "logits_to_keep": 1,
    }


def vlm_flops(model: LlavaForConditionalGeneration, tokens: Sequence[int]) -> int:
    """FLOPs of the text tower with ``tokens[i]`` tokens in layer i, and the head on one token.

    Per layer, n tokens of width d: q, k, v, o projections, three FFN matrices, and attention at full ``n x n`` (the
    triangular half is not taken off: kernels differ in whether they skip it).
    """
    c = model.config.text_config
    d, f = c.hidden_size, c.intermediate_size
    kv = d // c.num_attention_heads * c.num_key_value_heads
    per_token = 2 * (2 * d * d + 2 * d * kv + 3 * d * f)
    return sum(n * per_token + 4 * n * n * d for n in tokens) + 2 * d * c.vocab_size


def vlm_ratio(model: LlavaForConditionalGeneration, keep: float, late: float | None) -> float:
    """FLOPs dense / pruned: ``keep`` of the image tokens, none of them behind a share ``late`` of the layers."""
    layers, image = model.config.text_config.num_hidden_layers, model.config.image_seq_length
    kept = -(-image * round(keep * 1000) // 1000)
    until = layers if late is None else int(late * layers) + 1
    pruned = [TEXT_TOKENS + kept] * until + [TEXT_TOKENS] * (layers - until)
    return vlm_flops(model, [TEXT_TOKENS + image] * layers) / vlm_flops(model, pruned)


def vit(quick: bool = False) -> Dinov2Model:
    """A ViT-S/14 of the DINOv2 kind with random weights, for its own image size (no interpolated positions)."""
    torch.manual_seed(0)
    width, heads, size, depth = (64, 4, 56, 8) if quick else (384, 6, 224, 12)
    return Dinov2Model(
        Dinov2Config(
            hidden_size=width, num_attention_heads=heads, image_size=size, num_hidden_layers=depth, patch_size=14
        )
    ).eval()


def vit_flops(model: Dinov2Model, size: int, tokens: Sequence[int]) -> int:
    """FLOPs for one image of ``size`` pixels with ``tokens[i]`` tokens in layer i, patch embedding included."""
    c = model.config
    d, f = c.hidden_size, int(c.hidden_size * c.mlp_ratio)
    patches = (size // c.patch_size) ** 2
    return sum(n * 2 * (4 * d * d + 2 * d * f) + 4 * n * n * d for n in tokens) + 2 * patches * 3 * c.patch_size**2 * d


def vit_ratio(model: Dinov2Model, size: int, keep: Sequence[float], at: Sequence[float]) -> float:
    """FLOPs dense / pruned: ``keep`` of the patches at each depth of ``at`` (a fraction)."""
    layers, count = model.config.num_hidden_layers, (size // model.config.patch_size) ** 2 + 1
    tokens, dense = [], [count] * layers
    stages = {max(1, round(a * layers)): k for a, k in zip(at, keep, strict=True)}
    for i in range(layers):
        if i in stages:
            count = 1 - (-(count - 1) * round(stages[i] * 1000) // 1000)
        tokens.append(count)
    return vit_flops(model, size, dense) / vit_flops(model, size, tokens)


def llama(layers: int = 32, hidden: int = 128) -> LlamaForCausalLM:
    """A Llama as deep as the 7B one; narrow, since only its graph matters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=1000,
        )
    ).eval()

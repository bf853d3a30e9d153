"""The smallest models that have what a recipe acts on: for tests that compile many times."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from torch import nn

from tokcompile import demo

IMAGE = 120


def _spread(model: nn.Module) -> nn.Module:
    """Weights for attention that is far from uniform."""
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.05)
    return model.eval()


def vit() -> tuple[nn.Module, torch.Tensor]:
    """A vision encoder (17 tokens, 2 layers) and two pictures."""
    torch.manual_seed(0)
    config = T.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    return _spread(T.Dinov2Model(config)), torch.randn(2, 3, 32, 32)


def vlm() -> tuple[nn.Module, dict[str, Any]]:
    """A LLaVA (16 visual tokens, 2 decoder layers) and a prompt with one picture."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = T.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    text = T.LlamaConfig(**sizes, vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16)
    model = _spread(T.LlavaForConditionalGeneration(config))
    model.generation_config = T.GenerationConfig(pad_token_id=0, suppress_tokens=[IMAGE])
    ids = torch.tensor([[5, 6, *[IMAGE] * 16, 7, 8, 9, 10]])
    return model, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }


def demo_vlm(layers: int = 4) -> tuple[nn.Module, dict[str, Any]]:
    """The tiny VLM of the package with its first decoder layers only."""
    model, inputs = demo.tiny_vlm()
    tower: Any = model.model.language_model  # type: ignore[union-attr]
    tower.layers = tower.layers[:layers]
    for config in (model.config.text_config, tower.config):  # type: ignore[union-attr]
        config.num_hidden_layers = layers
    return model, inputs

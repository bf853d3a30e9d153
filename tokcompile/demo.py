"""Tiny random models to try things on, and the demonstration behind ``tokcompile demo``.

The models answer nothing; they have the structure of real ones and run in milliseconds::

    tokcompile explain tokcompile.demo:tiny_vlm --recipe vlm_prune_90
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

_IMAGE = 4


def tiny_vlm() -> tuple[nn.Module, dict[str, Any]]:
    """A random LLaVA (64 visual tokens, 8 text tokens, 10 decoder layers) and a prompt with one picture."""
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=3,
                    num_attention_heads=2,
                    image_size=64,
                    patch_size=8,
                    projection_dim=32,
                ),
                text_config=LlamaConfig(
                    hidden_size=64,
                    intermediate_size=128,
                    num_hidden_layers=10,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    vocab_size=128,
                ),
                image_token_index=_IMAGE,
                image_seq_length=64,
            )
        ).eval()
        model.generation_config = GenerationConfig(pad_token_id=0)
        text = torch.randint(10, 128, (1, 8))
        ids = torch.cat([text[:, :2], torch.full((1, 64), _IMAGE), text[:, 2:]], 1)
        return model, {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(1, 3, 64, 64),
        }


def tiny_vit() -> tuple[nn.Module, dict[str, Any]]:
    """A random vision encoder of DINOv2's form (65 tokens, 8 layers) and two pictures."""
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(hidden_size=48, num_hidden_layers=8, num_attention_heads=4, image_size=64, patch_size=8)
        ).eval()
        return model, {"pixel_values": torch.randn(2, 3, 64, 64)}


def tiny_llm() -> tuple[nn.Module, dict[str, Any]]:
    """A random Llama (4 layers) and a prompt of 32 tokens."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=128,
            )
        ).eval()
        model.generation_config = GenerationConfig(pad_token_id=0)
        return model, {"input_ids": torch.randint(10, 128, (1, 32))}


def full_demo() -> Path | None:
    """``examples/demo.py`` of the checkout that tokcompile is installed from; None in a wheel."""
    path = Path(__file__).resolve().parents[1] / "examples" / "demo.py"
    return path if path.is_file() else None


def run_full(arguments: Sequence[str]) -> int:
    """Run ``examples/demo.py``: real weights, pictures, times. Its exit status."""
    import sys

    path = full_demo()
    assert path is not None
    sys.path.insert(0, str(path.parent))
    try:
        spec = importlib.util.spec_from_file_location("demo", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["demo"] = module
        spec.loader.exec_module(module)
        return int(module.main(list(arguments)))
    finally:
        sys.path.remove(str(path.parent))

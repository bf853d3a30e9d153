"""Decoders that hold more than self-attention: linear attention, short convolutions, state spaces, cross-attention.

A method for decode steps acts on the self-attention and leaves the others, and their state, alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor, nn

import tokcompile
from tests.members import members
from tests.test_sparse_decode import Masked, assert_same, generate, masked, optimized, prompt

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def linear_attention() -> nn.Module:
    return tr.Qwen3NextForCausalLM(
        tr.Qwen3NextConfig(
            **SIZES,
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            mlp_only_layers=[0, 1],
            layer_types=["linear_attention", "full_attention"],
        )
    )


def convolutions() -> nn.Module:
    return tr.Lfm2ForCausalLM(tr.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))


def state_space() -> nn.Module:
    return tr.BambaForCausalLM(
        tr.BambaConfig(
            **SIZES,
            attn_layer_indices=[1],
            mamba_d_state=8,
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_expand=2,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear_attention": linear_attention,
    "convolutions": convolutions,
    "state_space": state_space,
}


def spread(model: nn.Module) -> nn.Module:
    """Attention that is far from uniform."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.12 if parameter.dim() > 1 else 0.03)
    return model.eval()


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return spread(MODELS[name]())


WAYS = [(name, beams) for name in MODELS for beams in (1, 3)]


@pytest.mark.parametrize(("name", "beams"), members(WAYS, [("linear_attention", 3)]))
def test_decode_steps_under_the_mask_of_the_choice(name: str, beams: int) -> None:
    """With left padding; beams move the state of the other layers too."""
    model, inputs = build(name), prompt()
    fast = optimized(model, "decode_control")
    result = generate(fast, inputs, 6, num_beams=beams)
    with masked(model, Masked("decode_control", {})):
        assert_same(result, generate(model, inputs, 6, num_beams=beams))
    dense = generate(model, inputs, 6, num_beams=beams)
    assert max(float((a - b).abs().max()) for a, b in zip(result.logits, dense.logits, strict=False)) > 1e-3
    step = tokcompile.report(fast).steps[0]
    assert (step.status, step.matches) == ("matched", 1)


def reads_images() -> tuple[nn.Module, dict[str, Tensor]]:
    """A decoder whose second layer reads an image by cross-attention, and two prompts with one image each."""
    vision = tr.models.mllama.MllamaVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        image_size=32,
        patch_size=8,
        max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2]],
        vision_output_dim=64,
        intermediate_layers_indices=[0],
    )
    text = tr.models.mllama.MllamaTextConfig(
        **SIZES, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    torch.manual_seed(0)
    config = tr.MllamaConfig(vision_config=vision, text_config=text, image_token_id=127)
    model = spread(tr.MllamaForConditionalGeneration(config))
    for name, parameter in model.named_parameters():
        if "gate" in name and parameter.dim() < 2:
            parameter.data.fill_(0.7)
    inputs = prompt()
    seen = torch.zeros(2, inputs["input_ids"].shape[1], 1, 2, dtype=torch.long)
    seen[:, 6:, 0, 0] = 1
    inputs |= {
        "pixel_values": torch.randn(2, 1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(5)),
        "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
        "cross_attention_mask": seen,
    }
    return model, inputs


def test_images_that_enter_by_cross_attention() -> None:
    """Nothing to prune in front of the decoder, for a reason that says so; its own attention can be sparse."""
    model, inputs = reads_images()
    recipe: Any = {"recipe_version": 1, "steps": [{"pass": "random", "params": {"keep": 0.5}}]}
    with torch.no_grad(), pytest.raises(tokcompile.NoMatchError, match="cross-attention") as refused:
        tokcompile.optimize(model, recipe, lowering="eager").generate(**inputs, max_new_tokens=2)
    assert "call with an image" not in str(refused.value)
    fast = optimized(model, "decode_control", budget=1.0)
    assert_same(generate(fast, inputs, 4), generate(model, inputs, 4))
    assert tokcompile.report(fast).steps[0].status == "matched"

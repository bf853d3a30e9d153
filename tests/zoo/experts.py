"""Tiny random vision-language models whose decoder has mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DeepseekV3Config,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from tests.zoo.vlm import (
    _QWEN_IDS,
    END,
    IMAGE,
    START,
    TEXT,
    VIDEO,
    VISION,
    Case,
    PlainVLM,
    _qwen,
    _stacked,
    _TextBlock,
    _transformers,
    randomize,
)


def qwen3_vl_moe(experts: str = "grouped_mm") -> Case:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = TEXT | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    config = Qwen3VLMoeConfig(vision_config=vision, text_config=text, **_QWEN_IDS)
    case = _qwen("qwen3_vl_moe", Qwen3VLMoeForConditionalGeneration, config, "sdpa")
    case.model.set_experts_implementation(experts)  # type: ignore[operator]
    return case


#: A router that first chooses groups of experts, and one expert that all tokens share.
_GROUPED = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
_GROUPED |= {"first_k_dense_replace": 1, "n_shared_experts": 1}


def glm4v_moe() -> Case:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
    vision |= {"out_hidden_size": 64, "image_size": 32}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END}
    text = TEXT | _GROUPED | {"head_dim": 16, "rope_parameters": rope}
    config = Glm4vMoeConfig(text_config=text, vision_config=vision, **ids)
    return _qwen("glm4v_moe", Glm4vMoeForConditionalGeneration, config, "sdpa")


def _llava(name: str, text: Any, experts: str) -> Case:
    vision = CLIPVisionConfig(**VISION | {"num_hidden_layers": 3}, image_size=56, patch_size=14)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16)
    model = _transformers(LlavaForConditionalGeneration, config)
    tower = model.model.language_model
    tower.config._experts_implementation = experts
    return Case(name, model, _stacked(56, 16), list(tower.layers), tower)


def deepseek(experts: str = "grouped_mm") -> Case:
    """The cache holds compressed keys and values."""
    latent = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 14}
    return _llava("deepseek", DeepseekV3Config(**TEXT | _GROUPED | latent | {"num_key_value_heads": 4}), experts)


def mixtral() -> Case:
    return _llava("mixtral", MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2), "grouped_mm")


class _ExpertBlock(_TextBlock):
    """A mixture of two of four experts: a loop over experts, or rows put in the order of experts."""

    def __init__(self, index: int, width: int, heads: int, kv_heads: int, form: str) -> None:
        super().__init__(index, width, heads, kv_heads)
        self.router, self.form = nn.Linear(width, 4, bias=False), form
        self.first, self.second = nn.Parameter(torch.zeros(4, width, width)), nn.Parameter(torch.zeros(4, width, width))

    def feed(self, h: Tensor) -> Tensor:
        flat = h.reshape(-1, h.shape[-1])
        shares, ids = self.router(flat).softmax(-1).topk(2, -1)
        if self.form == "loop":
            out = torch.zeros_like(flat)
            for expert in range(4):
                token, slot = torch.where(ids == expert)
                rows = torch.relu(flat[token] @ self.first[expert]) @ self.second[expert]
                out.index_add_(0, token, rows * shares[token, slot, None])
            return out.view(h.shape)
        key, order = ids.flatten().sort(stable=True)
        rows = torch.relu(torch.einsum("nd,nde->ne", flat[order // 2], self.first[key]))
        rows = torch.einsum("nd,nde->ne", rows, self.second[key]) * shares.flatten()[order][:, None]
        return rows[order.argsort()].view(*h.shape[:-1], 2, h.shape[-1]).sum(-2)


def plain(form: str) -> Case:
    model = PlainVLM("index_put")
    model.layers = nn.ModuleList(_ExpertBlock(index, 64, 4, 2, form) for index in range(4))
    randomize(model)
    for block in model.layers:
        for weight in (block.first, block.second):
            weight.data *= 8.0  # a matrix for each expert
    return Case(f"plain_{form}", model, _stacked(32, 16), list(model.layers), model, has_generate=False)


EXPERTS: dict[str, Callable[[], Case]] = {
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_vl_moe_batched": lambda: qwen3_vl_moe("batched_mm"),
    "glm4v_moe": glm4v_moe,
    "deepseek": deepseek,
    "deepseek_batched": lambda: deepseek("batched_mm"),
    "mixtral": mixtral,
    "plain_loop": lambda: plain("loop"),
    "plain_sorted": lambda: plain("sorted"),
}

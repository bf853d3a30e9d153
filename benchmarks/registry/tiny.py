"""Tiny random models of the families that transformers knows: their configurations, with all sizes cut down."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn

#: Name of a setting -> its size in a tiny model. Only settings that a configuration has are changed.
SIZES: dict[str, float] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "hidden_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("out_hidden_size", "vision_output_dim", "vision_hidden_size", "text_hidden_size"), 64),
    **dict.fromkeys(("encoder_hidden_size", "output_hidden_size", "query_dim", "expert_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "depth", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 256),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("image_seq_length", "image_seq_len"), 16),
    "head_dim": 16,
    "vocab_size": 128,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "rotary_dim": 8,
    "sliding_window": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 64,
    "num_mel_bins": 80,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
    "window_size": 16,
    "mlp_ratio": 2,
    "mm_tokens_per_image": 4,
}
#: Ids that stand for something in a prompt. The tiny vocabulary has 128 entries.
TOKENS = {
    "image_token_id": 100,
    "image_token_index": 100,
    "video_token_id": 101,
    "video_token_index": 101,
    "vision_start_token_id": 102,
    "boi_token_id": 102,
    "vision_end_token_id": 103,
    "eoi_token_id": 103,
    "audio_token_id": 104,
}
#: What a family needs besides: settings that have to agree with one another.
BESIDE: dict[str, dict[str, Any]] = {
    "llava_next": {"image_grid_pinpoints": [[32, 32]]},
    "llava_next_video": {"image_grid_pinpoints": [[32, 32]]},
    "llava_onevision": {"image_grid_pinpoints": [[32, 32]]},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "glm4v_moe": {"text_config": {"rope_parameters": {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {"mrope_section": [3, 3, 2]}}},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "kimi_linear": {"num_experts": 8},
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
}
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def tiny_settings(kind: type) -> dict[str, Any]:
    """The settings of a configuration class that make it tiny."""
    default = kind()
    have = default.to_dict()
    found: dict[str, Any] = {}
    for name, value in (SIZES | TOKENS).items():
        if isinstance(have.get(name), int | float) and not isinstance(have[name], bool):
            found[name] = type(have[name])(value)
    for name in _KEY_HEADS:
        if isinstance(have.get(name), int):
            found[name] = 4 if have[name] == have.get("num_attention_heads") else 2
    if "kv_lora_rank" in found:
        found.pop("head_dim", None)  # latent attention has a width for each part of a head
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(have.get(name), list):
            layers = int(found.get("num_hidden_layers", 4))
            found[name] = (list(dict.fromkeys(have[name])) * layers)[:layers]
    if "deepstack_visual_indexes" in have:
        found["deepstack_visual_indexes"] = [0, 1]
    if "fullatt_block_indexes" in have:
        found["fullatt_block_indexes"] = [1]
    for name, below in getattr(kind, "sub_configs", {}).items():
        inside = getattr(default, name, None)
        inner = type(inside) if isinstance(inside, transformers.PretrainedConfig) else below
        if inner is not transformers.AutoConfig:
            found[name] = tiny_settings(inner) | {"model_type": inner.model_type}
    _turn_three_ways(default, found)
    return found


def _turn_three_ways(default: Any, found: dict[str, Any]) -> None:
    """Rotary positions with an axis for time, height and width: half of a head of 16 is shared among the three."""
    text = found.get("text_config")
    known = getattr(getattr(default, "text_config", None), "rope_parameters", None)
    if isinstance(text, dict) and "spatial_merge_size" in str(found.get("vision_config")):
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            **(known if isinstance(known, dict) and "rope_type" in known else {}),
            "mrope_section": [2, 3, 3],
        }


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    both = {
        name: _merged(settings[name], value) for name, value in more.items() if isinstance(settings.get(name), dict)
    }
    return settings | more | both


def build(model_type: str, architecture: str) -> nn.Module:
    """A tiny random model of one family, in eval mode."""
    kind = transformers.CONFIG_MAPPING[model_type]
    settings = _merged(tiny_settings(kind), BESIDE.get(model_type, {}))
    torch.manual_seed(0)
    return getattr(transformers, architecture)(kind(**settings)).eval()  # type: ignore[no-any-return]


def pixels(model: Any, images: int = 1) -> dict[str, Tensor]:
    """Random pictures in the form that the model's forward takes."""
    names = inspect.signature(type(model).forward).parameters
    vision = getattr(model.config, "vision_config", model.config)
    torch.manual_seed(1)
    if "image_grid_thw" in names:
        side, channels = vision.patch_size, getattr(vision, "in_channels", getattr(vision, "in_chans", 3))
        frames = getattr(vision, "temporal_patch_size", 1)
        return {
            "pixel_values": torch.randn(images * 64, channels * frames * side * side),
            "image_grid_thw": torch.tensor([[1, 8, 8]] * images),
        }
    size = getattr(vision, "image_size", 32)
    size = size if isinstance(size, int) else size[0]
    values = torch.randn(images, 3, size, size)
    if "pixel_attention_mask" in names:
        return {"pixel_values": values[None]}
    sizes = torch.tensor([[size, size]] * images)
    tiles = torch.randn(images, 2, 3, size, size)  # the picture, and one tile of it
    forms: list[dict[str, Tensor]] = [{"pixel_values": values}]
    if "image_sizes" in names:
        forms += [{"pixel_values": part, "image_sizes": sizes} for part in (values, tiles)]
    return next((form for form in forms if _takes(model, form)), forms[0])


def _takes(model: Any, form: dict[str, Tensor]) -> bool:
    try:
        with torch.no_grad():
            features(model, form)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False
    return True


def features(model: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """What a model makes of pictures: features ``[n, D]`` or ``[images, n, D]``."""
    owner = model if hasattr(model, "get_image_features") else model.model
    found = owner.get_image_features(**given)
    if not isinstance(found, Tensor | list | tuple):
        pooled = getattr(found, "pooler_output", None)
        found = pooled if pooled is not None else found.last_hidden_state
    return [found] if isinstance(found, Tensor) else [part for part in found if isinstance(part, Tensor)]


def text_inputs(batch: int = 2, length: int = 9) -> dict[str, Any]:
    ids = torch.arange(batch * length).reshape(batch, length) % 90 + 4
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def image_inputs(model: Any) -> dict[str, Any]:
    """One prompt with one picture: as many placeholders as the model makes features of it."""
    names = inspect.signature(type(model).forward).parameters
    found: dict[str, Any] = pixels(model)
    with torch.no_grad():
        count = sum(part.numel() // part.shape[-1] for part in features(model, found))
    ids = torch.tensor([[5, 6, 102, *[100] * count, 103, *range(7, 19)]])
    found |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in names:
            found[name] = (ids == 100).long()
    return found

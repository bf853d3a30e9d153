"""Decoder-only language models."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr

from . import Case

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# These families take the number of logits as a number that Dynamo makes symbolic; the default 0 is no symbolic size.
LOGITS = {"logits_to_keep": 4}
GROUPED = SMALL | {"num_key_value_heads": 2}


def text(vocab: int = 128, batch: int = 2, length: int = 9) -> dict[str, Any]:
    ids = torch.arange(batch * length).reshape(batch, length) % (vocab - 8) + 4
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def _build(config: str, model: str, inputs: dict[str, Any] | None = None, **settings: Any) -> Case:
    torch.manual_seed(0)
    made = getattr(tr, model)(getattr(tr, config)(**settings))
    return made.eval(), text() | (inputs or {})


def llama(layers: int = 2) -> Case:
    return _build("LlamaConfig", "LlamaForCausalLM", **GROUPED | {"num_hidden_layers": layers})


def mistral() -> Case:
    return _build("MistralConfig", "MistralForCausalLM", **GROUPED, sliding_window=4)


def qwen2() -> Case:
    return _build("Qwen2Config", "Qwen2ForCausalLM", **GROUPED)


def qwen3() -> Case:
    return _build("Qwen3Config", "Qwen3ForCausalLM", **GROUPED, head_dim=16)


def gemma() -> Case:
    return _build("GemmaConfig", "GemmaForCausalLM", **GROUPED | {"num_key_value_heads": 1}, head_dim=16)


def gemma2() -> Case:
    return _build(
        "Gemma2Config", "Gemma2ForCausalLM", **GROUPED, head_dim=16, sliding_window=4, attn_implementation="eager"
    )


def gemma3_text() -> Case:
    return _build("Gemma3TextConfig", "Gemma3ForCausalLM", **GROUPED, head_dim=16, sliding_window=4)


def phi() -> Case:
    return _build("PhiConfig", "PhiForCausalLM", **SMALL)


def phi3() -> Case:
    return _build("Phi3Config", "Phi3ForCausalLM", **GROUPED)


def gpt2() -> Case:
    return _build("GPT2Config", "GPT2LMHeadModel", vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64)


def gpt_neox() -> Case:
    return _build("GPTNeoXConfig", "GPTNeoXForCausalLM", **SMALL)


def gptj() -> Case:
    return _build(
        "GPTJConfig",
        "GPTJForCausalLM",
        LOGITS,
        vocab_size=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=8,
    )


def opt() -> Case:
    return _build(
        "OPTConfig",
        "OPTForCausalLM",
        vocab_size=128,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    )


def bloom() -> Case:
    return _build("BloomConfig", "BloomForCausalLM", LOGITS, vocab_size=128, hidden_size=64, n_layer=2, n_head=4)


def falcon() -> Case:
    return _build(
        "FalconConfig",
        "FalconForCausalLM",
        LOGITS,
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )


def stablelm() -> Case:
    return _build("StableLmConfig", "StableLmForCausalLM", **GROUPED)


def olmo2() -> Case:
    return _build("Olmo2Config", "Olmo2ForCausalLM", **GROUPED)


def granite() -> Case:
    return _build("GraniteConfig", "GraniteForCausalLM", **GROUPED, residual_multiplier=0.22)


def cohere() -> Case:
    return _build("CohereConfig", "CohereForCausalLM", **GROUPED)


def smollm3() -> Case:
    return _build("SmolLM3Config", "SmolLM3ForCausalLM", **GROUPED)


def glm4() -> Case:
    return _build("Glm4Config", "Glm4ForCausalLM", **GROUPED, head_dim=16)


def starcoder2() -> Case:
    return _build("Starcoder2Config", "Starcoder2ForCausalLM", **GROUPED)


def nemotron() -> Case:
    return _build("NemotronConfig", "NemotronForCausalLM", **GROUPED, head_dim=16)


def mixtral() -> Case:
    return _build("MixtralConfig", "MixtralForCausalLM", **GROUPED, num_local_experts=4)


def qwen3_moe() -> Case:
    return _build(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        **GROUPED,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
    )


def qwen2_moe() -> Case:
    return _build(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        shared_expert_intermediate_size=96,
    )


def olmoe() -> Case:
    return _build("OlmoeConfig", "OlmoeForCausalLM", **GROUPED, num_experts=4, num_experts_per_tok=2)


def deepseek_v3() -> Case:
    return _build(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        **SMALL,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        moe_intermediate_size=48,
    )


def gpt_oss() -> Case:
    return _build(
        "GptOssConfig",
        "GptOssForCausalLM",
        **GROUPED,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
    )

"""Encoder-decoder models."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr

from . import Case
from .decoders import text

SMALL = {
    "vocab_size": 128,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _build(config: str, model: str, inputs: dict[str, Any] | None = None, **settings: Any) -> Case:
    torch.manual_seed(0)
    made = getattr(tr, model)(getattr(tr, config)(**settings)).eval()
    return made, (inputs or text()) | {"decoder_input_ids": text(length=5)["input_ids"], "use_cache": False}


def t5() -> Case:
    return _build(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )


def t5_gated() -> Case:
    return _build(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )


def bart() -> Case:
    return _build("BartConfig", "BartForConditionalGeneration", **SMALL)


def marian() -> Case:
    return _build("MarianConfig", "MarianMTModel", **SMALL)


def whisper() -> Case:
    features = torch.linspace(-1, 1, 2 * 20 * 32).reshape(2, 20, 32)
    settings = SMALL | {"max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 20}
    settings.pop("max_position_embeddings")
    return _build("WhisperConfig", "WhisperForConditionalGeneration", {"input_features": features}, **settings)

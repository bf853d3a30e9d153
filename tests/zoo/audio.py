"""Audio encoders: samples or mel frames, convolutions along time, layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr
from torch import nn

from . import Case

SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _samples(family: str, **settings: Any) -> Case:
    torch.manual_seed(0)
    model = getattr(tr, f"{family}Model")(getattr(tr, f"{family}Config")(**SMALL, **settings)).eval()
    return model, {"input_values": torch.linspace(-1, 1, 1600).reshape(2, 800)}


def wav2vec2() -> Case:
    """Post-norm; positions by a convolution above the layers."""
    return _samples("Wav2Vec2")


def hubert_large() -> Case:
    """Pre-norm."""
    return _samples("Hubert", do_stable_layer_norm=True, feat_extract_norm="layer")


def speech_to_text() -> Case:
    """Convolutions with gated linear units, and a mask over frames."""
    torch.manual_seed(0)
    config = tr.Speech2TextConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        input_feat_per_channel=20,
        max_source_positions=100,
        max_target_positions=32,
        conv_channels=32,
        num_conv_layers=2,
        decoder_start_token_id=1,
    )
    ids, frames = torch.ones(2, 4, dtype=torch.int64), torch.linspace(-1, 1, 2560).reshape(2, 64, 20)
    return tr.Speech2TextForConditionalGeneration(config).eval(), {
        "input_features": frames,
        "attention_mask": torch.ones(2, 64, dtype=torch.int64),
        "decoder_input_ids": ids,
        "use_cache": False,
    }


class HandWritten(nn.Module):
    """One strided convolution, a class token, ``nn.TransformerEncoder``."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.stem = nn.Conv1d(1, 32, 8, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        x = nn.functional.gelu(self.stem(samples[:, None])).transpose(1, 2)
        return self.layers(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1))


def hand_written() -> Case:
    torch.manual_seed(0)
    return HandWritten().eval(), {"samples": torch.linspace(-1, 1, 400).reshape(2, 200)}

"""Text encoders, and encoders written with torch.nn alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr
from torch import nn

from . import Case
from .decoders import SMALL, text

ENCODER = {k: v for k, v in SMALL.items() if k not in ("bos_token_id", "eos_token_id")}


def _text() -> dict[str, Any]:
    return {k: v for k, v in text().items() if k != "use_cache"}


def _build(config: str, model: str, **settings: Any) -> Case:
    torch.manual_seed(0)
    return getattr(tr, model)(getattr(tr, config)(**settings)).eval(), _text()


def bert() -> Case:
    return _build("BertConfig", "BertForMaskedLM", **ENCODER)


def bert_classifier() -> Case:
    return _build("BertConfig", "BertForSequenceClassification", **ENCODER)


def roberta() -> Case:
    return _build("RobertaConfig", "RobertaModel", **ENCODER)


def distilbert() -> Case:
    return _build(
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        vocab_size=128,
        dim=64,
        hidden_dim=96,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
    )


def modernbert() -> Case:
    return _build(
        "ModernBertConfig",
        "ModernBertModel",
        **ENCODER,
        cls_token_id=1,
        sep_token_id=2,
        global_attn_every_n_layers=2,
        local_attention=4,
        bos_token_id=1,
        eos_token_id=2,
    )


def clip_text() -> Case:
    return _build("CLIPTextConfig", "CLIPTextModel", **ENCODER | {"bos_token_id": 1, "eos_token_id": 2})


def torch_encoder(norm_first: bool = False) -> Case:
    """nn.TransformerEncoder; post-norm unless ``norm_first``."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 96, dropout=0.1, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), {"src": torch.randn(2, 9, 64)}


def torch_encoder_pre_norm() -> Case:
    return torch_encoder(norm_first=True)


class HandWritten(nn.Module):
    """Eager attention with einsum, a squared-ReLU feed-forward, and residuals scaled by a learned vector."""

    class Layer(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.mix = nn.Linear(width, 3 * width, bias=False)
            self.out = nn.Linear(width, width)
            self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
            self.scale = nn.Parameter(torch.full((width,), 0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, width = x.shape
            q, k, v = self.mix(self.one(x)).view(batch, length, 3, self.heads, -1).unbind(2)
            weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * (width // self.heads) ** -0.5).softmax(-1)
            mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
            x = x + self.scale * self.out(mixed)
            return x + self.scale * self.narrow(torch.relu(self.wide(self.two(x))).square())

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def hand_written() -> Case:
    torch.manual_seed(0)
    return HandWritten().eval(), {"x": torch.randn(2, 9, 64)}

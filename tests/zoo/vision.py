"""Vision encoders. (Vision-language models live in ``vlm.py``.)"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers as tr
from torch import nn

from . import Case

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def _images(size: int = 32, channels: int = 3) -> dict[str, Any]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * channels * size * size).reshape(2, channels, size, size)}


def _build(config: str, model: str, inputs: dict[str, Any] | None = None, **settings: Any) -> Case:
    torch.manual_seed(0)
    return getattr(tr, model)(getattr(tr, config)(**settings)).eval(), inputs or _images()


def vit() -> Case:
    return _build("ViTConfig", "ViTForImageClassification", **SMALL, image_size=32, patch_size=8)


def deit() -> Case:
    return _build("DeiTConfig", "DeiTModel", **SMALL, image_size=32, patch_size=8)


def dinov2() -> Case:
    return _build("Dinov2Config", "Dinov2Model", **SMALL, mlp_ratio=2, image_size=32, patch_size=8)


def dinov2_swiglu() -> Case:
    return _build("Dinov2Config", "Dinov2Model", **SMALL, mlp_ratio=2, image_size=32, patch_size=8, use_swiglu_ffn=True)


def dinov2_registers() -> Case:
    return _build(
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        **SMALL,
        mlp_ratio=2,
        image_size=32,
        patch_size=8,
        num_register_tokens=3,
    )


def dinov3() -> Case:
    return _build("DINOv3ViTConfig", "DINOv3ViTModel", **SMALL, image_size=32, patch_size=8, num_register_tokens=3)


def clip_vision() -> Case:
    return _build("CLIPVisionConfig", "CLIPVisionModel", **SMALL, image_size=32, patch_size=8)


def siglip() -> Case:
    return _build("SiglipVisionConfig", "SiglipVisionModel", **SMALL, image_size=32, patch_size=8)


def beit() -> Case:
    return _build("BeitConfig", "BeitModel", **SMALL, image_size=32, patch_size=8, use_relative_position_bias=True)


def swin() -> Case:
    return _build(
        "SwinConfig",
        "SwinModel",
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    )


def hiera() -> Case:
    return _build(
        "HieraConfig",
        "HieraModel",
        image_size=[32, 32],
        patch_size=[7, 7],
        patch_stride=[4, 4],
        patch_padding=[3, 3],
        embed_dim=16,
        depths=[1, 2],
        num_heads=[1, 2],
        masked_unit_size=[2, 2],
        query_stride=[2, 2],
        num_query_pool=1,
    )


def videomae() -> Case:
    video = torch.linspace(-1, 1, 2 * 4 * 3 * 32 * 32).reshape(2, 4, 3, 32, 32)
    return _build(
        "VideoMAEConfig",
        "VideoMAEModel",
        {"pixel_values": video},
        **SMALL,
        image_size=32,
        patch_size=8,
        num_frames=4,
        tubelet_size=2,
    )


def segformer() -> Case:
    return _build(
        "SegformerConfig",
        "SegformerModel",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
    )


class FusedVit(nn.Module):
    """A vision transformer with fused qkv, a class token and LayerScale, in plain torch.nn."""

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, count, width = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(batch, count, 3, self.heads, width // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, width)
            x = x + self.proj(mixed) * self.ls1
            return x + self.fc2(F.gelu(self.fc1(self.norm2(x)))) * self.ls2

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2, side: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, side * side + 1, width))
        self.blocks = nn.Sequential(*(self.Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def fused_vit() -> Case:
    torch.manual_seed(0)
    return FusedVit().eval(), {"images": _images()["pixel_values"]}

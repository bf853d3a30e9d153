"""Tiny random encoders for token pruning, each with the dense model in which chosen keys are hidden as its oracle.

A model is called as ``model(**inputs)``; ``EncoderCase.output`` takes the tokens ``[B, N, D]`` from what it returns.
Sizes are traps on purpose: SigLIP has 16 tokens of 16 channels a head, two heads and (by default) two rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from tests import oracle
from tests.zoo.vlm import randomize

WIDTH, HEADS, LAYERS = 32, 2, 4
COMMON = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
}
IMAGE = {"image_size": 32, "patch_size": 8}


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.last_hidden_state


@dataclass
class EncoderCase:
    """An encoder with its inputs.

    Attributes:
        name: key in ``ENCODERS``.
        model: in eval mode, fp32.
        make_inputs: (batch, generator) -> keyword arguments.
        layers: modules of the layers, in order.
        prefix_tokens: class, distillation and register tokens in front.
        tokens: N, prefix tokens included.
        hidden_keys: context manager (layers, dropped) under which the layers hide keys.
        output: what ``model(**inputs)`` returns -> ``[B, N, D]``.
    """

    name: str
    model: nn.Module
    make_inputs: Callable[[int, torch.Generator], dict[str, Tensor]]
    layers: list[nn.Module]
    prefix_tokens: int
    tokens: int
    hidden_keys: Callable[[Sequence[nn.Module], oracle.Dropped], contextlib.AbstractContextManager[None]]
    output: Callable[[Any], Tensor] = _first

    def inputs(self, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
        return self.make_inputs(batch, torch.Generator().manual_seed(seed))

    def run(self, inputs: dict[str, Tensor]) -> Tensor:
        """``[B, N, D]`` of the model as it is."""
        with torch.no_grad():
            return self.output(self.model(**inputs))

    def oracle(self, inputs: dict[str, Tensor], dropped: oracle.Dropped) -> Tensor:
        """``[B, N, D]`` of the dense model with the keys of ``dropped`` (layer -> ``[B, N]``) hidden."""
        with self.hidden_keys(self.layers, dropped):
            return self.run(inputs)


def _pixels(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}


def _ids(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (batch, 20), generator=generator)
    ids[:, -1] = 98  # end of sequence
    return {"input_ids": ids}


def _hf(
    name: str, cls: Any, config: Any, layers: Callable[[Any], Any], prefix: int, attn_implementation: str
) -> EncoderCase:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls._from_config(config, attn_implementation=attn_implementation)
    randomize(model)
    for module in model.modules():  # layer scale starts near zero; of order one it lets each layer count
        if type(module).__name__.endswith("LayerScale"):
            module.lambda1.data += 1.0
    text = cls is CLIPTextModel
    return EncoderCase(
        name,
        model,
        _ids if text else _pixels,
        list(layers(model)),
        prefix,
        20 if text else 16 + prefix,
        lambda layers, dropped: oracle.hidden_keys(layers, dropped, [model.config]),
    )


def vit(attn_implementation: str = "sdpa") -> EncoderCase:
    return _hf("vit", ViTModel, ViTConfig(**COMMON, **IMAGE), _layers, 1, attn_implementation)


def deit(attn_implementation: str = "sdpa") -> EncoderCase:
    return _hf("deit", DeiTModel, DeiTConfig(**COMMON, **IMAGE), _layers, 2, attn_implementation)


def dinov2(attn_implementation: str = "sdpa") -> EncoderCase:
    config = Dinov2Config(**COMMON, **IMAGE, mlp_ratio=2)
    return _hf("dinov2", Dinov2Model, config, _layers, 1, attn_implementation)


def dinov2_registers(attn_implementation: str = "sdpa") -> EncoderCase:
    config = Dinov2WithRegistersConfig(**COMMON, **IMAGE, mlp_ratio=2, num_register_tokens=4)
    return _hf("dinov2_registers", Dinov2WithRegistersModel, config, _layers, 5, attn_implementation)


def clip_vision(attn_implementation: str = "sdpa") -> EncoderCase:
    return _hf("clip_vision", CLIPVisionModel, CLIPVisionConfig(**COMMON, **IMAGE), _layers, 1, attn_implementation)


def clip_text(attn_implementation: str = "sdpa") -> EncoderCase:
    """Causal; without padding its mask is None and attention is told to be causal."""
    config = CLIPTextConfig(**COMMON, vocab_size=99, max_position_embeddings=32, eos_token_id=98)
    return _hf("clip_text", CLIPTextModel, config, _layers, 0, attn_implementation)


def siglip(attn_implementation: str = "sdpa") -> EncoderCase:
    return _hf("siglip", SiglipVisionModel, SiglipVisionConfig(**COMMON, **IMAGE), _layers, 0, attn_implementation)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The longest list of modules: the layers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len))


# ------------------------------------------------------------------------------------------------------ plain torch


@contextlib.contextmanager
def hidden_in_sdpa(layers: Sequence[nn.Module], dropped: oracle.Dropped) -> Iterator[None]:
    """Within the context, calls of ``F.scaled_dot_product_attention`` made inside ``layers`` hide keys.

    ``nn.MultiheadAttention`` calls the same function once the inference fast path is off.
    """
    original, inside = F.scaled_dot_product_attention, []

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kw: Any):
        if inside and inside[-1] in dropped:
            if attn_mask is None:
                attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)[None, None]
            hidden = dropped[inside[-1]]
            attn_mask = oracle.hide(attn_mask, hidden[:, None, None, :], 0)
        return original(query, key, value, attn_mask, *args, **kw)

    def enter(index: int) -> None:
        inside.append(index)

    def leave() -> None:
        inside.pop()

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda *_, index=index: enter(index)))
        handles.append(layer.register_forward_hook(lambda *_: leave()))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    F.scaled_dot_product_attention = attention
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for handle in handles:
            handle.remove()


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(b, n, c))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(WIDTH), _Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FusedViT(nn.Module):
    """A ViT in the style of timm: one linear for query, key and value; class token; tokens ``[B, 17, 32]`` out."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, kernel_size=8, stride=8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, WIDTH))
        self.blocks = nn.Sequential(*(_Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


def fused_vit() -> EncoderCase:
    model = randomize(FusedViT())
    return EncoderCase("fused_vit", model, _pixels, list(model.blocks), 1, 17, hidden_in_sdpa)


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` (batch first) over patches, no class token."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, kernel_size=8, stride=8)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 64, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(self.patch_embed(pixel_values).flatten(2).transpose(1, 2) + self.pos_embed)


def _torch_encoder(name: str, norm_first: bool) -> EncoderCase:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomize(TorchEncoder(norm_first))
    return EncoderCase(name, model, _pixels, list(model.encoder.layers), 0, 16, hidden_in_sdpa)


def torch_encoder_post_norm() -> EncoderCase:
    return _torch_encoder("torch_encoder_post_norm", norm_first=False)


def torch_encoder_pre_norm() -> EncoderCase:
    return _torch_encoder("torch_encoder_pre_norm", norm_first=True)


ENCODERS: dict[str, Callable[[], EncoderCase]] = {
    "vit": vit,
    "deit": deit,
    "dinov2": dinov2,
    "dinov2_registers": dinov2_registers,
    "clip_vision": clip_vision,
    "clip_text": clip_text,
    "siglip": siglip,
    "fused_vit": fused_vit,
    "torch_encoder_post_norm": torch_encoder_post_norm,
    "torch_encoder_pre_norm": torch_encoder_pre_norm,
}

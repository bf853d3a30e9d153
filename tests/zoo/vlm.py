"""Tiny random vision-language models with right inputs for each family.

Every model is seeded, fp32, in eval mode, and initialised so that attention is far from uniform and greedy tokens vary.
``VLMS`` holds one model for each family, ``VARIANTS`` further ones that exercise a single hard point.

How ``generate()`` of transformers calls these models (all but the hand-written ones):

* It runs the image encoder (``model.base_model.get_image_features``) first, pops the arguments of the encoder from the
  inputs (``pixel_values``; also ``image_grid_thw`` of the Qwen families, ``image_sizes`` of LLaVA-NeXT and
  LLaVA-OneVision, ``pixel_attention_mask`` of SmolVLM) and hands ``mm_encoder_outputs={"image": ...}`` to the first
  ``forward``. Decode steps get neither.
* A direct ``forward(**inputs)`` encodes inside ``forward``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

VOCAB, TEXT_VOCAB, PAD = 320, 200, 0
IMAGE, START, END, VIDEO, TILE = 300, 301, 302, 303, 304
SPECIAL = [IMAGE, START, END, VIDEO, TILE]

#: Width, depth and heads of every text tower; head width 16, two query heads for each key head.
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

#: What a family makes of a batch: (rows of images, each given as an index into the family's sizes)
#: -> (keyword arguments, for each row and image the token ids that stand for the image in the prompt).
Images = Callable[[list[list[int]], torch.Generator], tuple[dict[str, Tensor], list[list[list[int]]]]]


@dataclass
class Case:
    """A model with the inputs that fit it.

    Attributes:
        name: key in ``VLMS`` or ``VARIANTS``.
        model: in eval mode; ``model.generation_config`` has no end-of-sequence token.
        images: builds the image arguments, see :data:`Images`.
        decoder_layers: modules of the decoder layers, in order.
        text_tower: the module that gets ``inputs_embeds`` and runs the decoder layers.
        n_sizes: how many image sizes the family has; sizes above 0 have other token counts than size 0.
        has_generate: whether the model has ``generate``; if not, ``inputs`` are for ``forward`` only.
        images_first: the images stand at the start of the prompt.
        uniform_images: each row must hold the same number of images.
        extra: (input_ids, attention_mask) -> further inputs, such as token types.
    """

    name: str
    model: nn.Module
    images: Images
    decoder_layers: list[nn.Module]
    text_tower: nn.Module
    n_sizes: int = 1
    has_generate: bool = True
    images_first: bool = False
    uniform_images: bool = False
    extra: Callable[[Tensor, Tensor], dict[str, Tensor]] = field(default=lambda ids, mask: {})
    separate_images: int = 0

    def inputs(
        self,
        batch: int = 1,
        images_per_row: int | Sequence[int] = 1,
        left_padding: int | Sequence[int] = 0,
        text_len: int = 12,
        sizes: int | Sequence[int] = 0,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """Arguments for ``forward`` and ``generate``.

        Args:
            batch: number of rows.
            images_per_row: number of images in each row.
            left_padding: padded positions at the start of each row; an int pads the first row only. Rows are further
                padded on the left to the longest row.
            text_len: text tokens of each row, not counting the markers around an image.
            sizes: image sizes (below ``n_sizes``), repeated over all images in order.
            seed: of token ids and pixels.
        """
        generator = torch.Generator().manual_seed(seed)
        counts = [images_per_row] * batch if isinstance(images_per_row, int) else list(images_per_row)
        pads = [left_padding] + [0] * (batch - 1) if isinstance(left_padding, int) else list(left_padding)
        assert len(counts) == len(pads) == batch
        assert not self.uniform_images or len(set(counts)) == 1
        cycle = itertools.cycle([sizes] if isinstance(sizes, int) else sizes)
        kwargs, spans = self.images([[next(cycle) for _ in range(count)] for count in counts], generator)
        rows = []
        for row_spans in spans:
            text = torch.randint(3, TEXT_VOCAB, (text_len,), generator=generator).tolist()
            row: list[int] = [] if self.images_first else text[:3]
            for index, span in enumerate(row_spans):
                row += span
                if not self.images_first and index + 1 < len(row_spans):
                    row.append(text[3 + index])
            rows.append(row + text[self._used(len(row_spans)) :])
        length = max(len(row) + pad for row, pad in zip(rows, pads, strict=True))
        ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        if self.separate_images:  # the images are no part of input_ids; the mask covers them
            mask = torch.cat([mask.new_ones(batch, self.separate_images * counts[0]), mask], dim=1)
        return {"input_ids": ids, "attention_mask": mask, **kwargs, **self.extra(ids, mask)}

    def _used(self, images: int) -> int:
        return 0 if self.images_first else 3 + max(images - 1, 0)

    def visual_mask(self, inputs: dict[str, Tensor]) -> Tensor:
        """``[B, S]``, True where the residual stream holds an image feature."""
        if self.separate_images:
            visual = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
            visual[:, : self.separate_images * inputs["pixel_values"].shape[1]] = True
            return visual
        return inputs["input_ids"] == IMAGE

    def row(self, inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """Row ``index`` of a batch in which every row holds one image, without its padding."""
        keep = inputs["attention_mask"][index].bool()
        out = {}
        for name, value in inputs.items():
            if name == "pixel_values" and "image_grid_thw" in inputs:
                patches = inputs["image_grid_thw"].prod(-1).tolist()
                out[name] = value.split(patches)[index]
            elif value.shape == inputs["attention_mask"].shape:
                out[name] = value[index : index + 1, keep]
            elif name == "input_ids":  # images are kept apart
                out[name] = value[index : index + 1, keep[-value.shape[1] :]]
            else:
                out[name] = value[index : index + 1]
        return out


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value under which activations stay of order one and attention is peaked."""
    generator = torch.Generator().manual_seed(seed)
    zero_centred = ("Gemma", "PaliGemma")
    for module in model.modules():
        name = type(module).__name__
        for key, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if "Norm" in name and key == "weight":
                value = 0.2 * noise + (0.0 if name.startswith(zero_centred) and "RMS" in name else 1.0)
            elif isinstance(module, nn.Embedding):
                value = noise / float(getattr(module, "scalar_embed_scale", 1.0))
            elif parameter.dim() < 2:
                value = 0.2 * noise
            elif key == "mm_input_projection_weight":  # applied as x @ weight
                value = noise / math.sqrt(parameter.shape[0])
            else:
                value = noise * 1.3 / math.sqrt(parameter[0].numel())
            parameter.data.copy_(value)
    return model.eval()


def _transformers(cls: type, config: Any, attn_implementation: str = "sdpa", seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, attn_implementation=attn_implementation)
    randomize(model, seed)
    model.generation_config = GenerationConfig(pad_token_id=PAD, suppress_tokens=SPECIAL, do_sample=False)
    return model


def _pixels(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _flat(rows: list[list[int]]) -> list[int]:
    return [size for row in rows for size in row]


def _stacked(side: int, tokens: int, before: Sequence[int] = (), after: Sequence[int] = ()) -> Images:
    """One fixed-size picture for each image, all stacked."""

    def images(rows: list[list[int]], generator: torch.Generator) -> Any:
        pixels = _pixels((len(_flat(rows)), 3, side, side), generator)
        span = [*before, *[IMAGE] * tokens, *after]
        return {"pixel_values": pixels}, [[span for _ in row] for row in rows]

    return images


def llava(attn_implementation: str = "sdpa") -> Case:
    vision = CLIPVisionConfig(**VISION | {"num_hidden_layers": 3}, image_size=56, patch_size=14)
    text = LlamaConfig(**TEXT)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=16)
    model = _transformers(LlavaForConditionalGeneration, config, attn_implementation)
    tower = model.model.language_model
    return Case("llava", model, _stacked(56, 16), list(tower.layers), tower)


#: (height, width) of original images, and the tiles (without the base picture) that the best resolution has.
_ANYRES = [((56, 56), 4), ((28, 56), 2), ((50, 30), 4), ((60, 20), 2), ((56, 22), 2)]
_PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def _anyres(model: Any) -> Images:
    def images(rows: list[list[int]], generator: torch.Generator) -> Any:
        chosen = [_ANYRES[size] for size in _flat(rows)]
        most = max((tiles for _, tiles in chosen), default=1) + 1
        pixels = _pixels((len(chosen), most, 3, 28, 28), generator)
        sizes = torch.tensor([size for size, _ in chosen])
        with torch.no_grad():
            features = model.base_model.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output
        lengths = iter([len(feature) for feature in features])
        return {"pixel_values": pixels, "image_sizes": sizes}, [[[IMAGE] * next(lengths) for _ in row] for row in rows]

    return images


def llava_next(attn_implementation: str = "sdpa") -> Case:
    vision = CLIPVisionConfig(**VISION | {"num_hidden_layers": 3}, image_size=28, patch_size=14)
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=4,
    )
    model = _transformers(LlavaNextForConditionalGeneration, config, attn_implementation)
    tower = model.model.language_model
    return Case("llava_next", model, _anyres(model), list(tower.layers), tower, n_sizes=len(_ANYRES))


def llava_onevision(attn_implementation: str = "sdpa") -> Case:
    vision = SiglipVisionConfig(**VISION, image_size=28, patch_size=14, vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
    )
    model = _transformers(LlavaOnevisionForConditionalGeneration, config, attn_implementation)
    tower = model.model.language_model
    return Case("llava_onevision", model, _anyres(model), list(tower.layers), tower, n_sizes=len(_ANYRES))


#: (time, height, width) in patches; four patches make one token.
_GRIDS = [(1, 8, 8), (1, 4, 8), (1, 8, 12), (1, 4, 4)]
_QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}


def _grids(rows: list[list[int]], generator: torch.Generator) -> Any:
    chosen = [_GRIDS[size] for size in _flat(rows)]
    patches = sum(math.prod(grid) for grid in chosen)
    pixels = _pixels((patches, 3 * 2 * 4 * 4), generator)
    spans = [[[START, *[IMAGE] * (math.prod(_GRIDS[size]) // 4), END] for size in row] for row in rows]
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor(chosen)}, spans


def _image_types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int()}


def _qwen(name: str, cls: type, config: Any, attn_implementation: str) -> Case:
    model = _transformers(cls, config, attn_implementation)
    tower = model.model.language_model
    return Case(name, model, _grids, list(tower.layers), tower, n_sizes=len(_GRIDS), extra=_image_types)


def qwen2_vl(attn_implementation: str = "sdpa") -> Case:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    config = Qwen2VLConfig(vision_config=vision, text_config=text, **_QWEN_IDS)
    return _qwen("qwen2_vl", Qwen2VLForConditionalGeneration, config, attn_implementation)


def qwen2_5_vl(attn_implementation: str = "sdpa") -> Case:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    text = TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_QWEN_IDS)
    return _qwen("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration, config, attn_implementation)


def qwen3_vl(attn_implementation: str = "sdpa") -> Case:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config=vision, text_config=TEXT | {"head_dim": 16, "rope_parameters": rope}, **_QWEN_IDS
    )
    return _qwen("qwen3_vl", Qwen3VLForConditionalGeneration, config, attn_implementation)


def internvl(attn_implementation: str = "sdpa") -> Case:
    config = InternVLConfig(
        vision_config=VISION | {"image_size": [64, 64], "patch_size": [8, 8]},
        text_config=Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    model = _transformers(InternVLForConditionalGeneration, config, attn_implementation)
    tower = model.model.language_model

    def images(rows: list[list[int]], generator: torch.Generator) -> Any:
        """Size 0 is one tile, size 1 two tiles and a thumbnail: one longer run of placeholders."""
        tiles = [1, 3]
        pixels = _pixels((sum(tiles[size] for size in _flat(rows)), 3, 64, 64), generator)
        return {"pixel_values": pixels}, [[[START, *[IMAGE] * (16 * tiles[size]), END] for size in row] for row in rows]

    return Case("internvl", model, images, list(tower.layers), tower, n_sizes=2)


def smolvlm(attn_implementation: str = "sdpa") -> Case:
    config = SmolVLMConfig(
        vision_config=VISION | {"image_size": 64, "patch_size": 8},
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    model = _transformers(SmolVLMForConditionalGeneration, config, attn_implementation)
    tower = model.model.text_model

    def images(rows: list[list[int]], generator: torch.Generator) -> Any:
        """Size 0 is one picture, size 1 two tiles and the whole picture, each with a marker. ``[B, pictures, ...]``."""
        tiles = [1, 3]
        counts = [sum(tiles[size] for size in row) for row in rows]
        pixels = _pixels((len(rows), max(max(counts), 1), 3, 64, 64), generator)
        for row, count in enumerate(counts):
            pixels[row, count:] = 0  # a picture of zeros is padding
        spans = [[[START, *([TILE] + [IMAGE] * 16) * tiles[size], END] for size in row] for row in rows]
        mask = torch.ones(pixels.shape[0], pixels.shape[1], 64, 64, dtype=torch.long)
        return {"pixel_values": pixels, "pixel_attention_mask": mask}, spans

    return Case("smolvlm", model, images, list(tower.layers), tower, n_sizes=2)


_GEMMA_SIGLIP = {"image_size": 64, "patch_size": 8, "vision_use_head": False}


def _gemma_types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


def gemma3(attn_implementation: str = "sdpa", sliding_window: int = 512, name: str = "gemma3") -> Case:
    """Images attend to themselves in both directions; sliding and full layers alternate, each with its own RoPE."""
    text = Gemma3TextConfig(
        **TEXT,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=sliding_window,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=False,
    )
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, **_GEMMA_SIGLIP),
        text_config=text,
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    model = _transformers(Gemma3ForConditionalGeneration, config, attn_implementation)
    tower = model.model.language_model
    return Case(name, model, _stacked(64, 16, [START], [END]), list(tower.layers), tower, extra=_gemma_types)


def gemma3_window(attn_implementation: str = "sdpa") -> Case:
    """As :func:`gemma3`, with a window shorter than the prompt: sliding layers crop their cache."""
    return gemma3(attn_implementation, sliding_window=10, name="gemma3_window")


def _prefix_types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The prompt is the prefix (0); a suffix (1) only occurs in training."""
    return {"token_type_ids": torch.zeros_like(ids)}


def _paligemma(name: str, text: Any, attn_implementation: str) -> Case:
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, **_GEMMA_SIGLIP | {"patch_size": 16}, projection_dim=64),
        text_config=text,
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
        tie_word_embeddings=False,
    )
    model = _transformers(PaliGemmaForConditionalGeneration, config, attn_implementation)
    tower = model.model.language_model
    images = _stacked(64, 16)
    return Case(name, model, images, list(tower.layers), tower, images_first=True, extra=_prefix_types)


def paligemma(attn_implementation: str = "sdpa") -> Case:
    """The whole prompt attends in both directions. Positions count from 1."""
    text = GemmaConfig(**TEXT, head_dim=16, tie_word_embeddings=False)
    return _paligemma("paligemma", text, attn_implementation)


def paligemma2(attn_implementation: str = "eager") -> Case:
    """As :func:`paligemma` on Gemma 2: scores and logits are capped, sliding and full layers alternate."""
    text = Gemma2Config(
        **TEXT,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=512,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=10.0,
        tie_word_embeddings=False,
    )
    return _paligemma("paligemma2", text, attn_implementation)


# ---------------------------------------------------------------------------------------------- written by hand


class _RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class _VisionBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class _TextBlock(nn.Module):
    def __init__(self, index: int, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.index, self.heads, self.kv_heads, self.head_dim = index, heads, kv_heads, width // heads
        self.norm1, self.norm2 = _RMSNorm(width), _RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 2 * width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        #: Set by an oracle: (layer index, allowed [B, 1, S, S]) -> allowed.
        self.mask_hook: Callable[[int, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, allowed: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        h = self.norm1(x)
        query = self.query(h).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        key = self.key(h).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        value = self.value(h).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        groups = self.heads // self.kv_heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        if self.mask_hook is not None:
            allowed = self.mask_hook(self.index, allowed)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.feed(self.norm2(x))

    def feed(self, h: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(h)) * self.up(h))


class PlainVLM(nn.Module):
    """A VLM that shares no code with transformers: logits for the whole sequence, no cache.

    ``merge="cat"`` puts the images of a row in front of its text (``attention_mask`` covers both);
    ``merge="index_put"`` writes image features over the placeholder tokens of ``input_ids``.
    """

    def __init__(self, merge: str, width: int = 64, vision_width: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.merge = merge
        self.patch_embed = nn.Conv2d(3, vision_width, kernel_size=8, stride=8)
        self.position = nn.Parameter(torch.zeros(1, 16, vision_width))
        self.encoder = nn.ModuleList(_VisionBlock(vision_width, 2) for _ in range(2))
        self.encoder_norm = nn.LayerNorm(vision_width)
        self.projector = nn.Linear(vision_width, width)
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(_TextBlock(index, width, 4, 2) for index in range(layers))
        self.norm = _RMSNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        half = width // 4 // 2
        self.register_buffer("inv_freq", 1e4 ** (-torch.arange(half) / half), persistent=False)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Image features ``[images, 16, width]`` of ``pixel_values [images, 3, 32, 32]``."""
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2) + self.position
        for block in self.encoder:
            x = block(x)
        return self.projector(self.encoder_norm(x))

    def embed_inputs(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if self.merge == "cat":
            batch, images = pixel_values.shape[:2]
            features = self.encode(pixel_values.flatten(0, 1))
            return torch.cat([features.reshape(batch, images * features.shape[1], features.shape[2]), x], dim=1)
        x = x.clone()
        x[input_ids == IMAGE] = self.encode(pixel_values).flatten(0, 1)
        return x

    def decode(self, x: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        tokens = x.shape[1]
        angles = position_ids[:, None, :, None] * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        own = torch.eye(tokens, dtype=torch.bool, device=x.device)
        allowed = (causal & attention_mask[:, None, None, :].bool()) | own
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), allowed)
        return self.head(self.norm(x))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.decode(self.embed_inputs(input_ids, pixel_values), attention_mask, position_ids)


def plain_cat() -> Case:
    model = randomize(PlainVLM("cat"))

    def images(rows: list[list[int]], generator: torch.Generator) -> Any:
        pixels = _pixels((len(rows), len(rows[0]), 3, 32, 32), generator)
        return {"pixel_values": pixels}, [[] for _ in rows]

    return Case(
        "plain_cat",
        model,
        images,
        list(model.layers),
        model,
        has_generate=False,
        images_first=True,
        uniform_images=True,
        separate_images=16,
    )


def plain_index_put() -> Case:
    model = randomize(PlainVLM("index_put"))
    return Case("plain_index_put", model, _stacked(32, 16), list(model.layers), model, has_generate=False)


VLMS: dict[str, Callable[[], Case]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "plain_cat": plain_cat,
    "plain_index_put": plain_index_put,
}

VARIANTS: dict[str, Callable[[], Case]] = {"gemma3_window": gemma3_window, "paligemma2": paligemma2}


def shallow(case: Case, layers: int = 2) -> Case:
    """The same model with its first ``layers`` only: capture costs seconds for each layer.

    Where windows slide it keeps three: from the second on, Dynamo makes the length of their cache symbolic.
    """
    types = getattr(case.model.config.get_text_config(), "layer_types", None) if case.has_generate else None
    layers = max(layers, 3) if "sliding_attention" in (types or ()) else layers
    case.decoder_layers = case.decoder_layers[:layers]
    case.text_tower.layers = nn.ModuleList(case.decoder_layers)
    if case.has_generate:
        for config in (case.model.config.get_text_config(), case.text_tower.config):
            config.num_hidden_layers = layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:layers]
    return case

"""Tiny random vision-language models as folders that vLLM and transformers load: weights, tokenizer and processor.

Nothing comes from a hub: the tokenizer knows words ``w0 .. w299`` and the marks of each family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as T
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

WORDS = 300


@dataclass(frozen=True)
class Family:
    """A saved model.

    Attributes:
        image: what stands for an image in a prompt.
        sizes: pictures (width, height) of different token counts.
        positions: what vLLM can serve.
        model, processor: those of transformers.
    """

    name: str
    folder: Path
    image: str
    sizes: list[tuple[int, int]]
    positions: str
    model: Any
    processor: Any


def tokenizer(marks: list[str]) -> Any:
    vocabulary = {f"w{i}": i for i in range(WORDS)} | {mark: WORDS + i for i, mark in enumerate(marks)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = T.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w1"
    )
    found.add_special_tokens({"additional_special_tokens": marks})
    return found


def randomize(model: nn.Module, seed: int = 0) -> Any:
    """Weights for attention that is far from uniform and images that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.1 * noise if "norm" in name and parameter.dim() == 1 else 0.12 * noise
    return model.eval()


def picture(size: tuple[int, int], seed: int) -> Image.Image:
    width, height = size
    values = np.random.default_rng(seed).random((height, width, 3)) * 255
    return Image.fromarray(values.astype("uint8"))


def _save(model: Any, processor: Any, folder: Path, renamed: Mapping[str, str]) -> None:
    model.generation_config = T.GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for old, new in renamed.items():  # names of older releases, which vLLM reads
        weights = {name.replace(old, new, 1) if name.startswith(old) else name: w for name, w in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


TEXT = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llava(folder: Path) -> Family:
    marks = ["<image>"]
    words = tokenizer(marks)
    pictures = T.CLIPImageProcessor(size={"shortest_edge": 84}, crop_size={"height": 84, "width": 84})
    processor = T.LlavaProcessor(
        image_processor=pictures,
        tokenizer=words,
        patch_size=14,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    vision = T.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=84, patch_size=14
    )
    config = T.LlavaConfig(
        vision_config=vision,
        text_config=T.LlamaConfig(vocab_size=320, head_dim=64, **TEXT),
        image_token_index=WORDS,
        image_seq_length=36,
    )
    model = randomize(T.LlavaForConditionalGeneration(config))
    _save(
        model,
        processor,
        folder,
        {"model.vision_tower.": "model.vision_tower.vision_model.", "vision_tower.": "vision_tower.vision_model."},
    )
    return Family("llava", folder, "<image>", [(84, 84), (100, 90)], "compact", model, processor)


def qwen2_5_vl(folder: Path) -> Family:
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(marks)
    pictures = T.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 64)
    videos = T.Qwen2VLVideoProcessor(min_pixels=56 * 56, max_pixels=28 * 28 * 64)
    processor = T.Qwen2_5_VLProcessor(image_processor=pictures, tokenizer=words, video_processor=videos)
    config = T.Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            "patch_size": 14,
        },
        text_config={
            **TEXT,
            "vocab_size": 320,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
        },
        image_token_id=WORDS,
        video_token_id=WORDS + 1,
        vision_start_token_id=WORDS + 2,
        vision_end_token_id=WORDS + 3,
    )
    model = randomize(T.Qwen2_5_VLForConditionalGeneration(config))
    _save(model, processor, folder, {})
    image = "<|vision_start|> <|image_pad|> <|vision_end|>"
    return Family("qwen2_5_vl", folder, image, [(112, 140), (168, 84), (84, 84)], "keep", model, processor)


def qwen3_vl(folder: Path) -> Family:
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(marks)
    size = {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 64}
    pictures = T.Qwen2VLImageProcessor(size=size, patch_size=16, merge_size=2)
    videos = T.Qwen3VLVideoProcessor(size=size, patch_size=16, merge_size=2)
    processor = T.Qwen3VLProcessor(image_processor=pictures, tokenizer=words, video_processor=videos)
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 256,
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    config = T.Qwen3VLConfig(
        vision_config=vision,
        text_config={**TEXT, "head_dim": 64, "vocab_size": 320, "rope_parameters": rope},
        image_token_id=WORDS,
        video_token_id=WORDS + 1,
        vision_start_token_id=WORDS + 2,
        vision_end_token_id=WORDS + 3,
    )
    model = randomize(T.Qwen3VLForConditionalGeneration(config))
    _save(model, processor, folder, {})
    image = "<|vision_start|> <|image_pad|> <|vision_end|>"
    return Family("qwen3_vl", folder, image, [(128, 160), (192, 96), (96, 96)], "keep", model, processor)


FAMILIES = {"llava": llava, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}

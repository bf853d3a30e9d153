"""Pruned against dense files of one export, in onnxruntime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
import models
import numpy as np
import torch

import tokcompile

#: Layers of the language model that is exported: the time for one layer does not hang on their number, that of an
#: export and its size on disk do.
VLM_LAYERS = 8


def rows(folder: Path, quick: bool, repeats: int, load: float | None) -> list[harness.Row]:
    """A ViT at batch 8 with ``vit_prune_50``, and the prefill of a VLM with two recipes.

    Args:
        folder: where the exported files are, or will be.
    """
    return [*_vit(folder, quick, repeats, load), *_vlm(folder, quick, repeats, load)]


def _served(folder: Path, name: str, model: Any, inputs: dict[str, Any], recipe: str | None) -> tokcompile.OnnxModel:
    """The exported model, written first where it is not there yet. Both sessions of a comparison wait without
    spinning, since they are timed in turn in one process."""
    import onnxruntime

    place = folder / f"{name}-{recipe or 'dense'}"
    if not place.exists():
        tokcompile.export_onnx(model, inputs, place, recipe=recipe, check=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = harness.THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return tokcompile.OnnxModel.from_pretrained(place, providers=["CPUExecutionProvider"], session_options=options)


def _ratio(model: tokcompile.OnnxModel) -> float:
    return float(model.manifest["recipe"]["steps"][0]["flop_ratio"])


def _vit(folder: Path, quick: bool, repeats: int, load: float | None) -> list[harness.Row]:
    model, size = models.vit(quick), 56 if quick else 224
    name = ("tiny ViT" if quick else "ViT-S/14, random") + ", ONNX"
    pixels = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    dense, pruned = (_served(folder, "vit", model, {"pixel_values": pixels}, r) for r in (None, "vit_prune_50"))
    feed = pixels.numpy()
    times = harness.interleaved(
        {harness.ONNX_BASELINE: lambda: dense(pixel_values=feed), "vit_prune_50": lambda: pruned(pixel_values=feed)},
        repeats,
    )
    tokens, base = (size // 14) ** 2 + 1, times[harness.ONNX_BASELINE]
    return [
        harness.row("onnx", name, harness.ONNX_BASELINE, base, batch=8, tokens=tokens, load=load),
        harness.row(
            "onnx",
            name,
            "vit_prune_50",
            times["vit_prune_50"],
            batch=8,
            tokens=tokens,
            baseline=base,
            flop_ratio=_ratio(pruned),
            formula=models.vit_ratio(model, size, [0.56] * 3, [0.25, 0.5, 0.75]),
            load=load,
        ),
    ]


def _vlm(folder: Path, quick: bool, repeats: int, load: float | None) -> list[harness.Row]:
    """The decoder's prefill with image features ready, as in ``vlm``."""
    model = models.vlm(quick, None if quick else VLM_LAYERS)
    name = ("tiny LLaVA" if quick else f"LLaVA, Qwen2-0.5B text, {VLM_LAYERS} of its 24 layers") + ", ONNX"
    prompt = models.vlm_inputs(model)
    side = model.config.vision_config.image_size
    inputs = {"input_ids": prompt["input_ids"], "pixel_values": torch.randn(1, 3, side, side)}
    recipes = {"vlm_prune_90": 0.875, "vlm_random_90": None}
    served = {r or harness.ONNX_BASELINE: _served(folder, "vlm", model, inputs, r) for r in (None, *recipes)}
    ids, features = prompt["input_ids"].numpy(), prompt["features"][0].numpy()
    calls = {r: lambda m=m: prefill(m, ids, features) for r, m in served.items()}
    times = harness.interleaved(calls, repeats)
    tokens, base = ids.shape[1], times[harness.ONNX_BASELINE]
    found = [harness.row("onnx", name, harness.ONNX_BASELINE, base, batch=1, tokens=tokens, load=load)]
    for recipe, late in recipes.items():
        found.append(
            harness.row(
                "onnx",
                name,
                recipe,
                times[recipe],
                batch=1,
                tokens=tokens,
                baseline=base,
                load=load,
                flop_ratio=_ratio(served[recipe]),
                formula=models.vlm_ratio(model, 0.10, late),
            )
        )
    return found


def prefill(model: tokcompile.OnnxModel, ids: Any, features: Any) -> dict[str, Any]:
    """Embedding and decoder of an export on one prompt, with an empty past."""
    assert model.generation is not None
    visual = ids == model.generation["image_token_id"]
    embeds = model.run("embed_tokens", {"input_ids": ids})["inputs_embeds"]
    shapes = {v["name"]: v["shape"] for v in model.manifest["files"]["decoder"]["inputs"]}
    feed: dict[str, Any] = {
        n: np.zeros([s if isinstance(s, int) else len(ids) if i == 0 else 0 for i, s in enumerate(shape)], np.float32)
        for n, shape in shapes.items()
        if n.startswith("past_")
    }
    feed |= {
        "inputs_embeds": embeds,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
    }
    if "visual_mask" in shapes:
        feed |= {"visual_mask": visual, "image_features": features}
    else:
        embeds[visual] = features
    return model.run("decoder", feed)

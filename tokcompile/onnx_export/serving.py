"""Run exported models with onnxruntime: :class:`OnnxModel`. Needs numpy and onnxruntime, and never imports torch.

model = OnnxModel.from_pretrained("out")
tokens = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=12)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from tokcompile.errors import ExportError

#: Name of the file that says how the files of an export fit together.
MANIFEST = "manifest.json"
FORMAT, FORMAT_VERSION = "tokcompile-onnx", 1

Array = NDArray[Any]


class OnnxModel:
    """An exported model.

    Attributes:
        manifest: what ``manifest.json`` says.
        sessions: role of a file ("model", "vision_encoder", "embed_tokens", "decoder") -> onnxruntime session.
    """

    def __init__(self, manifest: dict[str, Any], sessions: dict[str, onnxruntime.InferenceSession]) -> None:
        self.manifest, self.sessions = manifest, sessions
        self.generation: dict[str, Any] | None = manifest.get("generation")
        self._outputs = {role: [o.name for o in s.get_outputs()] for role, s in sessions.items()}
        self._inputs = {role: {i.name: i for i in s.get_inputs()} for role, s in sessions.items()}

    @classmethod
    def from_pretrained(
        cls,
        directory: str | PathLike[str],
        providers: Sequence[Any] | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
    ) -> OnnxModel:
        """Load what ``export_onnx`` wrote.

        Args:
            directory: the folder with ``manifest.json``.
            providers: onnxruntime's execution providers, in order; by default CUDA where this onnxruntime has it,
                else CPU.
            session_options: for all sessions.

        Raises:
            ExportError: no (or a newer) export in the folder, or a provider that this onnxruntime does not have.
        """
        folder = Path(directory)
        if not (folder / MANIFEST).is_file():
            raise ExportError(f"{folder} holds no {MANIFEST}; tokcompile.export_onnx writes it with the files")
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest.get("format") != FORMAT or manifest.get("format_version", 0) > FORMAT_VERSION:
            raise ExportError(
                f"{folder / MANIFEST} is of format {manifest.get('format')} "
                f"{manifest.get('format_version')}, this version reads {FORMAT} up to {FORMAT_VERSION}"
            )
        available = onnxruntime.get_available_providers()
        if providers is None:
            providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
        missing = [p for p in providers if (p if isinstance(p, str) else p[0]) not in available]
        if missing:
            raise ExportError(
                f"onnxruntime has no {missing[0]} here (it has {', '.join(available)}); install "
                "onnxruntime-gpu for CUDA"
            )
        sessions = {
            role: onnxruntime.InferenceSession(
                str(folder / entry["file"]), sess_options=session_options, providers=list(providers)
            )
            for role, entry in manifest["files"].items()
        }
        return cls(manifest, sessions)

    # .. plain calls

    def __call__(self, **inputs: Any) -> dict[str, Array]:
        """Run a model of one graph: arrays by name -> outputs by name."""
        if "model" not in self.sessions or self.generation is not None:
            raise ExportError(f"a {self.manifest['kind']} model is run with generate(), or file by file with run()")
        return self.run("model", inputs)

    def run(self, role: str, inputs: dict[str, Any]) -> dict[str, Array]:
        """Run one file by its role in the manifest.

        Raises:
            ExportError: an input is missing or unknown, or does not pass a check of the model.
        """
        wanted = self._inputs[role]
        wrong = sorted(set(wanted) ^ set(inputs))
        if wrong:
            raise ExportError(f"{role} takes {', '.join(wanted)}; missing or unknown: {', '.join(wrong)}")
        feed: dict[str, Array] = {
            name: np.ascontiguousarray(np.asarray(value), _DTYPES[wanted[name].type]) for name, value in inputs.items()
        }
        results = dict(zip(self._outputs[role], self.sessions[role].run(None, feed), strict=True))
        for check in self.manifest["files"][role].get("checks", ()):  # a file cannot raise; it says what it found
            if not np.all(results.pop(check["output"])):
                raise ExportError(f"{role}: {check['message']}")
        return results

    # .. generation

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        suppress_tokens: Sequence[int] | None = None,
        on_logits: Callable[[Array], None] | None = None,
        **images: Any,
    ) -> Array:
        """Generate tokens, greedily or by sampling.

        Args:
            input_ids: ``[B, S]``; rows of different length are padded on the left.
            attention_mask: ``[B, S]``, 0 for padding; default: everything counts.
            max_new_tokens: at most so many; fewer when every row has ended.
            do_sample, temperature, top_k, top_p, seed: sampling; ``top_k=0`` and ``top_p=1`` switch a limit off.
            eos_token_id, pad_token_id, suppress_tokens: default: as in the generation configuration of the model.
            on_logits: is called with the logits ``[B, V]`` of each step, before anything is changed in them.
            images: inputs of the vision encoder (``pixel_values``, ...); one feature for each placeholder token.

        Returns:
            int64 ``[B, S + T]``: the prompt and the new tokens, ``pad_token_id`` after the end of a row.
        """
        config = self.generation
        if config is None:
            raise ExportError(f"a {self.manifest['kind']} model does not generate; call it")
        ids = np.asarray(input_ids, np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, np.int64)
        if ids.ndim != 2 or mask.shape != ids.shape:
            raise ExportError(f"input_ids and attention_mask are [B, S], found {ids.shape} and {mask.shape}")
        if (mask[:, -1] == 0).any():
            raise ExportError("rows are padded on the right; generation continues at the end: pad on the left")
        eos = np.atleast_1d(config["eos_token_id"] if eos_token_id is None else eos_token_id)
        eos = np.array([e for e in eos if e is not None and e >= 0], np.int64)
        pad = config["pad_token_id"] if pad_token_id is None else pad_token_id
        pad = pad if pad is not None else int(eos[0]) if len(eos) else 0
        banned = config["suppress_tokens"] if suppress_tokens is None else suppress_tokens
        random = np.random.default_rng(seed)

        state = _Decoder(self, config, ids.shape[0])
        logits = state.prefill(ids, mask, images)
        done = np.zeros(len(ids), bool)
        rows = [ids]
        for step in range(max_new_tokens):
            if on_logits is not None:
                on_logits(logits.copy())
            scores = logits.astype(np.float32)
            if banned:
                scores[:, list(banned)] = -np.inf
            new = _sample(scores, temperature, top_k, top_p, random) if do_sample else scores.argmax(-1)
            new = np.where(done, pad, new)
            rows.append(new[:, None])
            done |= np.isin(new, eos)
            if done.all() or step + 1 == max_new_tokens:
                break
            logits = state.step(new[:, None])
        return np.concatenate(rows, 1)


def _sample(scores: Array, temperature: float, top_k: int, top_p: float, random: np.random.Generator) -> Array:
    scores = scores / max(temperature, 1e-6)
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, -1)
    weights = np.exp(ranked - ranked[:, :1])
    if top_k:
        weights[:, top_k:] = 0
    weights /= weights.sum(-1, keepdims=True)
    if top_p < 1:  # the smallest set whose weight reaches top_p
        weights[np.cumsum(weights, -1) - weights >= top_p] = 0
        weights /= weights.sum(-1, keepdims=True)
    place = (np.cumsum(weights, -1) < random.random((len(weights), 1))).sum(-1).clip(max=weights.shape[1] - 1)
    return np.take_along_axis(order, place[:, None], -1)[:, 0]


class _Decoder:
    """Keys and values of one generation, and the positions that they stand for."""

    def __init__(self, model: OnnxModel, config: dict[str, Any], batch: int) -> None:
        self.model, self.config = model, config
        self.inputs, self.outputs = model._inputs["decoder"], model._outputs["decoder"]
        self.past: dict[str, Array] = {}
        for name, value in self.inputs.items():
            if name.startswith("past_key_values."):
                self.past[name] = np.zeros((batch, value.shape[1], 0, value.shape[3]), _DTYPES[value.type])
            elif name.startswith("past_positions."):
                self.past[name] = np.zeros((batch, 0), np.int64)
        self.mask = np.zeros((batch, 0), np.int64)

    def prefill(self, ids: Array, mask: Array, images: dict[str, Any]) -> Array:
        extra: dict[str, Array] = {}
        token = self.config.get("image_token_id")
        visual = np.zeros(ids.shape, bool) if token is None else ids == token
        if images:
            if "vision_encoder" not in self.model.sessions:
                raise ExportError(f"this export takes no {', '.join(images)}")
            extra = self.model.run("vision_encoder", images)
            features = extra["image_features"] = extra["image_features"].reshape(-1, extra["image_features"].shape[-1])
            if len(features) != visual.sum():
                raise ExportError(
                    f"{visual.sum()} placeholder tokens ({token}) in input_ids, and {len(features)} "
                    "image features; the prompt needs one placeholder for each feature"
                )
        elif visual.any():
            raise ExportError(f"input_ids hold {visual.sum()} placeholders of images ({token}), and no image is given")
        return self._run(ids, mask, visual, extra)

    def step(self, ids: Array) -> Array:
        return self._run(ids, np.ones_like(ids), np.zeros(ids.shape, bool), {})

    def _run(self, ids: Array, mask: Array, visual: Array, extra: dict[str, Array]) -> Array:
        self.mask = np.concatenate([self.mask, mask], 1)
        positions = np.maximum(np.cumsum(self.mask, 1) - 1, 0)[:, -ids.shape[1] :]
        feed: dict[str, Array] = {**self.past, "attention_mask": self.mask, "position_ids": positions}
        if "embed_tokens" in self.model.sessions:
            embeds = self.model.run("embed_tokens", {"input_ids": ids})["inputs_embeds"]
            if "visual_mask" in self.inputs:
                width = self.inputs["image_features"].shape[1]
                feed["visual_mask"] = visual
                feed["image_features"] = extra.get("image_features", np.zeros((0, width), embeds.dtype))
                if "image_scores" in self.inputs:
                    feed["image_scores"] = extra.get("image_scores", np.zeros(0, np.float32))
            elif extra:
                embeds[visual] = extra["image_features"]
            feed["inputs_embeds"] = embeds
        else:
            feed["input_ids"] = ids
        results = self.model.run("decoder", {name: feed[name] for name in self.inputs})
        for name in self.past:
            self.past[name] = results[name.replace("past_key_values.", "present.").replace("past_", "present_")]
        return results["logits"][:, -1]


_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}

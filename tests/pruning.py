"""Helpers of the oracle tests: an optimized model runs, what it kept is read from the record, the dense model hides
what it dropped.

The one rule for closeness is :func:`close`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tokcompile
from tests import oracle
from tests.zoo.vlm import Case
from tokcompile.runtime.recording import Recording

#: fp32: largest difference allowed, relative to the magnitude of what is compared.
TOLERANCE = 1e-5

RANDOM = [{"pass": "random", "params": {"keep": 0.25}}]
#: Two cuts in one graph: at the merge point, and after layer 1 (the layers behind it have no visual tokens).
TODRE = [{"pass": "todre", "params": {"keep": 0.25, "drop_layer": 1}}]
POOL = [{"pass": "pool", "params": {"keep": 0.25}}]


def recipe(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"recipe_version": 1, "description": "of a test", "steps": list(steps)}


def optimized(model: Any, steps: Sequence[Mapping[str, Any]], lowering: str = "eager", **kwargs: Any) -> Any:
    return tokcompile.optimize(model, recipe(steps), lowering=lowering, **kwargs)


def error(found: Tensor, wanted: Tensor) -> float:
    """``max|a - b| / max(1, max|b|)``."""
    assert found.shape == wanted.shape, f"{tuple(found.shape)} against {tuple(wanted.shape)}"
    assert torch.isfinite(found).all()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def close(found: Tensor | Sequence[Tensor], wanted: Tensor | Sequence[Tensor]) -> None:
    """Equal to 1e-5 of the magnitude, in each tensor (each step of a generation)."""
    if isinstance(found, Tensor):
        found, wanted = [found], [wanted]  # type: ignore[list-item]
    errors = [error(a, b) for a, b in zip(found, wanted, strict=True)]
    _worst.append(max(errors))
    assert max(errors) <= TOLERANCE, f"relative error of each step: {[f'{e:.1e}' for e in errors]}"


_worst: list[float] = []


def hidden(recording: Recording, length: int, layers: int, start: int = 0) -> oracle.Dropped:
    """layer -> ``[B, length]``: the prompt tokens that the recorded cuts dropped above that layer."""
    dropped: oracle.Dropped = {}
    for entry in recording.kept:
        rows = torch.ones(entry.indices.shape[0], length + 1, dtype=torch.bool)
        rows.scatter_(1, torch.where(entry.indices >= 0, entry.indices, length), False)
        dropped |= oracle.hide_from(entry.layer, rows[:, :length], layers)
    return dropped


def generate(
    model: nn.Module, inputs: dict[str, Tensor], max_new_tokens: int = 8, **kwargs: Any
) -> tuple[oracle.Run, Recording]:
    """Generation with an optimized model, and what it kept."""
    with torch.no_grad(), tokcompile.record(model) as recording:
        out = model.generate(  # type: ignore[operator]
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, output_logits=True, **kwargs
        )
    return oracle.Run(list(out.logits), out.sequences[:, inputs["input_ids"].shape[1] :]), recording


def run(
    model: nn.Module, case: Case, inputs: dict[str, Tensor], max_new_tokens: int = 8, **kwargs: Any
) -> tuple[oracle.Run, Recording]:
    """As :func:`generate`; a model without ``generate`` is called once, and its logits are those of the last token."""
    if case.has_generate:
        return generate(model, inputs, max_new_tokens, **kwargs)
    with torch.no_grad(), tokcompile.record(model) as recording:
        logits = model(**inputs)[:, -1]
    return oracle.Run([logits], logits.argmax(-1, keepdim=True)), recording


def check(model: nn.Module, case: Case, inputs: dict[str, Tensor], max_new_tokens: int = 8, **kwargs: Any) -> Recording:
    """``model`` (optimized) equals the dense model that hides what ``model`` dropped, at every step."""
    found, recording = run(model, case, inputs, max_new_tokens, **kwargs)
    dropped = hidden(recording, inputs["attention_mask"].shape[1], len(case.decoder_layers))
    wanted = oracle.masked_run(case, inputs, dropped, max_new_tokens if case.has_generate else 1, **kwargs)
    close(found.logits, wanted.logits)
    assert torch.equal(found.tokens, wanted.tokens) or not case.has_generate
    return recording

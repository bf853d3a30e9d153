"""Models of one graph: vision encoders, text encoders, classifiers, any module of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.errors import ExportError
from tokcompile.onnx_export.lowering import Stage, doubled


class SingleGraph(nn.Module):
    """``forward`` by name; its tensors by name."""

    def __init__(self, model: nn.Module, constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.constants = model, dict(constants)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return named_outputs(self.model(**inputs, **self.constants))


def named_outputs(result: Any) -> dict[str, Tensor]:
    """The tensors of what a model returned: a mapping by its names, anything else as ``output``, ``output_1``, ..."""
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        found = {name: value for name, value in result.items() if isinstance(value, Tensor)}
    elif isinstance(result, (tuple, list)):
        found = {f"output_{i}" if i else "output": value for i, value in enumerate(result) if isinstance(value, Tensor)}
    else:
        found = {}
    if not found:
        raise ExportError(f"the model returned {type(result).__name__} without a tensor in it; nothing to export")
    return found


def single_stage(model: nn.Module, inputs: Mapping[str, Any], axes: Mapping[str, Mapping[int, str]] | None) -> Stage:
    """The stage of a model that is one graph."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}
    if not tensors:
        raise ExportError("inputs hold no tensor; give example inputs by name, as for model(**inputs)")
    found = default_axes(tensors) if axes is None else {n: dict(axes.get(n, {})) for n in tensors}
    unknown = set(axes or ()) - set(tensors)
    if unknown:
        raise ExportError(f"axes name {sorted(unknown)}, the inputs are {sorted(tensors)}")
    with torch.no_grad():
        outputs = named_outputs(model(**inputs))
    return Stage("model", SingleGraph(model, constants), doubled(tensors, found), found, {n: {} for n in outputs})


def default_axes(tensors: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Batch and sequence: dimension 0 of every input, and dimension 1 of whole numbers ``[B, S]`` and embeddings.

    Inputs whose first sizes differ (the texts and the pictures of CLIP) get batch axes of their own.
    """
    found: dict[str, dict[int, str]] = {}
    first = next((t.shape[0] for t in tensors.values() if t.dim()), None)
    for name, value in tensors.items():
        axes: dict[int, str] = {}
        if value.dim():
            axes[0] = "batch_size" if value.shape[0] == first else f"{name}_batch_size"
        if (value.dim() == 2 and not value.is_floating_point()) or name == "inputs_embeds":
            axes[1] = "sequence_length"
        found[name] = axes
    return found

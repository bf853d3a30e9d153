"""The file that a broken-off calibration goes on from."""

from __future__ import annotations

import hashlib
import json
import os
from os import PathLike
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tokcompile.errors import CalibrationError
from tokcompile.plan.observed import Observed
from tokcompile.recipes import Recipe

# .. the resume file: running sums as safetensors, everything else as JSON in its header


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]


def save_progress(path: str | PathLike[str], observed: Observed, recipe: Recipe, count: int) -> None:
    tensors, entries = {}, []
    for index, regions in observed.seen.items():
        for key, seen in regions.items():
            numbers = {}
            for name, value in seen.sums.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{index}/{key}/{name}"] = value.contiguous()
                else:
                    numbers[name] = value
            entries.append({"step": index, "key": key, "numbers": numbers})
    meta = {"recipe": _digest(recipe), "count": str(count), "entries": json.dumps(entries)}
    temporary = Path(f"{os.fspath(path)}.part")
    save_file(tensors, temporary, metadata=meta)
    os.replace(temporary, path)


def load_progress(path: str | PathLike[str] | None, observed: Observed, recipe: Recipe) -> int:
    """Take over what a resume file holds: -> how many items it has seen."""
    if path is None or not Path(path).exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            if meta.get("recipe") != _digest(recipe):
                raise CalibrationError(
                    f"{os.fspath(path)} was written for another recipe; delete it, or name another file"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        for entry in json.loads(meta["entries"]):
            prefix = f"{entry['step']}/{entry['key']}/"
            sums = {
                **entry["numbers"],
                **{n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
            }
            observed.resumed[entry["step"], entry["key"]] = sums
        return int(meta["count"])
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(f"{os.fspath(path)} is not a file that calibrate wrote ({error}); delete it") from error

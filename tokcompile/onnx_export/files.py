"""What is written: ONNX files, weights beside them, the manifest. All of it or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from tokcompile.errors import ExportError
from tokcompile.onnx_export.lowering import Lowered
from tokcompile.onnx_export.serving import MANIFEST

#: Weights go into a file of their own above this size: one protobuf message holds at most 2 GiB.
INLINE_BYTES = 1 << 30


@contextlib.contextmanager
def complete_folder(out_dir: str | os.PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A folder beside ``out_dir`` that takes its name when everything in it is there and checked.

    Raises:
        ExportError: ``out_dir`` holds something else than an earlier export.
    """
    target = Path(out_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        ours = (target / MANIFEST).is_file()
        if not overwrite or not ours:
            raise ExportError(
                f"{target} exists"
                + (
                    " and holds other files; give another folder"
                    if not ours
                    else "; give another folder, or pass overwrite=True"
                )
            )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield part
        part.chmod(0o777 & ~_umask())
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old / target.name)
        os.replace(part, target)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def save_model(lowered: Lowered, folder: Path, relative: str, inline_bytes: int = INLINE_BYTES) -> dict[str, Any]:
    """Write one model; its entry in the manifest."""
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {
        id(v.const_value): v.const_value.nbytes
        for v in lowered.model.graph.initializers.values()
        if v.const_value is not None
    }
    external = sum(weights.values()) > inline_bytes
    data = f"{path.name}_data" if external else None
    ir.save(lowered.model, path, external_data=data, size_threshold_bytes=1024)
    return {
        "file": relative,
        "external_data": f"{Path(relative).parent / data}".removeprefix("./") if data else None,
        "weights_bytes": sum(weights.values()),
        "nodes": lowered.nodes,
        "inputs": [_value(v) for v in lowered.model.graph.inputs],
        "outputs": [_value(v) for v in lowered.model.graph.outputs if v.name not in lowered.checks],
        "checks": [{"output": name, "message": check.portable()} for name, check in lowered.checks.items()],
    }


def _value(value: Any) -> dict[str, Any]:
    shape = None if value.shape is None else [d if isinstance(d, int) else d.value for d in value.shape]
    return {"name": value.name, "dtype": value.dtype.numpy().name, "shape": shape}


def versions() -> dict[str, str]:
    """Versions of what made the files."""
    found = {"torch": str(torch.__version__)}
    for name in ("tokcompile", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def save_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def save_configuration(model: torch.nn.Module, folder: Path) -> None:
    """``config.json`` and ``generation_config.json``, which other runtimes read, where the model has them."""
    for attribute, name in (("config", "config.json"), ("generation_config", "generation_config.json")):
        config: Any = getattr(model, attribute, None)
        if hasattr(config, "to_diff_dict"):
            values = config.to_dict() if attribute == "config" else config.to_diff_dict()
            (folder / name).write_text(json.dumps(_clean(values), indent=1, default=str) + "\n")


def _clean(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: _clean(v) for k, v in values.items() if k not in ("_name_or_path", "name_or_path")}
    if isinstance(values, (list, tuple)):
        return [_clean(v) for v in values]
    return str(values).removeprefix("torch.") if isinstance(values, torch.dtype) else values

"""Save an optimized model to a folder and load it again: safetensors and JSON, nothing that runs.

    tokcompile.json        format and versions, recipe, facts of the prepared state, size and SHA-256 of the other files
    report.json            what was found and changed, as :meth:`tokcompile.Report.to_dict` gives it
    state.safetensors      tensors of the prepared state (where a pass made some)
    buffers.safetensors    buffers that the model's own format leaves out (where it has some)
    model/                 the dense model, by its own ``save_pretrained`` (models of transformers), or
    weights.safetensors    its state dict (any other module)

A folder is written beside its place and moved there when it is complete. Loading reads data only: the recipe is checked
like any recipe, its passes have to be installed, and a model class is taken from transformers alone.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokcompile.api import session_of
from tokcompile.errors import SavedModelError
from tokcompile.save.changes import changed
from tokcompile.save.format import (
    ALIASES,
    BUFFERS,
    FORMAT,
    MANIFEST,
    MODEL,
    MODEL_FILES,
    PAGE,
    REPORT,
    STATE,
    WEIGHTS,
    base_state,
    first_of,
    form_of,
    manifest_digest,
    plain_json,
    present,
    quiet,
    read_manifest,
    sha256,
    state_name,
    tensor_sha256,
    transformers_class,
    write_json,
)
from tokcompile.state import NAMESPACE, PreparedState
from tokcompile.version import __version__


def save_pretrained(model: nn.Module, folder: str | PathLike[str], *, weights: bool = True) -> Path:
    """Write an optimized model to ``folder``: complete, or not at all.

    Args:
        model: what :func:`tokcompile.optimize` returned.
        folder: a new or empty folder, or one that this function wrote earlier, which is replaced.
        weights: False leaves the weights of the dense model out (their checksums are kept), so that a variant of a
            large model takes little space; :func:`load` is then given the model.

    Returns:
        The folder.

    Raises:
        TokcompileError: ``model`` is not an optimized one.
        SavedModelError: the folder holds something else, or a tensor cannot be written.
    """
    session, target = session_of(model), Path(folder)
    assert session.recipe is not None
    check_place(target)
    kind = "none" if not weights else "transformers" if _of_transformers(type(model)) else "state_dict"
    made = target.parent / f".{target.name}.{secrets.token_hex(4)}.part"
    try:
        made.mkdir(parents=True)
    except OSError as error:
        raise SavedModelError(f"{target}: cannot be written: {error.strerror}") from None
    try:
        write_json(made / REPORT, session.report.to_dict())
        manifest: dict[str, Any] = {
            "format_version": FORMAT,
            "versions": {
                "tokcompile": __version__,
                "torch": torch.__version__,
                "transformers": importlib.import_module("transformers").__version__,
                "python": platform.python_version(),
            },
            "recipe": {"name": session.recipe.name, "data": session.recipe.to_dict()},
            "model": {"kind": kind, "class": type(model).__name__, "module": type(model).__module__},
            "changed": changed(model),
            "state": _write_state(made / STATE, session.prepared),
        }
        _write_model(made, model, kind, manifest["model"])
        manifest["files"] = {
            file.relative_to(made).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
            for file in sorted(made.rglob("*"))
            if file.is_file()
        }
        write_json(made / MANIFEST, manifest | {"sha256": manifest_digest(manifest)})
        _put(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


# .. writing


def check_place(target: Path) -> None:
    """Raise :class:`SavedModelError` unless :func:`save_pretrained` may write to ``target``."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise SavedModelError(f"{target}: is no folder; name another place")
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise SavedModelError(f"{target}: cannot be written: {above} is not a folder that you may write to")
    if not target.exists() or not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file():
        raise SavedModelError(f"{target}: is not empty, and was not written by save_pretrained; name another folder")
    foreign = sorted(present(target) - {MANIFEST, PAGE} - set(read_manifest(target)["files"]))
    if foreign:
        raise SavedModelError(
            f"{target}: would be replaced, but holds {foreign[0]}, which save_pretrained did not "
            "write; move it, or name another folder"
        )


def _put(made: Path, target: Path) -> None:
    """Move the complete folder to its place; what was there before comes back if that fails."""
    old = made.with_suffix(".old")
    replaces = target.exists()
    if replaces:
        os.rename(target, old)
    try:
        os.rename(made, target)
    except OSError:
        if replaces:
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_state(path: Path, state: PreparedState | None) -> list[dict[str, Any]]:
    """Write the tensors of the prepared state, and give what JSON can hold of it."""
    tensors: dict[str, Tensor] = {}
    entries = []
    for (pass_name, key), facts in (state.facts if state is not None else {}).items():
        assert state is not None
        found = state.tensors(pass_name, key)
        try:
            kept = json.loads(json.dumps(facts, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise SavedModelError(
                f"{pass_name}: the facts of {key or 'its region'} are no JSON values: {error}"
            ) from None
        entries.append(
            {
                "pass": pass_name,
                "key": key,
                "facts": kept,
                "tensors": {
                    name: {"parameter": isinstance(t, nn.Parameter), "requires_grad": t.requires_grad}
                    for name, t in found.items()
                },
            }
        )
        tensors |= {state_name(pass_name, key, name): t for name, t in found.items()}
    if tensors:
        _write_tensors(path, tensors)
    return entries


def _write_model(made: Path, model: nn.Module, kind: str, entry: dict[str, Any]) -> None:
    """Write the dense model; ``entry`` says how to read it."""
    weights = base_state(model)
    if kind == "none":
        entry["weights"] = {name: {**form_of(t), "sha256": tensor_sha256(t)} for name, t in weights.items()}
    elif kind == "state_dict":
        _write_tensors(made / WEIGHTS, weights)
    else:
        floating = {name: t.dtype for name, t in weights.items() if t.is_floating_point()}
        entry["dtypes"] = (
            {name: plain_json(dtype) for name, dtype in floating.items()} if len(set(floating.values())) > 1 else {}
        )
        entry["attention"] = _attention(model.config)
        try:
            with quiet():
                type(model).save_pretrained(model, made / MODEL, state_dict=weights)  # type: ignore[attr-defined]
        except Exception as error:  # a generation config that transformers itself refuses, say
            raise SavedModelError(f"{type(model).__name__}.save_pretrained failed: {first_of(error)}") from error
        odd = [f.name for f in (made / MODEL).iterdir() if not MODEL_FILES.fullmatch(f.name)]
        if odd:
            raise SavedModelError(
                f"{type(model).__name__}.save_pretrained wrote {odd[0]}, which load would not read; "
                "save with weights=False, and give the model to load"
            )
    hidden = _buffers(model) if kind != "none" else {}
    if hidden:
        _write_tensors(made / BUFFERS, hidden)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that ``state_dict`` leaves out. ``.to(dtype)`` converts them, so they are not what __init__ makes."""
    kept = model.state_dict()
    return {name: b for name, b in model.named_buffers() if name not in kept and not name.startswith(f"{NAMESPACE}.")}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """safetensors, a tensor that has several names once."""
    first: dict[tuple[Any, ...], str] = {}
    aliases, stored, storages = dict[str, str](), dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        plain = type(tensor) in (Tensor, nn.Parameter)
        if not plain or tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            what = type(tensor).__name__ if not plain else "meta" if tensor.is_meta else str(tensor.layout)
            raise SavedModelError(f"{name}: a tensor of kind {what} cannot be written to safetensors")
        same = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.device,
        )
        if tensor.numel() and same in first:
            aliases[name] = first[same]
            continue
        first[same] = name
        data = tensor.detach().contiguous()
        storage = data.untyped_storage()
        # views of one storage (parts of a fused weight, say) have to be apart
        stored[name] = data.clone() if storage.data_ptr() in storages or storage.nbytes() != data.nbytes else data
        storages.add(storage.data_ptr())
    save_file(stored, path, metadata={ALIASES: json.dumps(aliases)})


def _of_transformers(kind: type) -> bool:
    """Whether the class can be found in transformers by its name."""
    from transformers import PreTrainedModel

    return issubclass(kind, PreTrainedModel) and transformers_class(kind.__name__) is kind


def _attention(config: Any) -> dict[str, str]:
    """Attention implementation of a configuration ("") and of those inside it."""
    found = {"": config._attn_implementation}
    found |= {
        name: getattr(config, name)._attn_implementation
        for name in config.sub_configs
        if getattr(config, name, None) is not None
    }
    return {name: value for name, value in found.items() if value is not None}


# .. small things

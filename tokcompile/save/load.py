"""Read a saved model: :func:`load`, and :func:`restore_dense`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tokcompile.api import optimize, session_of
from tokcompile.errors import RecipeError, SavedModelError, TokcompileError
from tokcompile.recipes import Recipe
from tokcompile.registry import get_pass
from tokcompile.save.changes import changed
from tokcompile.save.format import (
    ALIASES,
    BUFFERS,
    MANIFEST,
    MODEL,
    MODEL_FILES,
    REPORT,
    STATE,
    WEIGHTS,
    base_state,
    dtype_of,
    first_of,
    form_of,
    present,
    quiet,
    read_manifest,
    sha256,
    state_name,
    tensor_sha256,
    transformers_class,
)
from tokcompile.state import PreparedState


def load(
    folder: str | PathLike[str],
    model: nn.Module | str | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    on_no_match: str = "error",
    lowering: str = "inductor",
    verify: bool = True,
) -> nn.Module:
    """The model that :func:`save_pretrained` wrote, in eval mode, on the CPU.

    Args:
        model: the dense model, for folders without a model of transformers in them: a module, which takes the saved
            weights (or, where they were left out, is checked to have them), or ``"module:function"`` (or
            ``"file.py:function"``) that returns one (or ``(model, inputs)``). Your own choice, never the folder's.
        inputs, on_no_match, lowering: as for :func:`tokcompile.optimize`.
        verify: compare the checksums of all files first (reads each file once more).

    Returns:
        An optimized model. ``model``, where it is given, becomes that model.

    Raises:
        SavedModelError: no saved model, one that is damaged, of a newer format, or that does not fit ``model``.
        RecipeError: a pass of its recipe is not installed.
        NoMatchError: as for :func:`tokcompile.optimize`.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    _check_files(place, manifest["files"], verify)
    try:
        recipe = Recipe.load(manifest["recipe"]["data"])
    except RecipeError as error:
        raise RecipeError(
            f"{place}: its recipe cannot be used here:\n{error}\nInstall the package that brings the "
            "pass, or load its file with tokcompile.registry.load_file"
        ) from None
    recipe = recipe.named(str(manifest["recipe"]["name"]))
    state = _read_state(place / STATE, manifest["state"])
    dense = _read_model(place, manifest["model"], model)
    loaded = optimize(
        dense, recipe, inputs=inputs, calibration=state, on_no_match=on_no_match, lowering=lowering, inplace=True
    )
    session_of(loaded).note_changed({str(name): str(why) for name, why in manifest["changed"].items()})
    return loaded


def restore_dense(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the original model: ``Original.load_state_dict(restore_dense(optimized))``.

    Prepared state stands beside the weights that it was made from and does not change them, so every conversion can be
    undone. What cannot be undone is a change of the weights themselves, by training or by ``.half()``.

    Returns:
        name -> tensor, on the memory of ``model``.

    Raises:
        TokcompileError: ``model`` is not an optimized one, or weights were changed since; their original values are
            known to nobody then.
    """
    session_of(model)
    lost = changed(model)
    if lost:
        name, why = next(iter(lost.items()))
        raise TokcompileError(
            f"the original weights are gone: {len(lost)} of {len(base_state(model))} tensors were changed after "
            f"tokcompile.optimize, first {name} ({why}); load the original model again, or take model.state_dict() for "
            "the weights as they are now"
        )
    return base_state(model)


def _check_files(place: Path, files: Mapping[str, Mapping[str, Any]], verify: bool) -> None:
    for name, entry in files.items():
        if name not in (REPORT, STATE, BUFFERS, WEIGHTS) and not (
            name.startswith(f"{MODEL}/") and MODEL_FILES.fullmatch(name[len(MODEL) + 1 :])
        ):
            raise SavedModelError(f"{place}: lists {name!r}, which save_pretrained does not write")
        file = place / name
        if not file.is_file():
            raise SavedModelError(f"{file}: is missing; the folder was not copied whole")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise SavedModelError(
                f"{file}: has {size:,} bytes, not the {entry['bytes']:,} that were written; it was "
                "cut off or replaced: copy it again"
            )
        if verify and sha256(file) != entry["sha256"]:
            raise SavedModelError(
                f"{file}: its checksum does not fit: it was changed or damaged after saving; copy it "
                "again, or save the model anew"
            )
    extra = sorted(name for name in present(place) if name.startswith(f"{MODEL}/") and name not in files)
    if extra:  # transformers would read some of what may lie here
        raise SavedModelError(f"{place / extra[0]}: was not written by save_pretrained; remove it")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            aliases = json.loads((file.metadata() or {}).get(ALIASES, "{}"))
        return tensors | {name: tensors[same] for name, same in aliases.items()}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SavedModelError(f"{path}: cannot be read: {first_of(error)}") from None


def _read_state(path: Path, entries: Iterable[Mapping[str, Any]]) -> PreparedState | None:
    entries = list(entries)
    if not entries:
        return None
    stored = _read_tensors(path) if any(entry["tensors"] for entry in entries) else {}
    state, made = PreparedState(), dict[int, Tensor]()
    for entry in entries:
        get_pass(entry["pass"])
        tensors = {}
        for name, how in entry["tensors"].items():
            full = state_name(entry["pass"], entry["key"], name)
            if full not in stored:
                raise SavedModelError(f"{path}: holds no {full}")
            data = stored[full]
            tensors[name] = (
                made.setdefault(id(data), nn.Parameter(data, how["requires_grad"])) if how["parameter"] else data
            )
        try:
            state.put(entry["pass"], entry["key"], tensors, entry["facts"])
        except (KeyError, TypeError, AttributeError) as error:  # a name that no module can have
            raise SavedModelError(f"{path}: {first_of(error)}") from None
    return state


def _read_model(place: Path, entry: Mapping[str, Any], given: nn.Module | str | None) -> nn.Module:
    kind, name = entry["kind"], entry["class"]
    if kind == "transformers":
        if given is not None:
            raise SavedModelError(f"{place}: holds a {name} of transformers with its weights; leave model= out")
        model = _from_transformers(place / MODEL, entry)
    else:
        if given is None:
            has = (
                "does not hold the weights of the dense model"
                if kind == "none"
                else "holds weights, but not the class that they belong to"
            )
            raise SavedModelError(
                f"{place}: {has}; call load(folder, model=...) with a {entry.get('module')}.{name} "
                "as it was before optimize, or with 'module:function' that makes one"
            )
        model = _given(given)
        if kind == "state_dict":
            _fill(model, _read_tensors(place / WEIGHTS), str(place / WEIGHTS))
        else:
            _compare(model, entry["weights"], place)
    if (place / BUFFERS).is_file():
        own = dict(model.named_buffers())
        for key, value in _read_tensors(place / BUFFERS).items():
            if key in own:
                owner, _, last = key.rpartition(".")
                model.get_submodule(owner)._buffers[last] = value.to(own[key].device)
    return model.eval()


def _given(given: Any) -> nn.Module:
    if isinstance(given, str):
        from tokcompile.model_source import call_function

        module, colon, function = given.rpartition(":")
        if not colon:
            raise SavedModelError(f"model={given!r}: write 'module:function', or give the model itself")
        given = call_function(module, function)
        given = given[0] if isinstance(given, tuple) and given else given
    if not isinstance(given, nn.Module):
        raise SavedModelError(
            f"model= should be a torch.nn.Module, or 'module:function' that returns one, not {type(given).__name__}"
        )
    return given


def _fill(model: nn.Module, saved: Mapping[str, Tensor], where: str) -> None:
    """Put the saved weights into ``model``, in the dtype that they have."""
    own = model.state_dict()
    _check_names(own, {name: form_of(t) for name, t in saved.items()}, where, dtypes=False)
    for name, tensor in own.items():  # copy_ would convert them silently
        if tensor.dtype != saved[name].dtype:
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            if last in module._parameters:
                parameter = module._parameters[last]
                assert parameter is not None
                parameter.data = parameter.data.to(saved[name].dtype)
            elif last in module._buffers:
                module._buffers[last] = tensor.to(saved[name].dtype)
    model.load_state_dict(dict(saved))


def _compare(model: nn.Module, saved: Mapping[str, Mapping[str, Any]], place: Path) -> None:
    """Raise unless ``model`` has the very weights that the folder was made with."""
    own = model.state_dict()
    _check_names(own, saved, str(place), dtypes=True)
    for name, tensor in own.items():
        if tensor_sha256(tensor) != saved[name]["sha256"]:
            raise SavedModelError(
                f"{place}: was saved for other weights than those of the model that was given; the "
                f"first that differs is {name}"
            )


def _check_names(
    own: Mapping[str, Tensor], saved: Mapping[str, Mapping[str, Any]], where: str, *, dtypes: bool
) -> None:
    missing, more = [n for n in own if n not in saved], [n for n in saved if n not in own]
    if missing or more:
        which = f"it has no {missing[0]}" if missing else f"the model has no {more[0]}"
        raise SavedModelError(f"{where}: belongs to another model than the one that was given: {which}")
    for name, tensor in own.items():
        form, wanted = form_of(tensor), saved[name]
        for part in ("shape", "dtype") if dtypes else ("shape",):
            if form[part] != wanted[part]:
                raise SavedModelError(
                    f"{where}: belongs to another model than the one that was given: the {part} of "
                    f"{name} is {wanted[part]} here and {form[part]} there"
                )


def _from_transformers(folder: Path, entry: Mapping[str, Any]) -> nn.Module:
    """The dense model, by the class that transformers has under this name, from this folder only."""
    model_class: Any = transformers_class(entry["class"])
    if model_class is None:
        raise SavedModelError(
            f"{folder}: transformers has no model class {entry['class']!r}; it was saved with "
            "another version of transformers"
        )
    try:
        _refuse_code(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder / "config.json")
        attention = {str(k): str(v) for k, v in entry["attention"].items()}
        _refuse_code({"attn_implementation": attention}, folder.parent / MANIFEST)
        dtypes = {str(k): dtype_of(v) for k, v in entry["dtypes"].items()}
        # one dtype for all loses bits of the wider ones, so the widest is read and narrowed tensor by tensor
        dtype = max(dtypes.values(), key=lambda d: torch.finfo(d).bits) if dtypes else "auto"
        with quiet():
            model: nn.Module = model_class.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention, local_files_only=True, use_safetensors=True
            )
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in dtypes and tensor.dtype != dtypes[name]:
                tensor.data = tensor.data.to(dtypes[name])
    except SavedModelError:
        raise
    except Exception as error:  # whatever files and configurations can do wrong
        raise SavedModelError(
            f"{folder}: {entry['class']} cannot be loaded: {type(error).__name__}: {first_of(error)}"
        ) from error
    return model


def _refuse_code(config: Any, where: Path) -> None:
    """A configuration can name code on a hub; nothing of the kind is followed."""
    stack: list[tuple[str, Any]] = [("", config)]
    while stack:
        key, value = stack.pop()
        named = "implementation" in key and isinstance(value, str) and not re.fullmatch(r"\w+", value, re.ASCII)
        if named or (key in ("auto_map", "custom_pipelines") and value):
            raise SavedModelError(
                f"{where}: {key or 'implementation'} = {value!r} names code outside of transformers, "
                "which load does not run"
            )
        if isinstance(value, dict):
            stack += [(key if "implementation" in key else str(k), v) for k, v in value.items()]
        elif isinstance(value, list):
            stack += [(key, v) for v in value]

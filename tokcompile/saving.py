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

import contextlib
import hashlib
import importlib
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokcompile.api import optimize, session_of
from tokcompile.errors import RecipeError, SavedModelError, TokcompileError
from tokcompile.recipes import Recipe
from tokcompile.registry import get_pass
from tokcompile.state import NAMESPACE, PreparedState, origin

#: Version of the folder format that this release writes, and the newest that it reads.
FORMAT = 1
#: Format version -> what turns its manifest into one of the next version. A version without an entry cannot be read.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

MANIFEST, REPORT, STATE, BUFFERS, WEIGHTS, MODEL = (
    "tokcompile.json", "report.json", "state.safetensors", "buffers.safetensors", "weights.safetensors", "model")
PAGE = "report.html"  # may lie beside them for readers; neither hashed nor read
#: What transformers may find in the folder of the dense model: no adapters, no pickles, no Python files.
_MODEL_FILES = re.compile(r"config\.json|generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors"
                          r"|model\.safetensors\.index\.json")
_ALIASES = "aliases"  # in the header of a tensor file: name -> name of the same tensor


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
        _write_json(made / REPORT, session.report.to_dict())
        manifest: dict[str, Any] = {
            "format_version": FORMAT,
            "versions": {"tokcompile": _version(), "torch": torch.__version__,
                         "transformers": importlib.import_module("transformers").__version__,
                         "python": platform.python_version()},
            "recipe": {"name": session.recipe.name, "data": session.recipe.to_dict()},
            "model": {"kind": kind, "class": type(model).__name__, "module": type(model).__module__},
            "changed": changed(model),
            "state": _write_state(made / STATE, session.prepared),
        }
        _write_model(made, model, kind, manifest["model"])
        manifest["files"] = {file.relative_to(made).as_posix(): {"bytes": file.stat().st_size, "sha256": _sha256(file)}
                             for file in sorted(made.rglob("*")) if file.is_file()}
        _write_json(made / MANIFEST, manifest | {"sha256": _digest(manifest)})
        _put(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def load(folder: str | PathLike[str], model: nn.Module | str | None = None, *,
         inputs: Mapping[str, Any] | None = None, on_no_match: str = "error", lowering: str = "inductor",
         verify: bool = True) -> nn.Module:
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
    manifest = _read_manifest(place)
    _check_files(place, manifest["files"], verify)
    try:
        recipe = Recipe.load(manifest["recipe"]["data"])
    except RecipeError as error:
        raise RecipeError(f"{place}: its recipe cannot be used here:\n{error}\nInstall the package that brings the "
                          "pass, or load its file with tokcompile.registry.load_file") from None
    recipe = recipe.named(str(manifest["recipe"]["name"]))
    state = _read_state(place / STATE, manifest["state"])
    dense = _read_model(place, manifest["model"], model)
    loaded = optimize(dense, recipe, inputs=inputs, calibration=state, on_no_match=on_no_match, lowering=lowering,
                      inplace=True)
    session_of(loaded).changed = {str(name): str(why) for name, why in manifest["changed"].items()}
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
            f"the original weights are gone: {len(lost)} of {len(_base_state(model))} tensors were changed after "
            f"tokcompile.optimize, first {name} ({why}); load the original model again, or take model.state_dict() for "
            "the weights as they are now")
    return _base_state(model)


def changed(model: nn.Module) -> dict[str, str]:
    """Tensors of the dense model that are no longer what they were when it was optimized: name -> how.

    Seen are changes in place (an optimizer step, ``load_state_dict``) and conversions of the dtype, not writes to
    ``tensor.data``, which PyTorch does not count.
    """
    session = session_of(model)
    now, lost = origin(model), dict(session.changed)
    for name, (version, dtype) in session.origin.items():
        if name not in now:
            lost[name] = "removed"
        elif now[name][1] != dtype:
            lost[name] = f"converted from {_plain(dtype)} to {_plain(now[name][1])}"
        elif now[name][0] != version:
            lost[name] = "changed in place"
    return lost


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
    foreign = sorted(_present(target) - {MANIFEST, PAGE} - set(_read_manifest(target)["files"]))
    if foreign:
        raise SavedModelError(f"{target}: would be replaced, but holds {foreign[0]}, which save_pretrained did not "
                              "write; move it, or name another folder")


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
            raise SavedModelError(f"{pass_name}: the facts of {key or 'its region'} are no JSON values: {error}"
                                  ) from None
        entries.append({"pass": pass_name, "key": key, "facts": kept, "tensors": {
            name: {"parameter": isinstance(t, nn.Parameter), "requires_grad": t.requires_grad}
            for name, t in found.items()}})
        tensors |= {_state_name(pass_name, key, name): t for name, t in found.items()}
    if tensors:
        _write_tensors(path, tensors)
    return entries


def _state_name(pass_name: str, key: str, name: str) -> str:
    return f"{pass_name}/{key}/{name}"


def _write_model(made: Path, model: nn.Module, kind: str, entry: dict[str, Any]) -> None:
    """Write the dense model; ``entry`` says how to read it."""
    weights = _base_state(model)
    if kind == "none":
        entry["weights"] = {name: {**_form(t), "sha256": _tensor_sha256(t)} for name, t in weights.items()}
    elif kind == "state_dict":
        _write_tensors(made / WEIGHTS, weights)
    else:
        floating = {name: t.dtype for name, t in weights.items() if t.is_floating_point()}
        entry["dtypes"] = {name: _plain(dtype) for name, dtype in floating.items()} \
            if len(set(floating.values())) > 1 else {}
        entry["attention"] = _attention(model.config)
        try:
            with _quiet():
                model.save_pretrained(made / MODEL, state_dict=weights)  # type: ignore[operator]
        except Exception as error:  # a generation config that transformers itself refuses, say
            raise SavedModelError(f"{type(model).__name__}.save_pretrained failed: {_first(error)}") from error
        odd = [f.name for f in (made / MODEL).iterdir() if not _MODEL_FILES.fullmatch(f.name)]
        if odd:
            raise SavedModelError(f"{type(model).__name__}.save_pretrained wrote {odd[0]}, which load would not read; "
                                  "save with weights=False, and give the model to load")
    hidden = _buffers(model) if kind != "none" else {}
    if hidden:
        _write_tensors(made / BUFFERS, hidden)


def _base_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if not name.startswith(f"{NAMESPACE}.")}


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
        same = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(),
                tensor.dtype, tensor.device)
        if tensor.numel() and same in first:
            aliases[name] = first[same]
            continue
        first[same] = name
        data = tensor.detach().contiguous()
        storage = data.untyped_storage()
        # views of one storage (parts of a fused weight, say) have to be apart
        stored[name] = data.clone() if storage.data_ptr() in storages or storage.nbytes() != data.nbytes else data
        storages.add(storage.data_ptr())
    save_file(stored, path, metadata={_ALIASES: json.dumps(aliases)})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _of_transformers(kind: type) -> bool:
    """Whether the class can be found in transformers by its name."""
    from transformers import PreTrainedModel

    return issubclass(kind, PreTrainedModel) and _transformers_class(kind.__name__) is kind


def _transformers_class(name: str) -> type | None:
    import transformers

    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _attention(config: Any) -> dict[str, str]:
    """Attention implementation of a configuration ("") and of those inside it."""
    found = {"": config._attn_implementation}
    found |= {name: getattr(config, name)._attn_implementation for name in config.sub_configs
              if getattr(config, name, None) is not None}
    return {name: value for name, value in found.items() if value is not None}


# .. reading


def _read_manifest(place: Path) -> dict[str, Any]:
    """The manifest, in the present format."""
    if not place.is_dir():
        raise SavedModelError(f"{place}: no such folder")
    if not (place / MANIFEST).is_file():
        dense = " It holds a dense model: load that with transformers." if (place / "config.json").is_file() else ""
        raise SavedModelError(f"{place}: was not written by tokcompile.save_pretrained (no {MANIFEST}).{dense}")
    broken = f"{place / MANIFEST} is damaged: "
    try:
        manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise SavedModelError(f"{broken}{type(error).__name__}: {_first(error)}") from None
    if isinstance(version, bool) or not isinstance(version, int):
        raise SavedModelError(f"{broken}format_version is {version!r}")
    if version > FORMAT:
        maker = manifest.get("versions")
        maker = maker.get("tokcompile") if isinstance(maker, dict) else None
        raise SavedModelError(f"{place}: has format {version}, written by tokcompile {maker or 'of a later release'}; "
                              f"this is tokcompile {_version()}, which reads formats up to {FORMAT}: update it")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise SavedModelError(f"{broken}its own checksum does not fit")
    while version < FORMAT:
        if version not in UPGRADES:
            raise SavedModelError(f"{place}: has format {version}, which tokcompile {_version()} cannot read any more; "
                                  f"load and save it with tokcompile {manifest['versions']['tokcompile']}, or optimize "
                                  "the dense model again")
        manifest, version = UPGRADES[version](manifest), version + 1
    _check_form(manifest, broken)
    return manifest  # type: ignore[no-any-return]


#: The keys of a manifest, and what they hold.
_FORM: dict[str, type] = {"versions": dict, "recipe": dict, "model": dict, "changed": dict, "state": list,
                          "files": dict}


def _check_form(manifest: dict[str, Any], broken: str) -> None:
    """Raise unless everything that is read later is there and of its type."""
    for key, kind in _FORM.items():
        if not isinstance(manifest.get(key), kind):
            raise SavedModelError(f"{broken}{key} is missing, or no {kind.__name__}")
    fits = (
        isinstance(manifest["recipe"].get("data"), dict) and isinstance(manifest["recipe"].get("name"), str)
        and manifest["model"].get("kind") in ("none", "transformers", "state_dict")
        and isinstance(manifest["model"].get("class"), str)
        and all(isinstance(e, dict) and isinstance(e.get("pass"), str) and isinstance(e.get("key"), str)
                and isinstance(e.get("facts"), dict) and isinstance(e.get("tensors"), dict) for e in manifest["state"])
        and all(isinstance(e, dict) and isinstance(e.get("bytes"), int) and isinstance(e.get("sha256"), str)
                for e in manifest["files"].values()))
    if not fits:
        raise SavedModelError(f"{broken}a part of it has not the form that save_pretrained writes")


def _check_files(place: Path, files: Mapping[str, Mapping[str, Any]], verify: bool) -> None:
    for name, entry in files.items():
        if name not in (REPORT, STATE, BUFFERS, WEIGHTS) and not (
                name.startswith(f"{MODEL}/") and _MODEL_FILES.fullmatch(name[len(MODEL) + 1:])):
            raise SavedModelError(f"{place}: lists {name!r}, which save_pretrained does not write")
        file = place / name
        if not file.is_file():
            raise SavedModelError(f"{file}: is missing; the folder was not copied whole")
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise SavedModelError(f"{file}: has {size:,} bytes, not the {entry['bytes']:,} that were written; it was "
                                  "cut off or replaced: copy it again")
        if verify and _sha256(file) != entry["sha256"]:
            raise SavedModelError(f"{file}: its checksum does not fit: it was changed or damaged after saving; copy it "
                                  "again, or save the model anew")
    extra = sorted(name for name in _present(place) if name.startswith(f"{MODEL}/") and name not in files)
    if extra:  # transformers would read some of what may lie here
        raise SavedModelError(f"{place / extra[0]}: was not written by save_pretrained; remove it")


def _present(place: Path) -> set[str]:
    return {file.relative_to(place).as_posix() for file in place.rglob("*") if not file.is_dir()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            aliases = json.loads((file.metadata() or {}).get(_ALIASES, "{}"))
        return tensors | {name: tensors[same] for name, same in aliases.items()}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SavedModelError(f"{path}: cannot be read: {_first(error)}") from None


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
            full = _state_name(entry["pass"], entry["key"], name)
            if full not in stored:
                raise SavedModelError(f"{path}: holds no {full}")
            data = stored[full]
            tensors[name] = made.setdefault(id(data), nn.Parameter(data, how["requires_grad"])) \
                if how["parameter"] else data
        try:
            state.put(entry["pass"], entry["key"], tensors, entry["facts"])
        except (KeyError, TypeError, AttributeError) as error:  # a name that no module can have
            raise SavedModelError(f"{path}: {_first(error)}") from None
    return state


def _read_model(place: Path, entry: Mapping[str, Any], given: nn.Module | str | None) -> nn.Module:
    kind, name = entry["kind"], entry["class"]
    if kind == "transformers":
        if given is not None:
            raise SavedModelError(f"{place}: holds a {name} of transformers with its weights; leave model= out")
        model = _from_transformers(place / MODEL, entry)
    else:
        if given is None:
            has = "does not hold the weights of the dense model" if kind == "none" else \
                "holds weights, but not the class that they belong to"
            raise SavedModelError(f"{place}: {has}; call load(folder, model=...) with a {entry.get('module')}.{name} "
                                  "as it was before optimize, or with 'module:function' that makes one")
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
        raise SavedModelError(f"model= should be a torch.nn.Module, or 'module:function' that returns one, not "
                              f"{type(given).__name__}")
    return given


def _fill(model: nn.Module, saved: Mapping[str, Tensor], where: str) -> None:
    """Put the saved weights into ``model``, in the dtype that they have."""
    own = model.state_dict()
    _check_names(own, {name: _form(t) for name, t in saved.items()}, where, dtypes=False)
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
        if _tensor_sha256(tensor) != saved[name]["sha256"]:
            raise SavedModelError(f"{place}: was saved for other weights than those of the model that was given; the "
                                  f"first that differs is {name}")


def _check_names(own: Mapping[str, Tensor], saved: Mapping[str, Mapping[str, Any]], where: str, *,
                 dtypes: bool) -> None:
    missing, more = [n for n in own if n not in saved], [n for n in saved if n not in own]
    if missing or more:
        which = f"it has no {missing[0]}" if missing else f"the model has no {more[0]}"
        raise SavedModelError(f"{where}: belongs to another model than the one that was given: {which}")
    for name, tensor in own.items():
        form, wanted = _form(tensor), saved[name]
        for part in ("shape", "dtype") if dtypes else ("shape",):
            if form[part] != wanted[part]:
                raise SavedModelError(f"{where}: belongs to another model than the one that was given: the {part} of "
                                      f"{name} is {wanted[part]} here and {form[part]} there")


def _from_transformers(folder: Path, entry: Mapping[str, Any]) -> nn.Module:
    """The dense model, by the class that transformers has under this name, from this folder only."""
    model_class: Any = _transformers_class(entry["class"])
    if model_class is None:
        raise SavedModelError(f"{folder}: transformers has no model class {entry['class']!r}; it was saved with "
                              "another version of transformers")
    try:
        _refuse_code(json.loads((folder / "config.json").read_text(encoding="utf-8")), folder / "config.json")
        attention = {str(k): str(v) for k, v in entry["attention"].items()}
        _refuse_code({"attn_implementation": attention}, folder.parent / MANIFEST)
        dtypes = {str(k): _dtype(v) for k, v in entry["dtypes"].items()}
        # one dtype for all loses bits of the wider ones, so the widest is read and narrowed tensor by tensor
        dtype = max(dtypes.values(), key=lambda d: torch.finfo(d).bits) if dtypes else "auto"
        with _quiet():
            model: nn.Module = model_class.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention, local_files_only=True, use_safetensors=True)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in dtypes and tensor.dtype != dtypes[name]:
                tensor.data = tensor.data.to(dtypes[name])
    except SavedModelError:
        raise
    except Exception as error:  # whatever files and configurations can do wrong
        raise SavedModelError(f"{folder}: {entry['class']} cannot be loaded: {type(error).__name__}: {_first(error)}"
                              ) from error
    return model


def _refuse_code(config: Any, where: Path) -> None:
    """A configuration can name code on a hub; nothing of the kind is followed."""
    stack: list[tuple[str, Any]] = [("", config)]
    while stack:
        key, value = stack.pop()
        named = "implementation" in key and isinstance(value, str) and not re.fullmatch(r"\w+", value, re.ASCII)
        if named or (key in ("auto_map", "custom_pipelines") and value):
            raise SavedModelError(f"{where}: {key or 'implementation'} = {value!r} names code outside of transformers, "
                                  "which load does not run")
        if isinstance(value, dict):
            stack += [(key if "implementation" in key else str(k), v) for k, v in value.items()]
        elif isinstance(value, list):
            stack += [(key, v) for v in value]


# .. small things


def _version() -> str:
    from tokcompile import __version__

    return __version__


def _form(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": _plain(tensor.dtype)}


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"no floating-point dtype {name!r}")
    return found


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tensor_sha256(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def _first(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."

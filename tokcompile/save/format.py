"""The files of a saved model and their forms."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.errors import SavedModelError
from tokcompile.state import NAMESPACE
from tokcompile.version import __version__

#: Version of the folder format that this release writes, and the newest that it reads.
FORMAT = 1
#: Format version -> what turns its manifest into one of the next version. A version without an entry cannot be read.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
MANIFEST, REPORT, STATE, BUFFERS, WEIGHTS, MODEL = (
    "tokcompile.json",
    "report.json",
    "state.safetensors",
    "buffers.safetensors",
    "weights.safetensors",
    "model",
)
PAGE = "report.html"  # may lie beside them for readers; neither hashed nor read
#: What transformers may find in the folder of the dense model: no adapters, no pickles, no Python files.
MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.json"
)
ALIASES = "aliases"  # in the header of a tensor file: name -> name of the same tensor


def state_name(pass_name: str, key: str, name: str) -> str:
    return f"{pass_name}/{key}/{name}"


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if not name.startswith(f"{NAMESPACE}.")}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of transformers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def transformers_class(name: str) -> type | None:
    import transformers

    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


# .. reading


def read_manifest(place: Path) -> dict[str, Any]:
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
        raise SavedModelError(f"{broken}{type(error).__name__}: {first_of(error)}") from None
    if isinstance(version, bool) or not isinstance(version, int):
        raise SavedModelError(f"{broken}format_version is {version!r}")
    if version > FORMAT:
        maker = manifest.get("versions")
        maker = maker.get("tokcompile") if isinstance(maker, dict) else None
        raise SavedModelError(
            f"{place}: has format {version}, written by tokcompile {maker or 'of a later release'}; "
            f"this is tokcompile {__version__}, which reads formats up to {FORMAT}: update it"
        )
    if manifest.pop("sha256", None) != manifest_digest(manifest):
        raise SavedModelError(f"{broken}its own checksum does not fit")
    while version < FORMAT:
        if version not in UPGRADES:
            raise SavedModelError(
                f"{place}: has format {version}, which tokcompile {__version__} cannot read any "
                f"more; load and save it with tokcompile {manifest['versions']['tokcompile']}, or "
                "optimize the dense model again"
            )
        manifest, version = UPGRADES[version](manifest), version + 1
    _check_form(manifest, broken)
    return manifest  # type: ignore[no-any-return]


#: The keys of a manifest, and what they hold.
_FORM: dict[str, type] = {
    "versions": dict,
    "recipe": dict,
    "model": dict,
    "changed": dict,
    "state": list,
    "files": dict,
}


def _check_form(manifest: dict[str, Any], broken: str) -> None:
    """Raise unless everything that is read later is there and of its type."""
    for key, kind in _FORM.items():
        if not isinstance(manifest.get(key), kind):
            raise SavedModelError(f"{broken}{key} is missing, or no {kind.__name__}")
    fits = (
        isinstance(manifest["recipe"].get("data"), dict)
        and isinstance(manifest["recipe"].get("name"), str)
        and manifest["model"].get("kind") in ("none", "transformers", "state_dict")
        and isinstance(manifest["model"].get("class"), str)
        and all(
            isinstance(e, dict)
            and isinstance(e.get("pass"), str)
            and isinstance(e.get("key"), str)
            and isinstance(e.get("facts"), dict)
            and isinstance(e.get("tensors"), dict)
            for e in manifest["state"]
        )
        and all(
            isinstance(e, dict) and isinstance(e.get("bytes"), int) and isinstance(e.get("sha256"), str)
            for e in manifest["files"].values()
        )
    )
    if not fits:
        raise SavedModelError(f"{broken}a part of it has not the form that save_pretrained writes")


def present(place: Path) -> set[str]:
    return {file.relative_to(place).as_posix() for file in place.rglob("*") if not file.is_dir()}


def form_of(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": plain_json(tensor.dtype)}


def plain_json(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"no floating-point dtype {name!r}")
    return found


def write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def first_of(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

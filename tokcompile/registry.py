"""The passes that a recipe can name: those that ship, and those that other packages bring.

A pass is a class with four things (all checked by :func:`register`)::

    @register
    class Random:
        '''Keep tokens at random (the control that every method has to beat).'''

        name = "random"                 # what a recipe writes after ``pass:``
        regions = "merge_point"         # the region kind it targets unless the recipe says otherwise

        class Params(PassParams):
            keep: Budget = Field(description="Kept tokens of each image, ratio or count.")
            seed: int = Field(0, ge=0, description="Seed of the draw.")
            drop: float = Field(0.875, gt=0, lt=1, description="Depth at which the rest is dropped.",
                                json_schema_extra=about(unit="fraction of depth", source="arXiv 2505.18757"))

Passes that ship live in ``tokcompile.passes``, one module each. Another package adds its own through the
entry-point group ``tokcompile.passes``; the entry point names the class, or a module that registers some.
Nothing is imported before a pass is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict

from tokcompile.errors import RecipeError, TokcompileError
from tokcompile.kinds import KINDS

#: Entry-point group through which other packages add passes.
GROUP = "tokcompile.passes"


class PassParams(BaseModel):
    """Base of a pass's parameters: unknown keys are errors, values are not coerced, instances do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def about(unit: str = "", source: str = "") -> dict[str, Any]:
    """For ``Field(json_schema_extra=about(...))``: the unit of a parameter, and where its default comes from.

    ``tokcompile recipes show``, the reference and the JSON Schema carry both.
    """
    return {key: value for key, value in (("unit", unit), ("source", source)) if value}


class Pass(Protocol):
    """What every pass class offers; how it rewrites a graph is the business of the planner."""

    name: ClassVar[str]
    regions: ClassVar[str]
    Params: ClassVar[type[BaseModel]]


PassClass = TypeVar("PassClass", bound=type[Any])

_passes: dict[str, type[Any]] = {}
_failures: dict[str, str] = {}
_loaded = False


def register(pass_class: PassClass) -> PassClass:
    """Make a pass known under its ``name``; use it as a class decorator.

    Raises:
        TypeError: the class lacks a part of the contract above, or its name is taken by another class.
    """
    who = pass_class.__qualname__
    name = getattr(pass_class, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"{who}.name: expected an identifier, found {name!r}")
    if getattr(pass_class, "regions", None) not in KINDS:
        raise TypeError(
            f"{who}.regions: expected one of {', '.join(KINDS)}, found {getattr(pass_class, 'regions', None)!r}"
        )
    if unknown := sorted(set(getattr(pass_class, "also", ())) - set(KINDS)):
        raise TypeError(f"{who}.also: expected some of {', '.join(KINDS)}, found {', '.join(unknown)}")
    params = getattr(pass_class, "Params", None)
    if not (isinstance(params, type) and issubclass(params, BaseModel)):
        raise TypeError(f"{who}.Params: expected a pydantic model (see PassParams), found {params!r}")
    if params.model_config.get("extra") != "forbid":
        raise TypeError(f"{who}.Params: must forbid unknown keys; derive it from tokcompile.authoring.PassParams")
    bare = [field for field, info in params.model_fields.items() if not info.description]
    if bare:
        raise TypeError(f"{who}.Params: no description on {', '.join(bare)}")
    if not (pass_class.__doc__ or "").strip():
        raise TypeError(f"{who}: a pass needs a docstring; `tokcompile recipes show` prints it")
    known = _passes.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (pass_class.__module__, who):
        raise TypeError(f"pass name {name!r} is taken by {known.__module__}.{known.__qualname__}")
    _passes[name] = pass_class
    return pass_class


def get_pass(name: str) -> type[Any]:
    """The pass class of that name.

    Raises:
        RecipeError: no such pass; names the nearest one, and what failed to load if anything did.
    """
    _load()
    if name in _passes:
        return _passes[name]
    raise RecipeError(f"unknown pass {name!r}{did_you_mean(name, pass_names())}{_failed()}")


def pass_names() -> list[str]:
    """Names of all known passes, sorted."""
    _load()
    return sorted(_passes)


def shipped_passes() -> list[str]:
    """Names of the passes that come with tokcompile, sorted."""
    return [name for name in pass_names() if _passes[name].__module__.startswith("tokcompile.passes.")]


def load_failures() -> dict[str, str]:
    """Module or entry point that could not be loaded -> the exception, as text."""
    _load()
    return dict(_failures)


def load_file(path: str | os.PathLike[str]) -> list[str]:
    """Run a Python file that registers passes, and give their names. For files of your own: this runs code.

    Raises:
        TokcompileError: the file cannot be read or run, or it registers nothing.
    """
    before = set(pass_names())
    file = Path(path)
    name = f"tokcompile_pass_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise TokcompileError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise TokcompileError(f"{file}: {type(error).__name__}: {error}") from error
    new = sorted(known for known, method in _passes.items() if known not in before or method.__module__ == name)
    if not new:
        raise TokcompileError(f"{file}: registers no pass; put @register on the class")
    return new


def did_you_mean(word: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)``, or the short list of what is known, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f" (did you mean {near[0]!r}?)"
    return f" (known: {', '.join(known)})" if known else ""


def _failed() -> str:
    return "".join(f"; {place} did not load: {why}" for place, why in sorted(_failures.items()))


def _load() -> None:
    """Import the passes, once. One that fails is noted and leaves the others usable."""
    global _loaded
    if _loaded:
        return
    _loaded = True  # first: a pass module may itself ask for a pass
    package = importlib.import_module("tokcompile.passes")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None):
        if not module.ispkg and not module.name.rpartition(".")[2].startswith("_"):
            _import(module.name)
    for point in entry_points(group=GROUP):
        try:
            loaded = point.load()
            if isinstance(loaded, type):
                register(loaded)
        except Exception as error:  # another package's code: any failure is its own
            _failures[f"entry point {point.name} = {point.value}"] = f"{type(error).__name__}: {error}"


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:  # an optional dependency that is missing, say
        _failures[module] = f"{type(error).__name__}: {error}"

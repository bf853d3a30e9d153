"""Calibration: run the model on data with observers in its captured graphs, then let the passes prepare their state."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tokcompile.errors import CalibrationError, TokcompileError
from tokcompile.recipes import Recipe
from tokcompile.registry import get_pass
from tokcompile.session import Session
from tokcompile.stages import install, run, share
from tokcompile.state import PreparedState

Item = Mapping[str, Any] | torch.Tensor

_SAVE_EVERY = 16  # items between two writes of the resume file


def calibrate(model: nn.Module, recipe: Any, data: Iterable[Item], *, resume: str | PathLike[str] | None = None,
              progress: bool = False) -> PreparedState:
    """Prepare the state that the passes of ``recipe`` need, from runs of the dense model on ``data``.

    Passes keep running sums, not activations, so memory does not grow with the data.

    Args:
        model: the original model; it is left as it was.
        recipe: as for :func:`tokcompile.optimize`.
        data: inputs, one after the other: mappings of keyword arguments of ``forward`` or ``generate``, or tensors (the
            first argument of ``forward``, such as ``input_ids``).
        resume: a file that keeps what was seen so far. An interrupted run goes on from it, provided that ``data`` comes
            in the same order again.
        progress: show a progress bar.

    Returns:
        The state, for ``tokcompile.optimize(model, recipe, calibration=state)``.

    Raises:
        RecipeError: the recipe is not valid.
        CalibrationError: no data, data that does not fit the model, or a pass that could not prepare a region.
    """
    loaded = Recipe.load(recipe)
    session = Session(loaded, lowering="eager", on_no_match="ignore", model=type(model).__name__, observing=True)
    clone = share(model)
    install(clone, session)
    done = _load(resume, session, loaded)
    count = 0
    for count, item in enumerate(_shown(data, progress), start=1):
        if 1 < count <= done:
            continue
        kwargs = arguments(model, item, count - 1)
        session.counting = count > done  # a resumed run still needs the graphs, for the weights in them
        with torch.no_grad():
            run(clone, kwargs)
        if resume is not None and count % _SAVE_EVERY == 0:
            _save(resume, session, loaded, count)
    if count == 0:
        raise CalibrationError("the calibration data is empty: give at least one input, such as "
                               "{'input_ids': ...}; a generator that was used before gives nothing more")
    if resume is not None and count > done:
        _save(resume, session, loaded, count)
    state = PreparedState()
    for index, (step, method) in enumerate(session.passes):
        if method.calibration == "none":
            continue
        seen = session.seen.get(index, {})
        if not seen:
            entry = session.report.steps[index]
            raise CalibrationError(f"steps[{index}] ({step.pass_}): calibration met no region that the step is for: "
                                   f"{entry.reason}")
        for key, (tensors, facts) in method.prepare(seen).items():
            state.put(step.pass_, key, tensors, facts)
    return state


def check_prepared(recipe: Recipe, calibration: Any) -> None:
    """Raise unless ``calibration`` is given exactly where the recipe can use it.

    Raises:
        CalibrationError: it is missing, or no pass takes it.
    """
    methods = [(i, s.pass_, get_pass(s.pass_)) for i, s in enumerate(recipe.steps)]
    if calibration is None:
        needy = [f"steps[{i}] ({name})" for i, name, m in methods if m.calibration == "required"]
        if needy:
            raise CalibrationError(f"{', '.join(needy)}: needs calibration; pass calibration=, an iterable of inputs "
                                   "such as {'input_ids': ...} that look like the ones to be served")
    elif all(m.calibration == "none" for _, _, m in methods):
        raise CalibrationError("no pass of this recipe takes calibration data; leave calibration out")
    elif isinstance(calibration, PreparedState):
        for i, name, m in methods:
            if m.calibration == "required" and not list(calibration.keys(name)):
                raise CalibrationError(f"steps[{i}] ({name}): the calibration was made for another recipe: it holds "
                                       "no state of this pass")


def arguments(model: nn.Module, item: Any, number: int, *, what: str = "calibration item",
              error: type[TokcompileError] = CalibrationError) -> dict[str, Any]:
    """One input as keyword arguments.

    Raises:
        TokcompileError: of the type ``error``; it is of another form, or has no argument that ``forward`` knows.
    """
    parameters = inspect.signature(model.forward).parameters
    if isinstance(item, torch.Tensor):
        return {next(iter(parameters)): item}
    if not isinstance(item, Mapping):
        raise error(f"{what} {number} is a {type(item).__name__}; expected a mapping of keyword arguments, such as "
                    "{'input_ids': ...}, or a tensor")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [k for k in item if k not in parameters]
    named = {p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not item or (unknown and not hasattr(model, "generate") and not takes_any) or not named & set(item):
        raise error(f"{what} {number} has the keys {sorted(item)}; the forward of this model takes "
                    f"{', '.join(sorted(named)[:12])}")
    return dict(item)


def _shown(data: Iterable[Item], progress: bool) -> Iterable[Item]:
    if not progress:
        return data
    from rich.progress import track

    total = len(data) if isinstance(data, Sequence) else None
    return track(data, description="Calibrating", total=total)


# .. the resume file: running sums as safetensors, everything else as JSON in its header


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:16]


def _save(path: str | PathLike[str], session: Session, recipe: Recipe, count: int) -> None:
    tensors, entries = {}, []
    for index, regions in session.seen.items():
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


def _load(path: str | PathLike[str] | None, session: Session, recipe: Recipe) -> int:
    """Take over what a resume file holds: -> how many items it has seen."""
    if path is None or not Path(path).exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            if meta.get("recipe") != _digest(recipe):
                raise CalibrationError(f"{os.fspath(path)} was written for another recipe; delete it, or name another "
                                       "file")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        for entry in json.loads(meta["entries"]):
            prefix = f"{entry['step']}/{entry['key']}/"
            sums = {**entry["numbers"], **{n.removeprefix(prefix): t for n, t in tensors.items()
                                           if n.startswith(prefix)}}
            session.resumed[entry["step"], entry["key"]] = sums
        return int(meta["count"])
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(f"{os.fspath(path)} is not a file that calibrate wrote ({error}); delete it") from error

"""Calibration: run the model on data with observers in its captured graphs, then let the passes prepare their state."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch import nn

from tokcompile.errors import CalibrationError
from tokcompile.plan.observed import Observed
from tokcompile.prepare.arguments import Item, arguments, shown
from tokcompile.prepare.resume import load_progress, save_progress
from tokcompile.recipes import Recipe
from tokcompile.registry import get_pass
from tokcompile.runtime.install import install, run, share
from tokcompile.runtime.session import Session
from tokcompile.state import PreparedState

_SAVE_EVERY = 16  # items between two writes of the resume file


def calibrate(
    model: nn.Module,
    recipe: Any,
    data: Iterable[Item],
    *,
    resume: str | PathLike[str] | None = None,
    progress: bool = False,
) -> PreparedState:
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
    observed = Observed()
    session = Session(loaded, lowering="eager", on_no_match="ignore", model=type(model).__name__, observed=observed)
    clone = share(model)
    install(clone, session)
    done = load_progress(resume, observed, loaded)
    count = 0
    for count, item in enumerate(shown(data, progress), start=1):
        if 1 < count <= done:
            continue
        kwargs = arguments(model, item, count - 1)
        session.count(count > done)  # a resumed run still needs the graphs, for the weights in them
        with torch.no_grad():
            run(clone, kwargs)
        if resume is not None and count % _SAVE_EVERY == 0:
            save_progress(resume, observed, loaded, count)
    if count == 0:
        raise CalibrationError(
            "the calibration data is empty: give at least one input, such as "
            "{'input_ids': ...}; a generator that was used before gives nothing more"
        )
    if resume is not None and count > done:
        save_progress(resume, observed, loaded, count)
    state = PreparedState()
    for index, (step, method) in enumerate(session.passes):
        if method.calibration == "none":
            continue
        seen = observed.seen.get(index, {})
        if not seen:
            entry = session.report.steps[index]
            raise CalibrationError(
                f"steps[{index}] ({step.pass_}): calibration met no region that the step is for: {entry.reason}"
            )
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
            raise CalibrationError(
                f"{', '.join(needy)}: needs calibration; pass calibration=, an iterable of inputs "
                "such as {'input_ids': ...} that look like the ones to be served"
            )
    elif all(m.calibration == "none" for _, _, m in methods):
        raise CalibrationError("no pass of this recipe takes calibration data; leave calibration out")
    elif isinstance(calibration, PreparedState):
        for i, name, m in methods:
            if m.calibration == "required" and not list(calibration.keys(name)):
                raise CalibrationError(
                    f"steps[{i}] ({name}): the calibration was made for another recipe: it holds no state of this pass"
                )

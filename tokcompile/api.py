"""The public functions: :func:`optimize`, :func:`explain`, :func:`report`, :func:`record`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, nn

from tokcompile.errors import TokcompileError
from tokcompile.kinds import Stage
from tokcompile.lower.inductor import LOWERINGS
from tokcompile.prepare.calibrate import calibrate, check_prepared
from tokcompile.prepare.given import check_inputs, check_model, warn_of_training_mode
from tokcompile.recipes import Recipe
from tokcompile.reporting.report import Report
from tokcompile.runtime.install import SESSION, Model, install, run_once, share, uninstall
from tokcompile.runtime.recording import Recording
from tokcompile.runtime.session import Session
from tokcompile.state import PreparedState, origin

RecipeLike = str | PathLike[str] | Mapping[str, Any] | Recipe
ON_NO_MATCH = ("error", "warn", "ignore")


def optimize(
    model: Model,
    recipe: RecipeLike,
    *,
    inputs: Mapping[str, Any] | None = None,
    calibration: Any = None,
    on_no_match: str = "error",
    lowering: str = "inductor",
    inplace: bool = False,
    visual_mask: Callable[[Mapping[str, Any]], Tensor | None] | None = None,
) -> Model:
    """Compile ``model`` with the steps of ``recipe``.

    Args:
        model: any module whose forward ``torch.compile`` captures as one graph; Hugging Face models keep
            ``generate()``.
        recipe: the name of a shipped recipe, a path, a mapping or a :class:`~tokcompile.recipes.Recipe`.
        inputs: keyword arguments of ``forward`` or ``generate``; given, the recipe is matched (and the graphs are
            compiled) now, else at the first call.
        calibration: for passes that need it, any iterable of inputs like ``inputs`` (or of ``input_ids`` tensors), or
            what :func:`~tokcompile.prepare.calibrate.calibrate` returned earlier.
        on_no_match: "error", "warn" or "ignore": what to do when a step changes nothing.
        lowering: "inductor", or "eager" (no code generation: slow, exact, quick to compile).
        inplace: change ``model`` itself instead of a copy that shares the memory of its parameters.
        visual_mask: for calls with ``inputs_embeds`` that hold image features already: takes the arguments of the call
            of ``generate`` or ``forward``, gives bool ``[B, S]``, True for the tokens of images (None: not known). A
            single call takes such a tensor as its argument ``visual_mask``.

    Returns:
        A model of the same class. ``model`` is left as it was. The two share the memory of their parameters: what is
        written in place into one (an optimizer step, ``load_state_dict``, a merged adapter) shows in both. Parameters
        are objects of their own with a ``.grad`` of their own, so make an optimizer over the parameters of the
        *returned* model. Where an optimizer over parameters of ``model`` exists already, these parameters are the
        same objects in both models, and it trains both. Parts prepared from weights (``calibration``) do not follow
        later changes of these; the next call warns.

    Raises:
        RecipeError: the recipe is not valid.
        NoMatchError: a step changes nothing (with ``inputs``; else raised by the first call).
        RewriteError: a pass fails by an error of its own (likewise); with ``on_no_match="warn"`` or "ignore" the model
            runs as without that step.
        TokcompileError: a bad argument.
    """
    check_model(model, "optimize")
    if on_no_match not in ON_NO_MATCH:
        raise TokcompileError(f"on_no_match={on_no_match!r}: choose one of {', '.join(ON_NO_MATCH)}")
    if lowering not in LOWERINGS:
        raise TokcompileError(f"lowering={lowering!r}: choose one of {', '.join(LOWERINGS)}")
    if hasattr(model, SESSION):
        raise TokcompileError("this model is optimized already; start from the original model")
    loaded = Recipe.load(recipe)
    if inputs is not None:
        check_inputs(model, inputs, "optimize")
    warn_of_training_mode(model, "optimize")
    check_prepared(loaded, calibration)
    if calibration is not None and not isinstance(calibration, PreparedState):
        calibration = calibrate(model, loaded, calibration)
    session = Session(
        loaded,
        lowering=lowering,
        on_no_match=on_no_match,
        model=type(model).__name__,
        state=calibration,
        visual_mask=visual_mask,
    )
    target = model if inplace else share(model)
    install(target, session)
    session.note_origin(origin(target))
    session.check_sources(target)  # as they are now
    if inputs is not None:
        try:
            run_once(target, inputs)
            session.check_matches(Stage.WHOLE)
        except BaseException:
            if inplace:
                uninstall(target)
            raise
    return target


def explain(
    model: nn.Module,
    inputs: Mapping[str, Any],
    recipe: RecipeLike | None = None,
    *,
    calibration: Any = None,
) -> Report:
    """What tokcompile finds in ``model`` on ``inputs`` and what ``recipe`` would change; changes nothing.

    Runs the model once (eagerly lowered), like ``optimize(..., inputs=inputs)`` does; a model that generates makes
    two tokens where the recipe acts in decode steps. What is planned before anything is rewritten is in
    :attr:`Report.plans`, for each stage.

    Args:
        calibration: as for :func:`optimize`.

    Raises:
        TokcompileError: a bad argument.
    """
    check_model(model, "explain")
    check_inputs(model, inputs, "explain")
    loaded = None if recipe is None else Recipe.load(recipe)
    if loaded is not None and calibration is not None and not isinstance(calibration, PreparedState):
        calibration = calibrate(model, loaded, calibration)
    session = Session(loaded, lowering="eager", on_no_match="ignore", model=type(model).__name__, state=calibration)
    clone = share(model)
    install(clone, session)
    run_once(clone, inputs, decode=any(method.stage == "decode" for _, method in session.passes))
    session.check_matches(Stage.WHOLE)  # into report.problems
    return session.report


def report(model: nn.Module) -> Report:
    """What was done to an optimized model so far."""
    return session_of(model).report


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Collect what each cut of each prefill keeps, and which rows of a decode step reused an earlier choice of keys.

    ``with record(model) as rec: ...; rec.kept, rec.reused``.
    """
    with session_of(model).recordings.open() as recording:
        yield recording


def session_of(model: nn.Module) -> Session:
    """The session of an optimized model.

    Raises:
        TokcompileError: it is not one.
    """
    session = getattr(model, SESSION, None)
    if session is None:
        raise TokcompileError("this model was not made by tokcompile.optimize")
    return session  # type: ignore[no-any-return]

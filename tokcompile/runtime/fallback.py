"""Calls that cannot be captured: each costs itself, not the recipe."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from tokcompile.errors import NoMatchError
from tokcompile.kinds import MERGED, Stage
from tokcompile.plan.apply import Matching
from tokcompile.plan.expectations import WAY_OUT
from tokcompile.plan.pass_base import Pass
from tokcompile.reporting.report import StageReport
from tokcompile.reporting.status import Status

#: Calls of one form that are tried at most: a failing capture takes as long as one that works.
TRIES = 3


class Failures:
    """Which calls of one model could not be captured, so that none is tried in vain again and again.

    A call's form is what its arguments are, apart from sizes: names, types, dtypes, ranks, plain values. One of the
    same form and sizes is not tried again; one of the same form and other sizes is, :data:`TRIES` times in all.
    """

    def __init__(self) -> None:
        self._tried: dict[tuple[Stage, Hashable], dict[Hashable, str]] = {}
        self._lock = threading.Lock()

    def known(self, stage: Stage, given: Any) -> str | None:
        """Why it is not worth while to try this call; None where it is."""
        with self._lock:
            if not any(of is stage for of, _ in self._tried):
                return None
            form, sizes = form_of(given)
            tried = self._tried.get((stage, form), {})
            if sizes in tried:
                return tried[sizes]
            return next(iter(tried.values())) if len(tried) >= TRIES else None

    def note(self, stage: Stage, given: Any, reason: str) -> None:
        form, sizes = form_of(given)
        with self._lock:
            self._tried.setdefault((stage, form), {})[sizes] = reason


class Fallbacks:
    """Counts in the report the calls that ran without a graph, and says so: of each reason once."""

    def __init__(self, matching: Matching) -> None:
        self.matching = matching
        self._told: set[tuple[Stage, str]] = set()
        self._lock = threading.Lock()

    def fell_back(self, stage: Stage, reason: str) -> None:
        """A call ran this stage uncompiled.

        Raises:
            NoMatchError: a step has changed nothing yet because of it, and ``on_no_match="error"``.
        """
        with self._lock:
            cause = f"stage '{stage}' was not captured: {reason}"
            told = (stage, reason) in self._told
            self._count(stage, reason)
            concerned, idle = self._steps(stage, cause)
            if not concerned or self.matching.observed is not None:
                return
            if idle and self.matching.on_no_match == "error":
                raise NoMatchError("\n".join((cause, *idle)) + WAY_OUT)
            self._told.add((stage, reason))
        if not told and self.matching.on_no_match != "ignore":
            text = (
                "This call ran without what the recipe does there; later ones are counted in tokcompile.report(model)"
            )
            warnings.warn(f"{cause}. {text}", stacklevel=5)

    def _count(self, stage: Stage, reason: str) -> None:
        for noted in self.matching.report.stages:
            if noted.name == stage and not noted.captured and noted.reason == reason:
                noted.fell_back += 1
                return
        self.matching.report.stages.append(StageReport(stage.value, captured=False, reason=reason, fell_back=1))

    def _steps(self, stage: Stage, cause: str) -> tuple[list[int], list[str]]:
        """The steps that act in a stage; and what is to be said of those that have changed nothing yet."""
        concerned, idle = [], []
        for index, ((step, method), entry) in enumerate(
            zip(self.matching.passes, self.matching.report.steps, strict=True)
        ):
            if not _acts(method, stage):
                continue
            concerned.append(index)
            entry.fell_back += 1
            if entry.matches and entry.status != Status.REWRITE_FAILED:
                entry.status = Status.FELL_BACK
            elif stage is not Stage.ENCODER and entry.status in (Status.STRUCTURE_MISS, Status.NOT_CAPTURED):
                entry.status, entry.reason = Status.NOT_CAPTURED, cause
                if step.expect.min_matches:
                    idle.append(f"step '{step.pass_}' changed 0 region(s), expected at least {step.expect.min_matches}")
                    self.matching.expectations.note(index, cause, idle[-1])
        return concerned, idle

    def served(self, stage: Stage) -> None:
        """A call ran this stage with a graph: steps that fell back are on again."""
        for (_, method), entry in zip(self.matching.passes, self.matching.report.steps, strict=True):
            if entry.status == Status.FELL_BACK and _acts(method, stage):
                entry.status = Status.MATCHED

    def never_reached(self, what: str, why: str) -> None:
        """No graph took part in a whole call.

        Raises:
            NoMatchError: a step has changed nothing yet, and ``on_no_match="error"``.
        """
        idle = [
            f"step '{step.pass_}'"
            for (step, _), entry in zip(self.matching.passes, self.matching.report.steps, strict=True)
            if entry.matches < step.expect.min_matches and entry.status != "unprofitable"
        ]
        if not idle or self.matching.observed is not None or (Stage.WHOLE, what) in self._told:
            return
        text = f"{what} ran without {', '.join(idle)}: {why}"
        self.matching.expectations.note(-1, text)
        if self.matching.on_no_match == "error":
            raise NoMatchError(text + WAY_OUT)
        self._told.add((Stage.WHOLE, what))
        if self.matching.on_no_match == "warn":
            warnings.warn(text, stacklevel=4)


def _acts(method: Pass, stage: Stage) -> bool:
    """Whether a pass may change graphs of a stage."""
    if stage is Stage.ENCODER:
        return method.stage == "any" and (method.regions not in MERGED or method.scores_features)
    if stage is Stage.DECODE:
        return method.stage != "prefill" and method.regions not in MERGED
    return method.stage != "decode"


def form_of(given: Any) -> tuple[Hashable, Hashable]:
    """The form of arguments, and their sizes."""
    sizes: list[Any] = []

    def form(value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            sizes.append(tuple(value.shape))
            return value.dtype, value.dim(), value.device.type, value.requires_grad
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return type(value).__name__, tuple((str(key), form(item)) for key, item in value.items())
        if isinstance(value, list | tuple):
            return type(value).__name__, tuple(form(item) for item in value)
        if hasattr(value, "get_seq_length"):
            sizes.append(int(value.get_seq_length()))
            return type(value).__name__, sizes[-1] > 0
        return type(value).__name__

    return (torch.is_grad_enabled(), form(given)), tuple(sizes)

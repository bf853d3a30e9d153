"""Every way in which tokcompile can refuse, one type each.

A message names what was found, where (module path, source line) and what to do. Nothing is printed by a
library function: a refusal is raised, or written into the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class TokcompileError(Exception):
    """Base of all errors that tokcompile raises on purpose."""


@dataclass(frozen=True)
class Mistake:
    """One mistake in a recipe.

    Attributes:
        file: name of the file (or what stands for it: "recipe" for a dict, "override" for a changed value).
        line, column: from 1; None where the recipe is no text.
        where: the place in the data, such as ``steps[0].params.keep``; "" for the whole.
        what: what is wrong, and what to write instead.
    """

    file: str
    line: int | None
    column: int | None
    where: str
    what: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line is not None else self.file
        return f"{place}: {self.where + ': ' if self.where else ''}{self.what}"


class RecipeError(TokcompileError):
    """A recipe is not valid. The message holds one line for each mistake, with file:line:column.

    Attributes:
        mistakes: the same as data; empty where the message is not about places in a recipe.
    """

    def __init__(self, message: str = "", mistakes: Sequence[Mistake] = ()) -> None:
        super().__init__(message or "\n".join(map(str, mistakes)))
        self.mistakes = list(mistakes)


class NoMatchError(TokcompileError):
    """A recipe step changed nothing (or less than it expects), and ``on_no_match="error"``."""


class RewriteError(NoMatchError):
    """A pass failed by an error of its own (the ``__cause__``) while a step was applied to a graph.

    Args:
        reason: what failed, and how.
        step: number of the step in the recipe.
        node: name of the graph node. path: module path of the region. source: ``file:line`` of the model code.
    """

    def __init__(self, reason: str, *, step: int, node: str = "", path: str = "", source: str = "") -> None:
        self.reason, self.step, self.node, self.path, self.source = reason, step, node, path, source
        place = ", ".join(part for part in (f"node {node}" if node else "", path, source) if part)
        super().__init__(f"{reason} [{place}]" if place else reason)


class CheckError(TokcompileError, RuntimeError):
    """A check that the model makes on its inputs does not hold, so there is no result."""


class CaptureError(TokcompileError):
    """A stage of the model could not be captured as one graph."""


class NarrowError(TokcompileError):
    """The token axis cannot be narrowed through some operation.

    Args:
        reason: what stands in the way and what to do.
        node: name of the graph node.
        path: module path of the node.
        source: ``file:line`` of the model code that made the node.
    """

    def __init__(self, reason: str, *, node: str = "", path: str = "", source: str = "") -> None:
        self.reason, self.node, self.path, self.source = reason, node, path, source
        place = ", ".join(part for part in (f"node {node}" if node else "", path, source) if part)
        super().__init__(f"{reason} [{place}]" if place else reason)


class UnprofitableError(NarrowError):
    """A region could be rewritten, but it would not pay; it stays as it is and the report says why."""


class CalibrationError(TokcompileError):
    """Calibration data is missing, empty or of the wrong form, or a pass could make nothing of it."""


class RecoveryError(TokcompileError):
    """A recovery cannot be run: its data, models or settings do not fit, or a checkpoint is of another run."""


class ExportError(TokcompileError):
    """A model, or a stage of it, cannot be written as ONNX, or the written files do not compute what the model does."""


class SavedModelError(TokcompileError):
    """A folder holds no saved model, or one that is damaged, too new, or not for the model that was given."""


class CacheError(TokcompileError):
    """A key/value cache of a kind, or in a state, in which pruned tokens cannot be tracked."""

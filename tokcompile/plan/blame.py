"""An error of a pass's own, told with the step and the place in the model at which it happened."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from tokcompile.capture.graph import module_path, source_line
from tokcompile.errors import RewriteError, TokcompileError
from tokcompile.plan.pass_base import Pass
from tokcompile.recipes import Step
from tokcompile.regions.model import Region
from tokcompile.rewrite.context import Context

_LONGEST = 300


@contextmanager
def blamed(
    ctx: Context, step: Step, method: Pass, stage: str, at: Region | fx.Node, index: int | None = None
) -> Iterator[None]:
    """Errors that a pass does not raise on purpose leave as a :class:`RewriteError` that names the step and ``at``.

    Args:
        index: of the step; default: ``ctx.step``.
    """
    try:
        yield
    except TokcompileError:
        raise
    except Exception as error:  # code of a pass, of anybody: whatever it raises is its own
        node = at.output if isinstance(at, Region) else at
        what = at.kind if isinstance(at, Region) else "features"
        said = " ".join(str(error).split())[:_LONGEST]
        raise RewriteError(
            f"step '{step.pass_}' failed at {what} in the {stage} graph by an error of its own, "
            f"{type(error).__name__}{': ' * bool(said)}{said} ({_line(method, error)})",
            step=ctx.step if index is None else index,
            node=node.name,
            path=at.path if isinstance(at, Region) else module_path(node),
            source=at.source if isinstance(at, Region) else source_line(node),
        ) from error


def _line(method: Pass, error: Exception) -> str:
    """``file:line`` of the pass where the error came from: the innermost line in the file of its class, or any."""
    own = getattr(sys.modules.get(type(method).__module__), "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((frame for frame in reversed(frames) if frame.filename == own), frames[-1])
    return f"{frame.filename}:{frame.lineno}"

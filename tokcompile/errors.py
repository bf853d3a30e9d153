"""Every way in which tokcompile can refuse, one type each.

A message names what was found, where (module path, source line) and what to do. Nothing is printed by a
library function: a refusal is raised, or written into the report.
"""

from __future__ import annotations


class TokcompileError(Exception):
    """Base of all errors that tokcompile raises on purpose."""


class RecipeError(TokcompileError):
    """A recipe is not valid. The message holds one line for each mistake, with file:line:column."""


class NoMatchError(TokcompileError):
    """A recipe step changed nothing (or less than it expects), and ``on_no_match="error"``."""


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


class CacheError(TokcompileError):
    """A key/value cache of a kind, or in a state, in which pruned tokens cannot be tracked."""

"""What became of a step of a recipe: the words that reports and their readers share."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """Outcome of a step. A member equals its text (``step.status == "matched"``) and is that text in JSON."""

    MATCHED = "matched"  #: rewritten
    UNPROFITABLE = "unprofitable"  #: it would not pay
    CONDITION_FAILED = "condition_failed"  #: a region, but one that cannot be rewritten as it stands
    STRUCTURE_MISS = "structure_miss"  #: no region of that kind, in the graphs that there were
    NOT_CAPTURED = "not_captured"  #: there was no graph to look at
    REWRITE_FAILED = "rewrite_failed"  #: the pass took the region and failed at it by an error of its own
    FELL_BACK = "fell_back"  #: matched before, but the last call of its stage ran without a graph


STATUSES: tuple[Status, ...] = tuple(Status)

"""What every choice of tokens or keys gives: :class:`Scores`, the result of a pass's ``score``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """What is kept first, and what goes along with it. The family says which shapes, and which fields it reads.

    Attributes:
        values: larger is kept first; of equals, the lower index. NaN counts as the worst. ``[B, S]`` for tokens, ``[B
            or 1, M, T]`` for the keys of a decode step.
        tokens: ``[B, S, D]``, the tokens to go on with where a method changes them (merging, pooling); None: those that
            were there.
        carried: name -> ``[B, S, ...]``, values of a method's own that it needs again below the cut.
        into: int64 ``[B, S]``, for a method that puts tokens into others: the place, in this sequence, of the kept
            token that each is part of afterwards.
    """

    values: Tensor
    tokens: Tensor | None = None
    carried: Mapping[str, Tensor] | None = None
    into: Tensor | None = None


def read_scores(result: object, name: str, rank: int, *fields: str) -> Scores:
    """The :class:`Scores` that a ``score`` of the pass ``name`` gave.

    A bare tensor stands for ``Scores(values)``. The tuples of the first releases, ``(tokens, values, into, *carried)``,
    are read for one more release, with a warning; what they carry is named by its number.

    Args:
        rank: number of dimensions of ``values``.
        fields: which of ``tokens``, ``carried`` and ``into`` the family reads.

    Raises:
        TypeError: it is something else, or has a field that nobody would read.
    """
    if isinstance(result, tuple):
        warnings.warn(
            f"{name}.score gives a tuple; give Scores(values, tokens=...) of tokcompile.authoring, tuples are refused "
            "from the next release on",
            DeprecationWarning,
            stacklevel=3,
        )
        tokens, values, *more = result
        carried = {str(number): value for number, value in enumerate(more[1:])}
        result = Scores(values, tokens, carried or None, more[0] if more else None)
    elif isinstance(result, Tensor):
        result = Scores(result)
    if not isinstance(result, Scores) or not isinstance(result.values, Tensor):
        raise TypeError(f"{name}.score: expected Scores, or a tensor of values, found {type(result).__name__}")
    if result.values.dim() != rank:
        raise TypeError(
            f"{name}.score: expected values of {rank} dimensions, found {result.values.dim()}: "
            f"{tuple(result.values.shape)}"
        )
    for field in ("tokens", "carried", "into"):
        if getattr(result, field) is not None and field not in fields:
            raise TypeError(f"{name}.score: nothing reads the field {field} of these Scores; leave it out")
    return result

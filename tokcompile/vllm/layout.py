"""The arithmetic of placeholders: which of them a prompt keeps, and where the tokens stood in the whole prompt.

An *item* is one image or video: a stretch of the prompt with ``n`` tokens, of which some are placeholders that image
features are written over, in runs; what is between the runs (row breaks, time stamps) is text and stays. Each run has
a budget of its own, as in the graph, where a run of visual tokens is an image.

A :class:`Layout` travels with the item's data as one int64 tensor ``[2 + axes, n]``; nothing here needs vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokcompile.recipe.budget import Budget

#: Axes of rotary positions that there is room for.
AXES = 4
_BASE = 256  # of the digits of a number in a feature: whole numbers up to 256 are exact in bfloat16
_DIGITS = 3
_SHIFT = _BASE**_DIGITS // 2  # numbers may be negative
#: Columns that :func:`write_columns` appends.
COLUMNS = _DIGITS * (AXES + 1)


@dataclass(frozen=True)
class Layout:
    """One item as it is in the prompt before tokens are dropped.

    Attributes:
        ids: token ids of the whole stretch, ``n`` of them.
        visual: for each, whether an image feature is written over it.
    """

    ids: list[int]
    visual: list[bool]

    def runs(self) -> list[int]:
        """Lengths of the runs of placeholders, in order."""
        found: list[int] = []
        before = False
        for flag in self.visual:
            if flag and not before:
                found.append(0)
            if flag:
                found[-1] += 1
            before = flag
        return found

    def kept(self, keep: Budget) -> list[int]:
        """How many placeholders of each run are left."""
        return [int(keep.count(length)) for length in self.runs()]

    def pruned(self, keep: Budget) -> list[int]:
        """Which places of the stretch are left: all text, and the first of each run."""
        counts = iter(self.kept(keep))
        places, left, before = [], 0, False
        for place, flag in enumerate(self.visual):
            if flag and not before:
                left = next(counts)
            if not flag or left > 0:
                places.append(place)
            if flag:
                left -= 1
            before = flag
        return places

    def tensor(self) -> Tensor:
        """int64 ``[2 + AXES, n]``: ids, visual, and room for positions relative to the first placeholder."""
        table = torch.zeros(2 + AXES, len(self.ids), dtype=torch.int64)
        table[0] = torch.tensor(self.ids, dtype=torch.int64)
        table[1] = torch.tensor(self.visual, dtype=torch.int64)
        return table

    @classmethod
    def read(cls, table: Tensor) -> Layout:
        """From :meth:`tensor`."""
        return cls([int(i) for i in table[0].tolist()], [bool(v) for v in table[1].tolist()])


@dataclass(frozen=True)
class Placed:
    """An item in a pruned prompt: ``offset`` and ``length`` there, and what it was."""

    offset: int
    length: int
    layout: Layout


def whole_prompt(ids: Sequence[int], items: Sequence[Placed], keep: Budget) -> tuple[list[int], list[int], list[int]]:
    """The prompt before tokens were dropped.

    Args:
        ids: the pruned prompt. items: in the order of their offsets.

    Returns:
        The whole prompt; for each token of the pruned one, its place in it (for a kept placeholder, the one that
        stands for it); where each item starts in it.

    Raises:
        ValueError: an item is not as long in the prompt as its layout says.
    """
    whole: list[int] = []
    places: list[int] = []
    starts: list[int] = []
    at = 0
    for item in items:
        left = item.layout.pruned(keep)
        if item.offset < at or len(left) != item.length:
            raise ValueError(
                f"an image has {item.length} tokens at {item.offset} of the prompt, expected {len(left)} from {at} on"
            )
        between = list(ids[at : item.offset])
        places += range(len(whole), len(whole) + len(between))
        whole += between
        starts.append(len(whole))
        places += [len(whole) + place for place in left]
        whole += item.layout.ids
        at = item.offset + item.length
    places += range(len(whole), len(whole) + len(ids) - at)
    whole += ids[at:]
    return whole, places, starts


def write_columns(features: Tensor, numbers: Tensor) -> Tensor:
    """Append whole numbers to features, in digits that every float format holds exactly.

    Args:
        features: ``[k, D]``. numbers: int64 ``[k, 1 + AXES]``.

    Raises:
        ValueError: a number that the digits do not hold.
    """
    shifted = numbers + _SHIFT
    if bool(((shifted < 0) | (shifted >= 2 * _SHIFT)).any()):
        raise ValueError(f"a position of a visual token is out of range: {int(numbers.abs().max())}")
    digits = [(shifted // _BASE**power) % _BASE for power in range(_DIGITS)]
    columns = torch.stack(digits, 2).flatten(1).to(features.device, features.dtype)
    return torch.cat([features, columns], 1)


def read_columns(features: Tensor) -> tuple[Tensor, Tensor]:
    """The features and the numbers that :func:`write_columns` put together."""
    width = features.shape[1] - COLUMNS
    digits = features[:, width:].to(torch.int64).reshape(-1, 1 + AXES, _DIGITS)
    powers = torch.tensor([_BASE**power for power in range(_DIGITS)], device=features.device)
    return features[:, :width], (digits * powers).sum(2) - _SHIFT

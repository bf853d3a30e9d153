"""What a recording holds: kept tokens, and choices that were used again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class KeptEntry:
    """What one cut of one prefill kept.

    Attributes:
        step: index of the recipe step. name: its pass.
        path: module path of the first layer below the cut. layer: its index in the stack.
        indices: int64 ``[B, K]``, positions in the unpruned sequence of this call, ascending; -1 pads ragged rows.
    """

    step: int
    name: str
    path: str
    layer: int
    indices: torch.Tensor


@dataclass
class ReusedEntry:
    """Whether one layer reused an earlier choice in one decode step.

    Attributes:
        step: index of the recipe step. name: its pass.
        path: module path of the region. layer: its index in the stack.
        rows: bool ``[B]``.
    """

    step: int
    name: str
    path: str
    layer: int
    rows: torch.Tensor


@dataclass
class Recording:
    """Collects :class:`KeptEntry` and :class:`ReusedEntry` objects, in the order in which cuts and layers ran."""

    kept: list[KeptEntry] = field(default_factory=list)
    reused: list[ReusedEntry] = field(default_factory=list)


class Recordings:
    """Who listens at the moment."""

    def __init__(self) -> None:
        self._open: list[Recording] = []

    @contextlib.contextmanager
    def open(self) -> Iterator[Recording]:
        recording = Recording()
        self._open.append(recording)
        try:
            yield recording
        finally:
            self._open = [other for other in self._open if other is not recording]

    def kept(self, step: int, name: str, path: str, layer: int, indices: torch.Tensor) -> None:
        for recording in self._open:
            recording.kept.append(KeptEntry(step, name, path, layer, indices.detach().clone()))

    def reused(self, entry: ReusedEntry) -> None:
        for recording in self._open:
            recording.reused.append(entry)

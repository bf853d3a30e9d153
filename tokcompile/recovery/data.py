"""The items of one training run: in an order that a seed fixes, for any number of processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import RecoveryError
from tokcompile.runtime.recording import KeptEntry

Item = Mapping[str, Any] | Tensor


# .. data


class Stream:
    """Items without end, by number; the same ones however many processes take them."""

    def __init__(self, data: Iterable[Item], seed: int) -> None:
        self.data, self.seed = data, seed
        self.indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping)
        if isinstance(data, Mapping) or not (self.indexed or hasattr(data, "__iter__")):
            raise RecoveryError(
                f"data is a {type(data).__name__}; expected an iterable of inputs, such as [{{'input_ids': ...}}, ...]"
            )
        self.size = len(data) if hasattr(data, "__len__") else None  # type: ignore[arg-type]
        if self.size == 0:
            raise RecoveryError("the data is empty: give at least one input, such as {'input_ids': ...}")
        self._order: tuple[int, list[int]] = (-1, [])
        self._iterator: Iterator[Item] | None = None
        self._next = 0

    def steps(self, epochs: int, group: int) -> int:
        if self.size is None:
            raise RecoveryError("data has no length, so say how long to train: steps=")
        return max(1, self.size * epochs // group)

    def item(self, number: int) -> Item:
        """Item ``number``; numbers only grow."""
        if self.indexed:
            assert self.size is not None
            epoch, place = divmod(number, self.size)
            if self._order[0] != epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
            return self.data[self._order[1][place]]  # type: ignore[index, no-any-return]
        while True:
            item = self._pull()
            self._next += 1
            if self._next > number:
                return item

    def _pull(self) -> Item:
        if self._iterator is None:
            self._iterator = iter(self.data)
        with contextlib.suppress(StopIteration):
            return next(self._iterator)
        if self._next == 0:
            raise RecoveryError(
                "the data is empty: give at least one input, such as {'input_ids': ...}; a generator "
                "that was used before gives nothing more"
            )
        fresh = iter(self.data)
        if fresh is self._iterator:
            raise RecoveryError(
                f"the data ran out after {self._next} items, and a generator cannot start again; pass "
                "a list, an object whose __iter__ starts anew, or fewer steps"
            )
        self._iterator = fresh
        return next(fresh)


# .. one batch


@dataclass
class Batch:
    """Positions at which both models gave logits, in a row.

    Attributes:
        student, teacher: ``[N, V]``.
        rows: int64 ``[N]``, their row in the batch. positions: their place in the unpruned sequence.
        labels: int64 ``[N]``, the token that follows; None without token ids.
        hidden: of each layer, ``[N, D]`` of student and teacher.
        on_prompt: see :func:`~tokcompile.recovery.losses.sstoken_scores`.
    """

    student: Tensor
    teacher: Tensor
    rows: Tensor
    positions: Tensor
    labels: Tensor | None
    hidden: list[tuple[Tensor, Tensor]]
    on_prompt: Tensor | None = None


def shared_positions(student: Tensor, length: int, kept: Sequence[KeptEntry]) -> Tensor:
    """int64 ``[B, K]``: the place of each position of the student in the unpruned sequence; -1 at empty slots."""
    shape = student.shape[:2]
    fitting = [entry.indices for entry in kept if entry.indices.shape == shape]
    if fitting:
        return fitting[-1]
    if shape[1] != length:
        raise RecoveryError(
            f"the model gives logits for {shape[1]} positions, the teacher for {length}, and no step "
            "of the recipe says which positions are left; pass the original model as teacher"
        )
    return torch.arange(length, device=student.device).expand(shape)

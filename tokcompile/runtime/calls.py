"""What is being called, in each thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from tokcompile.kinds import Stage


@dataclass(eq=False)
class Call:
    """One call of a method of an optimized model.

    Attributes:
        served: the stages that a graph took so far.
        tried: whether it came to a forward that is captured.
        visual_mask: bool ``[B, S]``, the tokens of images in the prompt of this call, where it is known.
        prompt_length: tokens of the prompt, where drafted ones may follow it.
    """

    served: list[Stage] = field(default_factory=list)
    tried: bool = False
    visual_mask: torch.Tensor | None = None
    prompt_length: int | None = None

    @property
    def reached(self) -> bool:
        """Whether a graph took more of it than an encoder."""
        return any(stage is not Stage.ENCODER for stage in self.served)


class Calls:
    """The calls that are open in this thread, the innermost last."""

    def __init__(self) -> None:
        self._of = threading.local()

    def _open(self) -> list[Call]:
        if not hasattr(self._of, "calls"):
            self._of.calls = []
        found: list[Call] = self._of.calls
        return found

    @contextlib.contextmanager
    def open(self, call: Call) -> Iterator[Call]:
        calls = self._open()
        calls.append(call)
        try:
            yield call
        finally:
            calls.remove(call)

    def note(self, stage: Stage) -> None:
        for call in self._open():
            call.served.append(stage)

    def enter(self) -> None:
        """A forward that is captured was called."""
        for call in self._open():
            call.tried = True

    @property
    def visual_mask(self) -> torch.Tensor | None:
        """That of the innermost call that has one."""
        return next((call.visual_mask for call in reversed(self._open()) if call.visual_mask is not None), None)

    @property
    def prompt_length(self) -> int | None:
        """That of the innermost call that has one."""
        return next((call.prompt_length for call in reversed(self._open()) if call.prompt_length is not None), None)

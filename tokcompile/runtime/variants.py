"""One compiled form of a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokcompile.capture.checks import Checks
from tokcompile.lower.guard import Guard
from tokcompile.rewrite.graph_inputs import HostSize, Kept, Memory, MemoryInput, StateInput
from tokcompile.runtime.memories import Memories
from tokcompile.state import PreparedState


@dataclass(eq=False)
class Variant:
    """One compiled form of a graph."""

    run: Callable[..., Any]
    guard: Guard
    sizes: list[HostSize]
    ragged: list[bool]
    kept: list[Kept]
    prologue: tuple[fx.GraphModule, list[int]] | None = None
    inputs: list[HostSize | StateInput | MemoryInput] = field(default_factory=list)
    prepared: PreparedState | None = None
    #: each with the number of the argument that holds the keys so far, and of the result that holds the grown ones
    memories: list[tuple[Memory, int, int | None]] = field(default_factory=list)
    remembered: Memories = field(default_factory=Memories)
    checks: Checks = field(default_factory=Checks)

    def __post_init__(self) -> None:
        self.forms = [_form(self._state(item)) for item in self.inputs if isinstance(item, StateInput)]

    def extra(self, args: Sequence[Any]) -> list[Any] | None:
        """What to append to ``args``: sizes and prepared state, and what the prologue computes from all of these.

        None when this variant was made for other sizes, for other (un)ragged rows, or for state of another form.
        """
        found = [size(args) for size in self.sizes]
        if [r for _, r in found] != self.ragged or any(
            size.static not in (None, n) for size, (n, _) in zip(self.sizes, found, strict=True)
        ):
            return None
        numbers = {id(size): n for size, (n, _) in zip(self.sizes, found, strict=True)}
        values = {
            id(memory): self.remembered.get(args[past]) or memory.fresh(args[past]) for memory, past, _ in self.memories
        }
        more = [
            numbers[id(item)]
            if isinstance(item, HostSize)
            else self._state(item)
            if isinstance(item, StateInput)
            else values[id(item.memory)][item.place]
            for item in self.inputs
        ]
        # Dynamo guards on the parameters that the model uses, and knows nothing of these
        if [_form(v) for v, item in zip(more, self.inputs, strict=True) if isinstance(item, StateInput)] != self.forms:
            return None
        if self.prologue is None:
            return more
        choose, inputs = self.prologue
        given = [*args, *more]
        try:
            with torch.no_grad():
                return [*more, *choose(*(given[i] for i in inputs))]
        except Exception:
            self.checks.ask(args)  # a choice among inputs that do not fit together fails before the graph would
            raise

    def _state(self, item: StateInput) -> torch.Tensor:
        assert self.prepared is not None
        return getattr(self.prepared.scope(item.pass_name, item.key), item.name)  # type: ignore[no-any-return]


def _form(tensor: Any) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad

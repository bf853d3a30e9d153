"""What a rewritten graph takes beside the inputs of the model: sizes, prepared state, values of earlier steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from tokcompile.rewrite.selection import kept_size

#: The number of slots that each row needs, from the visual mask ``[B, S]``: -> int64 ``[B]``. Traceable.
SizeFunction = Callable[[torch.Tensor], torch.Tensor]


class Observer(nn.Module):
    """Hands values of a running graph to a function."""

    _is_impure = True  # dead code elimination leaves it alone

    def __init__(self, function: Callable[..., None], active: Callable[[], bool]) -> None:
        super().__init__()
        self.function, self.active = function, active

    def forward(self, *values: Any) -> None:
        if self.active():
            with torch.no_grad():
                self.function(*values)


@dataclass(eq=False)
class StateInput:
    """A prepared tensor that a graph takes as one more input; read anew at each call."""

    pass_name: str
    key: str
    name: str


@dataclass(eq=False)
class Memory:
    """What a layer hands on from one decode step to the next; it belongs to the cache that holds the layer's keys.

    A cache that another one was made of (rows reordered or repeated, tokens cropped off) has none, nor has one that
    was written to in between: the next step starts from ``fresh``.

    Attributes:
        step, path, layer: which region has it, for recordings.
        past: input of the graph: the keys so far. grown: output of the graph: these and the new one; None where they
            are written into ``past``.
        fresh: the keys so far -> the values of a cache that has none yet.
        inputs: placeholders of the values. outputs: nodes of the new values, in the same order; set by the pass.
        reused: node, bool [B]: rows that made use of the old values.
    """

    step: int
    path: str
    layer: int
    past: fx.Node
    grown: fx.Node | None
    fresh: Callable[[torch.Tensor], list[torch.Tensor]]
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)
    reused: fx.Node | None = None


@dataclass(eq=False)
class MemoryInput:
    """A value of a :class:`Memory` that a graph takes as one more input."""

    memory: Memory
    place: int


@dataclass(eq=False)
class HostSize:
    """A size that depends on the data of a call: read off the visual mask before the graph runs.

    Rows hold different numbers of images, so the number of slots is no function of the sizes in the graph. The mask
    comes straight from the token ids; reading it is one small transfer for each prefill.

    ``static``: the graph was compiled for this number only (all its other sizes are static too).
    ``padded``: rows count as different, whether they are or not.
    ``function`` of ``mask`` can be traced too: an exported graph computes the size itself.
    """

    prologue: fx.GraphModule
    inputs: list[int]
    function: SizeFunction
    mask: fx.Node
    static: int | None = None
    padded: bool = False

    def __call__(self, args: Sequence[Any]) -> tuple[int, bool]:
        with torch.no_grad():
            (mask,) = self.prologue(*(args[i] for i in self.inputs))
            size, ragged = kept_size(self.function(mask.to("cpu", torch.bool)))
        # a symbolic size is at least 2; a single token gets an empty slot beside it
        return (size, ragged or self.padded) if size > 1 else (2, True)


@dataclass(eq=False)
class Kept:
    """A node that holds the kept positions ``[B, K]`` of one cut."""

    step: int
    path: str
    layer: int
    node: fx.Node

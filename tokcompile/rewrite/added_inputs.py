"""The inputs that a rewrite adds to a graph, behind those of the capture: sizes, prepared state, earlier values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.graph import extract
from tokcompile.rewrite.graph_inputs import HostSize, Memory, MemoryInput, SizeFunction, StateInput
from tokcompile.state import PreparedState


@dataclass(eq=False)
class AddedInputs:
    """See the module.

    Attributes:
        captured: the graph.
        prepared: the state that calibration made.
        static: sizes read off the data may be numbers in the graph; another number compiles it anew.
        always_ragged: the graph must serve rows that keep different numbers of tokens, whatever a call keeps.
        memories: what decode steps hand on; None where nothing can (a graph that is exported).
        of: added placeholder -> what it takes.
        sizes, ragged: the sizes that depend on data, and whether the rows of the first call differ.
    """

    captured: Captured
    prepared: PreparedState | None = None
    static: bool = False
    always_ragged: bool = False
    memories: list[Memory] | None = None
    of: dict[fx.Node, HostSize | StateInput | MemoryInput] = field(default_factory=dict)
    sizes: list[HostSize] = field(default_factory=list)
    ragged: list[bool] = field(default_factory=list)

    def state(self, pass_name: str, key: str) -> dict[str, fx.Node]:
        """The prepared tensors of a region as inputs, by name."""
        assert self.prepared is not None
        return {
            name: self._add(
                f"{pass_name}_{name}_{len(self.of)}", self.captured.fake(tensor), StateInput(pass_name, key, name)
            )
            for name, tensor in self.prepared.tensors(pass_name, key).items()
        }

    def size(
        self, mask: fx.Node, function: SizeFunction, name: str, args: Sequence[Any], padded: bool = False
    ) -> tuple[Any, bool]:
        """See :meth:`Context.host_size`."""
        size = HostSize(*extract(self.captured, [mask]), function, mask, padded=padded)
        hint, ragged = size(args)
        ragged = ragged or self.always_ragged
        self.sizes.append(size)
        self.ragged.append(ragged)
        if self.static:
            size.static = hint
            return hint, ragged
        place = f"{name}_{len(self.sizes)}"
        return self._add(place, self.captured.new_size(hint, place), size), ragged

    def memory(
        self,
        step: int,
        path: str,
        layer: int,
        past: fx.Node,
        grown: fx.Node | None,
        fresh: Callable[[torch.Tensor], list[torch.Tensor]],
        forms: Sequence[tuple[Sequence[Any], torch.dtype]],
    ) -> Memory:
        """See :meth:`Context.remember`."""
        assert self.memories is not None
        memory = Memory(step, path, layer, past, grown, fresh)
        for place, (shape, dtype) in enumerate(forms):
            with self.captured.fake_mode:
                value = torch.empty(tuple(shape), dtype=dtype, device=past.meta["val"].device)
            name = f"memory_{len(self.memories)}_{place}"
            memory.inputs.append(self._add(name, value, MemoryInput(memory, place)))
        self.memories.append(memory)
        return memory

    def _add(self, name: str, value: Any, item: HostSize | StateInput | MemoryInput) -> fx.Node:
        with self.captured.graph.inserting_after(self.captured.placeholders[-1]):
            node = self.captured.graph.placeholder(name)
        node.meta["val"] = value
        self.of[node] = item
        return node

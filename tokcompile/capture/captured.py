"""One captured graph: :class:`Captured`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic


@dataclass
class Captured:
    """One captured graph.

    Attributes:
        graph_module: pre-dispatch ATen; placeholders in the order of the captured inputs.
        fake_mode: the mode of every ``meta["val"]``; owns the shape environment.
        source: "dynamo" or "export".
        symbols: symbol of the capture -> symbol of ``fake_mode``'s own shape environment.
    """

    graph_module: fx.GraphModule
    fake_mode: FakeTensorMode
    source: str
    symbols: dict[Any, Any] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def new_size(self, hint: int, name: str) -> torch.SymInt:
        """A fresh symbolic size (at least 2), for a count that only the rewritten graph has."""
        env = self.fake_mode.shape_env
        assert env is not None
        symbol = env.create_symbol(hint, ConstantSource(name), dynamic_dim=DimDynamic.DYNAMIC)
        return env.create_symintnode(symbol, hint=hint)  # type: ignore[return-value]

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A stand-in for one more real tensor (a parameter), with static sizes."""
        with self.fake_mode:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return new.requires_grad_(tensor.requires_grad)

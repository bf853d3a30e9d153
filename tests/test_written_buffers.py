"""Buffers that model code fills slice by slice are the slices one behind the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import capture_graphs
from tokcompile.capture.ops import is_in_place
from tokcompile.capture.written import join_writes


class Filled(nn.Module):
    def __init__(self, fill: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: Tensor) -> Tensor:
        return self.fill(x) * 2


def in_order(x: Tensor) -> Tensor:
    buffer = x.new_empty(*x.shape[:-1], 8)
    buffer[..., :3] = x[..., :3]
    buffer[..., 3:] = x[..., :1].expand(*x.shape[:-1], 5)
    return buffer


def backwards_and_broadcast(x: Tensor) -> Tensor:
    buffer = torch.zeros(2, 5, 8)
    buffer[..., 4:].copy_(x[:, :1, :4])
    buffer[..., :4].copy_(x[..., 4:8])
    return buffer


def with_a_gap(x: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    buffer[..., :3] = x[..., 3:6]
    buffer[..., 4:] = x[..., 4:]
    return buffer


def read_in_between(x: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    buffer[..., :4] = x[..., 4:]
    total = buffer.sum()
    buffer[..., 4:] = x[..., 4:] + total
    return buffer


@pytest.mark.parametrize(
    ("fill", "joined"), [(in_order, 1), (backwards_and_broadcast, 1), (with_a_gap, 0), (read_in_between, 0)]
)
def test_joined_where_that_means_the_same(fill: Callable[[Tensor], Tensor], joined: int) -> None:
    model, x = Filled(fill).eval(), torch.randn(2, 5, 8)
    (captured,) = capture_graphs(model, {}, inputs_in_order=(x,))
    assert join_writes(captured) == joined
    captured.graph.lint()
    captured.graph_module.recompile()
    assert any(map(is_in_place, captured.graph.nodes)) is not bool(joined)
    values = [node.meta["val"] for node in captured.graph.find_nodes(op="placeholder")]
    given = [x if isinstance(value, Tensor) else value.node.hint for value in values]
    assert torch.equal(captured.graph_module(*given)[0], model(x))

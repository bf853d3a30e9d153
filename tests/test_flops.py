"""FLOPs of a graph: what reports and recipes predict with."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from tokcompile.capture.flops import graph_flops
from tokcompile.kernels.grouped_ffn import grouped_ffn
from tokcompile.kernels.token_list_attention import token_list_attention


def traced(function, *inputs) -> fx.Graph:
    return torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs).graph


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, w: functional.linear(x, w), [(2, 3, 8), (5, 8)]),
        (lambda x, w: x @ w, [(2, 3, 8), (2, 8, 5)]),
        (lambda b, x, w: torch.addmm(b, x, w), [(5,), (3, 8), (8, 5)]),
        (lambda x, w: functional.conv2d(x, w, stride=2), [(2, 3, 8, 8), (6, 3, 2, 2)]),
        (lambda x, w: functional.conv_transpose1d(x, w, stride=2), [(2, 3, 8), (3, 4, 2)]),
    ],
)
def test_agrees_with_the_counter_of_torch(function, shapes):
    inputs = [torch.randn(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    assert graph_flops(traced(function, *inputs)) == counter.get_total_flops() > 0


def test_attention_over_listed_keys_counts_the_lists_and_not_the_cache():
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 50, 8)
    index = torch.zeros(2, 2, 6, dtype=torch.int64)
    graph = traced(lambda q, k, i: token_list_attention(q, k, k, i)[0], query, key, index)
    assert graph_flops(graph) == 2 * 2 * 4 * 6 * (8 + 8)


def test_experts_count_their_slots():
    x, index = torch.randn(7, 16), torch.zeros(7, 2, dtype=torch.int64)
    graph = traced(
        lambda x, i, w, up, down: grouped_ffn(x, i, w, up, down, "silu"),
        x,
        index,
        torch.ones(7, 2),
        torch.randn(4, 12, 16),
        torch.randn(4, 16, 6),
    )
    assert graph_flops(graph) == 7 * 2 * 2 * 16 * (12 + 6)

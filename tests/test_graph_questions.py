"""Questions that many parts ask of a graph and that have one answer: sizes, arguments of attention, where a node is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tokcompile.capture.graph import refuse
from tokcompile.capture.ops import op_name, sdpa_arguments
from tokcompile.capture.sizes import dims_of, equal, expr, hint, product
from tokcompile.regions.places import layers_meant

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@pytest.fixture
def size() -> torch.SymInt:
    env = ShapeEnv()
    symbol = env.create_symbol(12, torch._dynamo.source.ConstantSource("n"))
    return env.create_symintnode(symbol, hint=12)


def test_sizes(size: torch.SymInt) -> None:
    assert hint(size) == 12
    assert hint(size * 2 + 1) == 25
    assert hint(7) == 7
    assert equal(size * 2, size + size)
    assert not equal(size, 12)
    assert not size.node.shape_env.guards  # no question put a condition on the size
    assert dims_of((3, size, size + 1)) == (3, expr(size), expr(size + 1))
    assert all(isinstance(d, int) for d in dims_of((3, 4)))
    assert product(()) == 1
    assert equal(product((2, size, 3)), 6 * size)


def test_a_size_read_off_data_has_no_value() -> None:
    unknown = ShapeEnv().create_unbacked_symint()
    assert hint(unknown, 0) == 0
    with pytest.raises(TypeError):
        hint(unknown)


def nodes() -> tuple[fx.Graph, list[fx.Node]]:
    graph = fx.Graph()
    found = [graph.placeholder(name) for name in ("query", "key", "value", "mask")]
    for node in found:
        node.meta["val"] = torch.empty(2, 4, 7, 16)
    return graph, found


def test_arguments_of_attention_by_position_and_by_name() -> None:
    graph, (query, key, value, mask) = nodes()
    by_place = sdpa_arguments(graph.call_function(ATTENTION, (query, key, value, mask, 0.1, True)))
    by_name = sdpa_arguments(
        graph.call_function(
            ATTENTION, (query, key, value), {"attn_mask": mask, "dropout_p": 0.1, "is_causal": True, "scale": None}
        )
    )
    assert by_place == by_name
    assert (by_place.mask, by_place.dropout, by_place.is_causal, by_place.enable_gqa) == (mask, 0.1, True, False)
    assert by_place.factor == 1 / math.sqrt(16)
    plain = sdpa_arguments(graph.call_function(ATTENTION, (query, key, value), {"scale": 0.5, "enable_gqa": True}))
    assert (plain.mask, plain.dropout, plain.is_causal) == (None, 0.0, False)
    assert (plain.factor, plain.enable_gqa) == (0.5, True)


def test_arguments_of_attention_are_written_back() -> None:
    graph, (query, key, value, mask) = nodes()
    node = graph.call_function(ATTENTION, (query, key, value), {"is_causal": True, "scale": 0.5, "enable_gqa": True})
    wanted = replace(sdpa_arguments(node), mask=mask, is_causal=False)
    wanted.write(node)
    assert sdpa_arguments(node) == wanted
    assert mask in node.all_input_nodes


def test_a_refusal_says_where() -> None:
    _, (query, *_) = nodes()
    query.meta["nn_module_stack"] = {"a": ("L['self'].layers[3].attention", object)}
    query.meta["stack_trace"] = '  File "/models/vit.py", line 12, in forward\n    x = q'
    error = refuse(query, "stays")
    assert (error.reason, error.node, error.path, error.source) == (
        "stays",
        "query",
        "layers.3.attention",
        "/models/vit.py:12",
    )


def test_in_place_forms_have_the_name_of_the_others() -> None:
    graph, (query, *_) = nodes()
    assert op_name(graph.call_function(torch.ops.aten.masked_fill_.Scalar, (query, query, 0))) == "masked_fill"
    assert op_name(query) == ""


@pytest.mark.parametrize(("given", "layers", "count"), [(0.5, 5, 3), (0.01, 5, 1), (1.0, 5, 5), (2, 5, 2), (9, 5, 5)])
def test_layers_meant(given: float, layers: int, count: int) -> None:
    assert layers_meant(given, layers) == count

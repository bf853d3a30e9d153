"""Every model of the zoos is captured whole, and what is captured computes what the model computes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tests import oracle
from tests.members import members
from tests.zoo.encoders_for_pruning import ENCODERS, EncoderCase
from tests.zoo.vlm import VARIANTS, VLMS, shallow
from tokcompile.capture.capture import DYNAMO_CONFIG, from_dynamo
from tokcompile.capture.captured import Captured
from tokcompile.capture.checks import take
from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.trace import is_fake

aten = torch.ops.aten


@dataclass
class Recorder:
    """A backend that captures each graph and runs it; every call is compared with the graph of Dynamo itself."""

    graphs: list[Captured] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)

    def __call__(self, graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured, index = from_dynamo(graph_module), len(self.graphs)
        checks = take(captured)  # as whoever runs the graph does
        self.graphs.append(captured)

        def call(*args: Any) -> Any:
            self.calls.append(index)
            checks.ask(args)
            expected, found = graph_module(*args), captured.graph_module(*args)
            for one, other in zip(tree_leaves(expected), tree_leaves(found), strict=True):
                assert not is_fake(other), "the captured graph returns a tensor without data"
                if isinstance(one, Tensor):
                    assert one.dtype == other.dtype
                    assert torch.equal(one, other), f"differs by {(one - other).abs().max()}"
                else:
                    assert one == other
            return found

        return call


def traced(model: nn.Module, kwargs: dict[str, Any]) -> Any:
    return type(model).forward(model, **kwargs)


def compiled(recorder: Recorder) -> Callable[[nn.Module, dict[str, Any]], Any]:
    torch._dynamo.reset()
    return torch.compile(traced, backend=recorder, dynamic=True, fullgraph=True)


def check_nodes(captured: Captured, model: nn.Module) -> None:
    """The form that everything behind relies on: whole operations, values, paths, source lines, no assertions."""
    operations = [node for node in captured.graph.nodes if node.op == "call_function"]
    modules = dict(model.named_modules())
    for node in captured.graph.nodes:
        assert node.op in ("placeholder", "call_function", "get_attr", "output")
        if node.op == "get_attr":
            assert not is_fake(getattr(captured.graph_module, node.target)), f"{node.name} is a constant without data"
    for node in operations:
        assert "val" in node.meta, node.format_node()
        assert not str(node.target).startswith("aten._assert"), node.format_node()
        path, line = module_path(node), source_line(node)
        assert path in modules, f"{node.name}: {path!r} is no module of the model"
        name, _, number = line.rpartition(":")
        assert os.path.exists(name), f"{node.name}: no source line, found {line!r}"
        assert number.isdigit()
    for node in operations:
        if node.target is aten.linear.default:
            assert isinstance(modules[module_path(node)], (nn.Linear, nn.MultiheadAttention)), module_path(node)
        if node.target is aten.scaled_dot_product_attention.default:
            assert "attn" in module_path(node) or "layers" in module_path(node) or "encoder" in module_path(node)


def count(captured: Captured, *targets: Any) -> int:
    return sum(node.target in targets for node in captured.graph.nodes)


#: Structures of their own: three-part positions, features between the layers, sliding layers with capped scores,
#: a prefix that sees itself.
IN_DEFAULT = ["llava", "qwen3_vl", "qwen2_5_vl", "internvl", "paligemma2"]


@pytest.mark.parametrize(
    "name", members((name for name in {**VLMS, **VARIANTS} if not name.startswith("plain")), IN_DEFAULT)
)
def test_generate_is_a_prefill_and_a_decode_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = shallow({**VLMS, **VARIANTS}[name]())
    inputs = case.inputs(batch=2, left_padding=3)
    eager = oracle.run(case, inputs, max_new_tokens=4)
    recorder, seen = Recorder(), []
    call = compiled(recorder)

    @functools.wraps(case.model.forward)
    def forward(**kwargs: Any) -> Any:
        seen.append({key for key, value in kwargs.items() if value is not None})
        return call(case.model, kwargs)

    monkeypatch.setattr(case.model, "forward", forward)
    with torch._dynamo.config.patch(**DYNAMO_CONFIG):
        found = oracle.run(case, inputs, max_new_tokens=4)
    if name == "gemma3_window":  # the first decode step finds the cropped cache of the prefill, later ones their own
        assert recorder.calls == [0, 1, 2, 2]
    else:
        assert recorder.calls == [0, 1, 1, 1], "one graph for the prefill, one for all decode steps"
    assert torch.equal(found.tokens, eager.tokens)
    # transformers takes other attention and mask routes while compiling, so equal to rounding only
    assert oracle.difference(found, eager) < 2e-5

    assert "mm_encoder_outputs" in seen[0], "generate() encodes before the first forward"
    assert "pixel_values" not in seen[0]
    assert all("mm_encoder_outputs" not in step for step in seen[1:])
    prefill, decode = recorder.graphs[:2]
    assert count(prefill, aten.masked_scatter.default) == 1
    assert count(decode, aten.masked_scatter.default) == 0
    for captured in recorder.graphs:
        check_nodes(captured, case.model)
        assert count(captured, aten.scaled_dot_product_attention.default, aten.softmax.int) == len(case.decoder_layers)


@pytest.mark.parametrize("name", [name for name in VLMS if name.startswith("plain")])
def test_a_model_without_generate_is_one_graph(name: str) -> None:
    case = shallow(VLMS[name]())
    inputs, recorder = case.inputs(batch=2, left_padding=3), Recorder()
    call = compiled(recorder)
    with torch.no_grad(), torch._dynamo.config.patch(**DYNAMO_CONFIG):
        found = call(case.model, inputs)
        again = call(case.model, case.inputs(batch=2, left_padding=1, text_len=17, seed=1))
    assert torch.equal(found, oracle.forward(case, inputs))
    other = case.inputs(batch=2, left_padding=1, text_len=17, seed=1)
    assert torch.equal(again, oracle.forward(case, other))
    assert recorder.calls == [0, 0], "other lengths need no new graph"
    check_nodes(recorder.graphs[0], case.model)
    assert count(recorder.graphs[0], aten.scaled_dot_product_attention.default) == 4, "two encoder and two text layers"


def capture_encoder(case: EncoderCase, batch: int = 2) -> tuple[Recorder, Tensor]:
    recorder = Recorder()
    call = compiled(recorder)
    with torch.no_grad(), torch._dynamo.config.patch(**DYNAMO_CONFIG):
        return recorder, case.output(call(case.model, case.inputs(batch)))


@pytest.mark.parametrize("name", list(ENCODERS))
def test_an_encoder_is_one_graph(name: str) -> None:
    case = ENCODERS[name]()
    recorder, found = capture_encoder(case)
    assert torch.equal(found, case.run(case.inputs(2)))
    assert recorder.calls == [0]
    captured = recorder.graphs[0]
    check_nodes(captured, case.model)
    if name.startswith("torch_encoder"):  # without gradients nn.TransformerEncoderLayer takes its fused path
        assert count(captured, aten._transformer_encoder_layer_fwd.default) == 4
    else:
        assert count(captured, aten.scaled_dot_product_attention.default) == 4


@pytest.mark.parametrize("name", ["torch_encoder_post_norm", "torch_encoder_pre_norm"])
def test_nn_transformer_encoder_shows_its_attention_when_the_fast_path_is_off(name: str) -> None:
    case = ENCODERS[name]()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        recorder, found = capture_encoder(case)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    torch.testing.assert_close(found, case.run(case.inputs(2)), atol=1e-5, rtol=0)
    captured = recorder.graphs[0]
    check_nodes(captured, case.model)
    assert count(captured, aten.scaled_dot_product_attention.default) == 4
    assert count(captured, aten._transformer_encoder_layer_fwd.default) == 0


def test_a_failing_comparison_is_noticed() -> None:
    """The recorder itself: a captured graph that computes something else does not pass."""
    case = ENCODERS["fused_vit"]()
    recorder = Recorder()

    def broken(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        call = recorder(graph_module, example_inputs)
        graph = recorder.graphs[0].graph
        scaled = next(node for node in graph.nodes if node.target is aten.gelu.default)
        scaled.replace_all_uses_with(scaled.args[0])
        recorder.graphs[0].graph_module.recompile()
        return call

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(**DYNAMO_CONFIG), pytest.raises(AssertionError, match="differs"):
        torch.compile(traced, backend=broken, dynamic=True, fullgraph=True)(case.model, case.inputs(2))

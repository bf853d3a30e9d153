"""Parts that occur more than once are compiled once, and the graph of calls computes what the graph did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import tokcompile
from tests.members import members
from tests.pruning import close
from tokcompile.capture.capture import from_dynamo
from tokcompile.capture.captured import Captured
from tokcompile.lower import inductor as lower
from tokcompile.lower import repeated
from tokcompile.lower.constants import fold_constants
from tokcompile.lower.repeated import compile_repeated
from tokcompile.lower.repeated_parts import Form, WholeError
from tokcompile.regions import find_regions


def recipe(keep: Sequence[float], at: Sequence[float], name: str = "class_attention") -> dict[str, Any]:
    return {"recipe_version": 1, "steps": [{"pass": name, "params": {"keep": list(keep), "at": list(at)}}]}


def vit(width: int = 32, layers: int = 6) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        image_size=48,
        patch_size=8,
        hidden_dropout_prob=0.0,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[Form]:
    """The forms that are compiled; what runs them is the traced module itself instead of Inductor's."""
    found: list[Form] = []
    made = repeated.Compiled.__init__

    def init(self: Any, form: Form, _compiler: Any) -> None:
        made(self, form, lambda module, _values, _mode: module)
        found.append(form)

    monkeypatch.setattr(repeated.Compiled, "__init__", init)
    return found


def layers_of(forms: Sequence[Form]) -> list[int]:
    """How many places each form with an attention has."""
    sdpa = torch.ops.aten.scaled_dot_product_attention.default
    return sorted(len(f.places) for f in forms if any(m.target is sdpa for m in f.members))


def same_as_eager(model: nn.Module, steps: dict[str, Any], pixels: Tensor) -> None:
    with torch.no_grad():
        changed = tokcompile.optimize(model, steps)
        found = changed(pixel_values=pixels).last_hidden_state
        assert " parts, called in " in tokcompile.report(changed).stages[-1].compiled
        wanted = tokcompile.optimize(model, steps, lowering="eager")(pixel_values=pixels).last_hidden_state
    close(found, wanted)


def test_layers_and_choices_are_one_form_each(forms: list[Form]) -> None:
    same_as_eager(vit(), recipe([0.75, 0.6, 0.5], [1 / 6, 1 / 2, 2 / 3]), torch.randn(2, 3, 48, 48))
    assert layers_of(forms) == [6]
    # the patches, the layers, three choices, the final norm
    assert sorted(len(f.places) for f in forms) == [1, 1, 3, 6]


@pytest.mark.parametrize("width", members([28, 36, 37 * 4], [28]))
def test_numbers_that_happen_to_be_the_token_count(forms: list[Form], width: int) -> None:
    """37 tokens, then 28: widths and head sizes of the same number are left alone."""
    same_as_eager(vit(width), recipe([0.75], [0.5]), torch.randn(3, 3, 48, 48))
    assert layers_of(forms) == [6]


def test_a_batch_as_large_as_the_stage(forms: list[Form]) -> None:
    same_as_eager(vit(), recipe([0.75, 0.5], [1 / 3, 2 / 3]), torch.randn(28, 3, 48, 48))
    assert layers_of(forms) == [6]


def test_merged_and_pooled_tokens(forms: list[Form]) -> None:
    for name in ("patch_merge", "patch_pool"):
        same_as_eager(vit(), recipe([0.5, 0.5], [1 / 3, 2 / 3], name), torch.randn(2, 3, 48, 48))
    # merging adds a bias to the attention of the layers below the first cut, so those are a form of their own
    assert layers_of(forms) == [2, 4, 6]


class Alternating(nn.Module):
    """Layers of two kinds in turn, as local and global layers of a decoder are."""

    def __init__(self) -> None:
        super().__init__()
        make = nn.TransformerEncoderLayer
        self.patch = nn.Conv2d(3, 32, 8, 8)
        self.layers = nn.ModuleList(
            make(32, 4, 64, activation="relu" if i % 2 else "gelu", batch_first=True, norm_first=True) for i in range(6)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x


def test_two_kinds_of_layer_are_two_forms(forms: list[Form]) -> None:
    torch.manual_seed(0)
    model, pixels = Alternating().eval(), torch.randn(2, 3, 48, 48)
    steps = recipe([0.5], [0.5])
    with torch.no_grad():
        found = tokcompile.optimize(model, steps)(pixel_values=pixels)
        close(found, tokcompile.optimize(model, steps, lowering="eager")(pixel_values=pixels))
    assert layers_of(forms) == [3, 3]


@pytest.mark.inductor
def test_inductor_runs_one_form_in_all_its_places(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    inner = lower._inductor

    def counting(module: Any, values: Any, mode: Any) -> Callable[..., Any]:
        compiled.append(len(values))
        return inner(module, values, mode)

    monkeypatch.setattr(lower, "_inductor", counting)
    same_as_eager(vit(), recipe([0.75, 0.5], [1 / 3, 2 / 3]), torch.randn(2, 3, 48, 48))
    assert len(compiled) == 4


def capture(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Captured:
    """``function`` as it is captured for fixed sizes."""
    found: list[Captured] = []

    def backend(module: Any, _inputs: Any) -> Any:
        return lambda *given: (found.append(from_dynamo(module, given)), module(*given))[1]

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    return found[0]


def never(*_: Any) -> Any:
    raise AssertionError("compiled")


def test_a_dense_graph_stays_whole() -> None:
    with torch.no_grad():
        captured = capture(vit(), pixel_values=torch.randn(2, 3, 48, 48))
        (stack,) = find_regions(captured.graph).of("vision_encoder")
        streams = [[stack.layers[0].input, *(layer.output for layer in stack.layers)]]
        assert len(streams[0]) == 7
        with pytest.raises(WholeError, match="no stack of layers loses tokens"):
            compile_repeated(captured, streams, never)


def test_with_gradients_the_graph_stays_whole(forms: list[Form], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "_inductor", lambda module, *_: module)
    model = tokcompile.optimize(vit(), recipe([0.5], [0.5]))
    model(pixel_values=torch.randn(2, 3, 48, 48)).last_hidden_state.sum().backward()
    assert not forms
    assert tokcompile.report(model).stages[-1].compiled == "as a whole: gradients are asked for"
    assert all(p.grad is not None for n, p in model.named_parameters() if "layer" in n)


def test_a_stage_of_one_token_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor treats sizes of 0 and 1 apart, so such a stage is of no common form."""
    whole: list[Any] = []
    monkeypatch.setattr(lower, "_inductor", lambda module, *_: (whole.append(module), module)[1])
    torch.manual_seed(0)
    model = Alternating().eval()
    steps, pixels = recipe([0.01], [0.5]), torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        changed = tokcompile.optimize(model, steps)
        found = changed(pixel_values=pixels)
        close(found, tokcompile.optimize(model, steps, lowering="eager")(pixel_values=pixels))
    assert found.shape[1] == 1
    assert tokcompile.report(changed).stages[-1].compiled == "as a whole: a stage has less than two tokens"


def test_constants_are_computed_once() -> None:
    def function(x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1]).cumsum(0).sort(descending=True).values
        return x + place.unsqueeze(0).expand(x.shape[0], -1) + torch.arange(x.shape[1])

    x = torch.randn(2, 5)
    wanted = function(x)
    captured = capture(function, x)
    assert fold_constants(captured) == 1
    left = [n.target for n in captured.graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.sort.default not in left
    assert torch.ops.aten.cumsum.default not in left
    assert torch.ops.aten.arange.default in left  # a single operation is made where it is used
    (again,) = captured.graph_module(x)
    assert torch.equal(again, wanted)


def test_what_is_written_to_is_no_constant() -> None:
    def function(x: Tensor) -> Tensor:
        buffer = torch.zeros(8).view(2, 4)
        buffer.add_(x)
        return buffer

    captured = capture(function, torch.ones(2, 4))
    assert fold_constants(captured) == 0
    for _ in range(2):
        (result,) = captured.graph_module(torch.ones(2, 4))
        assert torch.equal(result, torch.ones(2, 4))

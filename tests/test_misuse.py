"""Mistakes of everyday use are told in one line with the way out, or do what was meant."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tokcompile
from tokcompile.demo import tiny_llm, tiny_vit
from tokcompile.errors import ExportError, TokcompileError

RECIPE = "vit_prune_50"


@pytest.fixture(scope="module")
def vit() -> tuple[nn.Module, dict[str, Any]]:
    return tiny_vit()


@pytest.fixture(scope="module")
def wanted(vit: tuple[nn.Module, dict[str, Any]]) -> torch.Tensor:
    with torch.no_grad():
        return optimize(vit[0])(**vit[1]).last_hidden_state


def optimize(model: Any, **kwargs: Any) -> Any:
    return tokcompile.optimize(model, RECIPE, lowering="eager", **kwargs)


def refused(call: Callable[[], Any], says: str, kind: type[TokcompileError] = TokcompileError) -> None:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert re.search(says, text), text
    assert "\n" not in text
    assert "defect" not in text


MODELS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "an id": (lambda model: "org/model", r"not the text 'org/model'; load the model first"),
    "a class": (type, r"not the class \w+; pass an instance"),
    "compiled": (torch.compile, r"compiled by torch.compile already.*pass the model itself \(model\._orig_mod\)"),
    "parallel": (nn.DataParallel, r"wrapped in DataParallel.*pass the model inside \(model\.module\)"),
    "without values": (lambda model: copy.deepcopy(model).to("meta"), r"on the meta device.*load the weights first"),
    "partly without values": (
        lambda model: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")),
        r"'1\.weight' is on the meta device",
    ),
    "scripted": (lambda model: torch.jit.script(nn.Linear(2, 2)), "TorchScript.*pass the torch.nn.Module behind it"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_model_to_optimize(name: str, vit: tuple[nn.Module, dict[str, Any]]) -> None:
    make, says = MODELS[name]
    model, inputs = vit
    given = make(model)
    refused(lambda: optimize(given), "optimize.*" + says)
    refused(lambda: tokcompile.explain(given, inputs), "explain.*" + says)


INPUTS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "a tensor": (lambda pixels: pixels, r"inputs is a tensor; pass a mapping of keyword arguments, such as \{'pixel_"),
    "a tuple": (lambda pixels: (pixels,), "inputs is a tuple; pass a mapping"),
    "a list": (lambda pixels: [{"pixel_values": pixels}], "inputs is a list; pass a mapping"),
    "a wrong keyword": (
        lambda pixels: {"wrong": pixels},
        r"inputs has the keys \['wrong'\]; the forward.* pixel_values",
    ),
    "nothing": (lambda pixels: {}, r"inputs has the keys \[\]; the forward of this model takes"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_are_no_inputs(name: str, vit: tuple[nn.Module, dict[str, Any]]) -> None:
    make, says = INPUTS[name]
    model, inputs = vit
    given = make(inputs["pixel_values"])
    refused(lambda: optimize(model, inputs=given), "optimize: " + says)
    refused(lambda: tokcompile.explain(model, given), "explain: " + says)
    refused(lambda: tokcompile.bench(model, given, [RECIPE]), "bench: " + says)
    refused(lambda: tokcompile.export_onnx(model, given, "unused", recipe=RECIPE), "export_onnx: " + says, ExportError)


def test_an_argument_that_is_missing() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    refused(lambda: optimize(Two(), inputs={"x": torch.ones(1)}), "forward of this model also needs y")
    refused(lambda: optimize(Two(), inputs={"x": torch.ones(1), "z": torch.ones(1)}), r"takes x, y")


def test_arguments_of_generate_are_inputs_too() -> None:
    model, inputs = tiny_llm()
    recipe = {
        "recipe_version": 1,
        "steps": [{"pass": "token_sparse", "params": {"min_length": 0, "least": 0, "window": 4}}],
    }
    given = {"inputs": inputs["input_ids"], "max_new_tokens": 1}
    tokcompile.optimize(model, recipe, lowering="eager", inputs=given)


def test_recipes_of_bench_are_several(vit: tuple[nn.Module, dict[str, Any]]) -> None:
    refused(lambda: tokcompile.bench(*vit, RECIPE), rf"pass \['{RECIPE}'\]")


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(4)], ids=["dropout", "batch norm"])
def test_training_mode_is_told(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.warns(UserWarning, match=r"training mode, in which '1' \(\w+\) gives other results.*model\.eval\(\)"):
        optimize(model.train())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimize(model.eval())
        optimize(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)).train())


# A torch.compile of the user around, or inside, an optimized model


WAYS: dict[str, Callable[[nn.Module], tuple[nn.Module, Callable[..., Any]]]] = {
    "around": lambda model: (fast := optimize(model), torch.compile(fast, backend="eager")),
    "in place": lambda model: (fast := optimize(model), fast.compile(backend="eager") or fast),
    "around a wrapper": lambda model: (fast := optimize(model), torch.compile(_Wrapper(fast), backend="eager")),
    "inside, in place": lambda model: (fast := optimize(_compiled_in_place(model)), fast),
    "inside, its forward": lambda model: (fast := optimize(_compiled_forward(model)), fast),
}


class _Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.inner(pixel_values=pixel_values * 1.0)


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.compile(backend="eager")
    return model


def _compiled_forward(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way == "around a wrapper" else pytest.mark.slow) for way in WAYS]
)
def test_a_compiled_optimized_model_is_not_the_dense_one(
    way: str, vit: tuple[nn.Module, dict[str, Any]], wanted: torch.Tensor
) -> None:
    model, inputs = vit
    with torch.no_grad():
        fast, called = WAYS[way](model)
        with tokcompile.record(fast) as recording:
            found = called(**inputs).last_hidden_state
    assert len(recording.kept) == 3
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "take"),
    [
        ("torch.export", lambda fast, inputs: torch.export.export(fast, (), inputs)),
        ("torch.jit.trace", lambda fast, inputs: torch.jit.trace(fast, inputs["pixel_values"], strict=False)),
    ],
    ids=["export", "jit"],
)
def test_who_takes_the_model_apart_is_told_the_way_out(
    name: str, take: Callable[..., Any], vit: tuple[nn.Module, dict[str, Any]]
) -> None:
    model, inputs = vit
    with pytest.raises(tokcompile.TokcompileError, match=f"{name} cannot take an optimized model.*export_onnx"):
        take(optimize(model), inputs)

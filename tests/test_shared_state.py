"""What an optimized model shares with the original, and what does not follow it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import tokcompile
from tests.members import members
from tests.pruning import optimized
from tests.test_only_patches import HALF, Encoder
from tests.zoo.vlm import randomize
from tokcompile.demo import tiny_llm
from tokcompile.runtime.install import share

MOE = [{"pass": "moe_from_dense", "params": {"experts": 8, "shared": 3, "active": 5, "gate": "off"}}]
STEM = [{"pass": "stem", "params": {}}]


def in_place(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name and not name.startswith("tokcompile"):
                parameter.mul_(3)


def by_loading(model: Any) -> None:
    model.load_state_dict({name: value * 3 for name, value in model.state_dict().items()})


def by_a_step(model: Any) -> None:
    steps = torch.optim.SGD([p for n, p in model.named_parameters() if "mlp" in n and "tokcompile" not in n], 0.1)
    for parameter in steps.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    steps.step()


@pytest.mark.parametrize(
    ("steps", "change"),
    members(
        [(MOE, in_place), (MOE, by_loading), (MOE, by_a_step), (STEM, in_place)],
        [(MOE, by_a_step), (STEM, in_place)],
    ),
)
def test_changed_sources_are_told(steps: Any, change: Any) -> None:
    model, inputs = tiny_llm()
    fast = optimized(model, steps, calibration=[inputs], on_no_match="ignore")
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast(**inputs)
        change(model)
        with pytest.warns(UserWarning, match=r"weights changed that .* was prepared from .*tokcompile.optimize again"):
            fast(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast(**inputs)  # said once
    assert any("weights changed" in problem for problem in tokcompile.report(fast).problems)


def test_a_move_is_no_change() -> None:
    model, inputs = tiny_llm()
    fast = optimized(model, MOE, calibration=[inputs])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(**inputs)
        fast.to(torch.float64)(**inputs)


def test_an_optimizer_over_the_original_trains() -> None:
    model = randomize(Encoder(1, 0)).train()
    steps = torch.optim.SGD(model.parameters(), 0.1)
    fast = optimized(model, [HALF])
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    fast(torch.randn(2, 3, 32, 32)).square().mean().backward()
    steps.step()
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert "patch.weight" in changed
    steps.zero_grad()
    assert all(p.grad is None for p in fast.parameters())


def test_gradients_are_apart_without_one() -> None:
    model = randomize(Encoder(1, 0))
    fast = optimized(model, [HALF])
    fast(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is None for p in model.parameters())
    assert fast.patch.weight.grad is not None
    assert fast.patch.weight.data_ptr() == model.patch.weight.data_ptr()


class Adapted(nn.Module):
    """A linear with an adapter that can be merged, in the form that adapter libraries give it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.merged_adapters = base, []  # type: ignore[var-annotated]
        self.a, self.b = nn.Parameter(torch.randn(2, base.in_features)), nn.Parameter(torch.randn(base.out_features, 2))

    def merge(self) -> None:
        if not self.merged_adapters:
            self.base.weight.data += self.b.data @ self.a.data
            self.merged_adapters.append("default")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value = self.base(x)
        return value if self.merged_adapters else value + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("which", ["copy", "original"])
def test_merged_adapters_are_merged_in_both(which: str) -> None:
    model = randomize(Encoder(1, 0))
    for block in model.blocks:
        block.o = Adapted(block.o)  # type: ignore[arg-type]
    image = torch.randn(2, 3, 32, 32)
    fast = optimized(model, [{"pass": "class_attention", "params": {"keep": [1.0], "at": [0.5]}}])
    with torch.no_grad():
        wanted = model(image)
        fast(image)
        for block in (fast if which == "copy" else model).blocks:
            block.o.merge()
        for found in (model(image), fast(image)):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_functions_in_the_place_of_methods_are_copied_whole() -> None:
    """A function that holds its module, calls itself and has an argument by keyword alone: the copy is of the copy."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    layer = model[0]

    def forward(x: torch.Tensor, *, times: int = 2) -> torch.Tensor:
        found = nn.functional.linear(x, layer.weight, layer.bias)
        return found if times == 1 else forward(found, times=times - 1)

    layer.forward = forward  # type: ignore[method-assign]
    clone = share(model)
    x = torch.randn(3, 4)
    assert torch.equal(clone(x), model(x))
    clone[0].weight = nn.Parameter(torch.zeros(4, 4))  # type: ignore[index]
    clone[0].bias = nn.Parameter(torch.ones(4))  # type: ignore[index]
    assert torch.equal(clone(x), torch.ones(3, 4))
    assert not torch.equal(clone(x), model(x))

"""Smoothed routing: strength 0 changes nothing; otherwise it equals the formula, written down with hooks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import tokcompile
from tests.members import members
from tests.test_stem import close, output
from tests.zoo import decoders
from tokcompile.errors import NoMatchError, RecipeError

FAMILIES = {"mixtral": decoders.mixtral, "qwen3_moe": decoders.qwen3_moe}


def decided(model: nn.Module) -> nn.Module:
    """Routers that prefer some experts clearly, and experts that differ: initial weights make all alike."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.mul_(8)
    return model


def recipe(**params) -> dict:
    return {"recipe_version": 1, "description": "test", "steps": [{"pass": "moe_router_smoothing", "params": params}]}


def padded(inputs: dict) -> dict:
    mask = inputs["attention_mask"].clone()
    mask[1, :3] = 0
    return inputs | {"attention_mask": mask}


@contextlib.contextmanager
def smoothed(model: nn.Module, by: str, strength: float, mask: Tensor, temperature: float = 0.1) -> Iterator[None]:
    """The oracle: the top-k that the routers call sees smoothed probabilities. Attention is eager and causal."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for layer in model.model.layers:
        hooks += [
            layer.self_attn.register_forward_hook(lambda _m, _i, o: seen.update(weights=o[1])),
            layer.mlp.register_forward_pre_hook(lambda _m, i: seen.update(x=i[0])),
        ]
    original = torch.topk

    def topk(values: Tensor, *args, **kwargs):
        x = seen["x"]
        batch, length = x.shape[:2]
        r = values.reshape(batch, length, -1)
        if by == "attention":
            weights = seen["weights"].mean(1)
        else:
            unit = x / x.norm(dim=-1, keepdim=True)
            visible = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, :].bool()
            weights = (unit @ unit.transpose(1, 2) / temperature).masked_fill(~visible, -torch.inf).softmax(-1)
            nothing = ~visible.any(-1, keepdim=True)  # padding in front of the sequence keeps its own routing
            weights = torch.where(nothing, torch.eye(length), weights)
        mixed = (1 - strength) * r + strength * (weights @ r)
        return original(mixed.reshape(values.shape), *args, **kwargs)

    torch.topk = topk
    try:
        yield
    finally:
        torch.topk = original
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("family", "by"),
    members(
        [(family, by) for family in FAMILIES for by in ("similarity", "attention")],
        [("mixtral", "similarity"), ("qwen3_moe", "attention")],
    ),
)
def test_strength_0_equals_the_model_and_more_equals_the_formula(family, by):
    dense, inputs = FAMILIES[family]()
    decided(dense)
    inputs = padded(inputs)
    real = inputs["attention_mask"].bool()
    plain = output(dense, inputs)
    none = tokcompile.optimize(dense, recipe(by=by, strength=0.0), lowering="eager", inputs=inputs)
    close(output(none, inputs)[real], plain[real], 1e-6)
    some = tokcompile.optimize(dense, recipe(by=by, strength=0.7), lowering="eager", inputs=inputs)
    step = tokcompile.report(some).steps[0]
    assert (step.status, step.matches) == ("matched", 2)
    found = output(some, inputs)
    dense.set_attn_implementation("eager")
    with smoothed(dense, by, 0.7, inputs["attention_mask"]):
        expected = output(dense, inputs)
    close(found[real], expected[real])
    assert float((expected[real] - plain[real]).norm() / plain[real].norm()) > 1e-3


def test_causality_and_batches():
    dense, inputs = decoders.mixtral()
    optimized = tokcompile.optimize(decided(dense), recipe(strength=1.0), lowering="eager")
    whole = output(optimized, inputs)
    for row in range(2):
        single = {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        close(output(optimized, single), whole[row : row + 1], 2e-6)
    changed = inputs | {"input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 6] = 3
    assert torch.allclose(output(optimized, changed)[:, :6], whole[:, :6], atol=1e-6)


def test_decode_steps_route_as_before():
    dense, inputs = decoders.mixtral()
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    optimized = tokcompile.optimize(decided(dense), recipe(strength=1.0), lowering="eager")
    with torch.no_grad():
        first = optimized(**inputs, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        cache = copy.deepcopy(first.past_key_values)
        expected = dense(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        found = optimized(
            input_ids=token, attention_mask=mask, past_key_values=first.past_key_values, use_cache=True
        ).logits
    close(found, expected, 2e-6)
    assert "route as before" in tokcompile.report(optimized).steps[0].details["decode"]


def test_what_cannot_be_smoothed_is_refused():
    dense, inputs = decoders.llama()
    with pytest.raises(NoMatchError, match="no moe"):
        tokcompile.optimize(dense, recipe(), lowering="eager", inputs=inputs)
    dense, inputs = decoders.deepseek_v3()
    with pytest.raises(NoMatchError, match="sigmoid"):
        tokcompile.optimize(dense, recipe(), lowering="eager", inputs=inputs)
    with pytest.raises(RecipeError, match="strength"):
        tokcompile.optimize(dense, recipe(strength=2.0), lowering="eager")

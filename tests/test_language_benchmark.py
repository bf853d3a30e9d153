"""What the language benchmark computes in place of a model's layers is what ``optimize`` computes."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tokcompile
from tokcompile.demo import tiny_llm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from quality import in_place

from tokcompile.passes.moe.moe_from_dense import MoeFromDense
from tokcompile.passes.sparse_attention.fasa import Fasa
from tokcompile.passes.sparse_attention.token_sparse import TokenSparse
from tokcompile.passes.sparse_attention.tokenselect import TokenSelect
from tokcompile.passes.stem.stem import Stem
from tokcompile.recovery.losses import token_losses


def optimized(model: Any, name: str, params: dict[str, Any], calibration: Any = None, layers: Any = None) -> Any:
    step = {"pass": name, "params": params, "target": {"region": tokcompile.registry.get_pass(name).regions}}
    if layers:
        step["target"]["layers"] = layers
    return tokcompile.optimize(
        model, {"recipe_version": 1, "description": "x", "steps": [step]}, calibration=calibration, lowering="eager"
    )


def texts(count: int, length: int = 40) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(10, 128, (1, length), generator=g)} for _ in range(count)]


@torch.no_grad()
def decoded(model: Any, ids: torch.Tensor, steps: int = 3) -> torch.Tensor:
    cache, rows = None, []
    for part in (ids[:, :-steps], *ids[:, -steps:].split(1, 1)):
        found = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        rows.append(found.logits[:, -1])
    return torch.stack(rows)


@pytest.mark.slow
def test_in_place_equals_optimize() -> None:
    model, _ = tiny_llm()
    ids, data = texts(1)[0]["input_ids"], texts(9)
    dense = decoded(model, ids)

    def agree(found: Any, wanted: Any) -> None:
        one, other = decoded(found, ids), decoded(wanted, ids)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert float((one - dense).abs().max()) > 1e-3  # something was changed

    decode = {"budget": 8, "dense_below": 1}
    agree(
        in_place.sparse_decode_of(model, TokenSelect(TokenSelect.Params(budget=8))),
        optimized(model, "tokenselect", decode, layers=["1--1"]),
    )
    reuse = TokenSelect(TokenSelect.Params(budget=8, reuse=-1.0))
    agree(
        in_place.sparse_decode_of(model, reuse),
        optimized(model, "tokenselect", {**decode, "reuse": -1.0}, layers=["1--1"]),
    )
    method = Fasa(Fasa.Params(budget=8, planes=2))
    agree(
        in_place.sparse_decode_of(model, method, 1, in_place.fasa_planes(model, method, data)),
        optimized(model, "fasa", {**decode, "planes": 2}, data, ["1--1"]),
    )
    sparse = {"keep": 0.5, "window": 4, "least": 0}
    agree(
        in_place.sparse_prefill_of(model, TokenSparse.Params(**sparse)),
        optimized(model, "token_sparse", {**sparse, "min_length": 0}),
    )
    split = {"experts": 8, "shared": 2, "active": 3, "gate": "off"}
    seen = in_place.observed(model, data, MoeFromDense.Params(**split), Stem.Params())
    agree(
        in_place.experts_of(model, MoeFromDense.Params(**split), seen), optimized(model, "moe_from_dense", split, data)
    )
    agree(in_place.tables_of(model, Stem.Params(convert=0.5), seen), optimized(model, "stem", {"convert": 0.5}, data))
    assert torch.equal(decoded(model, ids), dense)  # the model is as it was


@torch.no_grad()
def test_fixed_neurons_are_those_of_most_energy() -> None:
    model, _ = tiny_llm()
    ids, data = texts(1)[0]["input_ids"], texts(9)
    seen = in_place.observed(model, data, MoeFromDense.Params(), None)
    whole = in_place.fixed_neurons_of(model, 1.0, seen)(input_ids=ids).logits
    torch.testing.assert_close(whole, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    half = in_place.fixed_neurons_of(model, 0.5, seen)(input_ids=ids).logits

    masked = copy.deepcopy(model)  # neurons that add least on average add nothing
    for key, layer in seen.items():
        mlp, x = masked.model.layers[int(key)].mlp, layer.sums["x"]
        inner = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        added = (inner[:, :, None] * mlp.down_proj.weight.T).square().sum(-1)
        least = (added / added.sum(1, keepdim=True)).mean(0).argsort()[: added.shape[1] // 2]
        mlp.down_proj.weight[:, least] = 0
    torch.testing.assert_close(half, masked(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert float((half - whole).abs().max()) > 1e-3


def test_the_divergence_from_labels_is_the_cross_entropy() -> None:
    import recover

    ids = torch.randint(50, (2, 9))
    student = torch.randn(2, 9, 50)
    theirs = recover.Labels(50)(ids, use_cache=False).logits
    found = token_losses(student[:, :-1].reshape(-1, 50), theirs[:, :-1].reshape(-1, 50))
    wanted = torch.nn.functional.cross_entropy(
        student[:, :-1].reshape(-1, 50), ids[:, 1:].reshape(-1), reduction="none"
    )
    torch.testing.assert_close(found, wanted)

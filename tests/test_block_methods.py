"""Choices of blocks for prompts: against plain loops in double precision, and in whole models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import tokcompile
from tests.zoo import decoders
from tokcompile.families.sparse_attention.blocks.attend import BlockForm, seen_of
from tokcompile.passes.sparse_attention.antidiagonal import Antidiagonal
from tokcompile.passes.sparse_attention.random_blocks import RandomBlocks
from tokcompile.passes.sparse_attention.vertical_slash import VerticalSlash
from tokcompile.recipe.recipe import Recipe

BLOCK, STRIDE = 8, 4


def operands(length: int, heads: int = 4, kv: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(2, h, length, 6, dtype=torch.float64, generator=make) for h in (heads, kv, kv)]
    return drawn[0] * 2, drawn[1], drawn[2]


def hidden(length: int, padding: str) -> Tensor | None:
    if padding == "none":
        return None
    visible = torch.ones(2, length, dtype=torch.bool)
    visible[0, slice(0, 11) if padding == "left" else slice(length - 11, None)] = False
    return visible


def best(values: list[float], share: float) -> set[int]:
    """The fewest entries that hold the share of the sum."""
    order, held, total = sorted(range(len(values)), key=lambda i: -values[i]), 0.0, sum(values)
    kept: set[int] = set()
    for i in order:
        if held < share * total:
            kept.add(i)
        held += values[i]
    return kept


def same(found: Tensor, wanted: list[set[int]]) -> None:
    """Rows of a bool tensor against sets."""
    assert [set(row.nonzero().flatten().tolist()) for row in found.flatten(0, -2)] == wanted


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [32, 45])
def test_antidiagonal_is_the_plain_one(length: int, causal: bool, padding: str) -> None:
    query, key, value = operands(length)
    visible = hidden(length, padding)
    form = BlockForm(0.4, causal=causal, block=BLOCK, visible=visible)
    method = Antidiagonal(Antidiagonal.Params(block=BLOCK, stride=STRIDE, share=0.7))
    there = torch.ones(2, length, dtype=torch.bool) if visible is None else visible
    if visible is not None:  # what stands in hidden tokens does not matter
        query = query.masked_fill(~visible[:, None, :, None], math.nan)
        key = key.masked_fill(~visible[:, None, :, None], math.nan)
    found = method.lists(query, key, value, form).keep
    tiles, blocks, wanted = -(-length // STRIDE), -(-length // BLOCK), []
    for b in range(2):
        for h in range(4):
            sums = [[0.0] * blocks for _ in range(blocks)]
            for i in range(tiles):
                if not there[b, i * STRIDE : (i + 1) * STRIDE].any():
                    continue
                logits = {}
                for j in range(tiles):
                    if (causal and j > i) or not there[b, j * STRIDE : (j + 1) * STRIDE].any():
                        continue
                    total = 0.0
                    for r in range(STRIDE):
                        q, k = i * STRIDE + STRIDE - 1 - r, j * STRIDE + r
                        if q < length and k < length and there[b, q] and there[b, k]:
                            total += float(query[b, h, q] @ key[b, h // 2, k])
                    logits[j] = math.exp(total * 0.4 / STRIDE)
                for j, weight in logits.items():
                    sums[i * STRIDE // BLOCK][j * STRIDE // BLOCK] += weight / sum(logits.values())
            wanted += [best(row, 0.7) for row in sums]
    same(found, wanted)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("length", [40, 61])
def test_vertical_slash_is_the_plain_one(length: int, padding: str) -> None:
    query, key, value = operands(length, seed=1)
    visible = hidden(length, padding)
    form = BlockForm(0.4, block=BLOCK, visible=visible)
    window, share, least = 5, 0.6, 9
    method = VerticalSlash(VerticalSlash.Params(block=BLOCK, share=share, window=window, least=least))
    there = torch.ones(2, length, dtype=torch.bool) if visible is None else visible
    if visible is not None:
        query = query.masked_fill(~visible[:, None, :, None], math.nan)
        key = key.masked_fill(~visible[:, None, :, None], math.nan)
    found = method.lists(query, key, value, form).keep
    blocks, wanted = -(-length // BLOCK), []
    for b in range(2):
        tokens = [t for t in range(length) if there[b, t]]
        for h in range(4):
            vertical, slash = [0.0] * length, [0.0] * length
            for i in tokens[-window:]:
                weights = {j: math.exp(0.4 * float(query[b, h, i] @ key[b, h // 2, j])) for j in tokens if j <= i}
                for j, weight in weights.items():
                    vertical[j] += weight / sum(weights.values())
                    slash[i - j] += weight / sum(weights.values())
            chosen = []
            for mass in (vertical, slash):
                count = max(len(best(mass, share)) // BLOCK + 1, -(-least // BLOCK))
                sums = [sum(mass[n * BLOCK : (n + 1) * BLOCK]) for n in range(blocks)]
                chosen.append(set(sorted(range(blocks), key=lambda n: -sums[n])[:count]))
            columns, diagonals = chosen
            for n in range(blocks):
                # a distance in [d, d + 1) blocks leads from block n to blocks n - d and n - d - 1
                reached = {n - d for d in diagonals} | {n - d - 1 for d in diagonals}
                wanted.append({m for m in range(n + 1) if m in columns or m in reached})
    earlier = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    same(found & earlier, wanted)


def test_random_blocks_keep_the_share_of_what_a_row_sees() -> None:
    query, key, value = operands(61)
    form = BlockForm(0.4, block=BLOCK, visible=hidden(61, "left"))
    lists = RandomBlocks(RandomBlocks.Params(block=BLOCK, keep=0.3)).lists(query, key, value, form).keep
    again = RandomBlocks(RandomBlocks.Params(block=BLOCK, keep=0.3)).lists(query, key, value, form).keep
    other = RandomBlocks(RandomBlocks.Params(block=BLOCK, keep=0.3, seed=1)).lists(query, key, value, form).keep
    seen = seen_of(query, form)
    assert torch.equal(lists, again)
    assert not torch.equal(lists, other)
    assert not (lists & ~seen).any()
    wanted = [math.ceil(round(float(n) * 0.3, 6)) for n in seen.sum(-1).expand(2, 4, 8).flatten()]
    assert lists.sum(-1).flatten().tolist() == wanted


METHODS: dict[str, dict[str, Any]] = {
    "antidiagonal": {"stride": 4, "share": 0.5, "last": 4},
    "vertical_slash": {"share": 0.3, "window": 4, "least": 0, "last": 4},
    "random_blocks": {"keep": 0.2, "last": 4},
}


def steps(name: str, **params: Any) -> dict[str, Any]:
    values = {"block": BLOCK, "dense_below": 1, **METHODS[name], **params}
    return {"recipe_version": 1, "description": "test", "steps": [{"pass": name, "params": values}]}


@pytest.mark.parametrize("name", METHODS)
def test_a_language_model_with_all_of_it_and_with_some(name: str) -> None:
    """A full budget is the model; with some, the last tokens of the first layer read everything."""
    model, _ = decoders.qwen3()
    inputs = decoders.text(length=52)
    inputs["attention_mask"][0, :9] = 0
    rows = inputs["attention_mask"].bool()
    full = {"keep": 1.0} if name == "random_blocks" else {"share": 1.0}
    whole = tokcompile.optimize(model, steps(name, **full), lowering="eager")
    some = tokcompile.optimize(model, steps(name), lowering="eager")
    with torch.no_grad():
        dense = model(**inputs).logits
        torch.testing.assert_close(whole(**inputs).logits[rows], dense[rows], atol=2e-5, rtol=1e-4)
        found = some(**inputs).logits
    assert torch.isfinite(found[rows]).all()
    assert float((found[rows] - dense[rows]).abs().max()) > 1e-4
    assert tokcompile.report(some).steps[0].matches == 2


def test_the_recipe_acts_above_its_gate_and_says_so_below() -> None:
    model, inputs = decoders.llama()
    optimized = tokcompile.optimize(model, "llm_block_prefill", inputs=inputs, lowering="eager")
    (step,) = tokcompile.report(optimized).steps
    assert (step.status, "4096" in step.reason) == ("unprofitable", True)
    (shipped,) = Recipe.load("llm_block_prefill").steps
    assert shipped.pass_ == "antidiagonal"

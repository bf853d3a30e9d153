"""Block-sparse attention of diffusion transformers: the choice by plain loops, text always kept, first steps dense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tokcompile
from tests.members import members
from tests.small_dits import TEXT, tiny_dit
from tests.zoo import decoders
from tokcompile.errors import NoMatchError
from tokcompile.families.sparse_attention.blocks import attend
from tokcompile.families.sparse_attention.blocks.attend import BlockForm, Text, block_attention, joint_attention
from tokcompile.passes.sparse_attention.rectified_spa import RectifiedSpa

BLOCK = 8


def method(**params: Any) -> RectifiedSpa:
    return RectifiedSpa(RectifiedSpa.Params(block=BLOCK, **params))


def operands(length: int, heads: int = 4, kv: int = 2, seed: int = 0) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, length, 6, dtype=torch.float64, generator=make) for h in (heads, kv, kv)]


def plain(
    query: Tensor, key: Tensor, value: Tensor, words: Tensor | None, there: list[int], keep: float, share: float
) -> tuple[list[set[int]], list[float], list[Tensor]]:
    """One head, in plain loops: critical blocks, R and the correction of each block of queries. ``[L, D]`` each."""
    blocks = -(-len(query) // BLOCK)
    inside = [[t for t in there if t // BLOCK == n] for n in range(blocks)]
    means = [[sum(x[t] for t in rows) / len(rows) for rows in inside] for x in (query, key, value)]
    away = [
        [sum((x[t] - m).abs() for t in rows) / len(rows) for rows, m in zip(inside, mean, strict=True)]
        for x, mean in zip((query, key), means, strict=False)
    ]
    kept, factors, corrections = [], [], []
    for n in range(blocks):
        one = [math.exp(0.4 * float(means[0][n] @ k)) for k in means[1]]
        text = [] if words is None else [math.exp(0.4 * float(means[0][n] @ k)) for k in words]
        total = sum(one) + sum(text)
        one, text = [v / total for v in one], [v / total for v in text]  # P0
        whole = sum(v * len(rows) for v, rows in zip(one, inside, strict=True)) + sum(text)
        mass = [v * len(rows) / whole for v, rows in zip(one, inside, strict=True)]  # P
        order = sorted(range(blocks), key=lambda m: -mass[m])
        below = sum(sum(mass[m] for m in order[: i + 1]) <= share for i in range(blocks))
        critical = set(order[: max(int(keep * blocks), 1 + below)])
        critical |= {m for m in range(blocks) if abs(m - n) <= 1}
        correction, left = torch.zeros(6, dtype=torch.float64), 0.0
        for m in set(range(blocks)) - critical:
            gain = abs(float(means[0][n] @ means[1][m]))
            lost = abs(float(away[0][n] @ means[1][m])) + abs(float(means[0][n] @ away[1][m]))
            if gain > lost:
                correction, left = correction + mass[m] * means[2][m], left + mass[m]
        kept.append(critical)
        factors.append(sum(mass) + sum(text) / whole - left)
        corrections.append(correction)
    return kept, factors, corrections


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize("length", [48, 61])
def test_the_choice_and_its_rectification_are_the_plain_ones(length: int, hidden: int, text: int) -> None:
    query, key, value = operands(length)
    level = operands(
        8, seed=7
    )  # tokens of a block are alike, so that some pairs of blocks are trusted and some are not
    query, key = (
        n * 0.3 + t.repeat_interleave(BLOCK, 2)[:, :, :length] for n, t in zip((query, key), level, strict=False)
    )
    visible, words = None, None
    if hidden:
        visible = torch.arange(length).expand(2, length) < length - torch.tensor([[hidden], [0]])
        for t in (query, key, value):
            t.masked_fill_(~visible[:, None, :, None], math.nan)
    if text:
        words = torch.randn(2, 2, text, 6, dtype=torch.float64)
    form = BlockForm(
        0.4, causal=False, block=BLOCK, visible=visible, text=None if words is None else Text(words, words, None)
    )
    lists = method(keep=0.3, share=0.2).lists(query, key, value, form)
    trusted = 0
    for b in range(2):
        there = [t for t in range(length) if visible is None or visible[b, t]]
        for h in range(4):
            given = None if words is None else words[b, h // 2]
            wanted = plain(query[b, h], key[b, h // 2], value[b, h // 2], given, there, 0.3, 0.2)
            assert [set(row.nonzero().flatten().tolist()) for row in lists.keep[b, h]] == wanted[0]
            torch.testing.assert_close(lists.mass[b, h].tolist(), wanted[1], atol=1e-12, rtol=0)
            torch.testing.assert_close(lists.rest[b, h], torch.stack(wanted[2]), atol=1e-12, rtol=0)
            trusted += sum(f < 0.999 for f in wanted[1])
    assert 0 < trusted < 8 * -(-length // BLOCK)


@pytest.mark.parametrize("text", [0, 5])
def test_constant_blocks_are_dense_attention_whatever_is_kept(text: int) -> None:
    """Pooling loses nothing there, so mass and correction make up for all that is left out; plain blocks do not."""
    query, key, value = operands(48, seed=3)
    query, key = (t[:, :, ::BLOCK].repeat_interleave(BLOCK, 2) for t in (query, key))
    query, key, value = (
        torch.cat([t, torch.randn(2, t.shape[1], text, 6, dtype=t.dtype)], 2) for t in (query, key, value)
    )
    form = BlockForm(0.4, causal=False, block=BLOCK)

    def run(**params: Any) -> Tensor:
        lists = method(keep=0.1, share=0.0, neighbours=0, **params).lists
        if text:
            return joint_attention(query, key, value, form, lists, text, False)
        return block_attention(query, key, value, form, lists)

    dense = functional.scaled_dot_product_attention(query, key, value, scale=0.4, enable_gqa=True)
    torch.testing.assert_close(run(), dense, atol=1e-12, rtol=0)
    assert float((run(rectify=False) - dense).abs().max()) > 0.05


# .. in whole models

KINDS = [("joint", False, False), ("joint", True, True), ("single", True, False), ("single", False, True)]
KINDS += [("cross", False, False), ("plain", False, False)]


def recipe(**params: Any) -> dict[str, Any]:
    values = {"block": BLOCK, "dense_below": 1, "keep": 0.2, **params}
    return {"recipe_version": 1, "description": "test", "steps": [{"pass": "rectified_spa", "params": values}]}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, bool]]]:
    seen: list[tuple[int, bool]] = []
    original = attend.joint_attention

    def joint(
        query: Tensor, key: Tensor, value: Tensor, form: BlockForm, choose: Any, text: Any, first: bool, sink: Any
    ):
        seen.append((int(text), first))
        return original(query, key, value, form, choose, text, first, sink)

    monkeypatch.setattr("tokcompile.families.sparse_attention.blocks.base.joint_attention", joint)
    return seen


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)


@pytest.mark.parametrize(("kind", "first", "masked"), members(KINDS, KINDS[1:]))
def test_tiny_transformers(kind: str, first: bool, masked: bool, told: list[tuple[int, bool]]) -> None:
    """The text is found; everything kept is the model; some kept is not, and stays near."""
    model, inputs = tiny_dit(kind, first, masked)
    dense = run(model, inputs)
    whole = tokcompile.optimize(model, recipe(keep=1.0), lowering="eager")
    torch.testing.assert_close(run(whole, inputs), dense, atol=1e-5, rtol=1e-4)
    (step,) = tokcompile.report(whole).steps
    assert (step.status, step.matches) == ("matched", 2)
    assert told == ([] if kind in ("cross", "plain") else [(TEXT, first)] * 2)
    some = tokcompile.optimize(model, recipe(), lowering="eager")
    found = run(some, inputs)
    away = float((found - dense).norm() / dense.norm())
    assert 1e-5 < away < 0.5


def test_text_by_number_and_where_nothing_tells() -> None:
    model, inputs = tiny_dit("joint", True)
    by_number = tokcompile.optimize(model, recipe(text_tokens=TEXT, text_first=True), lowering="eager")
    found = tokcompile.optimize(model, recipe(), lowering="eager")
    torch.testing.assert_close(run(by_number, inputs), run(found, inputs))

    class Scores(nn.Module):  # nothing that comes out has the shape of what went in
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return self.model(latents, timestep, text).flatten(1).mean(1)

    with pytest.raises(NoMatchError, match="nothing tells which part is the picture"):
        tokcompile.optimize(Scores(), recipe(), inputs=inputs, lowering="eager")


@pytest.mark.parametrize("first", members([False, True], [True]))
def test_pictures_of_other_sizes(first: bool, told: list[tuple[int, bool]]) -> None:
    """Sizes are symbols from the second picture on, and the text is found all the same."""
    model, inputs = tiny_dit("single", first)
    whole = tokcompile.optimize(model, recipe(keep=1.0), lowering="eager")
    for rows, columns in ((18, 24), (20, 26), (16, 24)):
        inputs["latents"] = torch.randn(2, 4, rows, columns)
        torch.testing.assert_close(run(whole, inputs), run(model, inputs), atol=1e-5, rtol=1e-4)
    assert len(told) >= 4
    assert {side for _, side in told} == {first}


def test_a_key_of_the_text_is_never_left_out() -> None:
    """Each text token alone, changed, changes every token of the picture."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 64 + TEXT, 8) for _ in range(3))
    form, choose = BlockForm(0.3, causal=False, block=BLOCK), method(keep=0.1, share=0.0, neighbours=0).lists
    before = joint_attention(query, key, value, form, choose, TEXT, False)
    for token in range(64, 64 + TEXT):
        changed = value.clone()
        changed[:, :, token] += 100
        away = joint_attention(query, key, changed, form, choose, TEXT, False) - before
        assert bool((away[:, :, :64].abs().amax(-1) > 1e-3).all())


def test_first_steps_are_dense() -> None:
    """By the timestep of each row; the graph is the same for all steps."""
    model, inputs = tiny_dit("joint")
    optimized = tokcompile.optimize(model, recipe(dense_from=0.8), lowering="eager")
    found, dense = run(optimized, inputs), run(model, inputs)
    torch.testing.assert_close(found[0], dense[0], atol=1e-5, rtol=1e-4)
    sparse = run(tokcompile.optimize(model, recipe(), lowering="eager"), inputs)
    torch.testing.assert_close(found[1], sparse[1], atol=1e-5, rtol=1e-4)
    assert float((found[1] - dense[1]).abs().max()) > 1e-4
    with pytest.raises(NoMatchError, match=r"no tensor argument 'sigma'.*latents, text, timestep"):
        tokcompile.optimize(model, recipe(dense_from=0.8, timestep="sigma"), inputs=inputs, lowering="eager")


def test_a_language_model_is_refused() -> None:
    model, inputs = decoders.llama()
    with pytest.raises(NoMatchError, match="attention both ways"):
        tokcompile.optimize(model, recipe(), inputs=inputs, lowering="eager")

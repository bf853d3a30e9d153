"""Attention over chosen blocks: dense attention under the mask of the choice, in both directions, with padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from torch import Tensor, nn

import tokcompile
from tests.zoo import decoders, encoders
from tokcompile import registry
from tokcompile.errors import NoMatchError
from tokcompile.families.sparse_attention.blocks.attend import BlockForm, block_attention, joint_attention
from tokcompile.families.sparse_attention.blocks.base import BlockParams, BlockSelection
from tokcompile.families.sparse_attention.blocks.lists import BlockLists, top_count, top_share

BLOCK = 4


def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """Attention under an explicit mask, in fp64; a row without a key gives 0."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    score = query.double() @ key.mT * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    value = value.masked_fill(~seen.any(2)[..., None].expand(*value.shape[:3], 1), 0)
    return score.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0) @ value


def pairs(keep: Tensor, length: int, form: BlockForm, heads: int, rows: int, every: bool = False) -> Tensor:
    """The mask [B, H, L, L] that a choice of blocks stands for, written pair by pair; ``every``: padding asks, too."""
    keep = keep.expand(rows, keep.shape[1], *keep.shape[2:]).repeat_interleave(heads // keep.shape[1], 1)
    visible = torch.ones(rows, length, dtype=torch.bool) if form.visible is None else form.visible.expand(rows, length)
    mask = torch.zeros(rows, heads, length, length, dtype=torch.bool)
    for b in range(rows):
        there = [j for j in range(length) if visible[b, j]]
        for i in range(length):
            if form.causal and i not in there and not every:
                continue  # a token that is not there attends to nothing
            for j in there:
                if form.causal and (j > i or (form.window and j <= i - form.window)):
                    continue
                whole = (form.own and i // BLOCK == j // BLOCK) or (form.causal and there[0] // BLOCK == j // BLOCK)
                tail = [t // BLOCK for t in there[-form.last :]] if form.last else []
                if whole or i // BLOCK in tail:
                    mask[b, :, i, j] = True
                else:
                    mask[b, :, i, j] = keep[b, :, i // BLOCK, j // BLOCK]
    return mask


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    group, kv = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 1)]))
    return {
        "heads": (group * kv, kv),
        "length": draw(st.integers(2, 19)),
        "causal": draw(st.booleans()),
        "padding": draw(st.sampled_from(["none", "left", "right"])),
        "lists": draw(st.sampled_from(["one", "key", "query"])),
        "own": draw(st.booleans()),
        "last": draw(st.sampled_from([0, 0, 3])),
        "window": draw(st.sampled_from([0, 0, 5])),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_chosen_blocks_are_dense_attention_under_their_mask(case: dict[str, Any]) -> None:
    """And what stands in hidden keys, or in keys of no list, does not matter."""
    torch.manual_seed(case["seed"])
    (heads, kv), length = case["heads"], case["length"]
    query, key, value = torch.randn(2, heads, length, 8), torch.randn(2, kv, length, 8), torch.randn(2, kv, length, 6)
    visible = None
    if case["padding"] != "none":
        visible = torch.ones(2, length, dtype=torch.bool)
        visible[0, slice(0, length // 3) if case["padding"] == "left" else slice(length - length // 3, None)] = False
    form = BlockForm(
        0.3,
        case["softcap"],
        case["causal"],
        case["window"] if case["causal"] else 0,
        BLOCK,
        last=case["last"],
        own=case["own"],
        visible=visible,
    )
    count, lists = -(-length // BLOCK), {"one": 1, "key": kv, "query": heads}[case["lists"]]
    keep = torch.rand(2, lists, count, count) < 0.4
    mask = pairs(keep, length, form, heads, 2)
    listed = pairs(keep, length, form, heads, 2, every=True)
    read = listed.unflatten(1, (kv, heads // kv)).any(2).any(2)  # [B, Hkv, L]: keys that some query of the group reads
    block = torch.arange(length) // BLOCK
    unused = ~torch.stack([read[..., block == n].any(-1) for n in range(count)], -1)[..., block]
    if visible is not None:
        unused |= ~visible[:, None]
    key[unused], value[unused] = math.nan, math.nan
    found = block_attention(query, key, value, form, lambda *_: BlockLists(keep))
    clean = [t.masked_fill(unused[..., None], 0) for t in (key, value)]
    wanted = dense(query, *clean, mask, 0.3, case["softcap"])
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 11), st.integers(1, 7), st.booleans(), st.booleans(), st.integers(0, 9))
def test_the_text_of_a_joint_sequence_is_always_attended_to(
    picture: int, text: int, first: bool, padded: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    length = picture + text
    query, key, value = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    words = slice(0, text) if first else slice(picture, length)
    tokens = slice(text, length) if first else slice(0, picture)
    visible = None
    if padded and text > 1:
        visible = torch.ones(2, length, dtype=torch.bool)
        visible[1, words.stop - text // 2 : words.stop] = False
    count = -(-picture // BLOCK)
    keep = torch.rand(2, 4, count, count) < 0.4
    mask = torch.ones(2, 4, length, length, dtype=torch.bool)
    kept = keep | torch.eye(count, dtype=torch.bool)
    number = torch.arange(picture) // BLOCK
    mask[:, :, tokens, tokens] = kept[:, :, number][..., number]
    if visible is not None:
        mask &= visible[:, None, None]
    form, seen = BlockForm(0.3, causal=False, block=BLOCK, visible=visible), []

    def choose(q: Tensor, k: Tensor, v: Tensor, inner: BlockForm) -> BlockLists:
        seen.append((q.shape[2], inner.text.key.shape[2]))
        assert torch.equal(k, key[:, :, tokens])
        assert torch.equal(inner.text.value, value[:, :, words])
        return BlockLists(keep)

    found = joint_attention(query, key, value, form, choose, text, first)
    assert seen == [(picture, text)]
    torch.testing.assert_close(found.double(), dense(query, key, value, mask, 0.3), atol=1e-5, rtol=1e-5)


def test_mass_and_rest_stand_for_what_is_left_out() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 10, 8) for _ in range(3))
    keep, form = torch.zeros(1, 1, 3, 3, dtype=torch.bool), BlockForm(0.3, causal=False, block=BLOCK)
    plain = block_attention(query, key, value, form, lambda *_: BlockLists(keep))
    mass, rest = torch.rand(2, 2, 3), torch.randn(2, 2, 3, 8)
    found = block_attention(query, key, value, form, lambda *_: BlockLists(keep, mass, rest))
    block = torch.arange(10) // BLOCK
    torch.testing.assert_close(found, plain * mass[:, :, block, None] + rest[:, :, block])


def test_dense_rows_of_a_batch_attend_to_everything() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 10, 8) for _ in range(3))
    keep = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    form = BlockForm(0.3, causal=False, block=BLOCK, dense=torch.tensor([True, False]).view(2, 1, 1, 1))
    given = BlockLists(keep, torch.rand(2, 2, 3), torch.randn(2, 2, 3, 8))
    found = block_attention(query, key, value, form, lambda *_: given)
    wanted = dense(query, key, value, torch.ones(2, 2, 10, 10, dtype=torch.bool), 0.3)
    torch.testing.assert_close(found[0].double(), wanted[0], atol=1e-5, rtol=1e-5)
    assert float((found[1] - wanted[1]).abs().max()) > 1e-2


@given(st.integers(0, 99), st.sampled_from([0.1, 0.5, 0.9, 0.999]))
def test_a_share_takes_the_fewest_that_hold_it(seed: int, share: float) -> None:
    values = torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    kept = [i for i, k in enumerate(top_share(values, share).tolist()) if k]
    order = sorted(range(7), key=lambda i: -values[i])
    assert set(kept) == set(order[: len(kept)])
    assert sum(values[kept]) >= share * sum(values) > sum(values[kept]) - min(values[kept])
    assert torch.equal(top_share(values, 1.0), torch.ones(7, dtype=torch.bool))
    assert not top_share(torch.zeros(7), share).any()


def test_ties_go_to_the_lower_index() -> None:
    assert top_count(torch.ones(2, 4), 2).tolist() == [[True, True, False, False]] * 2
    assert top_share(torch.ones(4), 0.5).tolist() == [True, True, False, False]


# .. in whole models


def draw(seed: int, layer: int, heads: int, blocks: int) -> Tensor:
    """A choice that the test knows as well: bool [1, H, n, n]."""
    number = torch.arange(heads * blocks * blocks) * 2654435761 + seed * 97 + layer * 7919
    return ((number >> 8) % 5 < 2).view(1, heads, blocks, blocks)


class Drawn(BlockSelection):
    """Blocks by a fixed draw."""

    name = "drawn_blocks"

    class Params(BlockParams):
        seed: int = Field(0, description="Seed; -1: every block.")
        last: int = Field(0, description="Last queries that stay dense.")

    def last(self) -> int:
        return self.params.last

    def lists(self, query: Tensor, key: Tensor, value: Tensor, form: BlockForm, *more: Tensor) -> BlockLists:
        blocks = (query.shape[2] + form.block - 1) // form.block
        if self.params.seed < 0:
            return BlockLists(torch.ones(1, 1, blocks, blocks, dtype=torch.bool))
        return BlockLists(draw(self.params.seed, form.layer, query.shape[1], blocks))


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.pass_names()
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))
    registry.register(Drawn)


class Bidirectional(nn.Module):
    """Attention both ways by hand, key heads shared by two query heads."""

    def __init__(self, causal: bool = False, eager: bool = False) -> None:
        super().__init__()
        self.causal, self.eager = causal, eager
        self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        b, s, _ = x.shape
        query = self.q(x).view(b, s, 4, 8).transpose(1, 2)
        key, value = self.kv(x).view(b, s, 2, 2, 8).permute(2, 0, 3, 1, 4)
        mask = None if there is None else there[:, None, None, :]
        if self.causal and mask is not None:
            mask = mask & torch.ones(s, s, dtype=torch.bool).tril()
        if self.eager:
            score = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
            score = score if mask is None else score.masked_fill(~mask, -1e9)
            y = score.softmax(-1) @ value.repeat_interleave(2, 1)
        else:
            y = nn.functional.scaled_dot_product_attention(
                query, key, value, mask, is_causal=self.causal and mask is None, enable_gqa=True
            )
        return self.out(y.transpose(1, 2).reshape(b, s, 32))

    def explicit(self, x: Tensor, there: Tensor | None, form: BlockForm, keep: Tensor) -> Tensor:
        b, s, _ = x.shape
        query = self.q(x).view(b, s, 4, 8).transpose(1, 2)
        key, value = self.kv(x).view(b, s, 2, 2, 8).permute(2, 0, 3, 1, 4)
        mask = pairs(keep, s, form, 4, b)
        return self.out(dense(query, key, value, mask, 8**-0.5).float().transpose(1, 2).reshape(b, s, 32))


def recipe(**params: Any) -> dict[str, Any]:
    values = {"block": BLOCK, "dense_below": 1, **params}
    return {"recipe_version": 1, "description": "test", "steps": [{"pass": "drawn_blocks", "params": values}]}


@pytest.mark.parametrize(
    ("causal", "eager", "padded"),
    [(False, False, True), (False, True, True), (True, False, True), (False, False, False)],
)
def test_models_by_hand_in_both_directions(causal: bool, eager: bool, padded: bool) -> None:
    torch.manual_seed(0)
    model = Bidirectional(causal, eager).eval()
    optimized = tokcompile.optimize(model, recipe(seed=3), lowering="eager")
    whole = tokcompile.optimize(model, recipe(seed=-1), lowering="eager")
    for length in (13, 22)[: 1 if padded else 2]:
        x = torch.randn(2, length, 32)
        there = torch.ones(2, length, dtype=torch.bool)
        there[0, :3] = False
        given = (x, there) if padded else (x,)
        rows = there if padded else torch.ones(2, length, dtype=torch.bool)
        form = BlockForm(1.0, causal=causal, block=BLOCK, visible=there if padded else None)
        with torch.no_grad():
            wanted = model.explicit(x, given[1] if padded else None, form, draw(3, 0, 4, -(-length // BLOCK)))
            torch.testing.assert_close(optimized(*given)[rows], wanted[rows], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(whole(*given)[rows], model(*given)[rows], atol=1e-5, rtol=1e-5)
            assert float((optimized(*given)[rows] - model(*given)[rows]).abs().max()) > 1e-3
    assert tokcompile.report(optimized).steps[0].matches == 1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss"])
def test_every_block_is_the_language_model(family: str) -> None:
    model, _ = getattr(decoders, family)()
    inputs = decoders.text(length=22)
    inputs["attention_mask"][0, :5] = 0
    optimized = tokcompile.optimize(model, recipe(seed=-1), lowering="eager")
    with torch.no_grad():
        rows = inputs["attention_mask"].bool()
        torch.testing.assert_close(optimized(**inputs).logits[rows], model(**inputs).logits[rows], atol=2e-5, rtol=1e-4)
    assert tokcompile.report(optimized).steps[0].matches == 2


def test_generation_is_sparse_in_the_prefill_alone() -> None:
    model, _ = decoders.llama()
    inputs = {**decoders.text(length=22), "use_cache": True, "max_new_tokens": 4, "do_sample": False}
    optimized = tokcompile.optimize(model, recipe(seed=-1), lowering="eager")
    assert torch.equal(optimized.generate(**inputs), model.generate(**inputs))
    assert tokcompile.report(optimized).steps[0].matches == 2


def test_encoders_with_padding() -> None:
    model, inputs = encoders.hand_written()
    optimized = tokcompile.optimize(model, recipe(seed=-1), inputs=inputs, lowering="eager")
    with torch.no_grad():
        found, wanted = optimized(**inputs), model(**inputs)
    found, wanted = (t if isinstance(t, Tensor) else t[0] for t in (found, wanted))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert tokcompile.report(optimized).steps[0].matches > 0


def test_reasons_to_stay_dense() -> None:
    model, inputs = decoders.bloom()
    with pytest.raises(NoMatchError, match="adds a bias to the scores"):
        tokcompile.optimize(model, recipe(), inputs=inputs, lowering="eager")
    model, inputs = decoders.llama()
    gated = tokcompile.optimize(model, recipe(dense_below=1000), inputs=inputs, lowering="eager")
    (step,) = tokcompile.report(gated).steps
    assert (step.status, "shorter than 1000 tokens run dense" in step.reason) == ("unprofitable", True)
    automatic = tokcompile.optimize(model, recipe(dense_below="auto"), inputs=inputs, lowering="eager")
    assert "shorter than 4096 tokens" in tokcompile.report(automatic).steps[0].reason
    calm = tokcompile.optimize(model, recipe(dense_layers=1), inputs=inputs, lowering="eager")
    assert tokcompile.report(calm).steps[0].matches == 1

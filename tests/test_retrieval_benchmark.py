"""Needles are where they should be, answers are judged by all their digits, and what is shared changes no figure."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokcompile.demo import tiny_llm
from tokcompile.measure.evaluate import Candidate, Task, evaluate
from tokcompile.passes.sparse_attention.token_sparse import TokenSparse
from tokcompile.passes.sparse_attention.tokenselect import TokenSelect

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from quality import in_place, retrieval

LENGTH = 600
#: Logarithms of probabilities, of up to about 15 nats, from fp32 products of other shapes.
CLOSE = {"rtol": 0, "atol": 1e-5}


def encode(text: str) -> list[int]:
    """A token for each character, below the 128 of the tiny model."""
    return [ord(c) % 128 for c in text]


def made(count: int = 3, questions: int = 8) -> list[retrieval.Haystack]:
    draw = random.Random(1)
    return retrieval.haystacks(
        encode, [draw.randrange(97, 123) for _ in range(count * LENGTH)], LENGTH, count, questions
    )


def test_a_haystack_holds_each_needle_once_and_where_it_says() -> None:
    for item in made():
        text = "".join(map(chr, item.ids[0].tolist()))
        starts = []
        for asked in item.asked:
            needle = "".join(map(chr, torch.cat([asked.question, asked.answer], 1)[0].tolist()))[2:] + "."
            assert text.count(needle) == 1
            starts.append((text.index(needle), asked.depth))
        assert len({asked.answer[0, 1].item() for asked in item.asked}) == 8  # first digits
        assert [asked.is_key for asked in item.asked] == [True] * 4 + [False] * 4
        shift = sum(len(f"\n{name} is 482.\n") for name in retrieval.FACTS)  # needles before a place push it back
        for start, depth in starts:
            assert -shift < start - depth * len(text) < shift
        assert sorted(starts) == sorted(starts, key=lambda s: s[1])
        longest = max(a.question.shape[1] + a.answer.shape[1] for a in item.asked)
        assert item.ids.shape[1] + longest == LENGTH


def test_haystacks_share_no_filler() -> None:
    items = retrieval.haystacks(encode, range(1000, 1000 + 3 * LENGTH), LENGTH, 3)
    parts = [set(item.ids[item.ids >= 1000].tolist()) for item in items]
    assert min(map(len, parts)) > 100
    assert sum(map(len, parts)) == len(set.union(*parts))
    with pytest.raises(ValueError, match="need as many"):
        retrieval.haystacks(encode, range(2 * LENGTH), LENGTH, 3)


def test_an_answer_is_right_where_all_its_digits_are() -> None:
    asked = made(1)[0].asked[0]
    digits = asked.answer[0, 1:]
    logits = torch.full((len(digits), 128), -1.0)
    logits[range(len(digits)), digits] = 3.0
    is_key, right, likely = retrieval.judged(logits, asked)
    assert (is_key, right) == (1.0, 1.0)
    assert likely == pytest.approx(sum(float(row.log_softmax(0)[d]) for row, d in zip(logits, digits, strict=True)))
    logits[-1, digits[-1] - 1] = 4.0
    assert retrieval.judged(logits, asked)[1] == 0.0


def test_figures_are_resampled_by_haystack() -> None:
    rows = [
        np.array([[1.0, 1, -1], [1, 0, -3], [0, 1, -0.5], [0, 1, -1.5]]),
        np.array([[1.0, 0, -5], [1, 0, -7], [0, 0, -2.5], [0, 1, -3.5]]),
    ]
    stats = retrieval.sums(rows, rows)
    assert len(stats) == 2  # haystacks, not questions
    found = {m.name: m.score(stats) for m in retrieval.MEASURES}
    assert found == {"needles found": 75.0, "keys found": 25.0, "loss of needles": 2.0, "loss of keys": 4.0}
    assert [m.score(stats[:1]) for m in retrieval.MEASURES] == [100.0, 50.0, 1.0, 2.0]


@torch.no_grad()
def in_one_call(model: Any, item: retrieval.Haystack) -> np.ndarray:
    rows = []
    for asked in item.asked:
        ids = torch.cat([item.ids, asked.question, asked.answer], 1)
        digits = asked.answer.shape[1] - 1
        rows.append(retrieval.judged(model(input_ids=ids).logits[0, -digits - 1 : -1], asked))
    return np.array(rows)


@torch.no_grad()
def test_both_ways_answer_as_one_dense_call_does() -> None:
    model, _ = tiny_llm()
    for item in made(2):
        wanted = in_one_call(model, item)
        for observe in (retrieval.answer_in_steps(model), retrieval.answer_after(model, 1)):
            for _ in range(2):  # the second time from what was kept
                np.testing.assert_allclose(observe(model, item), wanted, **CLOSE)


@torch.no_grad()
def test_a_prefill_with_shared_lower_layers_is_the_whole_prefill() -> None:
    model, _ = tiny_llm()
    item = made(1, 2)[0]
    params = TokenSparse.Params(keep=0.25, window=16, least=0)
    sparse = in_place.sparse_prefill_of(model, params)
    assert sparse.first == 2
    observe = retrieval.answer_after(model, 2)
    dense = observe(model, item)
    shared = observe(sparse, item)
    sparse.first = 0  # now it reads the prompt by itself
    np.testing.assert_allclose(shared, observe(sparse, item), **CLOSE)
    assert abs(shared[:, 2] - dense[:, 2]).max() > 1e-3
    with pytest.raises(ValueError, match="differs from layer 0"):
        in_place.above(sparse, item.ids, in_place.lower_of(model, item.ids, 2))
    other = in_place.sparse_prefill_of(model, params.model_copy(update={"select": "random"}), seed=1)
    third = in_place.sparse_prefill_of(model, params.model_copy(update={"select": "random"}), seed=2)
    assert abs(observe(other, item)[:, 2] - observe(third, item)[:, 2]).max() > 1e-3


@torch.no_grad()
def test_a_model_made_in_place_chooses_the_same_in_a_usual_cache() -> None:
    model, _ = tiny_llm()
    item = made(1)[0]
    sparse = in_place.sparse_decode_of(model, TokenSelect(TokenSelect.Params(budget=24)))
    observe = retrieval.answer_in_steps(model)
    found = observe(sparse, item)
    for asked, row in zip(item.asked, found, strict=True):
        cache, logits = model(input_ids=torch.cat([item.ids, asked.question], 1)).past_key_values, []
        for token in asked.answer[:, :-1].split(1, 1):
            logits.append(sparse(input_ids=token, past_key_values=cache).logits[0, -1])
        np.testing.assert_allclose(row, retrieval.judged(torch.stack(logits), asked), **CLOSE)
    assert abs(found[:, 2] - observe(model, item)[:, 2]).max() > 1e-3


@pytest.mark.slow
def test_recipes_run_on_the_same_tasks() -> None:
    model, _ = tiny_llm()
    items = made(2, 2)

    def recipe(name: str, params: dict[str, Any], **target: Any) -> dict[str, Any]:
        return {
            "recipe_version": 1,
            "description": "x",
            "steps": [{"pass": name, "params": params, "target": {"region": "attention", **target}}],
        }

    sparse = {"keep": 0.25, "window": 16, "least": 0}
    steps = Task("decode", items, retrieval.answer_in_steps(model), retrieval.MEASURES)
    prefill = Task("prefill", items, retrieval.answer_after(model, 1), retrieval.MEASURES)
    for task, document, other in (
        (
            steps,
            recipe("tokenselect", {"budget": 24, "dense_below": 1}, layers=["1--1"]),
            in_place.sparse_decode_of(model, TokenSelect(TokenSelect.Params(budget=24))),
        ),
        (
            prefill,
            recipe("token_sparse", {**sparse, "min_length": 0}),
            in_place.sparse_prefill_of(model, TokenSparse.Params(**sparse)),
        ),
    ):
        found = evaluate(model, [task], {"recipe": document, "in place": other}, resamples=10)
        for measure in retrieval.MEASURES:
            one, two = (found.find(task.name, name, measure.name) for name in ("recipe", "in place"))
            assert one.status == two.status == "measured", one.reason
            assert one.value == pytest.approx(two.value, rel=1e-4, abs=1e-4)
        assert abs(one.minus_dense or 0) > 1e-3


def test_a_ready_model_is_compared_with_the_controls_that_it_names() -> None:
    model, _ = tiny_llm()
    others = [Candidate(f"random {seed}", role="random", seed=seed, model=(tiny_llm()[0], seed)) for seed in range(3)]
    task = Task(
        "x",
        [1.0, 2.0],
        lambda m, item: [item * (1 + m[1])] if isinstance(m, tuple) else [item],
        [retrieval.Measure("y")],
    )
    found = evaluate(model, [task], [Candidate("mine", model=(model, 9), controls=others)], resamples=10)
    row = found.find("x", "mine")
    assert (row.value, row.random, row.random_min, row.random_max) == (1500.0, 300.0, 150.0, 450.0)
    assert row.minus_random == 1200.0
    assert {r.candidate for r in found.rows if r.role == "random"} == {"random 0", "random 1", "random 2"}
    alone = evaluate(
        model, [task], [Candidate("mine", model=(model, 9), controls=others)], resamples=10, with_controls=False
    )
    assert [r.candidate for r in alone.rows] == ["dense", "mine"]

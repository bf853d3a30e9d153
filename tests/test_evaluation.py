"""The protocol of quality: pairing, bootstrap, controls at equal budget, refusals, resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tokcompile
from tokcompile.measure.evaluate import Candidate, Measure, Task, controls, evaluate
from tokcompile.measure.paired import bootstrap, compare, interval, mean_percent, perplexity, ratio_percent
from tokcompile.measure.quality_results import journal_path, read_rows
from tokcompile.recipes import Recipe


class Answers(nn.Module):
    """Gives back 1 where it knows an item; counts how often it was asked."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.asked = known, 0

    def forward(self, item: int) -> float:
        self.asked += 1
        return float(item in self.known)


def _task(name: str = "quiz", items: int = 60, **kwargs: Any) -> Task:
    return Task(name, list(range(items)), lambda model, item: model(item), [Measure("accuracy")], **kwargs)


def test_figures() -> None:
    assert mean_percent(np.array([[1.0], [0.0]])) == 50
    assert ratio_percent(np.array([[1.0, 10], [1.0, 30]])) == 5
    assert perplexity(np.array([[math.log(4) * 3, 3], [math.log(4) * 5, 5]])) == pytest.approx(4)


def test_intervals_cover_the_true_value_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(300):
        sample = generator.normal(0.3, 1, (80, 1))
        low, high = interval(mean_percent, sample, resamples=300, seed=trial)
        inside += low <= 30 <= high
    assert 0.91 <= inside / 300 <= 0.98  # 95 % up to the percentile method's bias at n = 80 and the noise of 300 trials


def test_paired_differences_cover_and_are_narrower_than_unpaired_ones() -> None:
    generator = np.random.default_rng(1)
    inside, widths = 0, []
    for trial in range(200):
        ease = generator.normal(0, 1, (80, 1))  # what both share: pairing takes it out
        first, second = ease + generator.normal(0.1, 0.3, (80, 1)), ease + generator.normal(0, 0.3, (80, 1))
        found = compare(mean_percent, first, [second], resamples=300, seed=trial)
        inside += found.low <= 10 <= found.high
        low, high = interval(mean_percent, first, resamples=300, seed=trial)
        widths.append((found.high - found.low) / (high - low))
    assert 0.9 <= inside / 200 <= 0.99
    assert np.mean(widths) < 0.6


def test_a_difference_with_itself_is_zero_and_same() -> None:
    stats = np.random.default_rng(0).random((20, 2)) + 1
    found = compare(ratio_percent, stats, [stats])
    assert (found.value, found.low, found.high, found.verdict()) == (0, 0, 0, "same")


def test_a_comparison_of_different_items_is_an_error() -> None:
    with pytest.raises(tokcompile.TokcompileError, match="same items"):
        compare(mean_percent, np.ones((3, 1)), [np.ones((4, 1))])


def test_the_mean_over_seeds_is_what_counts() -> None:
    first = np.ones((10, 1))
    found = compare(mean_percent, first, [np.zeros((10, 1)), np.ones((10, 1))])
    assert found.value == 50


def test_bootstrap_is_deterministic_and_says_nan_where_nothing_is_defined() -> None:
    assert bootstrap(lambda rows: float(rows.mean()), 9, resamples=50) == bootstrap(
        lambda rows: float(rows.mean()), 9, resamples=50
    )
    assert all(math.isnan(v) for v in bootstrap(lambda rows: math.nan, 9, resamples=5))


def test_verdicts_follow_the_interval_and_the_direction_of_the_metric() -> None:
    dense, good, bad = Answers(set(range(40))), Answers(set(range(58))), Answers(set(range(10)))
    found = evaluate(dense, [_task()], {"good": good, "bad": bad, "same": Answers(set(range(1, 41)))}, resamples=500)
    verdicts = {row.candidate: row.against_dense for row in found.rows}
    assert verdicts == {"dense": "", "good": "better", "bad": "worse", "same": "same"}
    row = found.find("quiz", "good")
    assert (row.value, row.dense, row.minus_dense) == pytest.approx((100 * 58 / 60, 100 * 40 / 60, 100 * 18 / 60))
    assert row.minus_dense_low < row.minus_dense < row.minus_dense_high  # type: ignore[operator]
    lower = Task(
        "errors", list(range(60)), lambda model, item: model(item), [Measure("errors", higher_is_better=False)]
    )
    found = evaluate(dense, [lower], {"many": good})
    assert found.find("errors", "many").against_dense == "worse"
    assert found.find("errors", "many").relative == pytest.approx(40 / 58)


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    dense, one = Answers({1, 2}), Answers({2, 3})
    evaluate(dense, [_task()], {"one": one}, results=path)
    assert (dense.asked, one.asked) == (60, 60)
    two = Answers({5})
    again = evaluate(dense, [_task()], {"one": one, "two": two}, results=path)
    assert (dense.asked, one.asked, two.asked) == (60, 60, 60)
    assert again.find("quiz", "one").value == pytest.approx(100 * 2 / 60)
    evaluate(dense, [_task()], {"one": one, "two": two}, results=path)
    assert (dense.asked, one.asked, two.asked) == (60, 60, 60)
    evaluate(dense, [_task(version="2")], {"one": one}, results=path)
    assert one.asked == 120  # another version of the task is another task


def test_judges_that_compare_get_the_dense_answers_of_a_run_that_goes_on(tmp_path: Path) -> None:
    def agree(observed: Any, dense: Any) -> Any:
        return np.array([[float(a == b)] for a, b in zip(observed, dense, strict=True)])

    task = Task("quiz", list(range(60)), lambda model, item: model(item), [Measure("agreement", judge=agree)])
    dense, one, path = Answers({1, 2}), Answers({2, 3}), tmp_path / "q.csv"
    evaluate(dense, [task], {}, results=path)
    found = evaluate(dense, [task], {"one": one}, results=path)
    assert (dense.asked, one.asked) == (120, 60)
    assert found.find("quiz", "one").value == pytest.approx(100 * 58 / 60)


def test_a_broken_last_line_of_the_journal_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    dense, one = Answers({1}), Answers({1})
    evaluate(dense, [_task()], {"one": one}, results=path)
    journal = journal_path(path)
    journal.write_text(journal.read_text()[:-30])
    evaluate(dense, [_task()], {"one": one}, results=path)
    assert one.asked == 120


def test_result_files_round_trip_and_grow(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    dense = Answers({1, 2})
    evaluate(dense, [_task()], {"one": Answers({1})}, results=path)
    evaluate(dense, [_task("other")], {"one": Answers({1})}, results=path)
    found = evaluate(dense, [_task()], {"two": Answers({9})}, results=path)
    rows = read_rows(path)
    assert {(r.task, r.candidate) for r in rows} == {(t, c) for t in ("quiz", "other") for c in ("dense", "one")} | {
        ("quiz", "two")
    }
    mine = next(r for r in rows if r.candidate == "two")
    assert mine.value == pytest.approx(found.find("quiz", "two").value, rel=1e-4)
    assert (mine.seed, mine.higher_is_better, mine.items) == (None, True, 60)


def test_an_error_in_a_candidate_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    class Broken(Answers):
        def forward(self, item: int) -> float:
            self.asked += 1
            raise ValueError("no [such] thing")

    broken, dense = Broken(set()), Answers({1})
    for _ in range(2):
        found = evaluate(dense, [_task()], {"broken": broken, "fine": Answers({1})}, results=tmp_path / "q.csv")
        row = found.find("quiz", "broken")
        assert (row.status, row.value) == ("failed", None)
        assert "no [such] thing" in row.reason
        assert found.find("quiz", "fine").value is not None
        assert "no [such] thing" in str(found)
    assert broken.asked == 2


def test_a_refusal_is_a_row_with_the_reason() -> None:
    task = Task("t", [torch.randn(2, 4)], lambda model, item: float(model(item).sum()), [Measure("sum")])
    found = evaluate(nn.Linear(4, 4), [task], ["vlm_prune_90"])
    row = found.find("t", "vlm_prune_90")
    assert row.status == "refused"
    assert row.reason


def test_arguments_are_checked() -> None:
    dense = Answers({1})
    for tasks, candidates in (
        ([], {}),
        ([_task(), _task()], {}),
        ([_task(items=0)], {}),
        ([_task()], {"dense": dense}),
        ([_task()], ["vlm_prune_90", "vlm_prune_90"]),
    ):
        with pytest.raises(tokcompile.TokcompileError):
            evaluate(dense, tasks, candidates)


@pytest.mark.parametrize("name", ["vlm_prune_90", "vlm_prune_75", "vlm_cls_90"])
def test_controls_have_the_budget_of_the_method(name: str) -> None:
    recipe = Recipe.load(name)
    found = controls(recipe, seeds=(3, 5))
    assert [(c.role, c.seed) for c in found] == [("random", 3), ("random", 5), ("pool", None)]
    for control in found:
        assert control.recipe is not None
        assert control.recipe.steps[0].params.keep == recipe.steps[0].params.keep
    assert len({c.key for c in found}) == 3


def test_a_control_has_no_controls_and_neither_has_a_recipe_that_chooses_nothing() -> None:
    assert controls(Recipe.load("vlm_random_90")) == []
    assert controls(Recipe.load({"recipe_version": 1, "steps": [{"pass": "stem"}]})) == []


def test_candidates_that_do_the_same_have_one_key() -> None:
    first = Candidate("a", Recipe.load("vlm_prune_90"))
    assert first.key == Candidate("b", Recipe.load("vlm_prune_90")).key != Candidate("a", Recipe.load("vlm_cls_90")).key

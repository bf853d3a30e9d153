"""``tokcompile.bench``: every part is measured, in turns, and stated beside its ceiling."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tokcompile
from tokcompile.demo import tiny_vit, tiny_vlm
from tokcompile.errors import NoMatchError, RecipeError, TokcompileError
from tokcompile.measure.timing import in_turn, peak_memory
from tokcompile.reporting.bench_result import COMPILED, EAGER, BenchResult, amdahl

FAST: dict[str, Any] = {"rounds": 3, "warmup": 1, "lowering": "eager", "compiled_baseline": False}


@pytest.fixture(scope="module")
def vlm() -> BenchResult:
    model, inputs = tiny_vlm()
    state = dict(vars(model))
    steps: list[tuple[str, int, int]] = []
    result = tokcompile.bench(
        model,
        inputs,
        ["vlm_prune_90", "vlm_random_90"],
        new_tokens=3,
        progress=lambda *step: steps.append(step),
        **FAST,
    )
    assert vars(model) == state  # it ran on copies
    assert steps[-1][0] == "memory of vlm_random_90"
    assert any(text == "round 3 of 3" for text, _, _ in steps)
    assert all(0 <= done <= total for _, done, total in steps)
    return result


def test_every_part_is_measured(vlm: BenchResult) -> None:
    assert [row.name for row in vlm.rows] == [EAGER, "vlm_prune_90", "vlm_random_90"]
    for row in vlm.rows:
        for timing in (row.ttft, row.prefill, row.decode):
            assert timing is not None
            assert timing.count == 3
            assert 0 < timing.p20 <= timing.median <= timing.p80
        assert row.ttft.median > row.prefill.median  # the image encoder is in the first, not in the second
        assert row.peak_bytes > 0
    dense, pruned = vlm.rows[:2]
    assert pruned.peak_bytes < dense.peak_bytes
    assert pruned.speedup["ttft"] == pytest.approx(dense.ttft.median / pruned.ttft.median)
    assert dense.speedup == {}


def test_the_ceiling_is_by_amdahl(vlm: BenchResult) -> None:
    dense, pruned = vlm.rows[:2]
    ratio = vlm.reports["vlm_prune_90"].steps[0].flop_ratio
    assert pruned.flop_ratio == ratio > 3
    assert pruned.ceiling == pytest.approx(amdahl(dense.ttft.median, dense.prefill.median, ratio))
    assert 1 < pruned.ceiling < ratio
    assert amdahl(10, 5, 1) == 1
    assert amdahl(10, 10, 4) == 4
    assert amdahl(10, 5, 1e9) == pytest.approx(2)


def test_it_is_written_in_every_form(vlm: BenchResult, tmp_path: Path) -> None:
    data = json.loads(json.dumps(vlm.to_dict()))
    assert data["rows"][1]["ttft"]["median"] == vlm.rows[1].ttft.median
    text = str(vlm)
    assert all(part in text for part in ("vlm_random_90", "first token", "decode / token", "speed-up over dense eager"))
    vlm.to_csv(tmp_path / "b.csv")
    with (tmp_path / "b.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["recipe"] for line in lines] == [row.name for row in vlm.rows]
    assert float(lines[1]["decode_ms"]) == pytest.approx(vlm.rows[1].decode.median, rel=1e-3)
    assert lines[0]["ttft_speedup"] == ""
    pytest.importorskip("matplotlib")
    vlm.plot(tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 5000


def test_a_model_that_does_not_generate() -> None:
    model, inputs = tiny_vit()
    result = tokcompile.bench(model, inputs, [{"recipe_version": 1, "extends": "vit_prune_50"}], **FAST)
    dense, pruned = result.rows
    assert (pruned.name, pruned.prefill, pruned.decode, result.batch) == ("recipe 1", None, None, 2)
    assert pruned.ceiling == pytest.approx(pruned.flop_ratio)
    assert dense.ceiling is None
    assert "forward" in str(result)


def test_rounds_take_turns() -> None:
    seen: list[str] = []

    def call(name: str) -> Any:
        return lambda: seen.append(name) or {"ms": float(len(seen))}

    found = in_turn({"a": call("a"), "b": call("b"), "c": call("c")}, 3, 1)
    assert seen == list("abc" + "abc" + "bca" + "cab")
    assert [entry["ms"] for entry in found["a"]] == [4, 9, 11]


def test_peak_memory_counts_what_is_held_at_one_time() -> None:
    def work() -> None:
        x = torch.ones(1 << 18)  # 1 MiB
        del x
        y = torch.ones(1 << 18)
        z = y + 1
        del y, z

    assert peak_memory(work, torch.device("cpu")) == pytest.approx(2 << 20, rel=0.01)
    assert peak_memory(work, torch.device("meta")) is None


def test_what_cannot_run_is_an_error() -> None:
    model, inputs = tiny_vit()
    with pytest.raises(TokcompileError, match="at least 1"):
        tokcompile.bench(model, inputs, rounds=0)
    with pytest.raises(RecipeError, match="did you mean 'vit_prune_50'"):
        tokcompile.bench(model, inputs, ["vit_prune_05"])
    with pytest.raises(NoMatchError, match="no merge_point"):
        tokcompile.bench(model, inputs, ["vlm_prune_90"], **FAST)


@pytest.mark.slow
@pytest.mark.inductor
def test_against_plain_torch_compile() -> None:
    model, inputs = tiny_vit()
    result = tokcompile.bench(model, inputs, ["vit_prune_50"], rounds=2)
    assert [row.name for row in result.rows] == [EAGER, COMPILED, "vit_prune_50"]
    assert result.baseline == COMPILED
    assert result.row(COMPILED).compile_seconds > 0
    assert "ttft" in result.row(EAGER).speedup

"""The benchmarks: statistics, result files, FLOPs by hand against the report, and that the quick runs run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import tokcompile

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import harness  # noqa: E402
import kernel_speed as kernels  # noqa: E402
import models  # noqa: E402
import run  # noqa: E402


def test_quantiles_interpolate() -> None:
    assert harness.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert harness.quantile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert harness.quantile([7.0], 0.8) == 7.0


def test_rounds_run_every_call_once_and_change_the_order() -> None:
    seen: list[str] = []
    times = harness.interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, repeats=2, warmup=1)
    assert seen == ["a", "b", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_rows_hold_speedup_and_share_of_ceiling_and_survive_the_file(tmp_path: Path) -> None:
    base = harness.row("vlm", "m", harness.BASELINE, [100.0, 100.0, 100.0], batch=1, tokens=640)
    fast = harness.row("vlm", "m", "r", [20.0, 25.0, 50.0], batch=1, tokens=640, baseline=[100.0] * 3, flop_ratio=5.0)
    assert (fast.speedup, fast.share_of_ceiling) == (4.0, 0.8)
    harness.write_csv(tmp_path / "x.csv", [base, fast])
    lines = harness.read_csv(tmp_path / "x.csv")
    assert list(lines[0]) == harness.COLUMNS
    assert (lines[0]["speedup"], lines[1]["speedup"], lines[1]["torch"]) == ("", "4", torch.__version__)
    harness.write_csv(tmp_path / "vlm.csv", [base, fast])
    (tmp_path / "docs.md").write_text(f"head\n\n{harness.MARKER}\n\nold\n")
    harness.write_docs(tmp_path / "docs.md", tmp_path, {"vlm": "Title", "vit": "Not measured"})
    text = (tmp_path / "docs.md").read_text()
    assert text.startswith("head")
    assert "| m | r | 1 | 25 (22 to 40) | 4.00 | 5.00 | 80 % |" in text
    assert "old" not in text
    assert "Not measured" not in text
    pytest.importorskip("matplotlib")
    harness.plot(tmp_path / "x.png", lines, "title")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_flops_of_the_vit_recipes_are_those_that_they_state() -> None:
    model = models.vit()
    dense = models.vit_flops(model, 224, [257] * 12) / 2
    assert dense == pytest.approx(6.066e9 + 256 * 588 * 384, rel=1e-3)
    for keep, left in ((0.78, 4.255e9), (0.56, 3.040e9)):
        ratio = models.vit_ratio(model, 224, [keep] * 3, [0.25, 0.5, 0.75])
        assert ratio == pytest.approx(dense / (left + 256 * 588 * 384), rel=1e-3)


@pytest.mark.parametrize(("recipe", "late"), [("vlm_prune_90", 0.875), ("vlm_random_90", None)])
def test_flops_by_hand_agree_with_the_report_on_the_vlm(recipe: str, late: float | None) -> None:
    model = models.vlm(quick=True)
    inputs = models.vlm_inputs(model)
    optimized = tokcompile.optimize(model, recipe=recipe, lowering="eager")
    with torch.inference_mode():
        logits = models.vlm_call(optimized, inputs).logits
    assert logits.shape == (1, 1, 32_000)
    ratio = tokcompile.report(optimized).steps[0].flop_ratio
    assert ratio == pytest.approx(models.vlm_ratio(model, 0.1, late), rel=0.01)


def test_flops_by_hand_agree_with_the_report_on_the_vit() -> None:
    model = models.vit(quick=True)
    optimized = tokcompile.optimize(
        model, recipe="vit_prune_50", inputs={"pixel_values": torch.randn(2, 3, 56, 56)}, lowering="eager"
    )
    wanted = models.vit_ratio(model, 56, [0.56] * 3, [0.25, 0.5, 0.75])
    assert tokcompile.report(optimized).steps[0].flop_ratio == pytest.approx(wanted, rel=0.01)


def test_detect_runs() -> None:
    rows = run.bench_detect(quick=True, repeats=1, load=None)
    assert [r.recipe for r in rows][1:] == ["capture", "canonical form", "find_regions"]
    assert all(r.median_ms > 0 and r.repeats == 1 for r in rows)


def test_an_unknown_benchmark_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "vlm,vti"])
    assert "unknown benchmark vti" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("name", ["vlm", "vit", "compile", "onnx"])
def test_quick_runs_write_their_files(name: str, tmp_path: Path) -> None:
    assert run.main(["--only", name, "--quick", "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.csv", f"{name}.png"]


@pytest.mark.parametrize("name", list(kernels.CASES))
def test_kernel_cases_stand_for_the_same_numbers_as_their_dense_operation(name: str) -> None:
    for case in kernels.CASES[name](kernels.TINY):
        tensors = case.make("cpu")
        found, dense = case.run(**tensors), case.dense(**tensors)
        found = found[0] if isinstance(found, tuple) else found
        assert found.isfinite().all()
        if name == "attention_rows":  # sums of weights: each of the queries gives 1
            assert found.sum(-1) == pytest.approx(tensors["query"].shape[2], rel=1e-4)
            continue
        assert found.shape == dense.shape
        if case.name in ("all blocks", "half of the rows", "silu(gate) * row"):
            torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-5)
        assert case.flops >= 0
        assert case.moved > 0


@pytest.mark.slow
def test_kernels_run_and_write_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--quick", "--no-compile", "--out", str(tmp_path)]
    assert kernels.main(["--only", "embedding_gate,token_list_attention", *command]) == 0
    assert kernels.main(["--only", "gather_rows,embedding_gate", *command]) == 0  # the others stay
    lines = harness.read_csv(tmp_path / "kernels.csv")
    assert [p.name for p in tmp_path.iterdir()] == ["kernels.csv"]
    assert list(lines[0]) == kernels.COLUMNS
    assert [m["kernel"] for m in lines] == ["token_list_attention"] * 2 + ["gather_rows"] * 2 + ["embedding_gate"] * 4
    assert all(float(m["median_ms"]) > 0 and float(m["share"]) > 0 for m in lines)
    text = kernels.markdown(lines)
    assert "| 256 keys | 320 |" in text
    with pytest.raises(SystemExit):
        kernels.main(["--only", "gate"])
    assert "unknown kernel gate" in capsys.readouterr().err


@pytest.mark.slow
def test_kernels_are_compiled_for_devices_that_are_not_there() -> None:
    pytest.importorskip("triton")
    case = next(c for c in kernels.CASES["token_list_attention"](kernels.LARGE))
    for capability in (80, 90):
        registers, spilled, shared = map(int, kernels.usage(case, capability).split("/"))
        assert 0 < registers <= 255
        assert spilled == 0
        assert shared > 0

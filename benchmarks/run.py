"""Measures tokcompile against plain ``torch.compile`` of the same model.

    python benchmarks/run.py [--only vlm,vit,compile,detect,onnx] [--quick] [--out DIR]

Writes ``benchmarks/results/<name>.csv`` and ``<name>.png`` for each benchmark, and the tables of ``docs/benchmarks.md``
from them. Each runs in a process of its own
(``compile``: one for each compilation, with an empty Inductor cache), with 2 threads in fp32 on the CPU. Calls are
interleaved: every round times each of them once; compilation and warm-up calls come before. ``--quick`` takes tiny
models to see that everything runs; its times mean nothing.

========  =============================================================================================================
vlm       prefill of a LLaVA with the text tower of Qwen2-0.5B: 576 image and 64 text tokens, 90 % of the image dropped
vit       ViT-S/14 at 224 px, random weights, batch 8 and 1, 30 % and 50 % of the FLOPs dropped, or merged away
compile   wall time of the first call: optimize against torch.compile, nothing cached
detect    time to capture a 32-layer Llama, and to find its regions
onnx      pruned against dense files in onnxruntime: the ViT at batch 8, and the prefill of a VLM with fewer layers
========  =============================================================================================================
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import harness  # noqa: E402
import models  # noqa: E402
import torch  # noqa: E402

#: The dense model lowered by tokcompile: what of a speed-up is not the missing tokens.
DENSE = "nothing dropped"
DOCS = HERE.parent / "docs" / "benchmarks.md"
TITLES = {
    "vlm": "Prefill of a 0.5 B vision-language model, 576 image + 64 text tokens",
    "vit": "ViT-S/14 at 224 px, 257 tokens",
    "compile": "First call with nothing cached: compile time and one run",
    "detect": "Capture and detection, Llama with 32 layers",
    "onnx": "Exported files in onnxruntime on the CPU",
}


# ------------------------------------------------------------------------------------------------ the benchmarks


def bench_vlm(quick: bool, repeats: int, load: float | None) -> list[harness.Row]:
    """Prefill with image features ready: what pruning at the merge point can change."""
    import tokcompile

    model = models.vlm(quick)
    inputs = models.vlm_inputs(model)
    plain = torch.compile(model)
    calls: dict[str, Callable[[], Any]] = {harness.BASELINE: lambda: models.vlm_call(plain, inputs)}
    optimized = {}
    for recipe in ("vlm_prune_90", "vlm_random_90"):
        optimized[recipe] = tokcompile.optimize(model, recipe=recipe)
        calls[recipe] = lambda m=optimized[recipe]: models.vlm_call(m, inputs)
    # nothing of this recipe fits the prefill: the dense model with tokcompile's choice of matrix products alone
    chosen = tokcompile.optimize(model, recipe="vit_prune_50", on_no_match="ignore")
    calls[DENSE] = lambda: models.vlm_call(chosen, inputs)
    times = harness.interleaved(calls, repeats)
    tokens, base = inputs["input_ids"].shape[1], times[harness.BASELINE]
    rows = [
        harness.row("vlm", _vlm_name(quick), harness.BASELINE, base, batch=1, tokens=tokens, load=load),
        harness.row("vlm", _vlm_name(quick), DENSE, times[DENSE], batch=1, tokens=tokens, baseline=base, load=load),
    ]
    for recipe, late in (("vlm_prune_90", 0.875), ("vlm_random_90", None)):
        rows.append(
            harness.row(
                "vlm",
                _vlm_name(quick),
                recipe,
                times[recipe],
                batch=1,
                tokens=tokens,
                baseline=base,
                flop_ratio=tokcompile.report(optimized[recipe]).steps[0].flop_ratio,
                formula=models.vlm_ratio(model, 0.10, late),
                load=load,
            )
        )
    return rows


def _vlm_name(quick: bool) -> str:
    return "tiny LLaVA" if quick else "LLaVA, Qwen2-0.5B text"


#: Recipe -> share of the patches kept at each of its depths, and the depths.
VIT = {
    "vit_prune_30": (0.78, (0.25, 0.5, 0.75)),
    "vit_prune_50": (0.56, (0.25, 0.5, 0.75)),
    "vit_merge_50": (0.725, (0.08, 0.25, 0.42)),
}


def bench_vit(quick: bool, repeats: int, load: float | None) -> list[harness.Row]:
    """Encoder with patches dropped or merged inside."""
    import tokcompile

    model, size, name = models.vit(quick), 56 if quick else 224, _vit_name(quick)
    rows = []
    for batch in (8, 1):
        torch._dynamo.reset()
        pixels = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        plain = torch.compile(model)
        calls: dict[str, Callable[[], Any]] = {harness.BASELINE: lambda m=plain, x=pixels: m(pixel_values=x)}
        optimized = {}
        for recipe in VIT:
            optimized[recipe] = tokcompile.optimize(model, recipe=recipe)
            calls[recipe] = lambda m=optimized[recipe], x=pixels: m(pixel_values=x)
        # nothing of this recipe fits an encoder: the dense model with tokcompile's choice of matrix products alone
        chosen = tokcompile.optimize(model, recipe="vlm_random_90", on_no_match="ignore")
        calls[DENSE] = lambda m=chosen, x=pixels: m(pixel_values=x)
        times = harness.interleaved(calls, repeats * (4 if batch == 1 else 1))
        tokens, base = (size // 14) ** 2 + 1, times[harness.BASELINE]
        rows.append(harness.row("vit", name, harness.BASELINE, base, batch=batch, tokens=tokens, load=load))
        rows.append(harness.row("vit", name, DENSE, times[DENSE], batch=batch, tokens=tokens, baseline=base, load=load))
        for recipe, (keep, at) in VIT.items():
            rows.append(
                harness.row(
                    "vit",
                    name,
                    recipe,
                    times[recipe],
                    batch=batch,
                    tokens=tokens,
                    baseline=base,
                    load=load,
                    flop_ratio=tokcompile.report(optimized[recipe]).steps[0].flop_ratio,
                    formula=models.vit_ratio(model, size, [keep] * 3, at),
                )
            )
    return rows


def _vit_name(quick: bool) -> str:
    return "tiny ViT" if quick else "ViT-S/14, random"


COMPILED = {"vlm": ("vlm_prune_90", "vlm_random_90"), "vit": ("vit_prune_50",)}


def bench_compile(quick: bool, repeats: int, load: float | None) -> list[harness.Row]:
    """Wall time of the first call, each in a new process with an empty cache."""
    rows = []
    for name, recipes in COMPILED.items():
        contestants = [harness.BASELINE, *recipes]
        times: dict[str, list[float]] = {c: [] for c in contestants}
        cpu: dict[str, list[float]] = {c: [] for c in contestants}
        tokens = batch = 0
        for _ in range(repeats):
            for contestant in contestants:
                seen = _child("first_call", quick, fresh_cache=True, args=["--case", name, "--recipe", contestant])
                times[contestant].append(seen["ms"])
                cpu[contestant].append(seen["cpu_seconds"])
                tokens, batch = seen["tokens"], seen["batch"]
        title = _vlm_name(quick) if name == "vlm" else _vit_name(quick)
        for contestant in contestants:
            rows.append(
                harness.row(
                    "compile",
                    title,
                    contestant,
                    times[contestant],
                    batch=batch,
                    tokens=tokens,
                    load=load,
                    cpu_seconds=harness.quantile(cpu[contestant], 0.5),
                    baseline=None if contestant == harness.BASELINE else times[harness.BASELINE],
                )
            )
    return rows


def first_call(case: str, recipe: str, quick: bool) -> dict[str, Any]:
    """Time the first call of one model, compilation included."""
    import tokcompile
    import tokcompile.api  # imported before the clock starts, like torch and transformers

    if case == "vlm":
        model = models.vlm(quick)
        inputs = models.vlm_inputs(model)
        kwargs, tokens, batch = models.prefill_kwargs(inputs), inputs["input_ids"].shape[1], 1
    else:
        model, size, batch = models.vit(quick), 56 if quick else 224, 8
        kwargs, tokens = {"pixel_values": torch.randn(batch, 3, size, size)}, (size // 14) ** 2 + 1
    with torch.inference_mode():
        started, busy = time.perf_counter(), _cpu_seconds()
        compiled = torch.compile(model) if recipe == harness.BASELINE else tokcompile.optimize(model, recipe=recipe)
        compiled(**kwargs)
        seconds = time.perf_counter() - started
    return {"ms": seconds * 1e3, "cpu_seconds": _cpu_seconds() - busy, "tokens": tokens, "batch": batch}


def _cpu_seconds() -> float:
    """CPU time of this process and of those that it waited for (the C++ compiler); a load from outside adds little."""
    return sum(os.times()[:4])


def bench_detect(quick: bool, repeats: int, load: float | None) -> list[harness.Row]:
    """How long it takes to get from Dynamo's graph to regions."""
    from tokcompile.capture.canonical import canonicalise
    from tokcompile.capture.capture import DYNAMO_CONFIG, from_dynamo
    from tokcompile.regions import find_regions

    model = models.llama(4 if quick else 32)
    ids = torch.randint(0, 1000, (1, 128), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"capture": [], "canonical form": [], "find_regions": []}

    def backend(graph_module: torch.fx.GraphModule, _: Any) -> Any:
        clock = [time.perf_counter()]
        captured = from_dynamo(graph_module)
        clock.append(time.perf_counter())
        canonicalise(captured)
        clock.append(time.perf_counter())
        regions = find_regions(captured.graph)
        clock.append(time.perf_counter())
        assert len(regions.of("attention")) == model.config.num_hidden_layers, regions.summary
        for name, start, end in zip(times, clock, clock[1:], strict=False):
            times[name].append((end - start) * 1e3)
        return graph_module

    dynamo = []
    for _ in range(repeats + 1):
        torch._dynamo.reset()
        started = time.perf_counter()
        with torch._dynamo.config.patch(**DYNAMO_CONFIG), torch.inference_mode():
            torch.compile(model, backend=backend, dynamic=True)(input_ids=ids, use_cache=False)
        dynamo.append((time.perf_counter() - started) * 1e3 - sum(t[-1] for t in times.values()))
    times = {"Dynamo (torch.compile's own)": dynamo, **times}
    name = f"Llama, {model.config.num_hidden_layers} layers"
    # the first round is a warm-up: imports and caches
    return [
        harness.row("detect", name, step, values[1:], batch=1, tokens=128, load=load) for step, values in times.items()
    ]


def bench_onnx(quick: bool, repeats: int, load: float | None, exports: str | None = None) -> list[harness.Row]:
    """Exported files, pruned against dense."""
    import onnx_models

    with tempfile.TemporaryDirectory(prefix="tokcompile-bench-") as folder:
        return onnx_models.rows(Path(exports or folder), quick, repeats, load)


BENCHMARKS: dict[str, tuple[Callable[..., list[harness.Row]], int]] = {
    "vlm": (bench_vlm, 15),
    "vit": (bench_vit, 15),
    "compile": (bench_compile, 1),
    "detect": (bench_detect, 5),
    "onnx": (bench_onnx, 15),
}
"""Name -> (function, rounds)."""


# ------------------------------------------------------------------------------------------------------ processes


def _child(task: str, quick: bool, *, fresh_cache: bool = False, args: list[str] | None = None) -> Any:
    """Run this file for one task in a new process; what it returns comes back as JSON."""
    with tempfile.TemporaryDirectory(prefix="tokcompile-bench-") as folder:
        out = Path(folder) / "result.json"
        env = {**os.environ, "OMP_NUM_THREADS": str(harness.THREADS)}
        if fresh_cache:
            env["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder) / "inductor")
            env["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
        command = [sys.executable, str(HERE / "run.py"), "--task", task, "--result", str(out), *(args or [])]
        subprocess.run([*command, *(["--quick"] if quick else [])], check=True, env=env)
        return json.loads(out.read_text())


def _task(options: argparse.Namespace) -> Any:
    torch.set_num_threads(harness.THREADS)
    torch._logging.set_logs(dynamo=logging.ERROR)  # the plain baseline breaks its graph, which Dynamo remarks on
    if options.task == "first_call":
        return first_call(options.case, options.recipe, options.quick)
    function, repeats = BENCHMARKS[options.task]
    rounds = options.repeats or (2 if options.quick else repeats)
    more = {"exports": options.exports} if options.task == "onnx" else {}
    return [asdict(r) for r in function(options.quick, rounds, options.load, **more)]


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="comma-separated: " + ", ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="tiny models, 2 rounds: a smoke test")
    parser.add_argument("--repeats", type=int, help="timed rounds, instead of the benchmark's own number")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--exports", help="folder of exported files for 'onnx': used again where they are there")
    for hidden in ("--task", "--result", "--case", "--recipe"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.task:
        Path(options.result).write_text(json.dumps(_task(options)))
        return 0
    names = options.only.split(",")
    unknown = sorted(set(names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; choose from {', '.join(BENCHMARKS)}")
    out = options.out or (Path(tempfile.gettempdir()) / "tokcompile-quick" if options.quick else harness.RESULTS)
    for name in names:
        load = harness.load()
        extra = [] if load is None else ["--load", str(load)]
        extra += [] if options.repeats is None else ["--repeats", str(options.repeats)]
        extra += [] if options.exports is None else ["--exports", options.exports]
        rows = [harness.Row(**r) for r in _child(name, options.quick, args=extra)]
        harness.write_csv(out / f"{name}.csv", rows)
        harness.plot(out / f"{name}.png", harness.read_csv(out / f"{name}.csv"), TITLES[name])
        _show(rows)
        print(f"{out / name}.csv, .png   load {load}\n", flush=True)
        if out == harness.RESULTS:
            harness.write_docs(DOCS, out, TITLES)
    return 0


def _show(rows: list[harness.Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in (
        "benchmark",
        "model",
        "recipe",
        "batch",
        "median ms",
        "p20",
        "p80",
        "speed-up",
        "FLOP ratio",
        "by hand",
        "share",
    ):
        table.add_column(column, justify="left" if column in ("benchmark", "model", "recipe") else "right")
    for r in rows:
        numbers = [f"{t:.0f}" if t >= 100 else f"{t:.1f}" for t in (r.median_ms, r.p20_ms, r.p80_ms)]
        ratios = ["" if v is None else f"{v:.2f}" for v in (r.speedup, r.flop_ratio, r.flop_ratio_formula)]
        table.add_row(
            r.benchmark,
            r.model,
            r.recipe,
            str(r.batch),
            *numbers,
            *ratios,
            "" if r.share_of_ceiling is None else f"{100 * r.share_of_ceiling:.0f} %",
        )
    Console(width=max(120, Console().width)).print(table)


if __name__ == "__main__":
    raise SystemExit(main())

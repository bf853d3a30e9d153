"""Time and memory of a model, dense and with recipes, in one interleaved run: :func:`bench`.

Also what any timing needs: :func:`interleaved`, :func:`quantile`, :func:`versions`.
"""

from __future__ import annotations

import csv
import functools
import gc
import importlib.metadata
import io
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tokcompile.errors import TokcompileError
from tokcompile.recipes import Recipe

EAGER, COMPILED = "dense eager", "dense torch.compile"
#: Parts of a call, in the order of the columns.
PARTS = ("ttft", "prefill", "decode")
_TITLES = {"ttft": "first token", "prefill": "prefill", "decode": "decode / token"}

#: Called after each step with what is being done, steps done, and steps in all.
Progress = Callable[[str, int, int], None]


# ------------------------------------------------------------------------------------------------------- measuring


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the sorted values: 0.5 is the median."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def in_turn(calls: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int, warmup: int = 3,
            progress: Progress | None = None) -> dict[str, list[Mapping[str, float]]]:
    """What each call returned in each round. Every round runs each call once, so that load from outside hits all alike.

    Args:
        calls: name -> function without arguments that gives the times of its parts.
        repeats: rounds that count. warmup: rounds before them (compilation belongs there).
    """
    results: dict[str, list[Mapping[str, float]]] = {name: [] for name in calls}
    total, done = len(calls) * (repeats + warmup), 0
    with torch.inference_mode():
        for name, call in calls.items():
            for _ in range(warmup):
                if progress:
                    progress(f"warming up {name}", done, total)
                call()
                done += 1
        gc.collect()
        gc.disable()
        try:
            for turn in range(repeats):
                names = list(calls)
                shift = turn % len(names)  # nobody always runs behind the same other
                for name in names[shift:] + names[:shift]:
                    if progress:
                        progress(f"round {turn + 1} of {repeats}", done, total)
                    results[name].append(calls[name]())
                    done += 1
        finally:
            gc.enable()
    if progress:
        progress("measured", total, total)
    return results


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 3) -> dict[str, list[float]]:
    """Wall times in ms of whole calls, see :func:`in_turn`."""

    def timed(call: Callable[[], Any]) -> dict[str, float]:
        started = time.perf_counter()
        result = call()
        elapsed = (time.perf_counter() - started) * 1e3
        del result
        return {"ms": elapsed}

    found = in_turn({name: functools.partial(timed, call) for name, call in calls.items()}, repeats, warmup)
    return {name: [entry["ms"] for entry in entries] for name, entries in found.items()}


def versions() -> dict[str, Any]:
    """What the figures hang on."""
    import tokcompile

    return {"torch": torch.__version__, "transformers": importlib.metadata.version("transformers"),
            "tokcompile": tokcompile.__version__, "cpu": cpu_name(), "threads": torch.get_num_threads()}


def cpu_name() -> str:
    """Model name of the processor and its number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def load() -> float | None:
    """Load average of the last minute; None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that ``call`` holds at one time beyond what was held before; None where the device cannot say.

    CUDA: PyTorch's caching allocator. CPU: the allocations of PyTorch, added up from a profile.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        return None
    cpu = torch.autograd.DeviceType.CPU
    events = [e for e in results.events() if e.name() == "[memory]" and e.device_type() == cpu]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library notes its start and stop on the process's standard error, past Python."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


# --------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Timing:
    """Median, 20th and 80th percentile of wall times in ms."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, times: Sequence[float]) -> Timing:
        return cls(quantile(times, 0.5), quantile(times, 0.2), quantile(times, 0.8), len(times))

    def __str__(self) -> str:
        scale, unit, digits = (1e-3, "s", 1) if self.median >= 10_000 else (1, "ms", 0 if self.median >= 100 else 1)
        median, low, high = (f"{t * scale:.{digits}f}" for t in (self.median, self.p20, self.p80))
        return f"{median} ({low} to {high}) {unit}"


@dataclass
class BenchRow:
    """One contestant.

    Attributes:
        name: :data:`EAGER`, :data:`COMPILED`, or the recipe.
        ttft: from the call to the first token; the whole forward (and the only part) of a model that does not generate.
        prefill: the language model on the prompt, without the image encoder where that is a stage of its own.
        decode: per token, after the first one.
        peak_bytes: most memory held beyond the weights and the inputs.
        compile_seconds: the first call, compilation included.
        flop_ratio: predicted FLOPs before / after, of the graph that the recipe changes: the ceiling of the prefill.
        ceiling: Amdahl's bound on the speed-up of ``ttft``: only the prefill gets faster.
        speedup: part -> median of the baseline / this median.
        error: why it was not measured; "" where it was.
    """

    name: str
    ttft: Timing | None = None
    prefill: Timing | None = None
    decode: Timing | None = None
    peak_bytes: int | None = None
    compile_seconds: float | None = None
    flop_ratio: float | None = None
    ceiling: float | None = None
    speedup: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass
class BenchResult:
    """What :func:`bench` measured: ``print`` it, :meth:`to_dict`, :meth:`to_csv`, :meth:`plot`.

    Attributes:
        model, device, batch, new_tokens: what ran.
        rows: the contestants, dense ones first.
        baseline: name of the row that speed-ups refer to.
        versions: of what the figures hang on. load: of the machine before the run.
        reports: recipe -> the report of its model.
    """

    model: str
    device: str
    batch: int
    new_tokens: int
    baseline: str
    rows: list[BenchRow] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)
    load: float | None = None
    reports: dict[str, Any] = field(default_factory=dict, repr=False)

    def row(self, name: str) -> BenchRow:
        """The row of that name. Raises KeyError."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; times in ms, memory in bytes."""
        return {key: [asdict(r) for r in value] if key == "rows" else value for key, value in vars(self).items()
                if key != "reports"}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """One line for each contestant."""
        columns = ["model", "recipe", "device", "batch", "new_tokens",
                   *(f"{part}_{kind}" for part in PARTS for kind in ("ms", "p20", "p80", "speedup")), "rounds",
                   "peak_bytes", "compile_seconds", "flop_ratio", "ttft_ceiling", "error", "load", *self.versions]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for row in self.rows:
                line: dict[str, Any] = {
                    "model": self.model, "recipe": row.name, "device": self.device, "batch": self.batch,
                    "new_tokens": self.new_tokens, "peak_bytes": row.peak_bytes, "error": row.error, "load": self.load,
                    "compile_seconds": _digits(row.compile_seconds), "flop_ratio": _digits(row.flop_ratio),
                    "ttft_ceiling": _digits(row.ceiling), "rounds": row.ttft.count if row.ttft else 0, **self.versions}
                for part in PARTS:
                    timing: Timing | None = getattr(row, part)
                    if timing is not None:
                        line |= {f"{part}_ms": _digits(timing.median), f"{part}_p20": _digits(timing.p20),
                                 f"{part}_p80": _digits(timing.p80), f"{part}_speedup": _digits(row.speedup.get(part))}
                writer.writerow({key: "" if value is None else value for key, value in line.items()})

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Bars of the medians with p20 to p80, and a line where the ceiling is. Needs matplotlib.

        Raises:
            TokcompileError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise TokcompileError("a plot needs matplotlib: pip install matplotlib") from None
        measured = [row for row in self.rows if row.ttft is not None]
        parts = [part for part in PARTS if any(getattr(row, part) is not None for row in measured)]
        figure = Figure(figsize=(4.2 * len(parts), 1.2 + 0.45 * len(measured)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
        base = next((row for row in measured if row.name == self.baseline), None)
        for ax, part in zip(axes, parts, strict=True):
            shown = [(i, row, getattr(row, part)) for i, row in enumerate(measured) if getattr(row, part) is not None]
            ax.barh([i for i, _, _ in shown], [t.median for _, _, t in shown], height=0.65,
                    xerr=[[t.median - t.p20 for _, _, t in shown], [t.p80 - t.median for _, _, t in shown]],
                    color=["#9aa5b1" if row.name in (EAGER, COMPILED) else "#2f6fb0" for _, row, _ in shown],
                    error_kw={"elinewidth": 1, "capsize": 2})
            for i, row, timing in shown:
                text = f" {_ms(timing.median)}"
                if part in row.speedup and row.name != self.baseline:
                    text += f"  {row.speedup[part]:.2f}×"
                ax.text(timing.p80, i, text, va="center", fontsize=8)
                bound = _bound(row, part)
                if bound and base is not None and getattr(base, part) is not None:
                    ax.plot([getattr(base, part).median / bound] * 2, [i - 0.4, i + 0.4], color="#c2410c", linewidth=2)
            ax.set_xlim(0, 1.35 * max(t.p80 for _, _, t in shown))
            ax.set_title(self.title(part) + ", ms", fontsize=9, loc="left")
            ax.tick_params(labelsize=8)
            for side in ("top", "right"):
                ax.spines[side].set_visible(False)
        axes[0].set_yticks(range(len(measured)), [row.name for row in measured])
        axes[0].invert_yaxis()
        figure.suptitle(f"{self.model}, batch {self.batch}, {self.device} "
                        "(median, whiskers p20 to p80; orange: the ceiling by FLOPs)", fontsize=9, x=0.01, ha="left")
        figure.savefig(path, dpi=120)

    def title(self, part: str) -> str:
        """What a part of the call is called."""
        return _TITLES[part] if self.new_tokens else "forward"

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160, color_system=None, highlight=False)
        console.print(self.table())
        for row in self.rows:
            if row.error:
                console.print(f"{row.name}: {row.error}", markup=False, soft_wrap=True)
        console.print(self.note(), markup=False, soft_wrap=True)
        file = console.file
        assert isinstance(file, io.StringIO)
        return "\n".join(line.rstrip() for line in file.getvalue().rstrip().split("\n"))

    def table(self) -> Table:
        """For a terminal."""
        table = Table(box=None, pad_edge=False, header_style="", title=f"{self.model}, batch {self.batch}, "
                      f"{self.device}", title_justify="left", title_style="")
        table.add_column("")
        parts = [part for part in PARTS if any(getattr(row, part) is not None for row in self.rows)]
        for part in parts:
            table.add_column(self.title(part), justify="right")
            table.add_column("x", justify="right")
        for name in ("memory", "compile", "FLOPs", "ceiling"):
            table.add_column(name, justify="right")
        for row in self.rows:
            cells = []
            for part in parts:
                timing = getattr(row, part)
                cells += ["" if timing is None else str(timing),
                          f"{row.speedup[part]:.2f}" if part in row.speedup else ""]
            cells += ["" if row.peak_bytes is None else _size(row.peak_bytes),
                      "" if row.compile_seconds is None else f"{row.compile_seconds:.1f} s",
                      *("" if value is None else f"{value:.2f}" for value in (row.flop_ratio, row.ceiling))]
            table.add_row(row.name, *cells)
        return table

    def note(self) -> str:
        """Under the table: what was compared, and how."""
        rounds = max((row.ttft.count for row in self.rows if row.ttft), default=0)
        names = ", ".join(f"{key} {self.versions[key]}" for key in ("torch", "transformers", "tokcompile"))
        part = "prefill" if self.new_tokens else "forward"
        return (f"Median (p20 to p80) of {rounds} interleaved rounds; x: speed-up over {self.baseline}; memory: peak "
                f"beyond weights and inputs;\nFLOPs: before / after, the ceiling of the {part}; ceiling: of the first "
                f"column, by Amdahl.\n{self.versions['cpu']}, {self.versions['threads']} threads; {names}; load before "
                f"the run {self.load}")


# ----------------------------------------------------------------------------------------------------------- bench


def bench(model: nn.Module, inputs: Mapping[str, Any], recipes: Sequence[Any] = (), *, new_tokens: int = 16,
          rounds: int = 10, warmup: int = 2, lowering: str = "inductor", compiled_baseline: bool = True,
          memory: bool = True, calibration: Any = None, progress: Progress | None = None) -> BenchResult:
    """Measure ``model`` dense (eager, and under ``torch.compile``) and with each recipe, in turns.

    Args:
        model: in eval mode, on its device. It is not changed: everything runs on copies that share its parameters.
        inputs: keyword arguments of ``generate`` (where the model has it), else of ``forward``.
        recipes: names, paths, mappings or recipes.
        new_tokens: tokens generated in each round; 1 leaves decoding out.
        rounds, warmup: timed rounds, and rounds before them.
        lowering: of the recipes, see :func:`tokcompile.optimize`.
        compiled_baseline: whether plain ``torch.compile`` is measured; it is the baseline then.
        memory: whether peak memory is measured, in a round of its own.
        calibration: for the recipes with passes that take it, see :func:`tokcompile.optimize`.
        progress: called with what is being done, steps done, steps in all.

    Raises:
        TokcompileError: a bad argument, or a recipe that does not fit the model (see :func:`tokcompile.optimize`).
    """
    from tokcompile.api import optimize, report
    from tokcompile.registry import get_pass
    from tokcompile.stages import share

    if new_tokens < 1 or rounds < 1 or warmup < 1:
        raise TokcompileError("new_tokens, rounds and warmup should be at least 1")
    loaded = [Recipe.load(recipe) for recipe in recipes]
    names = _names(loaded)
    generates = callable(getattr(model, "generate", None)) and getattr(model, "can_generate", lambda: True)()
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    first = next((value for value in inputs.values() if isinstance(value, torch.Tensor)), None)
    result = BenchResult(type(model).__name__, _device_name(device), len(first) if first is not None else 1,
                         new_tokens if generates else 0, COMPILED if compiled_baseline else EAGER,
                         versions=versions(), load=load())

    models: dict[str, nn.Module] = {EAGER: share(model)}
    if compiled_baseline:
        models[COMPILED] = _plainly_compiled(share(model))
    for name, recipe in zip(names, loaded, strict=True):
        takes = any(getattr(get_pass(step.pass_), "calibration", "none") != "none" for step in recipe.steps)
        models[name] = optimize(model, recipe, lowering=lowering, calibration=calibration if takes else None)
    calls = {name: _Call(one, inputs, new_tokens if generates else 0, device) for name, one in models.items()}

    rows = {name: BenchRow(name) for name in models}
    for number, (name, call) in enumerate(calls.items()):
        if progress:
            progress(f"compiling {name}", number, len(calls))
        started = time.perf_counter()
        with torch.inference_mode():
            call()
        rows[name].compile_seconds = None if name == EAGER else time.perf_counter() - started
    for name, found in in_turn(calls, rounds, warmup, progress).items():
        for part in PARTS:
            if all(part in entry for entry in found):
                setattr(rows[name], part, Timing.of([entry[part] for entry in found]))
    for number, (name, call) in enumerate(calls.items()):
        if memory:
            if progress:
                progress(f"memory of {name}", number, len(calls))
            with torch.inference_mode():
                rows[name].peak_bytes = peak_memory(call, device)
    for name in names:
        result.reports[name] = report(models[name])
        ratios = [step.flop_ratio for step in result.reports[name].steps if step.flop_ratio]
        rows[name].flop_ratio = max(ratios, default=None)
    _compare(list(rows.values()), rows[result.baseline])
    result.rows = list(rows.values())
    return result


def _compare(rows: Sequence[BenchRow], base: BenchRow) -> None:
    """Fill in speed-ups and ceilings."""
    for row in rows:
        for part in PARTS:
            mine, its = getattr(row, part), getattr(base, part)
            if mine is not None and its is not None and row is not base:
                row.speedup[part] = its.median / mine.median
        if row.flop_ratio and base.ttft is not None:
            changed = base.prefill or base.ttft  # the part of the time that the recipe makes shorter
            row.ceiling = amdahl(base.ttft.median, changed.median, row.flop_ratio)


def amdahl(total: float, part: float, ratio: float) -> float:
    """Greatest speed-up of ``total`` when ``part`` of it gets ``ratio`` times as fast."""
    return total / (total - part + part / ratio)


class _Call:
    """One timed call of a model: times of its parts in ms."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], new_tokens: int, device: torch.device) -> None:
        self.model, self.inputs, self.new_tokens, self.device = model, dict(inputs), new_tokens, device
        self.prefill: list[float] = []
        if new_tokens:
            object.__setattr__(model, "forward", self._timed(model.forward))

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.prefill:  # only the first forward of a call
                return forward(*args, **kwargs)
            started = self._now()
            out = forward(*args, **kwargs)
            self.prefill.append((self._now() - started) * 1e3)
            return out

        return timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self) -> dict[str, float]:
        if not self.new_tokens:
            started = self._now()
            self.model(**self.inputs)
            elapsed = (self._now() - started) * 1e3
            return {"ttft": elapsed}
        self.prefill.clear()
        tokens = _Arrivals()
        started = self._now()
        with _quiet():
            self.model.generate(**{  # type: ignore[operator]
                "do_sample": False, **self.inputs, "max_new_tokens": self.new_tokens,
                "min_new_tokens": self.new_tokens, "streamer": tokens})
        parts = {"ttft": (tokens.times[0] - started) * 1e3, "prefill": self.prefill[0]}
        if len(tokens.times) > 1:
            parts["decode"] = (tokens.times[-1] - tokens.times[0]) * 1e3 / (len(tokens.times) - 1)
        return parts


class _Arrivals:
    """Streamer that notes when each token came; tokens are on the host by then."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt:
            self.times.append(time.perf_counter())
        self.prompt = False

    def end(self) -> None:
        pass


def _plainly_compiled(model: nn.Module) -> nn.Module:
    """``torch.compile`` with default settings on both stages that ``generate`` calls."""
    object.__setattr__(model, "forward", torch.compile(model.forward))
    base = getattr(model, "base_model", None)
    if base is not None and hasattr(base, "get_image_features"):
        object.__setattr__(base, "get_image_features", torch.compile(base.get_image_features))
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on generation settings."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _names(recipes: Sequence[Recipe]) -> list[str]:
    names: list[str] = []
    for number, recipe in enumerate(recipes, 1):
        name = Path(recipe.name).stem or f"recipe {number}"
        names.append(name if name not in names else f"{name} ({number})")
    return names


def _bound(row: BenchRow, part: str) -> float | None:
    return {"ttft": row.ceiling, "prefill": row.flop_ratio}.get(part)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _digits(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ms(ms: float) -> str:
    return f"{ms / 1e3:.1f} s" if ms >= 10_000 else f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


__all__ = ["COMPILED", "EAGER", "BenchResult", "BenchRow", "Timing", "amdahl", "bench", "interleaved", "peak_memory",
           "quantile", "versions"]

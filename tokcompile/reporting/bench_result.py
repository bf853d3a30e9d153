"""The result of a benchmark: times, rows, and how they are shown."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tokcompile.errors import TokcompileError
from tokcompile.recipes import Recipe
from tokcompile.reporting.quantile import quantile

EAGER, COMPILED = "dense eager", "dense torch.compile"
#: Parts of a call, in the order of the columns.
PARTS = ("ttft", "prefill", "decode")
_TITLES = {"ttft": "first token", "prefill": "prefill", "decode": "decode / token"}


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
        return {
            key: [asdict(r) for r in value] if key == "rows" else value
            for key, value in vars(self).items()
            if key != "reports"
        }

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """One line for each contestant."""
        columns = [
            "model",
            "recipe",
            "device",
            "batch",
            "new_tokens",
            *(f"{part}_{kind}" for part in PARTS for kind in ("ms", "p20", "p80", "speedup")),
            "rounds",
            "peak_bytes",
            "compile_seconds",
            "flop_ratio",
            "ttft_ceiling",
            "error",
            "load",
            *self.versions,
        ]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for row in self.rows:
                line: dict[str, Any] = {
                    "model": self.model,
                    "recipe": row.name,
                    "device": self.device,
                    "batch": self.batch,
                    "new_tokens": self.new_tokens,
                    "peak_bytes": row.peak_bytes,
                    "error": row.error,
                    "load": self.load,
                    "compile_seconds": _digits(row.compile_seconds),
                    "flop_ratio": _digits(row.flop_ratio),
                    "ttft_ceiling": _digits(row.ceiling),
                    "rounds": row.ttft.count if row.ttft else 0,
                    **self.versions,
                }
                for part in PARTS:
                    timing: Timing | None = getattr(row, part)
                    if timing is not None:
                        line |= {
                            f"{part}_ms": _digits(timing.median),
                            f"{part}_p20": _digits(timing.p20),
                            f"{part}_p80": _digits(timing.p80),
                            f"{part}_speedup": _digits(row.speedup.get(part)),
                        }
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
            ax.barh(
                [i for i, _, _ in shown],
                [t.median for _, _, t in shown],
                height=0.65,
                xerr=[[t.median - t.p20 for _, _, t in shown], [t.p80 - t.median for _, _, t in shown]],
                color=["#9aa5b1" if row.name in (EAGER, COMPILED) else "#2f6fb0" for _, row, _ in shown],
                error_kw={"elinewidth": 1, "capsize": 2},
            )
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
        figure.suptitle(
            f"{self.model}, batch {self.batch}, {self.device} "
            "(median, whiskers p20 to p80; orange: the ceiling by FLOPs)",
            fontsize=9,
            x=0.01,
            ha="left",
        )
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
        table = Table(
            box=None,
            pad_edge=False,
            header_style="",
            title=f"{self.model}, batch {self.batch}, {self.device}",
            title_justify="left",
            title_style="",
        )
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
                cells += [
                    "" if timing is None else str(timing),
                    f"{row.speedup[part]:.2f}" if part in row.speedup else "",
                ]
            cells += [
                "" if row.peak_bytes is None else _size(row.peak_bytes),
                "" if row.compile_seconds is None else f"{row.compile_seconds:.1f} s",
                *("" if value is None else f"{value:.2f}" for value in (row.flop_ratio, row.ceiling)),
            ]
            table.add_row(row.name, *cells)
        return table

    def note(self) -> str:
        """Under the table: what was compared, and how."""
        rounds = max((row.ttft.count for row in self.rows if row.ttft), default=0)
        names = ", ".join(f"{key} {self.versions[key]}" for key in ("torch", "transformers", "tokcompile"))
        part = "prefill" if self.new_tokens else "forward"
        return (
            f"Median (p20 to p80) of {rounds} interleaved rounds; x: speed-up over {self.baseline}; memory: peak "
            f"beyond weights and inputs;\nFLOPs: before / after, the ceiling of the {part}; ceiling: of the first "
            f"column, by Amdahl.\n{self.versions['cpu']}, {self.versions['threads']} threads; {names}; load before "
            f"the run {self.load}"
        )


def amdahl(total: float, part: float, ratio: float) -> float:
    """Greatest speed-up of ``total`` when ``part`` of it gets ``ratio`` times as fast."""
    return total / (total - part + part / ratio)


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

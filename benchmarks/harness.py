"""Result rows, CSV files and plots: what all benchmarks share. The timing is that of ``tokcompile.measure.timing``."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tokcompile.measure.timing import cpu_name, interleaved, load, versions
from tokcompile.reporting.quantile import quantile

__all__ = ["cpu_name", "interleaved", "load", "quantile", "versions"]  # beside what is defined here

RESULTS = Path(__file__).with_name("results")
THREADS = 2
MARKER = "<!-- below: written by benchmarks/run.py from benchmarks/results/*.csv -->"
BASELINE = "torch.compile"
"""Name in the column ``recipe`` of what everything is compared with: the same model under plain ``torch.compile``."""

ONNX_BASELINE = "onnxruntime, dense"
"""The same for exported files."""


@dataclass
class Row:
    """One line of a result file.

    Attributes:
        benchmark, model: names.
        recipe: of tokcompile, or :data:`BASELINE` (:data:`ONNX_BASELINE`); what else was timed where it is neither.
        batch, tokens: rows, and tokens of a row before any are dropped.
        median_ms, p20_ms, p80_ms, repeats: of the wall time.
        flop_ratio: FLOPs of the dense graph / of the rewritten one, from tokcompile's report; the ceiling of speedup.
        flop_ratio_formula: the same by hand, from the shapes of the model.
        speedup: baseline median / this median.
        share_of_ceiling: speedup / flop_ratio.
        cpu_seconds: median CPU time, compilers that were started included (compile only).
        load: load average of the machine (1 minute) when the benchmark began, without the benchmark itself.
    """

    benchmark: str
    model: str
    recipe: str
    batch: int
    tokens: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    flop_ratio: float | None = None
    flop_ratio_formula: float | None = None
    speedup: float | None = None
    share_of_ceiling: float | None = None
    cpu_seconds: float | None = None
    load: float | None = None
    torch: str = ""
    transformers: str = ""
    tokcompile: str = ""
    cpu: str = ""
    threads: int = THREADS


COLUMNS = [f.name for f in fields(Row)]


def row(
    benchmark: str,
    model: str,
    recipe: str,
    times: Sequence[float],
    *,
    batch: int,
    tokens: int,
    baseline: Sequence[float] | None = None,
    flop_ratio: float | None = None,
    formula: float | None = None,
    load: float | None = None,
    cpu_seconds: float | None = None,
) -> Row:
    """A line of the result file from the measured times."""
    median = quantile(times, 0.5)
    speedup = quantile(baseline, 0.5) / median if baseline else None
    return Row(
        benchmark,
        model,
        recipe,
        batch,
        tokens,
        median,
        quantile(times, 0.2),
        quantile(times, 0.8),
        len(times),
        flop_ratio,
        formula,
        speedup,
        speedup / flop_ratio if speedup and flop_ratio else None,
        cpu_seconds,
        load,
        **versions(),
    )


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows, numbers with four significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for item in rows:
            writer.writerow({k: _short(v) for k, v in asdict(item).items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The lines of a result file, as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _short(value: Any) -> Any:
    if value is None:
        return ""
    if not isinstance(value, float):
        return value
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def number(text: str) -> float | None:
    """A cell of a result file as a number; None where it is empty."""
    return float(text) if text else None


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """A table of the lines of a result file, and what they were measured with."""
    cpu = any(m.get("cpu_seconds") for m in lines)
    rows = [
        "| model | recipe | batch | median ms (p20 to p80) | speed-up | FLOP ratio | share of ceiling |"
        + (" CPU s |" if cpu else ""),
        "|---|---|--:|--:|--:|--:|--:|" + ("--:|" if cpu else ""),
    ]
    for m in lines:
        share = f"{100 * float(m['share_of_ceiling']):.0f} %" if m["share_of_ceiling"] else ""
        times = f"{m['median_ms']} ({m['p20_ms']} to {m['p80_ms']})"
        ratios = [f"{float(m[k]):.2f}" if m[k] else "" for k in ("speedup", "flop_ratio")]
        rows.append(
            f"| {m['model']} | {m['recipe']} | {m['batch']} | {times} | {' | '.join(ratios)} | {share} |"
            + (f" {m['cpu_seconds']} |" if cpu else "")
        )
    first = lines[0]
    rounds = ", ".join(sorted({m["repeats"] for m in lines}, key=int))
    note = (
        f"{rounds} rounds; {first['cpu']}, {first['threads']} threads; torch {first['torch']}, "
        f"transformers {first['transformers']}, tokcompile {first['tokcompile']}; "
        f"load before the run {first['load'] or 'unknown'}."
    )
    return "\n".join([*rows, "", note])


def write_docs(path: Path, results: Path, titles: Mapping[str, str]) -> None:
    """Replace what stands behind the marker in ``path`` by the tables of all result files."""
    head = path.read_text().split(MARKER)[0]
    parts = [
        f"## {title}\n\n{markdown(read_csv(results / f'{name}.csv'))}\n\n![{name}](../benchmarks/results/{name}.png)"
        for name, title in titles.items()
        if (results / f"{name}.csv").exists()
    ]
    path.write_text(f"{head}{MARKER}\n\n" + "\n\n".join(parts or ["No results yet."]) + "\n")


def plot(path: Path, lines: Sequence[Mapping[str, str]], title: str) -> None:
    """Bars: median time of each line with p20 to p80; the speed-up and its share of the ceiling at the end of a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for line in lines:
        groups.setdefault((line["model"], line["batch"]), []).append(line)
    figure, axes = plt.subplots(
        len(groups), 1, squeeze=False, layout="constrained", figsize=(8, 0.9 + 0.42 * len(lines) + 0.45 * len(groups))
    )
    for ax, ((model, batch), members) in zip(axes[:, 0], groups.items(), strict=True):
        names = [m["recipe"] for m in members]
        median = [float(m["median_ms"]) for m in members]
        errors = [
            [t - float(m["p20_ms"]) for t, m in zip(median, members, strict=True)],
            [float(m["p80_ms"]) - t for t, m in zip(median, members, strict=True)],
        ]
        colours = ["#9aa5b1" if n.startswith((BASELINE, ONNX_BASELINE)) else "#2f6fb0" for n in names]
        ax.barh(names, median, xerr=errors, color=colours, error_kw={"elinewidth": 1, "capsize": 2}, height=0.7)
        for i, m in enumerate(members):
            text = f" {_time(median[i])}"
            if m["speedup"]:
                text += f"   {float(m['speedup']):.2f}×"
            if m["share_of_ceiling"]:
                text += f" = {100 * float(m['share_of_ceiling']):.0f} % of {float(m['flop_ratio']):.2f}×"
            ax.text(float(m["p80_ms"]), i, text, va="center", fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, max(float(m["p80_ms"]) for m in members) * 1.45)
        ax.set_title(f"{model}, batch {batch}", fontsize=9, loc="left")
        ax.tick_params(labelsize=8)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    axes[-1, 0].set_xlabel("wall time, ms (median; whiskers p20 to p80)", fontsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _time(ms: float) -> str:
    return f"{ms / 1e3:.1f} s" if ms >= 10_000 else f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def spread(times: Sequence[float]) -> float:
    """Standard deviation over mean; a timing above some 0.1 was disturbed."""
    return statistics.pstdev(times) / statistics.fmean(times)

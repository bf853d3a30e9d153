"""Plots and ``docs/quality.md`` from the result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokcompile.measure.quality_results import EvalRow, read_rows

MARKER = "<!-- below: written by benchmarks/quality/run.py from benchmarks/results/quality.csv -->"
COLOURS = {"dense": "#9aa5b1", "method": "#2f6fb0", "random": "#d1813a", "pool": "#5f9e6e"}
SIGNS = {"better": "above", "worse": "below", "same": "no difference", "": ""}


def write(results: Path, page: Path | None, skipped: Mapping[str, str] | None = None) -> None:
    """Plots beside the result file; behind the marker of ``page``, the tables of all tasks (None: plots only)."""
    rows = read_rows(results)
    plots = plot(results, rows)
    if page is not None:
        head = page.read_text(encoding="utf-8").split(MARKER)[0]
        page.write_text(f"{head}{MARKER}\n\n{markdown(rows, plots, skipped or {})}", encoding="utf-8")


def _groups(rows: Sequence[EvalRow]) -> dict[tuple[str, str], list[EvalRow]]:
    found: dict[tuple[str, str], list[EvalRow]] = {}
    for row in rows:
        found.setdefault((row.model, row.task), []).append(row)
    return found


def leaderboard(rows: Sequence[EvalRow]) -> str:
    """One line for each method and figure: share of dense, and whether it is above its controls."""
    lines = [
        "| model | task | figure | method | tokens | of dense | against random | against pooling |",
        "|---|---|---|---|--:|--:|---|---|",
    ]
    methods = [r for r in rows if r.role == "method" and r.value is not None]
    for r in sorted(methods, key=lambda r: (r.model, r.task, r.metric, -(r.relative or 0))):
        share = "" if r.relative is None else f"{100 * r.relative:.1f} %"
        lines.append(
            f"| {r.model} | {r.task} | {r.metric} | {r.candidate} | {_tokens(r)} | {share} | "
            f"{_against(r, 'random')} | {_against(r, 'pool')} |"
        )
    return "\n".join(lines)


def _against(r: EvalRow, name: str) -> str:
    value = getattr(r, f"minus_{name}")
    if value is None:
        return ""
    sign = SIGNS[getattr(r, f"against_{name}")]
    return f"{sign}: {value:+.3g} [{getattr(r, f'minus_{name}_low'):+.3g}, {getattr(r, f'minus_{name}_high'):+.3g}]"


def _tokens(r: EvalRow) -> str:
    return "" if r.tokens_before is None or r.tokens_after is None else f"{r.tokens_before:.0f} → {r.tokens_after:.0f}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def markdown(rows: Sequence[EvalRow], plots: Sequence[Path], skipped: Mapping[str, str]) -> str:
    """The generated part of the page."""
    parts = [f"## Leaderboard\n\n{leaderboard(rows)}"]
    for (model, task), members in _groups(rows).items():
        refused = [r for r in members if r.status != "measured"]
        lines = [
            "| figure | candidate | tokens | FLOPs before / after | value | minus dense | ms |",
            "|---|---|--:|--:|--:|---|--:|",
        ]
        for r in members:
            if r.status != "measured":
                continue
            minus = (
                ""
                if r.minus_dense is None
                else f"{r.minus_dense:+.3g} [{r.minus_dense_low:+.3g}, {r.minus_dense_high:+.3g}]"
            )
            own = f"{_plain(r.value)} [{_plain(r.low)}, {_plain(r.high)}] {r.unit}".strip()
            lines.append(
                f"| {r.metric} | {r.candidate} | {_tokens(r)} | {_plain(r.flop_ratio)} | {own} | {minus} | "
                f"{'' if r.ms is None else f'{r.ms:.0f}'} |"
            )
        text = f"## {task} ({model})\n\n{members[0].items} items.\n\n" + "\n".join(lines)
        seen = {r.candidate: f"`{r.candidate}`: {r.status}: {r.reason}" for r in refused}
        parts.append(text + "".join(f"\n\n{line}" for line in seen.values()))
    parts += [f"![{p.stem}](../benchmarks/results/{p.name})" for p in plots]
    if skipped:
        parts.append("## Skipped\n\n" + "\n".join(f"* {name}: {reason}" for name, reason in skipped.items()))
    first = rows[0] if rows else None
    if first is not None:
        loads = [r.load for r in rows if r.load is not None]
        busy = f"; load average of the machine {min(loads):.1f} to {max(loads):.1f}" if loads else ""
        parts.append(
            f"torch {first.torch}, transformers {first.transformers}, tokcompile {first.tokcompile}, "
            f"{first.threads} thread(s){busy}."
        )
    return "\n\n".join(parts) + "\n"


def plot(results: Path, rows: Sequence[EvalRow]) -> list[Path]:
    """``quality_tokens.png`` (figure against tokens) and ``quality_time.png`` (against ms), a panel for each figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple[str, str, str], list[EvalRow]] = {}
    for r in rows:
        if r.value is not None:
            panels.setdefault((r.model, r.task, r.metric), []).append(r)
    panels = {k: v for k, v in panels.items() if any(r.role == "method" and r.tokens_after for r in v)}
    if not panels:
        return []
    written = []
    for kind, name in (("tokens", "tokens kept"), ("time", "ms for an item (median)")):
        columns = min(3, len(panels))
        lines = -(-len(panels) // columns)
        figure, axes = plt.subplots(
            lines, columns, squeeze=False, layout="constrained", figsize=(4.2 * columns, 3.1 * lines)
        )
        for ax, (key, members) in zip(axes.flat, panels.items(), strict=False):
            full = max((r.tokens_before or 0 for r in members), default=0)
            for r in members:
                x = r.ms if kind == "time" else full if r.role == "dense" else r.tokens_after
                if x is None or r.value is None or r.low is None or r.high is None:
                    continue
                # the percentile interval of a skewed figure can leave the figure itself outside
                spread = [[max(0.0, r.value - r.low)], [max(0.0, r.high - r.value)]]
                ax.errorbar(
                    [x],
                    [r.value],
                    yerr=spread,
                    fmt="s" if r.role == "dense" else "o",
                    ms=5,
                    lw=1,
                    capsize=2,
                    color=COLOURS[r.role],
                    alpha=0.85,
                    label=r.role,
                )
                if r.role == "method":
                    ax.annotate(r.candidate, (x, r.value), fontsize=6, xytext=(4, 4), textcoords="offset points")
            handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
            ax.legend(handles.values(), handles.keys(), fontsize=6)
            ax.set_title(f"{key[1]}: {key[2]} ({key[0]})", fontsize=8, loc="left")
            ax.set_xlabel(name, fontsize=7)
            ax.tick_params(labelsize=7)
        for ax in list(axes.flat)[len(panels) :]:
            ax.axis("off")
        path = results.with_name(f"{results.stem}_{kind}.png")
        figure.savefig(path, dpi=100)
        plt.close(figure)
        written.append(path)
    return written

"""What a report comes to, in four lines: what changed, how much faster, how good, against what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokcompile.reporting.bench_result import BenchResult


def verdict(report: Mapping[str, Any], bench: BenchResult | None = None) -> dict[str, str]:
    """Question -> answer, in the order in which a reader asks; {} where no recipe was applied.

    Args:
        report: what ``Report.to_dict`` gives.
        bench: measured times of the recipe, beside those of the dense model.
    """
    if not report["steps"]:
        return {}
    return {
        "What changed": _changed(report),
        "How much faster": _faster(report, bench),
        "How good": _good(report),
        "Against what": _against(bench),
    }


def _changed(report: Mapping[str, Any]) -> str:
    parts = []
    for step in report["steps"]:
        if not step["matches"]:
            parts.append(f"{step['pass_name']}: nothing ({step['status']})")
            continue
        before, after = step["details"].get("tokens_before"), step["details"].get("tokens_after")
        tokens = "" if before is None or after is None else f", {before} → {after} tokens"
        parts.append(f"{step['pass_name']}: {step['matches']} region{'s' * (step['matches'] != 1)}{tokens}")
    text = "; ".join(parts)
    fell_back = max((step.get("fell_back", 0) for step in report["steps"]), default=0)  # a call counts at every step
    return f"{text}; {fell_back} call{'s' * (fell_back != 1)} ran without the recipe" if fell_back else text


def _faster(report: Mapping[str, Any], bench: BenchResult | None) -> str:
    ratios = [step["flop_ratio"] for step in report["steps"] if step["flop_ratio"] is not None]
    bound = f" The FLOPs allow {max(ratios):.2f}× at most, over the graph that changed." if ratios else ""
    row = None if bench is None else next((r for r in bench.rows if r.name == report["recipe"]), None)
    if bench is None or row is None:
        return "Not measured here (tokcompile bench measures it)." + bound
    if row.error:
        return f"Could not be measured: {row.error}." + bound
    parts = [
        f"{bench.title(part)} {row.speedup[part]:.2f}×" for part in ("ttft", "prefill", "decode") if part in row.speedup
    ]
    return (", ".join(parts) or "no part was measured for both") + "." + bound


def _good(report: Mapping[str, Any]) -> str:
    """What the recipe itself says was measured; a report sees no answers."""
    words = " ".join(str(report.get("recipe_data", {}).get("description", "")).split())
    place = words.find("Measured on")
    measured = f" The recipe says: {words[place:]}" if place >= 0 else ""
    return "Not measured on this model (tokcompile.evaluate does, with your task)." + measured


def _against(bench: BenchResult | None) -> str:
    if bench is None:
        return "The model without tokcompile."
    return f"{bench.baseline}, in the same run, on {bench.device} ({bench.versions.get('cpu', '')})."

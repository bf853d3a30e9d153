"""What was found in a model, what was changed, what was left alone, and why."""

from __future__ import annotations

import io
import math
import numbers
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokcompile.kinds import KINDS
from tokcompile.regions.model import Regions
from tokcompile.reporting.html import fragment, write
from tokcompile.reporting.paths import path_glob, path_globs, path_template
from tokcompile.reporting.status import STATUSES, Status

if TYPE_CHECKING:
    from tokcompile.reporting.bench_result import BenchResult


_WIDTH = 120
_NEAR_MISSES_SHOWN = 3


@dataclass
class StepReport:
    """What became of one step of the recipe.

    Attributes:
        pass_name: the pass.
        status: see :class:`~tokcompile.reporting.status.Status`; the text of one will do.
        matches: regions rewritten.
        regions: their module paths.
        reason: why not, or what was left out; with the module path and source line where there is one.
        flop_ratio: predicted FLOPs before / after, over the graph that the step is in; None when not predicted.
        details: what the pass has to say: ``tokens_before``, ``tokens_after`` (an int, or a formula as text) and more.
        fell_back: calls that ran without this step because they could not be captured.
    """

    pass_name: str
    status: Status
    matches: int = 0
    regions: list[str] = field(default_factory=list)
    reason: str = ""
    flop_ratio: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    fell_back: int = 0

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status should be one of {', '.join(STATUSES)}, found {self.status!r}")
        self.status = Status(self.status)


@dataclass
class StageReport:
    """One captured (or not captured) part of the model.

    Attributes:
        name: "encoder", "prefill", "decode", "forward".
        captured: whether it runs as a graph; if not, it runs uncompiled and ``reason`` says why.
        reason: also of a graph for some values of its inputs only: which ones, the how many-th it is, and why.
        nodes: nodes of the graph after the rewrite.
        seconds: time to capture, rewrite and lower it.
        compiled: how: "eager", part by part, or as a whole and why.
        fell_back: calls that ran uncompiled for this reason.
    """

    name: str
    captured: bool
    reason: str = ""
    nodes: int = 0
    seconds: float = 0.0
    compiled: str = ""
    fell_back: int = 0


@dataclass(repr=False)
class Report:
    """The report of one model.

    Attributes:
        model: name of the model.
        regions: one dict each: kind, path, roles (role -> node name), shapes (name -> int, or text for a symbolic
            size), variant, source; "stage" where the caller adds it.
        steps: one for each step of the recipe, in order.
        stages: one for each graph.
        near_misses: one dict each: kind, reason, node, path, source, score (0..1).
        layers: one dict for each layer of each stack: stage, stack (kind), stack_path, index, path, attention and
            feed_forward (module paths, or None), feed_forward_kind, tokens_before, tokens_after.
        recipe: name of the recipe, where it has one.
        recipe_data: the whole recipe, every parameter filled in; {} where there is none.
        problems: what the recipe expects and the model does not give, a line each.
        plans: one dict for the first graph of each stage, made before it was rewritten: stage, steps (step, pass,
            regions, reason, prepared), cuts (stack, layer, tokens) and predicted_flop_ratio.
    """

    model: str = ""
    regions: list[dict[str, Any]] = field(default_factory=list)
    steps: list[StepReport] = field(default_factory=list)
    stages: list[StageReport] = field(default_factory=list)
    near_misses: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""
    problems: list[str] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    recipe_data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_regions(cls, regions: Regions, model: str = "") -> Report:
        """A report of what was found in one graph, with no steps yet."""
        found: list[dict[str, Any]] = [_plain(region.as_dict()) for region in regions.regions]
        near = [
            {
                "kind": miss.kind,
                "reason": miss.reason,
                "node": miss.node.name,
                "path": miss.path,
                "source": miss.source,
                "score": miss.score,
            }
            for miss in sorted(regions.near_misses, key=lambda miss: -miss.score)
        ]
        return cls(model=model, regions=found, near_misses=near)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types; symbolic sizes and numbers that JSON lacks become text."""
        plain = _plain(_fields(self))
        assert isinstance(plain, dict)
        return plain

    def to_html(
        self,
        path: str | os.PathLike[str],
        *,
        bench: BenchResult | None = None,
        pictures: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the report as one page that needs nothing else.

        Args:
            bench: measured times (:func:`tokcompile.bench`), shown beside the ceiling.
            pictures: caption -> PNG or JPEG (a path, bytes, or a PIL image), of kept patches for example.

        Raises:
            TokcompileError: something in ``pictures`` is no picture.
        """
        write(self.to_dict(), path, bench=bench, pictures=pictures)

    def __repr__(self) -> str:
        """One line; ``print(report)`` shows all of it."""
        recipe = f"recipe {self.recipe}" if self.recipe else f"a recipe of {len(self.steps)} steps"
        done = [f"{s.pass_name} {s.status}" + (f" x{s.matches}" if s.matches else "") for s in self.steps]
        graphs = ", ".join(dict.fromkeys(stage.name for stage in self.stages if stage.captured)) or "none yet"
        what = f"{recipe} ({', '.join(done)})" if self.steps else f"{len(self.regions)} regions, no recipe"
        return f"<tokcompile report of {self.model or 'a model'}: {what}; graphs: {graphs}>"

    def _repr_html_(self) -> str:
        return fragment(self.to_dict())

    def __str__(self) -> str:
        # markup and highlighting off: reasons hold square brackets
        console = Console(
            file=io.StringIO(), width=_WIDTH, color_system=None, markup=False, emoji=False, highlight=False
        )
        self._print(console)
        file = console.file
        assert isinstance(file, io.StringIO)
        return "\n".join(line.rstrip() for line in file.getvalue().strip("\n").split("\n"))

    def _print(self, console: Console) -> None:
        lines = _Lines(console)
        lines.add(self.model or "model")
        if self.regions:
            console.print(_regions_table(self.regions))
        else:
            lines.add("No region found.")
        if self.plans:
            console.print(_plans_table(self.plans))
        if self.steps:
            console.print(_steps_table(self.steps))
        for number, step in enumerate(self.steps):
            if step.reason:
                lines.add(f"steps[{number}] ({step.pass_name}): {step.reason}")
            rest = {key: value for key, value in step.details.items() if key not in ("tokens_before", "tokens_after")}
            if rest:
                lines.add(
                    f"steps[{number}] ({step.pass_name}): " + ", ".join(f"{k} {_short(v)}" for k, v in rest.items())
                )
        if self.stages:
            console.print(_stages_table(self.stages))
        for stage in self.stages:
            if stage.reason:
                times = f" ({stage.fell_back} calls)" if stage.fell_back > 1 else ""
                lines.add(f"stage {stage.name}{times}: {stage.reason}")
        found = {region["kind"] for region in self.regions}
        missed = [miss for miss in self.near_misses if miss["kind"] not in found]
        for miss in sorted(missed, key=lambda miss: -miss["score"])[:_NEAR_MISSES_SHOWN]:
            place = ", ".join(part for part in (f"node {miss['node']}", miss["path"], miss["source"]) if part)
            lines.add(f"nearly a {miss['kind']}: {miss['reason']} [{place}]")


def _counted(entry: StepReport | StageReport) -> dict[str, Any]:
    """The fields of a step or stage; ``fell_back`` only where it counted something."""
    return {name: value for name, value in vars(entry).items() if name != "fell_back" or value}


def _fields(report: Report) -> dict[str, Any]:
    """The report's fields, steps and stages as dicts; values untouched (a symbolic size cannot be copied)."""
    return {
        "model": report.model,
        "regions": report.regions,
        "steps": [_counted(step) for step in report.steps],
        "stages": [_counted(stage) for stage in report.stages],
        "near_misses": report.near_misses,
        "layers": report.layers,
        "recipe": report.recipe,
        "problems": report.problems,
        "plans": report.plans,
        "recipe_data": report.recipe_data,
    }


class _Lines:
    """Prints a line of text whole: a reason stays searchable, however long."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def add(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="", header_style="", box=None, pad_edge=False)
    for column in columns:
        right = column in ("count", "matches", "regions", "nodes", "seconds", "FLOPs before/after")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _regions_table(regions: list[dict[str, Any]]) -> Table:
    """One line for regions of a kind that differ only in the numbers of their module path."""
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for region in regions:
        variant = ", ".join(f"{key} {value}" for key, value in region.get("variant", {}).items())
        rank = KINDS.index(region["kind"]) if region["kind"] in KINDS else len(KINDS)
        key = (region.get("stage", ""), rank, region["kind"], path_template(region["path"]), variant)
        groups[key].append(region["path"])
    stages = list(dict.fromkeys(region.get("stage", "") for region in regions))
    table = _table("\nRegions", *(["stage"] if any(stages) else []), "kind", "count", "where", "variant")
    for key in sorted(groups, key=lambda key: (stages.index(key[0]), key[1])):
        stage, _, kind, _, variant = key
        row = [kind, str(len(groups[key])), path_glob(groups[key]) or "(model)", variant]
        table.add_row(*([stage] if any(stages) else []), *row)
    return table


def _plans_table(plans: list[dict[str, Any]]) -> Table:
    """What each stage was planned to become, before it was rewritten."""
    table = _table("\nPlan", "stage", "pass", "regions", "tokens from layer on", "FLOPs before/after")
    for plan in plans:
        cuts = ", ".join(f"{cut['layer']}: {'?' if cut['tokens'] is None else cut['tokens']}" for cut in plan["cuts"])
        ratio = plan["predicted_flop_ratio"]
        for number, step in enumerate(plan["steps"]):
            first = number == 0
            table.add_row(
                plan["stage"] if first else "",
                step["pass"],
                str(len(step["regions"])),
                cuts if first else "",
                f"{ratio:.2f}" if first and ratio is not None else "",
            )
    return table


def _steps_table(steps: list[StepReport]) -> Table:
    table = _table("\nSteps", "pass", "status", "matches", "where", "tokens", "FLOPs before/after")
    for step in steps:
        before, after = step.details.get("tokens_before"), step.details.get("tokens_after")
        tokens = f"{_short(before)} -> {_short(after)}" if before is not None and after is not None else ""
        ratio = "" if step.flop_ratio is None else f"{step.flop_ratio:.2f}"
        where = "\n".join(path_globs(step.regions))
        table.add_row(step.pass_name, step.status, str(step.matches), where, tokens, ratio)
    return table


def _stages_table(stages: list[StageReport]) -> Table:
    table = _table("\nStages", "stage", "captured", "nodes", "seconds", "compiled")
    for stage in stages:
        seen = (str(stage.nodes), f"{stage.seconds:.2f}", stage.compiled) if stage.captured else ("", "", "")
        table.add_row(stage.name, "yes" if stage.captured else "no", *seen)
    return table


def _short(value: Any) -> str:
    return str(_plain(value))


def _plain(value: Any) -> Any:
    """A value in JSON types."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)  # of an enum: its text
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return str(value)  # int() would guard on it
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(entry) for key, entry in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(entry) for entry in value), key=str)
    if isinstance(value, torch.Tensor) and value.numel() <= 1000 and type(value) in (torch.Tensor, torch.nn.Parameter):
        return _plain(value.tolist())
    return str(value)

"""Quality of recipes against the dense model on the same items: :func:`evaluate`.

Protocol only: models and data come from the caller. Every candidate sees the same items as the dense model, so all
comparisons are paired; intervals come from a bootstrap over items. A recipe is also compared with its controls at the
same budget: a random choice (three seeds) and pooling. What was measured is appended to a journal beside the result
file, so an interrupted run goes on where it stopped.

    task = Task("quiz", items, observe=answer, measures=[Measure("accuracy", judge=right)])
    result = evaluate(model, [task], ["vlm_prune_90"], results="quality.csv")
    print(result)
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from tokcompile.errors import TokcompileError
from tokcompile.measure.paired import (
    Array,
    Difference,
    Score,
    bootstrap,
    compare,
    interval,
    mean_percent,
    perplexity,
    ratio_percent,
)
from tokcompile.measure.quality_results import (
    COLUMNS,
    EvalRow,
    Evaluation,
    Journal,
    Measured,
    journal_path,
    merge_rows,
    read_rows,
    write_rows,
)
from tokcompile.measure.timing import load, versions
from tokcompile.recipes import Recipe
from tokcompile.registry import get_pass
from tokcompile.reporting.quantile import quantile

__all__ = [
    "Array",
    "Candidate",
    "Difference",
    "EvalRow",
    "Evaluation",
    "Measure",
    "Score",
    "Task",
    "bootstrap",
    "compare",
    "controls",
    "evaluate",
    "interval",
    "journal_path",
    "mean_percent",
    "perplexity",
    "ratio_percent",
    "read_rows",
    "write_rows",
]

#: Called with what is being measured, items done, and items in all.
Progress = Callable[[str, int, int], None]
Role = Literal["dense", "method", "random", "pool"]

DENSE = "dense"
#: Region kind that a step targets -> the passes that are its controls.
CONTROLS = {
    "merge_point": {"random": "random", "pool": "pool"},
    **{kind: {"random": "patch_random", "pool": "patch_pool"} for kind in ("vision_encoder", "audio_encoder")},
}


# ------------------------------------------------------------------------------------------------------------ tasks


def as_is(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
    """Each observation is the statistics of its item."""
    return np.asarray([np.atleast_1d(np.asarray(one, dtype=np.float64)) for one in observed])


@dataclass(frozen=True)
class Measure:
    """One figure of a task.

    Attributes:
        name: of the figure, "accuracy" say; unit: "%" or "".
        judge: (observations of a candidate, those of the dense model), both one for each item -> float ``[n, k]``.
        score: statistics ``[n, k]`` of any sample of items -> the figure. A mean, a ratio of sums, a correlation.
        higher_is_better: False for perplexity or an error rate.
    """

    name: str
    judge: Callable[[Sequence[Any], Sequence[Any]], Array] = as_is
    score: Score = mean_percent
    unit: str = "%"
    higher_is_better: bool = True


@dataclass(frozen=True)
class Task:
    """Items, what a model does with one, and the figures that follow.

    Attributes:
        name: of the task; one name, one set of items.
        items: what is asked, one after the other. An item is also the unit of the bootstrap: items have to be
            independent of each other.
        observe: (model, item) -> what it did: an answer, features, log-likelihoods. Runs without gradients.
        measures: at least one.
        calibration: inputs for passes that need them (:func:`tokcompile.calibrate`), disjoint from ``items``.
        version: change it when items or ``observe`` change, so that old journal entries are not used.
        note: what a reader should know, "small sample" say.
    """

    name: str
    items: Sequence[Any]
    observe: Callable[[Any, Any], Any]
    measures: Sequence[Measure]
    calibration: Iterable[Any] | None = None
    version: str = "1"
    note: str = ""


@dataclass(frozen=True)
class Candidate:
    """What is measured: a recipe, or a model that is ready.

    Attributes:
        name: in the results. recipe: None for a ready model and for the dense one.
        role: "method", or the control that it is. model: a ready model. seed: of a random control.
        controls: candidates to measure beside it, beyond those that :func:`controls` makes of a recipe.
    """

    name: str
    recipe: Recipe | None = None
    role: Role = "method"
    model: Any = None
    seed: int | None = None
    controls: Sequence[Candidate] = ()

    @property
    def key(self) -> str:
        """The same for candidates that do the same: their steps, and the source of the passes."""
        if self.recipe is None:
            return self.name
        sources = {inspect.getsourcefile(get_pass(step.pass_)) for step in self.recipe.steps}
        code = hashlib.sha256(b"".join(Path(s).read_bytes() for s in sorted(filter(None, sources)))).hexdigest()[:12]
        return f"{self.recipe.model_dump_json(exclude={'description'})} {code}"


def controls(recipe: Recipe, seeds: Sequence[int] = (0, 1, 2)) -> list[Candidate]:
    """The controls of a recipe at its budget: random choices and pooling in place of its one step that chooses tokens.

    A control takes the parameters that it shares with the method (``keep``, ``at``). None for a recipe with no such
    step, with several, or that is a control itself.
    """
    steps = [
        (i, s)
        for i, s in enumerate(recipe.steps)
        if CONTROLS.get(s.region) and "keep" in get_pass(s.pass_).Params.model_fields
    ]
    if len(steps) != 1:
        return []
    index, step = steps[0]
    kinds = CONTROLS[step.region]
    if step.pass_ in kinds.values():
        return []
    document = _document(recipe)
    given = document["steps"][index]["params"]
    found = []
    for role, name in kinds.items():
        known = get_pass(name).Params.model_fields
        shared = {key: value for key, value in given.items() if key in known and key != "seed"}
        for seed in seeds if role == "random" else (None,):
            params = shared if seed is None else {**shared, "seed": seed}
            changed = {**document["steps"][index], "pass": name, "params": params}
            steps_ = [*document["steps"][:index], changed, *document["steps"][index + 1 :]]
            control = Recipe.load({**document, "description": f"{role} control", "steps": steps_})
            label = f"{name} " + " ".join(f"{key}={_short(value)}" for key, value in params.items())
            found.append(Candidate(label, control, "random" if role == "random" else "pool", seed=seed))
    return found


def _document(recipe: Recipe) -> dict[str, Any]:
    """A recipe as the mapping that :meth:`Recipe.load` takes."""
    document: dict[str, Any] = json.loads(recipe.model_dump_json(exclude={"name"}, by_alias=True, exclude_none=True))
    return document


def _short(value: Any) -> str:
    return "/".join(map(_short, value)) if isinstance(value, list) else str(value)


# --------------------------------------------------------------------------------------------------------- evaluate


def evaluate(
    model: nn.Module,
    tasks: Sequence[Task],
    candidates: Sequence[Any] | Mapping[str, Any],
    *,
    label: str | None = None,
    with_controls: bool = True,
    seeds: Sequence[int] = (0, 1, 2),
    results: str | os.PathLike[str] | None = None,
    lowering: str = "eager",
    resamples: int = 2000,
    level: float = 0.95,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure candidates on tasks, item by item against the dense model and against controls at the same budget.

    Args:
        model: the dense model; it is left as it was.
        tasks: see :class:`Task`.
        candidates: recipes as :func:`tokcompile.optimize` takes them; or name -> recipe; or name -> a model that is
            ready (what a recipe made, or anything else that ``observe`` can use); or :class:`Candidate` objects.
        label: name of the model in the results; left out, its class.
        with_controls: measure the random (one for each of ``seeds``) and pooling controls of each recipe that chooses
            tokens, see :func:`controls`, and those that a candidate names.
        results: CSV file to write after each candidate. Beside it a journal keeps the statistics of items; what it
            holds already is not measured again. Rows of other models and tasks in the file stay.
        lowering: of the recipes. "eager" compiles in seconds and gives the same figures as "inductor" up to rounding.
        resamples, level: of the bootstrap.
        fresh: measure anew what the journal holds.
        progress: called with what is being measured, items done, items in all.

    Returns:
        The rows of these tasks. A recipe that tokcompile refuses has rows with the reason; an error in a candidate
        gives rows with status "failed", and the others go on.

    Raises:
        TokcompileError: a bad argument: no tasks or candidates, a task without items, two with the same name.
        RecipeError: a recipe is not valid.
    """
    label = label or type(model).__name__
    named = _candidates(candidates)
    if not tasks or len({t.name for t in tasks}) != len(tasks):
        raise TokcompileError("evaluate needs tasks, each with a name of its own")
    for task in tasks:
        if not task.items or not task.measures:
            raise TokcompileError(f"task {task.name!r} has no items or no measures")
    journal = Journal(None if results is None else journal_path(results))
    beside = {
        c.name: [*c.controls, *(controls(c.recipe, seeds) if c.recipe is not None else ())] if with_controls else []
        for c in named
    }
    all_: dict[str, Candidate] = {}  # controls that methods share are measured once
    for one in [Candidate(DENSE, role="dense"), *named, *(c for group in beside.values() for c in group)]:
        all_.setdefault(one.key, one)
    last = next(reversed(all_))
    done: dict[str, list[EvalRow]] = {}
    ready: dict[str, nn.Module] = {}
    for task in tasks:
        measured: dict[str, Measured] = {}
        dense: list[Any] | None = None
        for key, one in all_.items():
            entry = _entry_key(label, task, key, lowering)
            found = None if fresh else journal.entries.get(entry)
            known = found is not None
            if found is None:
                if dense is None and (one.role == "dense" or any(m.judge is not as_is for m in task.measures)):
                    dense, seconds = _observe(model, task, f"{task.name}: {DENSE}", progress)
                if one.role == "dense":
                    assert dense is not None
                    stats = {m.name: m.judge(dense, dense) for m in task.measures}
                    found = Measured(stats, quantile(seconds, 0.5) * 1e3, load=load())
                else:
                    found = _measure(model, one, key, task, dense or (), lowering, progress, ready)
                journal.add(entry, f"{label}/{task.name}/{one.name}", found)
            measured[key] = found
            if known and key != last:  # bootstraps take seconds: not again for each line of the journal
                continue
            done[task.name] = _rows(label, task, all_, measured, named, beside, resamples, level)
            if results is not None:
                merge_rows(results, label, done)
    return Evaluation([row for task in tasks for row in done[task.name]])


def _candidates(given: Sequence[Any] | Mapping[str, Any]) -> list[Candidate]:
    pairs = list(given.items()) if isinstance(given, Mapping) else [(None, one) for one in given]
    found = []
    for name, one in pairs:
        if isinstance(one, Candidate):
            found.append(one)
        elif isinstance(one, nn.Module):
            found.append(Candidate(name or type(one).__name__, model=one))
        else:
            recipe = Recipe.load(one)
            found.append(Candidate(name or recipe.name or (str(one) if isinstance(one, str) else ""), recipe))
    names = [one.name for one in found]
    if len(set(names)) != len(names) or not all(names) or DENSE in names:
        raise TokcompileError(f"candidates need names that differ, and none may be {DENSE!r}: {names}")
    return found


def _entry_key(label: str, task: Task, candidate: str, lowering: str) -> str:
    parts = [label, task.name, task.version, len(task.items), [m.name for m in task.measures], candidate, lowering]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _observe(model: Any, task: Task, title: str, progress: Progress | None) -> tuple[list[Any], list[float]]:
    observed, seconds = [], []
    with torch.no_grad():
        for number, item in enumerate(task.items):
            if progress:
                progress(title, number, len(task.items))
            started = time.perf_counter()
            observed.append(task.observe(model, item))
            seconds.append(time.perf_counter() - started)
    if progress:
        progress(title, len(task.items), len(task.items))
    return observed, seconds


def _measure(
    model: nn.Module,
    one: Candidate,
    key: str,
    task: Task,
    dense: Sequence[Any],
    lowering: str,
    progress: Progress | None,
    ready: dict[str, nn.Module],
) -> Measured:
    """``ready`` holds models that recipes made: one that needs no calibration is compiled once for all tasks."""
    from tokcompile.api import optimize, report

    try:
        changed = one.model
        if one.recipe is not None:
            needs = [getattr(get_pass(step.pass_), "calibration", "none") for step in one.recipe.steps]
            takes = task.calibration if any(need != "none" for need in needs) else None
            changed = ready.get(key) or optimize(model, one.recipe, lowering=lowering, calibration=takes)
            if takes is None:
                ready[key] = changed
        observed, seconds = _observe(changed, task, f"{task.name}: {one.name}", progress)
        stats = {m.name: m.judge(observed, dense) for m in task.measures}
        facts: dict[str, float | None] = {}
        if one.recipe is not None:
            steps = report(changed).steps
            facts["flop_ratio"] = max((s.flop_ratio for s in steps if s.flop_ratio), default=None)
            for name in ("tokens_before", "tokens_after"):
                facts[name] = next(
                    (float(s.details[name]) for s in steps if isinstance(s.details.get(name), int | float)), None
                )
        return Measured(stats, quantile(seconds, 0.5) * 1e3, facts, load=load())
    except TokcompileError as error:
        return Measured(status="refused", reason=" ".join(str(error).split()), load=load())
    except Exception as error:  # one broken candidate must not take a long run down; the row says what happened
        return Measured(status="failed", reason=" ".join(f"{type(error).__name__}: {error}".split())[:500], load=load())


def _rows(
    label: str,
    task: Task,
    all_: Mapping[str, Candidate],
    measured: Mapping[str, Measured],
    named: Sequence[Candidate],
    beside: Mapping[str, Sequence[Candidate]],
    resamples: int,
    level: float,
) -> list[EvalRow]:
    """Rows of what has been measured so far."""
    origin = {k: v for k, v in versions().items() if k in COLUMNS}
    names = {one.key: beside.get(one.name, ()) for one in named}
    rows = []
    for metric in task.measures:

        def stats(key: str, metric: Measure = metric) -> Array | None:
            found = measured.get(key)
            return None if found is None or found.status != "measured" else found.stats[metric.name]

        def differ(first: Array, others: Sequence[Array], metric: Measure = metric) -> Difference:
            return compare(metric.score, first, others, resamples=resamples, level=level)

        base = stats(DENSE)
        for key, found in measured.items():
            one = all_[key]
            row = EvalRow(
                label,
                task.name,
                metric.name,
                one.name,
                one.role,
                one.seed,
                metric.unit,
                metric.higher_is_better,
                len(task.items),
                status=found.status,
                reason=found.reason,
                ms=found.ms,
                load=found.load,
                **found.facts,  # type: ignore[arg-type]
                **origin,
            )
            rows.append(row)
            mine = stats(key)
            if mine is None:
                continue
            row.value = metric.score(mine)
            row.low, row.high = interval(metric.score, mine, resamples=resamples, level=level)
            if base is None or one.role == "dense":
                continue
            row.dense = metric.score(base)
            better, worse = (row.value, row.dense) if metric.higher_is_better else (row.dense, row.value)
            row.relative = better / worse if worse else None
            _fill(row, "dense", differ(mine, [base]))
            for role in ("random", "pool"):
                others = [s for c in names.get(key, ()) if c.role == role and (s := stats(c.key)) is not None]
                if others:
                    _beside(row, role, [metric.score(other) for other in others])
                    _fill(row, role, differ(mine, others))
    return rows


def _beside(row: EvalRow, role: str, values: Sequence[float]) -> None:
    """What the controls of one kind reached."""
    setattr(row, role, sum(values) / len(values))
    if role == "random":
        row.random_min, row.random_max = min(values), max(values)


def _fill(row: EvalRow, name: str, difference: Difference) -> None:
    for suffix, value in (("", difference.value), ("_low", difference.low), ("_high", difference.high)):
        setattr(row, f"minus_{name}{suffix}", value)
    setattr(row, f"against_{name}", difference.verdict(row.higher_is_better))

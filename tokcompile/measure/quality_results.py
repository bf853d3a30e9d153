"""What :func:`tokcompile.evaluate` leaves behind: rows of the result file, and the journal that lets a run go on."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tokcompile.measure.paired import Array


@dataclass
class EvalRow:
    """One figure of one candidate: a line of the result file.

    Attributes:
        model, task, metric, unit, higher_is_better, items: what was measured.
        candidate, role, seed: see :class:`Candidate`.
        tokens_before, tokens_after, flop_ratio: of the changed part, from tokcompile's report (of the last input seen).
        value: the figure. low, high: its own interval. dense: the dense model's.
        relative: value / dense (dense / value where lower is better), so 1 is "as good".
        minus_dense, minus_random, minus_pool: paired differences, each with ``_low`` and ``_high``; random is the mean
            over its seeds.
        random, pool: figures of the controls. random_min, random_max: over the seeds.
        against_random, against_pool, against_dense: "better", "worse" or "same" (the interval holds 0).
        ms: median wall time of one item, in this run; the machine may have been busy (load).
        status: "measured", "refused" (tokcompile says why in ``reason``) or "failed" (an error, in ``reason``).
    """

    model: str
    task: str
    metric: str
    candidate: str
    role: str
    seed: int | None = None
    unit: str = ""
    higher_is_better: bool = True
    items: int = 0
    tokens_before: float | None = None
    tokens_after: float | None = None
    flop_ratio: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    dense: float | None = None
    relative: float | None = None
    minus_dense: float | None = None
    minus_dense_low: float | None = None
    minus_dense_high: float | None = None
    against_dense: str = ""
    random: float | None = None
    random_min: float | None = None
    random_max: float | None = None
    minus_random: float | None = None
    minus_random_low: float | None = None
    minus_random_high: float | None = None
    against_random: str = ""
    pool: float | None = None
    minus_pool: float | None = None
    minus_pool_low: float | None = None
    minus_pool_high: float | None = None
    against_pool: str = ""
    ms: float | None = None
    status: str = "measured"
    reason: str = ""
    load: float | None = None
    threads: int = 0
    torch: str = ""
    transformers: str = ""
    tokcompile: str = ""


COLUMNS = [f.name for f in fields(EvalRow)]


@dataclass
class Evaluation:
    """Rows of all tasks, in order."""

    rows: list[EvalRow] = field(default_factory=list)

    def find(self, task: str, candidate: str, metric: str | None = None) -> EvalRow:
        """The row of a candidate (the first figure, without ``metric``).

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.task, row.candidate) == (task, candidate) and metric in (None, row.metric):
                return row
        raise KeyError((task, candidate, metric))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows; numbers with five significant digits."""
        write_rows(path, self.rows)

    def __str__(self) -> str:
        table = Table(box=None, header_style="bold", pad_edge=False)
        for column in ("task", "metric", "candidate", "tokens", "value", "minus dense", "minus random", "minus pool"):
            table.add_column(column, overflow="fold")
        for r in self.rows:
            if r.status != "measured":
                table.add_row(r.task, r.metric, r.candidate, "", r.status, r.reason)
                continue
            tokens = (
                ""
                if r.tokens_before is None or r.tokens_after is None
                else f"{r.tokens_before:.0f} -> {r.tokens_after:.0f}"
            )
            table.add_row(
                r.task,
                r.metric,
                r.candidate,
                tokens,
                _digits(r.value),
                *(
                    difference_text(getattr(r, n), getattr(r, f"{n}_low"), getattr(r, f"{n}_high"))
                    for n in ("minus_dense", "minus_random", "minus_pool")
                ),
            )
        console = Console(file=io.StringIO(), width=160, color_system=None, markup=False, highlight=False)
        console.print(table)
        return "\n".join(line.rstrip() for line in console.file.getvalue().split("\n"))  # type: ignore[attr-defined]


def write_rows(path: str | os.PathLike[str], rows: Iterable[EvalRow]) -> None:
    """Write a result file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: _digits(v) if isinstance(v, float) else "" if v is None else v for k, v in asdict(row).items()}
            )


def read_rows(path: str | os.PathLike[str]) -> list[EvalRow]:
    """Read a result file."""
    kinds = {f.name: str(f.type) for f in fields(EvalRow)}

    def typed(name: str, text: str) -> Any:
        kind = kinds[name]
        if not text and "None" in kind:
            return None
        if kind.startswith("float"):
            return float(text)
        if kind.startswith("int"):
            return int(text)
        return text == "True" if kind == "bool" else text

    with Path(path).open(newline="") as file:
        return [EvalRow(**{k: typed(k, v) for k, v in line.items() if k in kinds}) for line in csv.DictReader(file)]


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def difference_text(value: float | None, low: float | None, high: float | None) -> str:
    """``+1.5 [-0.3, +3.2]``; empty where nothing was compared."""
    return "" if value is None or low is None or high is None else f"{value:+.3g} [{low:+.3g}, {high:+.3g}]"


def merge_rows(path: str | os.PathLike[str], label: str, done: Mapping[str, Sequence[EvalRow]]) -> None:
    """Write the rows of these tasks in place of their old ones; other rows of the file stay."""
    old = read_rows(path) if Path(path).exists() else []
    kept = [row for row in old if row.model != label or row.task not in done]
    fresh = [row for rows in done.values() for row in rows]
    names = {(row.task, row.candidate) for row in fresh}
    # candidates of the same tasks that this run does not know stay too: files grow recipe by recipe
    kept += [row for row in old if row.model == label and row.task in done and (row.task, row.candidate) not in names]
    write_rows(path, [*kept, *fresh])


# ---------------------------------------------------------------------------------------------------------- journal


@dataclass
class Measured:
    """What one candidate did on one task, as the journal keeps it."""

    stats: dict[str, Array] = field(default_factory=dict)
    ms: float | None = None
    facts: dict[str, float | None] = field(default_factory=dict)
    status: str = "measured"
    reason: str = ""
    load: float | None = None


class Journal:
    """Lines of JSON, one for each candidate and task, appended as they are measured. A broken last line is left out."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.entries: dict[str, Measured] = {}
        self.names: dict[str, str] = {}  # key -> model/task/candidate
        if path is None or not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # a run was cut off while it wrote
            self.names[entry["key"]] = entry["name"]
            stats = {k: np.asarray(v, dtype=np.float64) for k, v in entry.pop("stats").items()}
            known = {f.name for f in fields(Measured)}
            self.entries[entry["key"]] = Measured(stats, **{k: v for k, v in entry.items() if k in known})

    def add(self, key: str, name: str, measured: Measured) -> None:
        """Keep an entry; failures are kept for this run only, so that the next run tries again."""
        self.entries[key], self.names[key] = measured, name
        if self.path is None or measured.status == "failed":
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {
            "key": key,
            "name": name,
            **{k: v for k, v in vars(measured).items() if k != "stats"},
            "stats": {k: v.tolist() for k, v in measured.stats.items()},
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def journal_path(results: str | os.PathLike[str]) -> Path:
    """Where the journal of a result file lies: ``quality.csv`` -> ``quality.local.jsonl``."""
    return Path(results).with_suffix(".local.jsonl")

"""Module paths that differ only in numbers, as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable


def path_template(path: str) -> tuple[str, ...]:
    return tuple("#" if part.isdecimal() else part for part in path.split("."))


def path_globs(paths: Iterable[str]) -> list[str]:
    """:func:`path_glob` for each set of paths that differ only in numbers, in order of appearance."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in paths:
        groups[path_template(path)].append(path)
    return [path_glob(group) for group in groups.values()]


def path_glob(paths: list[str]) -> str:
    """``model.layers.{0..31}.mlp`` for paths that differ only in numbers; holes are listed: ``{0..3,7}``."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(_span(set(column)) for column in columns)


def _span(parts: set[str]) -> str:
    if len(parts) == 1:
        return next(iter(parts))
    runs: list[list[int]] = []
    for value in sorted(int(part) for part in parts):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return "{" + ",".join(str(low) if low == high else f"{low}..{high}" for low, high in runs) + "}"

"""Values of a recipe in messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def shown(value: Any) -> str:
    """A value as YAML writes it, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def percent_hint(value: Any) -> str:
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    return f"; write {float(match[1]) / 100:g}" if match and 0 < float(match[1]) <= 100 else ""


def layer_bounds(entry: Any) -> tuple[int, int] | None:
    """First and last layer of an entry of ``layers``, both inclusive; None when it is not one."""
    if isinstance(entry, int) and not isinstance(entry, bool):
        return entry, entry
    match = re.fullmatch(r"(-?\d{1,6})-(-?\d{1,6})", entry, re.ASCII) if isinstance(entry, str) else None
    return (int(match[1]), int(match[2])) if match else None

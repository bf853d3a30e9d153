"""Apply the steps of a recipe to one graph."""

from __future__ import annotations

from typing import Any

#: Region kinds that are rewritten one by one, in place; a step for them can choose layers.
LOCAL = ("attention", "feed_forward", "moe")


def merged_details(details: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the pass said of each region: once where all regions agree, else by module path."""
    names = dict.fromkeys(name for item in details.values() for name in item)
    merged: dict[str, Any] = {}
    for name in names:
        values = {path: item[name] for path, item in details.items() if name in item}
        same = all(v == next(iter(values.values())) for v in values.values())
        merged[name] = next(iter(values.values())) if same else values
    return merged

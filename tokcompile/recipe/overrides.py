"""Change single values of a recipe by their place: ``steps[0].params.keep=0.2``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tokcompile.errors import Mistake, RecipeError
from tokcompile.recipe import yaml as recipe_yaml

_PART = re.compile(r"\.?([A-Za-z_][\w-]*)|\[(-?\d{1,4})\]", re.ASCII)


def parse(settings: Iterable[str]) -> dict[str, Any]:
    """``["steps[0].params.keep=0.2"]`` -> ``{"steps[0].params.keep": 0.2}``; values are YAML, read like a recipe.

    Raises:
        RecipeError: no "=", or a value that is not plain YAML; all of them at once.
    """
    values: dict[str, Any] = {}
    mistakes = []
    for setting in settings:
        place, equals, text = setting.partition("=")
        place = place.strip()
        if not equals:
            mistakes.append(
                Mistake("override", None, None, place, "should be PLACE=VALUE, such as steps[0].params.keep=0.2")
            )
            continue
        if place in values:
            mistakes.append(Mistake("override", None, None, place, "is set twice"))
            continue
        value, _, faults = recipe_yaml.read(text)
        mistakes += [Mistake("override", None, None, place, what) for _, what, _ in faults]
        values[place] = value
    if mistakes:
        raise RecipeError(mistakes=mistakes)
    return values


def apply(data: dict[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Set values in ``data`` (changed in place). Keys are not checked here: the recipe is validated afterwards.

    Returns:
        the data, and (place, what is wrong) for every place that cannot be reached.
    """
    wrong = []
    for place, value in changes.items():
        try:
            _set(data, _parts(place), value)
        except ValueError as error:
            wrong.append((place, str(error)))
    return data, wrong


def _parts(place: str) -> list[str | int]:
    parts: list[str | int] = []
    at = 0
    while at < len(place):
        match = _PART.match(place, at)
        if match is None or (at == 0) == match[0].startswith((".", "[")):
            break
        parts.append(match[1] if match[1] is not None else int(match[2]))
        at = match.end()
    if at < len(place) or not parts:
        raise ValueError("is not a place in a recipe; write it like steps[0].params.keep")
    if parts[0] == "extends":
        raise ValueError("cannot be changed here; name the other recipe instead")
    return parts


def _set(data: Any, parts: list[str | int], value: Any) -> None:
    *above, last = parts
    here, seen = data, ""
    for part in above:
        _check(here, part, seen)
        if isinstance(part, str) and here.get(part) is None:
            here[part] = {}  # a block that is left out, such as expect
        here = here[part]
        seen += f"[{part}]" if isinstance(part, int) else f".{part}" if seen else part
    _check(here, last, seen)
    here[last] = value


def _check(here: Any, part: str | int, seen: str) -> None:
    if isinstance(part, str):
        if isinstance(here, list):
            raise ValueError(f"{seen} is a list; say which entry: {seen}[0].{part}")
        if not isinstance(here, dict):
            raise ValueError(f"{seen} is a single value and has no {part!r} in it")
    elif not isinstance(here, list):
        raise ValueError(f"{seen} is not a list")
    elif not -len(here) <= part < len(here):
        raise ValueError(f"{seen} has {len(here)} entries, numbered from 0")

"""The mistakes that validation finds, in the words of the recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from tokcompile.errors import Mistake
from tokcompile.recipe.source import Source, mistake_at
from tokcompile.recipe.steps import Expect, Protect, Step, Target
from tokcompile.recipe.wording import shown
from tokcompile.recipe.yaml import Loc, Marks
from tokcompile.registry import did_you_mean, get_pass


def explain(source: Source, marks: Marks, data: Any, detail: ErrorDetails, root: type[BaseModel]) -> Mistake:
    """One complaint of pydantic about ``data``, which was read from ``source`` as a ``root``."""
    kind, value = detail["type"], detail["input"]
    loc = _in_data(detail["loc"], data, kind == "missing", root)
    if kind == "extra_forbidden":
        what = f"unknown key{did_you_mean(str(loc[-1]), _known_keys(loc[:-1], data, root))}"
        return mistake_at(source, marks.find(loc, key=True), loc, what)
    if kind == "missing":
        return mistake_at(source, marks.find(loc[:-1]), loc[:-1], f"key {str(loc[-1])!r} is missing")
    if kind == "value_error":
        what = str(detail["ctx"]["error"])
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        what = f"should be a mapping, found {shown(value)}"
    else:
        what = f"{detail['msg'].replace('Input should', 'should')}, found {shown(value)}"
        if kind == "literal_error" and isinstance(value, str):
            near = did_you_mean(value, re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
            what += near if "did you mean" in near else ""  # the message lists what is known already
    return mistake_at(source, marks.find(loc), loc, what)


def _in_data(loc: Loc, data: Any, missing: bool, root: type[BaseModel]) -> Loc:
    """``loc`` without the names that pydantic gives to the members of a union."""
    here: Any = data
    real: list[int | str] = []
    for part in loc[:-1] if missing else loc:
        if isinstance(here, BaseModel):  # an object handed in as it is
            here = vars(here)
        inside: Any = range(len(here)) if isinstance(here, list) else here if isinstance(here, Mapping) else ()
        if part in inside:
            here = here[part]
            real.append(part)
        elif isinstance(here, Mapping) and part in _known_keys(tuple(real), data, root):  # left out
            here = {}
            real.append(part)
    return (*real, loc[-1]) if missing else tuple(real)


def unite(lines: list[Mistake]) -> list[Mistake]:
    """One line where each member of a union had its own complaint about one value."""
    groups: dict[tuple[Any, ...], list[Mistake]] = {}
    for line in lines:
        groups.setdefault((line.line, line.column, line.where, line.what.rpartition(", found ")[2]), []).append(line)
    united = []
    for group in groups.values():
        heads = list(dict.fromkeys(line.what.rpartition(", found ")[0] for line in group))
        found = group[0].what.rpartition(", found ")[2]
        text = ", or ".join([heads[0], *(head.removeprefix("should be ") for head in heads[1:])])
        united.append(group[0] if len(heads) == 1 else replace(group[0], what=f"{text}, found {found}"))
    return united


def _known_keys(loc: Loc, data: Any, root: type[BaseModel]) -> list[str]:
    """The keys that the mapping at ``loc`` may hold."""
    model: type[BaseModel] | None = None
    if loc == ():
        model = root
    elif loc == ("protect",):
        model = Protect
    elif loc[0] == "steps" and len(loc) == 2:
        model = Step
    elif loc[0] == "steps" and len(loc) == 3:
        models: dict[str, type[BaseModel]] = {"target": Target, "expect": Expect}
        model = models.get(str(loc[2]))
        if loc[2] == "params":
            model = get_pass(data["steps"][loc[1]]["pass"]).Params
    return [field.alias or name for name, field in model.model_fields.items()] if model else []

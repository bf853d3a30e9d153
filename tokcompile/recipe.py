"""Recipes: which passes to run on which regions, with which parameters. Data, never code.

A recipe is read from YAML, a dict or the name of one that ships, and checked as a whole: every mistake in it
is named in one :class:`~tokcompile.errors.RecipeError`, one line each, ``file:line:column: where: what``. Reading YAML
is in ``recipe_yaml``, changing single values in ``recipe_overrides``, the JSON Schema in ``recipe_schema``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
)
from pydantic_core import ErrorDetails, core_schema

from tokcompile import recipe_overrides, recipe_yaml
from tokcompile.errors import Mistake, RecipeError
from tokcompile.recipe_yaml import Loc, Marks, Place
from tokcompile.regions.model import KINDS
from tokcompile.registry import did_you_mean, get_pass

_MAX_DENOMINATOR = 10**6


@dataclass(frozen=True)
class Budget:
    """How many tokens to keep: a ratio in (0, 1], or a count of at least 1. Held in integers.

    A float ``ceil(ratio * n)`` differs between runtimes; ``(n * num + den - 1) // den`` does not.

    Attributes:
        num: numerator of the ratio, or the count.
        den: denominator of the ratio (at most 10**6), 1 for a count.
        is_count: whether it is a count. In YAML ``1`` is a count of one token, ``1.0`` the ratio "all".
    """

    num: int
    den: int
    is_count: bool = False

    @classmethod
    def of(cls, value: Any) -> Budget:
        """Make a budget from a ratio (float) or a count (int).

        Raises:
            ValueError: neither a ratio in [1e-6, 1] nor an integer of at least 1.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"should be a ratio in (0, 1] or a whole number of tokens, found {_shown(value)}" + _percent_hint(value)
            )
        if isinstance(value, int):
            if value < 1:
                raise ValueError(f"a count of tokens should be at least 1, found {value}")
            return cls(value, 1, True)
        if not (math.isfinite(value) and 0 < value <= 1):
            hint = (
                f"; for a count write {value:.0f}" if math.isfinite(value) and value > 1 and value.is_integer() else ""
            )
            raise ValueError(f"a ratio should be in (0, 1], found {value}{hint}")
        ratio = Fraction(str(value)).limit_denominator(_MAX_DENOMINATOR)
        if not ratio:
            raise ValueError(f"a ratio should be at least {1 / _MAX_DENOMINATOR:.6f}, found {value}")
        return cls(ratio.numerator, ratio.denominator)

    @property
    def value(self) -> int | float:
        """The budget as a recipe writes it: an int for a count, a float for a ratio."""
        return self.num if self.is_count else self.num / self.den

    def count(self, n: Any) -> Any:
        """Tokens kept of ``n`` (an int, or a symbolic size that is at least 1): at least 1, at most ``n``; 0 of 0."""
        if not self.is_count:
            return (n * self.num + self.den - 1) // self.den
        if isinstance(n, int):
            return min(n, self.num)
        import torch

        return torch.sym_min(n, self.num)  # type: ignore[no-untyped-call]

    def __str__(self) -> str:
        return str(self.num) if self.is_count else f"{100 * self.num / self.den:g} %"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.of, serialization=core_schema.plain_serializer_function_ser_schema(lambda budget: budget.value)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "description": "ratio"},
                {"type": "integer", "minimum": 1, "description": "count"},
            ],
            "unit": "share of the tokens, or tokens",
        }


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_LayerEntry = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^-?[0-9]+--?[0-9]+$"}]})
]


class Target(_Model):
    """Which regions a step is for. Every filter that is given has to agree."""

    region: str | None = Field(
        None,
        description="Region kind; left out, the kind that the pass targets.",
        json_schema_extra={"enum": [*KINDS, None]},
    )
    layers: list[_LayerEntry] | None = Field(
        None,
        description='Layers of the stack: 0-based indices, negative from the end, inclusive ranges such as "4-8".',
    )
    path: str | None = Field(None, min_length=1, description="Glob on the module path; * also crosses dots.")
    modality: Literal["image", "video"] | None = Field(None, description="Only tokens of this kind of input.")

    @field_validator("region")
    @classmethod
    def _region(cls, value: str | None) -> str | None:
        if value is not None and value not in KINDS:
            raise ValueError(f"unknown region kind {value!r}{did_you_mean(value, list(KINDS))}")
        return value

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: list[Any] | None) -> list[Any] | None:
        if value == []:
            raise ValueError("an empty list selects no layer; leave the key out for all layers")
        for entry in value or []:
            bounds = _bounds(entry)
            if bounds is None:
                raise ValueError(f'should hold whole numbers and ranges such as "4-8", found {_shown(entry)}')
            if (bounds[0] < 0) == (bounds[1] < 0) and bounds[0] > bounds[1]:
                raise ValueError(f"range {entry!r} runs backwards")
        return value

    def layer_indices(self, depth: int) -> list[int]:
        """The selected layers of a stack of ``depth`` layers: 0-based, ascending, each once.

        Raises:
            RecipeError: an entry asks for a layer that the stack does not have.
        """
        if self.layers is None:
            return list(range(depth))
        chosen: set[int] = set()
        for entry in self.layers:
            low, high = _bounds(entry) or (0, 0)
            start, stop = (index + depth if index < 0 else index for index in (low, high))
            if not 0 <= start <= stop < depth:
                raise RecipeError(f"target.layers: {entry!r} is outside a stack of {depth} layers (0..{depth - 1})")
            chosen.update(range(start, stop + 1))
        return sorted(chosen)

    def matches_path(self, path: str) -> bool:
        """Whether a module path passes the ``path`` filter."""
        return self.path is None or fnmatchcase(path, self.path)


class Expect(_Model):
    """How many regions a step has to change; fewer or more is an error."""

    min_matches: int = Field(default=1, ge=1, description="Least number of regions changed.")
    max_matches: int | None = Field(
        default=None, ge=1, description="Greatest number of regions changed; left out, any."
    )

    @field_validator("max_matches")
    @classmethod
    def _order(cls, value: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min_matches")
        if value is not None and least is not None and value < least:
            raise ValueError(f"should be at least min_matches = {least}, found {value}")
        return value


class Protect(_Model):
    """What no step may touch, beyond class, register and text tokens, which are always kept."""

    paths: list[str] = Field(default_factory=list, description="Globs on module paths; what matches is left alone, "
                                                               "with all that is inside it.")
    leading_tokens: int | None = Field(
        None, ge=0, description="Tokens kept at the head of an encoder's axis; left out, as found in the graph."
    )

    def covers(self, path: str) -> bool:
        """Whether the region at that module path has to be left alone."""
        return bool(self.covering(path))

    def covering(self, path: str) -> list[str]:
        """The globs that cover a module path: they fit it, or a module that it is inside of."""
        parts = path.split(".")
        around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        return [glob for glob in self.paths if any(fnmatchcase(module, glob) for module in around)]


class Step(_Model):
    """One pass, where to run it, with which parameters."""

    pass_: str = Field(alias="pass", description="Name of the pass.")
    target: Target = Field(default_factory=lambda: Target.model_validate({}), description="Which regions.")
    params: Any = Field(
        default_factory=dict,
        validate_default=True,
        description="Parameters of the pass.",
        json_schema_extra={"type": "object"},
    )
    expect: Expect = Field(default_factory=lambda: Expect(), description="How many regions have to change.")

    @field_validator("pass_")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            get_pass(value)
        except RecipeError as error:
            raise ValueError(str(error)) from None
        return value

    @field_validator("params")
    @classmethod
    def _params(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping | BaseModel):
            raise ValueError(f"should be a mapping of parameters, found {_shown(value)}")
        if "pass_" not in info.data:  # the pass is unknown: nothing to check against
            return value
        return get_pass(info.data["pass_"]).Params.model_validate(value)  # its errors keep their own places

    @field_serializer("params")
    def _dump_params(self, value: Any) -> Any:
        return value.model_dump(mode="json", by_alias=True) if isinstance(value, BaseModel) else value

    @property
    def region(self) -> str:
        """The region kind that the step is for: the target's, or the pass's default."""
        return self.target.region or str(get_pass(self.pass_).regions)


class Recipe(_Model):
    """An ordered list of steps. Make one with :meth:`load`; it is complete and does not change."""

    recipe_version: Literal[1] = Field(description="Version of the recipe format.")
    description: str = Field("", description="What it does and costs, in a sentence or two.")
    extends: str | None = Field(
        None, min_length=1, description="Recipe to start from: a shipped name, or a path relative to this file."
    )
    steps: list[Step] = Field(default_factory=list, validate_default=True, description="What to do, in this order.")
    protect: Protect | None = Field(None, description="What to leave alone.")
    _name: str = PrivateAttr("")

    @field_validator("recipe_version", mode="before")
    @classmethod
    def _version(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"should be 1, found {_shown(value)}")
        return value

    @field_validator("steps")
    @classmethod
    def _some_steps(cls, value: list[Step], info: ValidationInfo) -> list[Step]:
        given = "extends" in info.data and info.data["extends"] is None
        if not value and given:
            raise ValueError("a recipe needs at least one step")
        return value

    @property
    def name(self) -> str:
        """The shipped name or the file that it came from, "" for a dict."""
        return self._name

    @classmethod
    def load(cls, source: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
             overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read and check a recipe, and merge what it extends.

        Args:
            source: the name of a shipped recipe, the path of a YAML file, a dict, or a recipe (given back as it is).
            overrides: values to change in the complete recipe, by place: ``{"steps[0].params.keep": 0.2}``.

        Returns:
            a complete recipe: ``extends`` is merged and None.

        Raises:
            RecipeError: all that is wrong, one line each: ``file:line:column: where: what``.
        """
        if overrides:
            return cls.load(source).override(overrides)
        if isinstance(source, Recipe):
            return source if source.extends is None else cls.load(source.to_dict())
        if isinstance(source, Mapping):
            return _resolve(_Source("", "recipe", Path()), dict(source), Marks(), [], [])
        if not isinstance(source, str | os.PathLike):
            raise RecipeError(f"a recipe is a name, a path, a dict or a Recipe, found {type(source).__name__}")
        return _read(_find(os.fspath(source), Path()), [])

    @classmethod
    def parse(cls, text: str, name: str = "<text>") -> Recipe:
        """Like :meth:`load`, from YAML text; ``name`` stands for the file in messages."""
        return _resolve_text(_Source(name, name, Path()), text, [])

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with other values, by place: ``{"steps[0].params.keep": 0.2, "steps[-1].expect.max_matches": 1}``.

        Raises:
            RecipeError: a place that no recipe has, or a value that does not fit there; all of them at once.
        """
        label = "override"
        data, wrong = recipe_overrides.apply(self.to_dict(), changes)
        lines = [Mistake(label, None, None, where, what) for where, what in wrong]
        recipe = _resolve(_Source("", label, Path()), data, Marks(), [], lines)
        recipe._name = self._name
        return recipe

    def named(self, name: str) -> Recipe:
        """A copy of that name."""
        recipe = self.model_copy()
        recipe._name = name
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``Recipe.load(recipe.to_dict())`` does the same as the recipe."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def shipped() -> list[str]:
    """Names of the recipes that ship, sorted."""
    folder = files("tokcompile.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where a recipe comes from: its identity, the name for messages, the folder that ``extends`` is relative to."""

    key: str
    label: str
    folder: Path
    shipped: bool = False


def _find(name: str, folder: Path) -> _Source:
    if name in shipped():
        return _Source(name, f"{name}.yaml", folder, shipped=True)
    try:
        path = folder / name
        if path.suffix in (".yaml", ".yml") or path.exists():
            return _Source(str(path.resolve()), str(path), path.parent)
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have
        raise RecipeError(f"unknown recipe {_shown(name)}: {error}") from None
    raise RecipeError(f"unknown recipe {_shown(name)}{did_you_mean(name, shipped())}; a path ends in .yaml")


def _read(source: _Source, chain: list[str]) -> Recipe:
    try:
        if source.shipped:
            text = files("tokcompile.recipes").joinpath(source.label).read_text(encoding="utf-8")
        else:
            text = Path(source.key).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(mistakes=[_line(source, None, (), f"cannot be read: {error}")]) from None
    return _resolve_text(source, text, chain)


def _resolve_text(source: _Source, text: str, chain: list[str]) -> Recipe:
    data, marks, faults = recipe_yaml.read(text)
    lines = [_line(source, place, loc, what) for loc, what, place in faults]
    if data is None and lines:
        raise RecipeError(mistakes=lines)
    return _resolve(source, data, marks, chain, lines)


def _resolve(source: _Source, data: Any, marks: Marks, chain: list[str], lines: list[Mistake]) -> Recipe:
    """Check one recipe, then lay it over the one that it extends. ``lines`` holds the mistakes found so far."""
    recipe: Recipe | None = None
    base: Recipe | None = None
    inherited: list[Mistake] = []
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        lines += _united([_explain(source, marks, data, detail) for detail in error.errors(include_url=False)])
    if recipe is not None and recipe.extends and recipe.steps == [] and "steps" in recipe.model_fields_set:
        what = "a recipe needs at least one step; leave the key out to keep those of the recipe that it extends"
        lines.append(_line(source, marks.find(("steps",)), ("steps",), what))
    extends = data.get("extends") if isinstance(data, Mapping) else None
    if isinstance(extends, str) and extends:
        try:
            found = _find(extends, source.folder)
            _check_circle(found, [*chain, source.key])
        except RecipeError as error:
            lines.append(_line(source, marks.find(("extends",)), ("extends",), str(error)))
        else:
            try:
                base = _read(found, [*chain, source.key])
            except RecipeError as error:
                inherited = error.mistakes or [_line(found, None, (), str(error))]
    if lines or inherited or recipe is None:
        lines.sort(key=lambda line: (line.line or 0, line.column or 0))
        raise RecipeError(mistakes=lines + inherited)
    if base is not None:
        own = {field: getattr(recipe, field) for field in recipe.model_fields_set - {"extends"}}
        recipe = base.model_copy(update=own)
    recipe._name = source.key if source.shipped else source.label if source.key else ""
    return recipe


def _check_circle(found: _Source, chain: list[str]) -> None:
    if found.key in chain:
        names = [Path(key).name for key in [*chain[chain.index(found.key) :], found.key]]
        raise RecipeError(f"recipes extend each other in a circle: {' -> '.join(names)}")


# --- messages --------------------------------------------------------------------------------------------------------


def _line(source: _Source, place: Place | None, loc: Loc, what: str) -> Mistake:
    line, column = place or (None, None)
    return Mistake(source.label, line, column, _where(loc), " ".join(what.splitlines()))


def _where(loc: Loc) -> str:
    """``("steps", 0, "params", "keep")`` as ``steps[0].params.keep``."""
    text = ""
    for part in loc:
        plain = isinstance(part, str) and re.fullmatch(r"[\w-]+", part, re.ASCII)
        text += f".{part}" if plain else f"[{part!r}]"
    return text.lstrip(".")


def _explain(source: _Source, marks: Marks, data: Any, detail: ErrorDetails) -> Mistake:
    kind, value = detail["type"], detail["input"]
    loc = _in_data(detail["loc"], data, kind == "missing")
    if kind == "extra_forbidden":
        what = f"unknown key{did_you_mean(str(loc[-1]), _known_keys(loc[:-1], data))}"
        return _line(source, marks.find(loc, key=True), loc, what)
    if kind == "missing":
        return _line(source, marks.find(loc[:-1]), loc[:-1], f"key {str(loc[-1])!r} is missing")
    if kind == "value_error":
        what = str(detail["ctx"]["error"])
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        what = f"should be a mapping, found {_shown(value)}"
    else:
        what = f"{detail['msg'].replace('Input should', 'should')}, found {_shown(value)}"
        if kind == "literal_error" and isinstance(value, str):
            near = did_you_mean(value, re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
            what += near if "did you mean" in near else ""  # the message lists what is known already
    return _line(source, marks.find(loc), loc, what)


def _in_data(loc: Loc, data: Any, missing: bool) -> Loc:
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
        elif isinstance(here, Mapping) and part in _known_keys(tuple(real), data):  # left out
            here = {}
            real.append(part)
    return (*real, loc[-1]) if missing else tuple(real)


def _united(lines: list[Mistake]) -> list[Mistake]:
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


def _known_keys(loc: Loc, data: Any) -> list[str]:
    """The keys that the mapping at ``loc`` may hold."""
    model: type[BaseModel] | None = None
    if loc == ():
        model = Recipe
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


def _shown(value: Any) -> str:
    """A value as YAML writes it, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _percent_hint(value: Any) -> str:
    match = re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)\s*%\s*", value) if isinstance(value, str) else None
    return f"; write {float(match[1]) / 100:g}" if match and 0 < float(match[1]) <= 100 else ""


def _bounds(entry: Any) -> tuple[int, int] | None:
    """First and last layer of an entry of ``layers``, both inclusive; None when it is not one."""
    if isinstance(entry, int) and not isinstance(entry, bool):
        return entry, entry
    match = re.fullmatch(r"(-?\d{1,6})-(-?\d{1,6})", entry, re.ASCII) if isinstance(entry, str) else None
    return (int(match[1]), int(match[2])) if match else None


__all__ = ["Budget", "Expect", "Protect", "Recipe", "Step", "Target", "shipped"]

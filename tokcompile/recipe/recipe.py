"""Recipes: which passes to run on which regions, with which parameters. Data, never code.

A recipe is read from YAML, a dict or the name of one that ships, and checked as a whole: every mistake in it
is named in one :class:`~tokcompile.errors.RecipeError`, one line each, ``file:line:column: where: what``. Reading YAML
is in ``recipe_yaml``, changing single values in ``recipe_overrides``, the JSON Schema in ``recipe_schema``.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator, model_validator

from tokcompile.errors import Mistake, RecipeError
from tokcompile.recipe import overrides as recipe_overrides
from tokcompile.recipe import yaml as recipe_yaml
from tokcompile.recipe.budget import Budget
from tokcompile.recipe.mistakes import explain, unite
from tokcompile.recipe.source import Source, find, mistake_at
from tokcompile.recipe.steps import Protect, RecipeModel, Step, errors_at
from tokcompile.recipe.wording import shown
from tokcompile.recipe.yaml import Loc, Marks
from tokcompile.registry import get_pass


class Recipe(RecipeModel):
    """An ordered list of steps. Make one with :meth:`load`; it is complete and does not change."""

    recipe_version: Literal[1] = Field(description="Version of the recipe format.")
    description: str = Field("", description="What it does and costs, in a sentence or two.")
    extends: str | None = Field(
        None, min_length=1, description="Recipe to start from: a shipped name, or a path relative to this file."
    )
    steps: list[Step] = Field(default_factory=list, validate_default=True, description="What to do, in this order.")
    protect: Protect | None = Field(None, description="What to leave alone.")
    set: dict[str, Any] | None = Field(
        None,
        description="Values to change in the recipe that it extends, by place: steps[0].params.keep: 0.2.",
    )
    _name: str = PrivateAttr("")
    _warnings: tuple[Mistake, ...] = PrivateAttr(())

    @field_validator("recipe_version", mode="before")
    @classmethod
    def _version(cls, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"should be 1, found {shown(value)}")
        return value

    @field_validator("steps")
    @classmethod
    def _some_steps(cls, value: list[Step], info: ValidationInfo) -> list[Step]:
        given = "extends" in info.data and info.data["extends"] is None
        if not value and given:
            raise ValueError("a recipe needs at least one step")
        return value

    @field_validator("set")
    @classmethod
    def _set_what_is_extended(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if value and info.data.get("extends", "?") is None:
            raise ValueError("changes values of the recipe that `extends` names, and there is none")
        return value

    @model_validator(mode="after")
    def _protects_something(self) -> Recipe:
        """A number of tokens to protect that no pass would look at is refused, so that it is not ignored silently."""
        idle = _idle_protection(self) if self.extends is None else []
        if idle:
            raise errors_at(Recipe, *((("protect", name), _IDLE, getattr(self.protect, name)) for name in idle))
        return self

    @property
    def name(self) -> str:
        """The shipped name or the file that it came from, "" for a dict."""
        return self._name

    @property
    def warnings(self) -> tuple[Mistake, ...]:
        """What is valid, but probably not meant."""
        return self._warnings

    @classmethod
    def load(
        cls, source: str | os.PathLike[str] | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None
    ) -> Recipe:
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
            return _resolve(Source("", "recipe", Path()), dict(source), Marks(), [], [])
        if not isinstance(source, str | os.PathLike):
            raise RecipeError(f"a recipe is a name, a path, a dict or a Recipe, found {type(source).__name__}")
        return _read(find(os.fspath(source), Path()), [])

    @classmethod
    def parse(cls, text: str, name: str = "<text>") -> Recipe:
        """Like :meth:`load`, from YAML text; ``name`` stands for the file in messages."""
        return _resolve_text(Source(name, name, Path()), text, [])

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with other values, by place: ``{"steps[0].params.keep": 0.2, "steps[-1].expect.max_matches": 1}``.

        Raises:
            RecipeError: a place that no recipe has, or a value that does not fit there; all of them at once.
        """
        label = "override"
        data, wrong = recipe_overrides.apply(self.to_dict(), changes)
        lines = [Mistake(label, None, None, where, what) for where, what in wrong]
        recipe = _resolve(Source("", label, Path()), data, Marks(), [], lines)
        recipe._name = self._name
        return recipe

    def __repr__(self) -> str:
        steps = ", ".join(
            f"{step.pass_}({', '.join(f'{k}={v!r}' for k, v in step.params.model_dump(exclude_unset=True).items())})"
            for step in self.steps
        )
        return f"<tokcompile recipe{' ' + self.name if self.name else ''}: {steps}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        name, description, steps = map(html.escape, (self.name or "recipe", self.description, repr(self)))
        return f"<b>{name}</b><p>{description}</p><pre>{steps}</pre>"

    def named(self, name: str) -> Recipe:
        """A copy of that name."""
        recipe = self.model_copy()
        recipe._name = name
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``Recipe.load(recipe.to_dict())`` does the same as the recipe."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def _read(source: Source, chain: list[str]) -> Recipe:
    try:
        if source.shipped:
            text = files("tokcompile.recipes").joinpath(source.label).read_text(encoding="utf-8")
        else:
            text = Path(source.key).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(mistakes=[mistake_at(source, None, (), f"cannot be read: {error}")]) from None
    return _resolve_text(source, text, chain)


def _resolve_text(source: Source, text: str, chain: list[str]) -> Recipe:
    data, marks, faults = recipe_yaml.read(text)
    lines = [mistake_at(source, place, loc, what) for loc, what, place in faults]
    if data is None and lines:
        raise RecipeError(mistakes=lines)
    return _resolve(source, data, marks, chain, lines)


def _resolve(source: Source, data: Any, marks: Marks, chain: list[str], lines: list[Mistake]) -> Recipe:
    """Check one recipe, then lay it over the one that it extends. ``lines`` holds the mistakes found so far."""
    recipe: Recipe | None = None
    base: Recipe | None = None
    inherited: list[Mistake] = []
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        lines += unite([explain(source, marks, data, detail, Recipe) for detail in error.errors(include_url=False)])
    if recipe is not None and recipe.extends and recipe.steps == [] and "steps" in recipe.model_fields_set:
        what = "a recipe needs at least one step; leave the key out to keep those of the recipe that it extends"
        lines.append(mistake_at(source, marks.find(("steps",)), ("steps",), what))
    extends = data.get("extends") if isinstance(data, Mapping) else None
    if isinstance(extends, str) and extends:
        try:
            found = find(extends, source.folder)
            _check_circle(found, [*chain, source.key])
        except RecipeError as error:
            lines.append(mistake_at(source, marks.find(("extends",)), ("extends",), str(error)))
        else:
            try:
                base = _read(found, [*chain, source.key])
            except RecipeError as error:
                inherited = error.mistakes or [mistake_at(found, None, (), str(error))]
    if lines or inherited or recipe is None:
        lines.sort(key=lambda line: (line.line or 0, line.column or 0))
        raise RecipeError(mistakes=lines + inherited)
    recipe._warnings = tuple(_warnings(source, recipe, marks))
    if base is not None:
        own = {field: getattr(recipe, field) for field in recipe.model_fields_set - {"extends", "set"}}
        warned = recipe._warnings if "steps" in own else base._warnings
        changes, recipe = recipe.set, base.model_copy(update=own)
        recipe._warnings = warned
        if changes:
            recipe = _changed(source, recipe, changes, marks)
        if idle := _idle_protection(recipe):
            places: list[Loc] = [("protect", name) for name in idle]
            raise RecipeError(mistakes=[mistake_at(source, marks.find(loc), loc, _IDLE) for loc in places])
    recipe._name = source.key if source.shipped else source.label if source.key else ""
    return recipe


def _warnings(source: Source, recipe: Recipe, marks: Marks) -> Iterator[Mistake]:
    """A budget written ``1`` keeps one token, where ``1.0`` (all of them) may be meant."""
    for number, step in enumerate(recipe.steps):
        for name, value in step.params:
            entries = value if isinstance(value, list | tuple) else [value]
            for place, entry in enumerate(entries):
                if isinstance(entry, Budget) and entry.is_count and entry.num == 1:
                    loc: Loc = ("steps", number, "params", name, *((place,) if entries is value else ()))
                    yield mistake_at(source, marks.find(loc), loc, "1 keeps one token; write 1.0 to keep all")


_IDLE = "no pass of this recipe removes tokens inside an encoder; leave it out"


def _idle_protection(recipe: Recipe) -> list[str]:
    """The keys of ``protect`` that no step of a recipe looks at."""
    if recipe.protect is None or any(getattr(get_pass(s.pass_), "protects_leading", False) for s in recipe.steps):
        return []
    return [name for name in ("leading_tokens", "trailing_tokens") if getattr(recipe.protect, name) is not None]


def _changed(source: Source, recipe: Recipe, changes: Mapping[str, Any], marks: Marks) -> Recipe:
    """``recipe`` with the values that the key ``set`` of another one gives; mistakes name the entry of ``set``."""
    try:
        return recipe.override(changes)
    except RecipeError as error:
        lines = []
        for mistake in error.mistakes:
            entry = next((place for place in changes if mistake.where.startswith(place)), mistake.where)
            loc: Loc = ("set", entry)
            lines.append(mistake_at(source, marks.find(loc), loc, mistake.what))
        lines.sort(key=lambda line: (line.line or 0, line.column or 0))
        raise RecipeError(mistakes=lines) from None


def _check_circle(found: Source, chain: list[str]) -> None:
    if found.key in chain:
        names = [Path(key).name for key in [*chain[chain.index(found.key) :], found.key]]
        raise RecipeError(f"recipes extend each other in a circle: {' -> '.join(names)}")

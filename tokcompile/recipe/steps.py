"""The parts of a recipe: steps, their targets, what they expect, what is protected."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
)
from pydantic_core import InitErrorDetails

from tokcompile.errors import RecipeError
from tokcompile.kinds import KINDS, LOCAL
from tokcompile.recipe.wording import layer_bounds, shown
from tokcompile.registry import did_you_mean, get_pass


class RecipeModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def errors_at(model: type[BaseModel], *found: tuple[tuple[str, ...], str, Any]) -> ValidationError:
    """A complaint at several places inside one value: (place, what is wrong, the value there) of each."""
    details: list[InitErrorDetails] = [
        {"type": "value_error", "loc": place, "input": value, "ctx": {"error": ValueError(what)}}
        for place, what, value in found
    ]
    return ValidationError.from_exception_data(model.__name__, details)


_LayerEntry = Annotated[
    Any, WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^-?[0-9]+--?[0-9]+$"}]})
]


class Target(RecipeModel):
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
            bounds = layer_bounds(entry)
            if bounds is None:
                raise ValueError(f'should hold whole numbers and ranges such as "4-8", found {shown(entry)}')
            if (bounds[0] < 0) == (bounds[1] < 0) and bounds[0] > bounds[1]:
                raise ValueError(f"range {entry!r} runs backwards")
        return value

    def layer_indices(self, depth: int) -> list[int]:
        """The selected layers of a stack of ``depth`` layers: 0-based, ascending, each once.

        Raises:
            RecipeError: an entry asks for a layer that the stack does not have. A model has several stacks; whether
                one of them has the layer is for the caller to say.
        """
        if self.layers is None:
            return list(range(depth))
        chosen: set[int] = set()
        for entry in self.layers:
            low, high = layer_bounds(entry) or (0, 0)
            start, stop = (index + depth if index < 0 else index for index in (low, high))
            if not 0 <= start <= stop < depth:
                raise RecipeError(f"target.layers: {entry!r} is outside a stack of {depth} layers (0..{depth - 1})")
            chosen.update(range(start, stop + 1))
        return sorted(chosen)

    def matches_path(self, path: str) -> bool:
        """Whether a module path passes the ``path`` filter."""
        return self.path is None or fnmatchcase(path, self.path)


class Expect(RecipeModel):
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


class Protect(RecipeModel):
    """What no step may touch, beyond class, register and text tokens, which are always kept."""

    paths: list[str] = Field(
        default_factory=list,
        description="Globs on module paths; what matches is left alone, with all that is inside it.",
    )
    leading_tokens: int | None = Field(
        None, ge=0, description="Tokens kept at the head of an encoder's axis; left out, as found in the graph."
    )
    trailing_tokens: int | None = Field(
        None, ge=0, description="Tokens kept at the end of an encoder's axis; left out, as found in the graph."
    )

    def covers(self, path: str) -> bool:
        """Whether the region at that module path has to be left alone."""
        return bool(self.covering(path))

    def covering(self, path: str) -> list[str]:
        """The globs that cover a module path: they fit it, or a module that it is inside of."""
        parts = path.split(".")
        around = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        return [glob for glob in self.paths if any(fnmatchcase(module, glob) for module in around)]


class Step(RecipeModel):
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

    @field_validator("target")
    @classmethod
    def _fits_the_pass(cls, value: Target, info: ValidationInfo) -> Target:
        """A filter that the pass would not look at is refused, so that none is ignored silently."""
        if "pass_" not in info.data:
            return value
        method = get_pass(info.data["pass_"])
        found: list[tuple[tuple[str, ...], str, Any]] = []
        kinds = (method.regions, *getattr(method, "also", ()))
        if value.region is not None and value.region not in kinds:
            what = f"{method.name} works on {' or '.join(kinds)}, not on {value.region}; leave target.region out"
            found.append((("region",), what, value.region))
        if value.layers is not None and method.regions not in LOCAL:
            what = f"{method.name} takes no target.layers; its own parameters say at which depth it acts"
            found.append((("layers",), what, value.layers))
        if value.modality is not None and method.regions != "merge_point":
            what = "images and video are told apart at merge points only; leave target.modality out"
            found.append((("modality",), what, value.modality))
        if found:
            raise errors_at(Target, *found)
        return value

    @field_validator("params")
    @classmethod
    def _params(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping | BaseModel):
            raise ValueError(f"should be a mapping of parameters, found {shown(value)}")
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

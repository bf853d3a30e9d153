"""The parameters of a pass as text for people: type, bounds, unit, default, source."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from tokcompile.registry import get_pass

_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "mapping",
    "array": "list",
}
_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minItems": "at least {} long",
    "maxItems": "at most {} long",
    "minLength": "at least {} long",
    "pattern": "matching {}",
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a pass (or one key of a recipe).

    Attributes:
        name: its key in a recipe.
        type: with bounds, such as ``number > 0, ≤ 1``.
        default: as JSON; None where the parameter is required.
        required: whether it has to be given.
        unit: what the number counts; "" where the type says it all.
        source: where the default or the range comes from.
        description: what it does.
    """

    name: str
    type: str
    default: Any
    required: bool
    unit: str
    source: str
    description: str


def parameters(model: type[BaseModel]) -> list[Parameter]:
    """The fields of a pydantic model, in order."""
    schema = model.model_json_schema(by_alias=True)
    defs, required = schema.get("$defs", {}), set(schema.get("required", []))
    found = []
    for name, field in schema.get("properties", {}).items():
        found.append(
            Parameter(
                name,
                type_of(field, defs),
                field.get("default"),
                name in required,
                _unit(field, defs),
                field.get("source", ""),
                " ".join(field.get("description", "").split()),
            )
        )
    return found


def pass_parameters(name: str) -> list[Parameter]:
    """The parameters of the pass of that name. Raises RecipeError where there is none."""
    return parameters(get_pass(name).Params)


def pass_summary(name: str) -> str:
    """First paragraph of the pass's docstring."""
    return " ".join((inspect.getdoc(get_pass(name)) or "").split("\n\n")[0].split())


def pass_source(name: str) -> str:
    """What the docstring of the pass (or of its module) says behind "Source:"; "" where it names none."""
    method = get_pass(name)
    for text in (inspect.getdoc(method), getattr(sys.modules.get(method.__module__), "__doc__", None)):
        match = re.search(r"^\s*Source: (.+?)(?:\n\s*\n|\Z)", text or "", re.MULTILINE | re.DOTALL)
        if match:
            return " ".join(match[1].split())
    return ""


def type_of(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    """A JSON Schema as words."""
    schema = _resolved(schema, defs)
    if "enum" in schema:
        return " | ".join("null" if value is None else str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if "anyOf" in schema:
        kinds = dict.fromkeys(_named(option, defs) for option in schema["anyOf"])
        return " or ".join(kinds)
    if "oneOf" in schema:
        return " or ".join(dict.fromkeys(type_of(option, defs) for option in schema["oneOf"]))
    kind = schema.get("type", "")
    text = _TYPES.get(kind, kind)
    if kind == "array" and "items" in schema:
        inner = type_of(schema["items"], defs)
        text = f"list of ({inner})" if " or " in inner else f"list of {inner}"
    bounds = [words.format(_number(schema[key])) for key, words in _BOUNDS.items() if key in schema]
    return f"{text} {', '.join(bounds)}" if bounds else text


def _named(option: dict[str, Any], defs: dict[str, Any]) -> str:
    kind = type_of(option, defs)
    label = option.get("description", "") if option.get("type") in ("integer", "number") else ""
    return re.sub(r"^(whole number|number)", label, kind) if label else kind


def _unit(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    resolved = _resolved(schema, defs)
    unit = str(resolved.get("unit", ""))
    return unit or (_unit(resolved["items"], defs) if isinstance(resolved.get("items"), dict) else "")


def _resolved(schema: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    return {**defs[name], **{k: v for k, v in schema.items() if k != "$ref"}} if name in defs else schema


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

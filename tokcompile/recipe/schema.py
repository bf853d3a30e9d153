"""The JSON Schema of a recipe file, for editors. ``recipes/schema.json`` is :func:`json_schema` of what ships."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokcompile.recipe.recipe import Recipe
from tokcompile.registry import get_pass, pass_names, shipped_passes

#: First line of a recipe file that tells the YAML language server (VS Code, Neovim, ...) which schema to use.
EDITOR_LINE = "# yaml-language-server: $schema={}"
FILE = "schema.json"


def json_schema(passes: Iterable[str] | None = None) -> dict[str, Any]:
    """JSON Schema of a recipe file; the parameters of each known pass included.

    Args:
        passes: names of the passes that a recipe may use; left out, all that are installed.
    """
    names = pass_names() if passes is None else sorted(passes)
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema(by_alias=True)}
    schema["title"] = "tokcompile recipe"
    defs, branches = schema["$defs"], []
    for name in names:
        params = get_pass(name).Params.model_json_schema(by_alias=True, ref_template=f"#/$defs/{name}_{{model}}")
        defs.update({f"{name}_{key}": value for key, value in params.pop("$defs", {}).items()})
        defs[f"{name}_params"] = params
        then: dict[str, Any] = {"properties": {"params": {"$ref": f"#/$defs/{name}_params"}}}
        if params.get("required"):
            then["required"] = ["params"]
        branches.append({"if": {"properties": {"pass": {"const": name}}}, "then": then})
    defs["Step"]["properties"]["pass"]["enum"] = names
    if branches:
        defs["Step"]["allOf"] = branches
    return schema


def shipped_schema() -> dict[str, Any]:
    """The content of ``recipes/schema.json``: passes of other packages left out."""
    return json_schema(shipped_passes())

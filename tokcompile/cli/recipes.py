"""``tokcompile recipes list|show|new|schema``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tokcompile.cli.app import recipes_app
from tokcompile.cli.options import AsJson, Sets, load_recipe, may_replace
from tokcompile.cli.output import first_sentence, stderr, stdout, table_of, write_json, yaml_text
from tokcompile.errors import TokcompileError


@recipes_app.command("list", epilog="Example: tokcompile recipes list")
def recipes_list(as_json: AsJson = False) -> None:
    """The recipes that ship and the passes that are installed."""
    from tokcompile.recipe.parameters import pass_source, pass_summary
    from tokcompile.recipes import Recipe, shipped
    from tokcompile.registry import get_pass, load_failures, pass_names

    recipes = [Recipe.load(name) for name in shipped()]
    passes = [
        {"name": n, "region": get_pass(n).regions, "summary": pass_summary(n), "source": pass_source(n)}
        for n in pass_names()
    ]
    if as_json:
        write_json(
            {
                "recipes": [{"name": r.name, **r.to_dict()} for r in recipes],
                "passes": passes,
                "failures": load_failures(),
            }
        )
        return
    table = table_of("recipe", "passes", "what it does")
    for recipe in recipes:
        table.add_row(recipe.name, ", ".join(step.pass_ for step in recipe.steps), first_sentence(recipe.description))
    stdout().print(table)
    table = table_of("pass", "works on", "what it does")
    for entry in passes:
        table.add_row(entry["name"], entry["region"], entry["summary"])
    stdout().print()
    stdout().print(table)
    for place, why in load_failures().items():
        stderr().print(f"{place} did not load: {why}", markup=False)


@recipes_app.command("show", epilog="Examples: tokcompile recipes show vlm_prune_90 · tokcompile recipes show todre")
def recipes_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Recipe (shipped name or file), or name of a pass.")],
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """A recipe with everything filled in, and the parameters of its passes: type, bounds, unit, default, source."""
    from tokcompile.recipe.parameters import pass_parameters, pass_source, pass_summary
    from tokcompile.recipes import shipped
    from tokcompile.registry import pass_names

    recipe = (
        None if name in pass_names() and name not in shipped() and not Path(name).exists() else load_recipe(name, sets)
    )
    passes = [name] if recipe is None else list(dict.fromkeys(step.pass_ for step in recipe.steps))
    if as_json:
        write_json(
            {
                "recipe": recipe.to_dict() if recipe else None,
                "passes": {
                    p: {
                        "summary": pass_summary(p),
                        "source": pass_source(p),
                        "parameters": [vars(q) for q in pass_parameters(p)],
                    }
                    for p in passes
                },
            }
        )
        return
    out = stdout()
    if recipe is not None:
        out.print(yaml_text(recipe.to_dict()), markup=False, soft_wrap=True)
    for entry in passes:
        source = pass_source(entry)
        out.print(Text.assemble((entry, "bold"), ": ", pass_summary(entry)), soft_wrap=True)
        if source:
            out.print(Text(f"Source: {source}"), soft_wrap=True)
        table = table_of("parameter", "type", "default", "unit", "source", "meaning")
        for parameter in pass_parameters(entry):
            default = "required" if parameter.required else json.dumps(parameter.default)
            table.add_row(
                parameter.name, parameter.type, default, parameter.unit, parameter.source, parameter.description
            )
        out.print(table)


@recipes_app.command("new", epilog="Example: tokcompile recipes new mine.yaml --from vlm_prune_90")
def recipes_new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file to write.")],
    base: Annotated[str, typer.Option("--from", metavar="RECIPE", help="Recipe to start from.")] = "vlm_prune_90",
    sets: Sets = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write a recipe to edit, and the JSON Schema beside it that lets editors check and complete it."""
    from tokcompile.recipe.schema import EDITOR_LINE, json_schema

    recipe = load_recipe(base, sets)
    if file.suffix not in (".yaml", ".yml"):
        raise typer.BadParameter(f"{file}: a recipe ends in .yaml")
    schema = file.with_name("tokcompile.schema.json")
    if file.exists() and not may_replace(file, force):
        raise TokcompileError(f"{file} exists; choose another name, or --force to overwrite it")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{EDITOR_LINE.format(schema.name)}\n{yaml_text(recipe.to_dict())}", encoding="utf-8")
    schema.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    stderr().print(f"wrote {file} and {schema}; check it with: tokcompile lint {file}", markup=False, soft_wrap=True)


@recipes_app.command("schema", epilog="Example: tokcompile recipes schema > tokcompile.schema.json")
def recipes_schema() -> None:
    """The JSON Schema of a recipe file, with the parameters of every installed pass."""
    from tokcompile.recipe.schema import json_schema

    write_json(json_schema())

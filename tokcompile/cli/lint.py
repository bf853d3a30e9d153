"""``tokcompile lint``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from tokcompile.cli.app import app
from tokcompile.cli.codes import RECIPE
from tokcompile.cli.options import AsJson, Sets, load_recipe
from tokcompile.cli.output import stdout, write_json
from tokcompile.errors import Mistake, RecipeError


@app.command(epilog="Examples: tokcompile lint mine.yaml · tokcompile lint recipes/*.yaml --json")
def lint(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Recipe files (or shipped names).")],
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Check recipes; every mistake at once, with its line and column. Exit code 3 if there is one.

    What is valid but probably not meant is a warning, which changes no exit code.
    """
    found: list[dict[str, Any]] = []
    for name in files:
        mistakes: list[dict[str, Any]] = []
        warned: Sequence[Mistake] = []
        try:
            warned = load_recipe(name, sets).warnings
        except RecipeError as error:
            mistakes = [vars(m) for m in error.mistakes] or [
                {"file": name, "line": None, "column": None, "where": "", "what": line}
                for line in str(error).split("\n")
            ]
            if not as_json:
                prefix = "" if error.mistakes else f"{name}: "
                for line in str(error).split("\n"):
                    stdout().print(prefix + line, markup=False, soft_wrap=True, highlight=False)
        else:
            if not as_json:
                for warning in warned:
                    stdout().print(f"{warning} (warning)", markup=False, soft_wrap=True, highlight=False)
                stdout().print(f"{name}: ok", markup=False, soft_wrap=True, highlight=False)
        found.append(
            {"file": name, "ok": not mistakes, "mistakes": mistakes, "warnings": [vars(warning) for warning in warned]}
        )
    if as_json:
        write_json(found)
    if not all(entry["ok"] for entry in found):
        raise typer.Exit(RECIPE)

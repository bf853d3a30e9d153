"""The application, its group of recipe commands, and the options before a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokcompile.version import __version__

_EPILOG = """
MODEL is a folder that transformers' save_pretrained wrote, a name on the hub, or module:function (file.py:function)
that returns (model, inputs).

Exit codes: 0 done, 2 wrong usage, 3 recipe not valid, 4 recipe changes nothing, 5 model, file or package missing,
6 refused, 1 a defect of tokcompile.
"""

app = typer.Typer(
    name="tokcompile",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
    epilog=_EPILOG,
    help="Compress models inside the graph that torch.compile captures.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The recipes that ship, what is in them, and a start for your own.",
)
app.add_typer(recipes_app, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tokcompile {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (works anywhere).")] = False,
    passes: Annotated[
        list[Path] | None,
        typer.Option(
            "--passes",
            metavar="FILE",
            help="Python file with passes of your own; it is run (works anywhere). Repeatable.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    from tokcompile.registry import load_file

    for path in passes or []:
        load_file(path)

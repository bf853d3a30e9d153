"""Where a call of the command line starts and ends."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from rich.text import Text

from tokcompile.cli import lint, models, recipes  # noqa: F401  each registers its commands
from tokcompile.cli.app import app
from tokcompile.cli.codes import DEFECT, OK, exit_code, message
from tokcompile.cli.output import stderr


def in_front(given: Sequence[str], option: str) -> list[str]:
    """``given`` with each ``option VALUE`` (or ``option=VALUE``) ahead of the command, where the program reads it."""
    words, first, rest = list(given), list[str](), list[str]()
    while words:
        word = words.pop(0)
        if word == "--":  # what follows is not for us
            return [*first, *rest, word, *words]
        if word == option and words:
            first += [word, words.pop(0)]
        else:
            (first if word.startswith(f"{option}=") else rest).append(word)
    return [*first, *rest]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Gives the exit code; prints no traceback without ``--debug``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = in_front([argument for argument in given if argument != "--debug"], "--passes")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)  # what cannot be captured is in the report
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a hub that does not answer is one error
    try:
        app(given, prog_name="tokcompile")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK if stop.code is None else DEFECT
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        stderr().print(Text.assemble(("error: ", "bold red"), message(error) or type(error).__name__), soft_wrap=True)
        return exit_code(error)
    return OK


def run() -> None:
    """Console script."""
    sys.exit(main())

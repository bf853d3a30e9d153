"""Exit codes, and the message of an error."""

from __future__ import annotations

import re
from importlib.metadata import requires

from tokcompile.errors import NoMatchError, RecipeError, TokcompileError

OK, DEFECT, USAGE, RECIPE, NO_MATCH, MISSING, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130


def exit_code(error: BaseException) -> int:
    """The exit code that stands for an error."""
    from tokcompile.model_source import ModelNotFoundError

    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, RecipeError):
        return RECIPE
    if isinstance(error, NoMatchError):
        return NO_MATCH
    if isinstance(error, ModelNotFoundError | ImportError | OSError):
        return MISSING
    return REFUSED if isinstance(error, TokcompileError) else DEFECT


def extras_with(package: str) -> list[str]:
    """The extras of tokcompile that bring ``package``."""
    found = []
    for line in requires("tokcompile") or []:
        name, marker = re.match(r"[\w.-]+", line), re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if name and marker and name[0] == package:
            found.append(marker[1])
    return found


def message(error: BaseException) -> str:
    if isinstance(error, TokcompileError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        extras = " or ".join(f"pip install 'tokcompile[{extra}]'" for extra in extras_with(package))
        return f"{error.name} is not installed: pip install {package}" + (f" (or {extras})" if extras else "")
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError | ImportError):
        return str(error)
    first = " ".join(str(error).split())[:300]
    return f"a defect of tokcompile, or of the model's code: {type(error).__name__}: {first}\n(--debug shows where)"

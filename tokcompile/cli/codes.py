"""Exit codes, and the message of an error."""

from __future__ import annotations

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


def message(error: BaseException) -> str:
    if isinstance(error, TokcompileError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed: pip install {error.name.split('.')[0]}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError | ImportError):
        return str(error)
    first = " ".join(str(error).split())[:300]
    return f"a defect of tokcompile, or of the model's code: {type(error).__name__}: {first}\n(--debug shows where)"

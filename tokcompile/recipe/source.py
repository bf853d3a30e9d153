"""Where a recipe comes from: a name that ships, or a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tokcompile.errors import Mistake, RecipeError
from tokcompile.recipe.wording import shown
from tokcompile.recipe.yaml import Loc, Place
from tokcompile.registry import did_you_mean


def shipped() -> list[str]:
    """Names of the recipes that ship, sorted."""
    folder = files("tokcompile.recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


# --- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a recipe comes from: its identity, the name for messages, the folder that ``extends`` is relative to."""

    key: str
    label: str
    folder: Path
    shipped: bool = False


def find(name: str, folder: Path) -> Source:
    if name in shipped():
        return Source(name, f"{name}.yaml", folder, shipped=True)
    try:
        path = folder / name
        if path.suffix in (".yaml", ".yml") or path.exists():
            return Source(str(path.resolve()), str(path), path.parent)
    except (OSError, ValueError, RuntimeError) as error:  # a name that no file can have
        raise RecipeError(f"unknown recipe {shown(name)}: {error}") from None
    raise RecipeError(f"unknown recipe {shown(name)}{did_you_mean(name, shipped())}; a path ends in .yaml")


# --- messages --------------------------------------------------------------------------------------------------------


def mistake_at(source: Source, place: Place | None, loc: Loc, what: str) -> Mistake:
    line, column = place or (None, None)
    return Mistake(source.label, line, column, place_text(loc), " ".join(what.splitlines()))


def place_text(loc: Loc) -> str:
    """``("steps", 0, "params", "keep")`` as ``steps[0].params.keep``."""
    text = ""
    for part in loc:
        plain = isinstance(part, str) and re.fullmatch(r"[\w-]+", part, re.ASCII)
        text += f".{part}" if plain else f"[{part!r}]"
    return text.lstrip(".")

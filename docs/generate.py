"""Write what the documentation takes from the code: ``python docs/generate.py`` (``--check`` only compares).

recipes/schema.json     JSON Schema of a recipe file
docs/reference.md       every key of a recipe, every pass with its parameters, every recipe that ships, every region
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

from pydantic import BaseModel

from tokcompile.recipe.parameters import parameters, pass_source, pass_summary
from tokcompile.recipe.recipe import Recipe
from tokcompile.recipe.schema import shipped_schema
from tokcompile.recipe.source import shipped
from tokcompile.recipe.steps import Expect, Protect, Step, Target
from tokcompile.regions.model import (
    AttentionRegion,
    AudioEncoder,
    DecoderStack,
    FeedForwardRegion,
    MergePoint,
    MoeRegion,
    Region,
    VisionEncoder,
)
from tokcompile.registry import get_pass, shipped_passes

REGIONS = (
    *(AttentionRegion, FeedForwardRegion, MoeRegion, MergePoint),
    *(DecoderStack, VisionEncoder, AudioEncoder),
)
ROOT = Path(__file__).resolve().parents[1]


def generated() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    return {
        ROOT / "recipes" / "schema.json": json.dumps(shipped_schema(), indent=2, ensure_ascii=False) + "\n",
        ROOT / "docs" / "reference.md": reference(),
    }


def reference() -> str:
    """The recipe reference."""
    parts = [
        "<!-- written by docs/generate.py -->\n# Recipe reference\n",
        "[Recipes](recipes.md) says how they work; this is every key, pass and recipe.\n",
    ]
    for title, model in (
        ("A recipe", Recipe),
        ("`steps[i]`", Step),
        ("`steps[i].target`", Target),
        ("`steps[i].expect`", Expect),
        ("`protect`", Protect),
    ):
        parts.append(f"## {title}\n\n{_table(model)}")
    parts.append("## Passes\n")
    for name in shipped_passes():
        method = get_pass(name)
        source = pass_source(name)
        also = "".join(f"; with `target: {{region: {kind}}}` on `{kind}`" for kind in method.also)
        parts.append(
            f"### `{name}`\n\n{pass_summary(name)} Works on `{method.regions}`{also}.\n"
            + (f"\nSource: {source}\n" if source else "")
            + f"\n{_table(method.Params)}"
        )
    parts.append("## Recipes that ship\n")
    for name in shipped():
        recipe = Recipe.load(name)
        steps = ", ".join(f"`{step.pass_}`" for step in recipe.steps)
        parts.append(f"### `{name}`\n\nPasses: {steps}.\n\n{_paragraphs(recipe.description)}\n")
    parts.append(
        "## Regions\n\nWhat is found in a graph, and what a pass is given; the classes are in `tokcompile.authoring`. "
        "A field that a region does not have is None.\n"
    )
    parts += [_region(kind) for kind in REGIONS]
    return "\n".join(parts)


def _region(kind: type[Region]) -> str:
    """The fields of a class of regions, by its docstring and those of what it builds on."""
    inherited = [base for base in reversed(kind.__mro__) if issubclass(base, Region)]
    rows = [row for base in inherited for row in _attributes(base) if base is kind or row[0] != "`kind`"]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return f"### `{kind.__name__}`\n\nOf the kind `{kind.kind}`.\n\n| fields | |\n|---|---|\n{table}\n"


def _attributes(kind: type) -> list[tuple[str, str]]:
    """(names, meaning) of each entry below "Attributes:" in a docstring."""
    _, _, text = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\S[^:]*): ((?:.|\n(?=     ))*)", text, re.MULTILINE)
    found = re.compile(r":\w+:`~?([^`]*)`|``([^`]*)``")
    return [(_names(names), found.sub(r"`\1\2`", " ".join(said.split()))) for names, said in entries]


def _names(text: str) -> str:
    return " ... ".join(", ".join(f"`{name}`" for name in part.split(", ")) for part in text.split(" ... "))


def _paragraphs(text: str) -> str:
    """A description; lines that are laid out by hand stay as they are."""
    blocks = text.strip().split("\n\n")
    return "\n\n".join(f"```text\n{b}\n```" if "\n  " in b else " ".join(b.split()) for b in blocks)


def _table(model: type[BaseModel]) -> str:
    found = parameters(model)
    said = [column for column in ("unit", "source") if any(getattr(p, column) for p in found)]
    columns = ["key", "type", "default", *said, "meaning"]
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for p in found:
        default = "required" if p.required else f"`{json.dumps(p.default)}`" if p.default is not None else ""
        cells = {
            "key": f"`{p.name}`",
            "type": p.type,
            "default": default,
            "unit": p.unit,
            "source": p.source,
            "meaning": p.description,
        }
        rows.append("| " + " | ".join(cells[c].replace("|", "\\|") for c in columns) + " |")
    return "\n".join(rows) + "\n"


def stale() -> list[Path]:
    """The files that do not hold what they should."""
    return [
        path for path, text in generated().items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]


def main(argv: list[str]) -> int:
    """Entry point."""
    old = stale()
    for path in old:
        print(f"{'out of date' if argv else 'written'}: {path.relative_to(ROOT)}")
        if not argv:
            path.write_text(generated()[path], encoding="utf-8")
    return int(bool(old and argv))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

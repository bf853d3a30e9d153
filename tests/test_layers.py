"""Imports go down, and never in a circle: the contracts of pyproject.toml, kept by the sources and able to break."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import ROOT, install_copy, sources

LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_copy(tmp_path_factory.mktemp("house"))


def lint(house: Path) -> tuple[int, str]:
    """Exit code and text of import-linter on a copy of the package (it cannot follow folders that are mapped)."""
    done = subprocess.run(
        [sys.executable, "-c", LINT, ROOT / "pyproject.toml"],
        cwd=house,
        capture_output=True,
        text=True,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_imports_go_down_and_never_in_a_circle(house: Path) -> None:
    code, said = lint(house)
    assert code == 0, said
    assert "2 kept, 0 broken" in said


@pytest.mark.parametrize(
    ("module", "imported", "words"),
    [
        ("kernels/segments.py", "tokcompile.rewrite.selection", "is not allowed to import tokcompile.rewrite"),
        ("runtime/recording.py", "tokcompile.runtime.session", "No cycles are allowed in tokcompile.runtime"),
        ("somewhere.py", "tokcompile.errors", "tokcompile.somewhere"),
    ],
    ids=["up", "circle", "a module on no floor"],
)
def test_what_the_contracts_refuse(house: Path, module: str, imported: str, words: str) -> None:
    file = house / "tokcompile" / module
    before = file.read_text() if file.exists() else None
    text = before or ""
    try:  # imports for types count too
        file.write_text(f"{text}\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {imported}\n")
        code, said = lint(house)
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_text(before)
    assert code == 1
    assert words in said


@pytest.mark.parametrize("file", sources("*.py"), ids=str)
def test_what_is_longer_than_one_reading_says_why_it_is_one_thing(file: Path) -> None:
    """450 lines of a file, 200 of a class, 60 of a function, without its signature and docstring."""
    text = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    page = ast.get_docstring(tree) or ""
    assert text.count("\n") <= 450 or "One file:" in page
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            said = ast.get_docstring(node)
            body = node.body[1:] if said and len(node.body) > 1 else node.body
            lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
            kind, most = ("class", 200) if isinstance(node, ast.ClassDef) else ("function", 60)
            reason = f"One {kind}:" in (said or "") or (f"One {kind}:" in page and f"``{node.name}``" in page)
            assert lines <= most or reason, f"{node.name}: {lines} lines"

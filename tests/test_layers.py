"""Imports go down, and never in a circle: the contracts of pyproject.toml, kept by the sources and able to break."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.house import ROOT, install_copy

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

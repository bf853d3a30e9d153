"""Files, classes and functions that one reading holds; what is larger says in its docstring why it is one thing.

The reason is the sentence that begins with "One file:", "One class:" or "One function:"; that of a Triton kernel, which
has no docstring of its own, stands in the docstring of its file and names it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import ROOT, sources

#: Lines, blank ones and comments included; without the docstring, and of a function without its signature.
LIMITS = {"file": 450, "class": 200, "function": 60}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def measured(path: Path) -> Iterator[tuple[str, str, int, str]]:
    """(kind, name, lines, where a reason may stand) of a file and of each class and function in it."""
    text = path.read_text()
    tree = ast.parse(text)
    about = ast.get_docstring(tree) or ""
    yield "file", path.name, len(text.splitlines()) - docstring_lines(tree), about
    for node in ast.walk(tree):
        if isinstance(node, Definition):
            first, last = node.body[0].lineno if not isinstance(node, ast.ClassDef) else node.lineno, node.end_lineno
            assert last is not None
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            doc = ast.get_docstring(node) or (about if f"``{node.name}``" in about else "")
            yield kind, node.name, last - first + 1 - docstring_lines(node), doc


def docstring_lines(node: ast.Module | Definition) -> int:
    if ast.get_docstring(node) is None:
        return 0
    first = node.body[0]
    assert first.end_lineno is not None
    return first.end_lineno - first.lineno + 1


def unexplained(path: Path) -> list[str]:
    return [
        f"{path}: {kind} {name} has {lines} lines, more than {LIMITS[kind]}: split it, or say why it is one thing in a "
        f'sentence of its docstring that begins with "One {kind}:"'
        for kind, name, lines, doc in measured(path)
        if lines > LIMITS[kind] and f"One {kind}:" not in doc
    ]


def test_what_is_large_says_why() -> None:
    found = [line for path in sources("*.py") for line in unexplained(ROOT / path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("doc", "count"), [("Much.", 1), ("Much. One function: a table of cases.", 0)])
def test_a_large_function_without_a_reason_is_found(tmp_path: Path, doc: str, count: int) -> None:
    file = tmp_path / "large.py"
    file.write_text(f'def large():\n    """{doc}"""\n' + "    x = 1\n" * (LIMITS["function"] + 1))
    assert len(unexplained(file)) == count

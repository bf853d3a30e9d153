"""Every code block of the documentation runs, and what is generated from the code is current.

Blocks of a page run in order, in one folder and one namespace. ``title="name"`` writes a file of that name instead;
``text`` behind a block is what it prints; ``tokcompile`` in a ``bash`` block is the command line of this checkout.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
import sys
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tests.members import members
from tokcompile import registry
from tokcompile.cli import main
from tokcompile.recipes import Recipe, shipped
from tokcompile.registry import shipped_passes

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
#: Commands that are not run here: they install, or are what runs the tests.
LEFT_OUT = re.compile(r"(pip|make|git|vllm|python benchmarks/)\b")


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, title, text and first line."""

    language: str
    title: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            language, _, rest = token.info.partition(" ")
            title = re.search(r'title="([^"]+)"', rest)
            found.append(Block(language, title[1] if title else "", token.content, token.map[0] + 2))
    return found


class Runner:
    """Runs the blocks of one page."""

    def __init__(self, page: Path) -> None:
        self.page, self.printed = page, ""
        self.module = types.ModuleType("docs_page")  # a real one: Dynamo looks globals up by module
        self.names: dict[str, Any] = vars(self.module)

    def run(self, block: Block) -> None:
        if block.title:
            path = Path(block.title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code, encoding="utf-8")
            if path.suffix == ".py":
                compile(block.code, block.title, "exec")
            return
        run = getattr(self, f"_{block.language or 'none'}", None)
        assert run is not None, f"{self.page.name}:{block.line}: nothing runs blocks of language {block.language!r}"
        run(block)

    def _python(self, block: Block) -> None:
        out = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.code, str(self.page), "exec")
        with contextlib.redirect_stdout(out):
            exec(code, self.names)
        self.printed = out.getvalue()

    def _bash(self, block: Block) -> None:
        out = io.StringIO()
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or LEFT_OUT.match(line):
                continue
            assert words[0] == "tokcompile", f"{self.page.name}:{block.line}: {words[0]} is not run by this test"
            with contextlib.redirect_stdout(out):
                assert main(words[1:]) == 0, line
        self.printed = out.getvalue()

    def _text(self, block: Block) -> None:
        if self.printed:
            assert block.code.strip() == self.printed.strip()
            self.printed = ""

    def _yaml(self, block: Block) -> None:
        if block.code.lstrip("# ").startswith(("recipe_version", "yaml-language-server")):
            Recipe.parse(block.code, f"{self.page.name}:{block.line}")

    def _toml(self, block: Block) -> None:
        tomllib.loads(block.code)

    def _none(self, block: Block) -> None:
        pass


#: Commands and calls that the tests of the command line, of a pass in one file, of ONNX and of quality make, too.
ELSEWHERE = ["index.md", "command_line.md", "write_a_pass.md", "onnx.md", "quality.md"]


@pytest.mark.parametrize(
    "page", members(PAGES, [page for page in PAGES if page.name not in ELSEWHERE]), ids=lambda page: page.stem
)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.pass_names()
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))
    modules = set(sys.modules)
    runner = Runner(page)
    monkeypatch.setitem(sys.modules, "docs_page", runner.module)
    try:
        for block in blocks(page):
            runner.run(block)
    finally:
        for name in set(sys.modules) - modules:
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")) or name.startswith("tokcompile_pass_"):
                del sys.modules[name]


def _generator() -> Any:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_generated_is_current() -> None:
    assert [str(path.relative_to(ROOT)) for path in _generator().stale()] == [], "run `python docs/generate.py`"


def test_the_reference_holds_everything() -> None:
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert all(f"## `{name}`" in text for name in (*shipped_passes(), *shipped()))
    assert "| `keep` | ratio > 0, ≤ 1 or count ≥ 1 | required |" in text


def test_every_pass_has_a_row_in_the_table_of_methods() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    missing = [name for name in shipped_passes() if f"| `{name}` |" not in text]
    assert missing == [], "say in docs/methods.md what it needs, costs, and what was checked"


def test_links_between_pages_hold() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name} links to {target}"


def test_the_site_is_built(tmp_path: Path) -> None:
    build = pytest.importorskip("mkdocs.commands.build", reason="mkdocs is not installed (extra: docs)")
    pytest.importorskip("material", reason="mkdocs-material is not installed (extra: docs)")
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path))
    config.plugins.on_startup(command="build", dirty=False)
    build.build(config)
    for page in PAGES:
        html = (tmp_path / f"{page.stem}.html").read_text(encoding="utf-8")
        for picture in re.findall(r'<img [^>]*src="([^":]+)"', html):
            assert (tmp_path / picture).is_file(), f"{page.name} shows {picture}"
    assert "Five minutes" in (tmp_path / "index.html").read_text(encoding="utf-8")

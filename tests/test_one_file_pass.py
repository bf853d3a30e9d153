"""A new method is one file of at most 60 lines and one YAML file. The two are those of ``docs/write_a_pass.md``."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tokcompile
import tokcompile.passes
from tests.pruning import check, optimized
from tests.zoo.vlm import VLMS, shallow
from tokcompile import registry
from tokcompile.errors import TokcompileError
from tokcompile.recipes import Recipe
from tokcompile.registry import get_pass, load_file

PAGE = Path(__file__).resolve().parents[1] / "docs" / "write_a_pass.md"


def block(title: str) -> str:
    """The code block of that title."""
    match = re.search(rf'^```\w+ title="{re.escape(title)}"\n(.*?)^```$', PAGE.read_text("utf-8"), re.M | re.S)
    assert match is not None, f"{PAGE.name} has no block {title}"
    return match[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for title in ("norm.py", "norm_25.yaml"):
        (tmp_path / title).write_text(block(title), encoding="utf-8")
    return tmp_path


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry.pass_names()
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))
    monkeypatch.setattr(registry, "_failures", {})
    yield
    for name in ("tokcompile.passes.norm", "tokcompile_pass_norm"):
        sys.modules.pop(name, None)


def test_the_pass_is_short() -> None:
    assert len(block("norm.py").splitlines()) <= 60


def test_a_file_in_the_folder_of_passes_is_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No list to extend, no import to add; the result equals the dense model with the dropped keys masked."""
    monkeypatch.setattr(tokcompile.passes, "__path__", [*tokcompile.passes.__path__, str(folder)])
    monkeypatch.setattr(registry, "_loaded", False)
    recipe = Recipe.load(folder / "norm_25.yaml")
    assert get_pass("norm").__module__ == "tokcompile.passes.norm"

    case = shallow(VLMS["llava"]())
    model = tokcompile.optimize(case.model, recipe, lowering="eager")
    inputs = case.inputs(batch=2, images_per_row=[1, 2], left_padding=2)
    recording = check(model, case, inputs)

    with torch.no_grad():  # the four longest of the sixteen tokens of each image, and all of the text
        features = case.model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        norms = torch.cat(list(features)).norm(dim=-1).split(16)
    visual = case.visual_mask(inputs)
    images = iter(norms)
    for row, kept in enumerate(recording.kept[0].indices):
        starts = [i for i in range(visual.shape[1]) if visual[row, i] and not visual[row, i - 1]]
        wanted = {int(i) for i in (~visual[row]).nonzero()}
        for start in starts:
            wanted |= {start + int(i) for i in next(images).topk(4).indices}
        assert {int(i) for i in kept if i >= 0} == wanted


def test_keeping_everything_changes_nothing(folder: Path) -> None:
    assert load_file(folder / "norm.py") == ["norm"]
    case = shallow(VLMS["llava"]())
    inputs = case.inputs()
    model = optimized(case.model, [{"pass": "norm", "params": {"keep": 1.0}}])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, case.model(**inputs).logits)


def test_a_file_that_is_no_pass_says_so(tmp_path: Path) -> None:
    for text, message in (
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = 1", "registers no pass"),
        (
            "from tokcompile.registry import register\n@register\nclass A:\n    name = 'a'\n",
            r"A.regions: expected one of",
        ),
    ):
        (tmp_path / "a.py").write_text(text)
        with pytest.raises(TokcompileError, match=message):
            load_file(tmp_path / "a.py")
    for name in ("none.py", "a.txt", ""):
        with pytest.raises(TokcompileError, match="not a Python file"):
            load_file(tmp_path / name)

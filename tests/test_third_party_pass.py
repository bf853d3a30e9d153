"""The example package that brings a pass of its own: installed by pip, found by entry point, used in a recipe."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "third_party_pass"

PROGRAM = """
import json, sys, torch
from tokcompile.recipes import Recipe
from tokcompile.registry import get_pass, load_failures, pass_names, shipped_passes
from tokcompile.authoring import budgets, keep_mask, segments

recipe = Recipe.load(sys.argv[1])
method = get_pass("uniform")(recipe.steps[0].params)
segment = segments(torch.tensor([[0, *[1] * 10, 0, *[1] * 7]]).bool())
budget = budgets(segment, 1, 4)
scores = method.score(torch.zeros(1, 19, 4), segment, budget).values
kept = (keep_mask(scores, segment, budget) & (segment >= 0)).nonzero()[:, 1].tolist()
print(json.dumps({"module": type(method).__module__, "known": "uniform" in pass_names(), "kept": kept,
                  "shipped": "uniform" in shipped_passes(), "failures": load_failures()}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip installed the example into."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed, so nothing can be built offline")
    work = tmp_path_factory.mktemp("third_party")
    source, target = work / "source", work / "site"
    subprocess.run(
        [sys.executable, "-c", "import shutil, sys; shutil.copytree(*sys.argv[1:])", EXAMPLE, source], check=True
    )  # pip builds inside the folder; the checkout stays clean
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(program: str, *args: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(path)} if path else dict(os.environ)
    return subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=False, env=env)


def test_an_installed_package_adds_its_pass(installed: Path) -> None:
    done = run(PROGRAM, str(EXAMPLE / "uniform_25.yaml"), path=installed)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "module": "tokcompile_uniform",
        "known": True,
        "shipped": False,
        "failures": {},
        # three of ten tokens at distances of 3 and 4, two of seven
        "kept": [4, 7, 10, 15, 18],
    }


def test_without_the_package_the_recipe_says_so() -> None:
    done = run("import sys; from tokcompile import Recipe; Recipe.load(sys.argv[1])", str(EXAMPLE / "uniform_25.yaml"))
    assert done.returncode == 1
    assert "uniform_25.yaml:4:11: steps[0].pass: unknown pass 'uniform'" in done.stderr

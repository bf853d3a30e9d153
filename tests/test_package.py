"""What an installer gets: the wheel holds every package and file, and works outside of the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import tokcompile
from tests.house import FOLDERS, PROJECT, ROOT, installed_place, sources
from tokcompile.recipes import shipped

#: Files of the packages that are no modules.
DATA = ("py.typed", "*.yaml", "schema.json")
USE = ROOT / "tests" / "use_package.py"


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that has to succeed, without the checkout on its path."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(hook: str, source: Path, target: Path) -> Path:
    """What a build front end does: the hook of the back end, in a process of its own; nothing is downloaded."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{hook}(sys.argv[1]))"
    target.mkdir(exist_ok=True)
    return target / run(sys.executable, "-c", code, target, cwd=source).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what the sdist holds, and that from a copy of the checkout."""
    place = tmp_path_factory.mktemp("package")
    copy = place / "copy"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in {Path(folder).parts[0] for folder in FOLDERS.values()}:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ("pyproject.toml", PROJECT["project"]["readme"], "LICENSE"):
        shutil.copyfile(ROOT / file, copy / file)
    with tarfile.open(build("build_sdist", copy, place / "dist")) as archive:
        archive.extractall(place, filter="data")
    (source,) = place.glob("tokcompile-*")
    return build("build_wheel", source, place / "dist")


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an empty environment with the wheel; the dependencies are borrowed from this one."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place / "venv", with_pip=False, symlinks=True)
    python = place / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    library = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    # a folder that a .pth file names is searched, the .pth files in it (an editable tokcompile) are not read
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (library / "borrowed.pth").write_text("\n".join(borrowed))
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, "install", *quiet, wheel, cwd=place)
    return python


def test_every_package_is_named() -> None:
    folders = {".".join(installed_place(file).parent.parts) for file in sources("*.py")}
    missing = folders ^ set(PROJECT["tool"]["setuptools"]["packages"])
    assert not missing, f"pyproject.toml, packages: {sorted(missing)} is missing from it, or names no folder"
    without = {str(file.parent) for file in sources("*.py")} - {str(file.parent) for file in sources("__init__.py")}
    assert not without, f"folders without an __init__.py: {sorted(without)}"


def test_the_wheel_holds_what_the_checkout_holds(wheel: Path) -> None:
    wanted = {str(installed_place(file)) for pattern in ("*.py", *DATA) for file in sources(pattern)}
    assert {"tokcompile/py.typed", "tokcompile/recipes/schema.json", "tokcompile/onnx_export/export.py"} <= wanted
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    assert found == wanted
    assert f"Version: {tokcompile.__version__}" in lines


@pytest.mark.slow
def test_the_command_line_of_the_wheel(python: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> str:
        return run(python.with_name("tokcompile"), *arguments, cwd=tmp_path)

    assert call("--version") == f"tokcompile {tokcompile.__version__}\n"
    listed = json.loads(call("recipes", "list", "--json"))
    assert [entry["name"] for entry in listed["recipes"]] == shipped()
    assert all(entry["ok"] for entry in json.loads(call("lint", *shipped(), "--json")))


def test_the_wheel_imports_optimizes_and_exports(python: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: onnx)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: onnx)")
    said = json.loads(run(python, USE, tmp_path / "out", cwd=tmp_path, OMP_NUM_THREADS="1").splitlines()[-1])
    place = Path(said["place"])
    assert place.is_relative_to(python.parents[1])
    assert set(said["modules"]) == modules()
    assert said["status"] == ["matched"]
    assert said["exported"]


def modules() -> set[str]:
    """Every module below ``tokcompile``, but what ``python -m`` runs."""
    names = {dotted(installed_place(file).with_suffix("").parts) for file in sources("*.py")}
    return {name for name in names if name != "tokcompile" and not name.endswith(".__main__")}


def dotted(parts: Sequence[str]) -> str:
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

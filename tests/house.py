"""The source tree as it is when installed: what pyproject.toml maps where, and a copy in that form."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: Package -> its folder in a checkout; a package inside of one follows it.
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def installed_place(file: Path) -> Path:
    """Where a file of the checkout (path relative to it) lies when installed, relative to site-packages."""
    for package, folder in FOLDERS.items():
        if file.is_relative_to(folder):
            return Path(*package.split(".")) / file.relative_to(folder)
    raise ValueError(f"{file} belongs to no package")


def sources(pattern: str) -> list[Path]:
    """Files of the packages that match a glob, relative to the checkout."""
    found = (path for folder in FOLDERS.values() for path in (ROOT / folder).rglob(pattern))
    return sorted(path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts)


def install_copy(target: Path) -> Path:
    """Copy all modules to ``target`` as an installer would, whatever list of packages there is."""
    for file in sources("*.py"):
        place = target / installed_place(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, place)
    return target


if __name__ == "__main__":
    install_copy(Path(sys.argv[1]))

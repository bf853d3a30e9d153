"""Which members of a table of tests are in the default run; `pytest -m slow` runs the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def members(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """``values`` as parameters of a test, marked slow unless ``kept`` has them: one or two of each kind are enough to
    notice a break at once. A tuple is several parameters."""
    values = list(values)
    assert not [value for value in kept if value not in values], "what is kept has to be a member"
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=() if value in kept else pytest.mark.slow
        )
        for value in values
    ]

"""Calls that cannot be captured: each costs itself, not the recipe."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from tokcompile.kinds import Stage

#: Calls of one form that are tried at most: a failing capture takes as long as one that works.
TRIES = 3


class Failures:
    """Which calls of one model could not be captured, so that none is tried in vain again and again.

    A call's form is what its arguments are, apart from sizes: names, types, dtypes, ranks, plain values. One of the
    same form and sizes is not tried again; one of the same form and other sizes is, :data:`TRIES` times in all.
    """

    def __init__(self) -> None:
        self._tried: dict[tuple[Stage, Hashable], dict[Hashable, str]] = {}
        self._lock = threading.Lock()

    def known(self, stage: Stage, given: Any) -> str | None:
        """Why it is not worth while to try this call; None where it is."""
        with self._lock:
            if not any(of is stage for of, _ in self._tried):
                return None
            form, sizes = form_of(given)
            tried = self._tried.get((stage, form), {})
            if sizes in tried:
                return tried[sizes]
            return next(iter(tried.values())) if len(tried) >= TRIES else None

    def note(self, stage: Stage, given: Any, reason: str) -> None:
        form, sizes = form_of(given)
        with self._lock:
            self._tried.setdefault((stage, form), {})[sizes] = reason


def form_of(given: Any) -> tuple[Hashable, Hashable]:
    """The form of arguments, and their sizes."""
    sizes: list[Any] = []

    def form(value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            sizes.append(tuple(value.shape))
            return value.dtype, value.dim(), value.device.type, value.requires_grad
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return type(value).__name__, tuple((str(key), form(item)) for key, item in value.items())
        if isinstance(value, list | tuple):
            return type(value).__name__, tuple(form(item) for item in value)
        if hasattr(value, "get_seq_length"):
            sizes.append(int(value.get_seq_length()))
            return type(value).__name__, sizes[-1] > 0
        return type(value).__name__

    return (torch.is_grad_enabled(), form(given)), tuple(sizes)


def reason_of(error: BaseException) -> str:
    """The first lines of what Dynamo says, on one line."""
    text = " ".join(str(error).split("\n\n")[0].split())[:500]
    return f"{type(error).__name__}: {text}"

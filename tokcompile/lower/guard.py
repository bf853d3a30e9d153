"""Whether a compiled graph fits the sizes of a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.printers import PythonPrinter

from tokcompile.capture.captured import Captured


class Guard:
    """Whether a compiled graph fits the sizes of a call.

    Tracing and Inductor guard on sizes in the graph's own shape environment, where Dynamo does not look; this checks
    those guards.
    """

    def __init__(self, captured: Captured) -> None:
        env = captured.fake_mode.shape_env
        assert env is not None
        guards = [g.expr for g in env.guards if not isinstance(g.expr, sympy.logic.boolalg.BooleanTrue)]
        wanted: set[Any] = set().union(*(g.free_symbols for g in guards)) if guards else set()
        sources: dict[Any, tuple[int, int | None]] = {}
        for i, node in enumerate(captured.placeholders):
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                sources.setdefault(value.node.expr, (i, None))
        for i, node in enumerate(captured.placeholders):
            value = node.meta["val"]
            if isinstance(value, torch.Tensor):
                for d, s in enumerate(value.shape):
                    if isinstance(s, torch.SymInt) and s.node.expr.is_Symbol:
                        sources.setdefault(s.node.expr, (i, d))
        guards = [g for g in guards if g.free_symbols <= set(sources)]
        self._sources = [(s, *sources[s]) for s in sorted(wanted & set(sources), key=str)]
        printer = PythonPrinter()
        names = ", ".join(str(s) for s, _, _ in self._sources)
        body = " and ".join(f"({printer.doprint(g)})" for g in guards) or "True"
        self.text = body
        self._check = eval(f"lambda {names}: {body}", {"math": math, "torch": torch})

    def __call__(self, args: Sequence[Any]) -> bool:
        return bool(self._check(*(args[i] if d is None else args[i].shape[d] for _, i, d in self._sources)))

"""Turn a rewritten graph into something that runs: eager (the FX module itself) or Inductor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.printers import PythonPrinter

from tokcompile.capture import Captured
from tokcompile.cpu_linear import choose_linears
from tokcompile.repeated import WholeError, compile_repeated

LOWERINGS = ("inductor", "eager")


def lower(captured: Captured, lowering: str,
          streams: Sequence[Sequence[fx.Node]] = ()) -> tuple[Callable[..., Any], str]:
    """Compile ``captured``: -> what takes the values of its placeholders and returns a flat sequence, and how it was
    compiled, in words.

    Args:
        streams: the residual streams of its stacks of layers, see :func:`compile_repeated`.
    """
    if lowering == "eager":
        return captured.graph_module, lowering
    choose_linears(captured)
    try:
        return compile_repeated(captured, streams, _inductor)
    except WholeError as error:
        values = [node.meta["val"] for node in captured.placeholders]
        return _inductor(captured.graph_module, values, captured.fake_mode), f"as a whole: {error}"


def _inductor(graph_module: fx.GraphModule, values: list[Any], mode: FakeTensorMode) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    with tracing(TracingContext(mode)):
        return compile_fx(graph_module, values)  # type: ignore[return-value]


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

"""Turn a rewritten graph into something that runs: eager (the FX module itself) or Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from tokcompile.capture.captured import Captured
from tokcompile.lower.cpu_linear import choose_linears
from tokcompile.lower.parallel import of_this_rank
from tokcompile.lower.repeated import compile_repeated
from tokcompile.lower.repeated_parts import WholeError
from tokcompile.lower.wrapped import call_functions, example

LOWERINGS = ("inductor", "eager")


def lower(
    captured: Captured, lowering: str, streams: Sequence[Sequence[fx.Node]] = ()
) -> tuple[Callable[..., Any], str]:
    """Compile ``captured``: -> what takes the values of its placeholders and returns a flat sequence, and how it was
    compiled, in words.

    Args:
        streams: the residual streams of its stacks of layers, see :func:`compile_repeated`.
    """
    wrapped = call_functions(captured)
    if lowering == "eager":
        return of_this_rank(captured, captured.graph_module), lowering
    if wrapped:
        values = [example(node) for node in captured.placeholders]
        how = f"as a whole: weights are {', '.join(wrapped)}"
        return of_this_rank(captured, _inductor(captured.graph_module, values, captured.fake_mode)), how
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

"""Tiny random models of many families, and the capture of their graphs.

Every function of the family files returns ``(model.eval(), inputs)``: two layers, hidden size 32 to 64, a fixed seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from transformers import logging

from tokcompile.capture.capture import DYNAMO_CONFIG, from_dynamo
from tokcompile.capture.captured import Captured

logging.set_verbosity_error()

Case = tuple[nn.Module, dict[str, Any]]
Family = Callable[[], Case]


def capture_graphs(
    model: nn.Module,
    inputs: dict[str, Any],
    method: str | None = None,
    dynamic: bool = True,
    inputs_in_order: Sequence[Any] = (),
) -> list[Captured]:
    """Capture every graph that ``model(**inputs)`` (or ``model.<method>(**inputs)``) runs, in order.

    With ``method`` the model's ``forward`` is compiled while the method runs: ``generate`` gives a prefill graph and
    a decode graph. ``dynamic=False`` fixes all sizes (with a symbolic image size the window arithmetic of
    hierarchical vision models takes minutes to capture).
    """
    graphs: list[Captured] = []

    def record(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(from_dynamo(graph_module))
        return graph_module.forward

    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(**DYNAMO_CONFIG):
        if method is None:
            model(
                *inputs_in_order, **inputs
            )  # some models install hooks at their first call, under a lock that Dynamo cannot enter
            torch.compile(model, backend=record, dynamic=dynamic, fullgraph=True)(*inputs_in_order, **inputs)
            return graphs
        forward = torch.compile(
            lambda module, kwargs: type(module).forward(module, **kwargs),
            backend=record,
            dynamic=dynamic,
            fullgraph=True,
        )

        @functools.wraps(model.forward)
        def compiled(**kwargs: Any) -> Any:
            return forward(model, kwargs)

        try:
            model.forward = compiled
            getattr(model, method)(**inputs)
        finally:
            del model.forward
    return graphs

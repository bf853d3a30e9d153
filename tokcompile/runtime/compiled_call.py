"""A function captured as one graph, under the settings of Dynamo that this needs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tokcompile.capture.capture import DYNAMO_CONFIG
from tokcompile.errors import CheckError, TokcompileError
from tokcompile.runtime.session import Session

#: What Dynamo raises when it cannot capture a stage as one graph.
CAPTURE_FAILURES = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.InternalTorchDynamoError,
    torch._dynamo.exc.FailOnRecompileLimitHit,
    torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode,
)
_LOSES_CHECKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12)


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own: Dynamo counts recompilations for each code object."""
    code = function.__code__.replace(co_name=function.__name__)
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def compile_stage(function: Callable[..., Any], session: Session, *, dynamic: bool = False) -> Callable[..., Any]:
    """``function`` captured as one graph.

    Args:
        dynamic: sizes are symbolic from the start; else, as in ``torch.compile``, from the second size on. What
            cannot be captured with static sizes is tried once more with symbolic ones.
    """

    def compiled(dynamic: bool | None) -> Callable[..., Any]:
        return torch.compile(_fresh(function), backend=session.backend, dynamic=dynamic, fullgraph=True)

    inner = compiled(True if dynamic else None)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal inner, dynamic
        with torch._dynamo.config.patch(**DYNAMO_CONFIG), _open_forms():
            try:
                return inner(*args, **kwargs)
            except CheckError:
                function(*args, **kwargs)  # the model says best what is wrong
                raise
            except CAPTURE_FAILURES:
                if dynamic:
                    raise
                inner, dynamic = compiled(True), True
                return inner(*args, **kwargs)

    return call


@contextlib.contextmanager
def _open_forms() -> Iterator[None]:
    """Ask for forms that can be captured.

    nn.TransformerEncoder's inference fast path is one opaque operation. torch before 2.12 loses track of the numbers
    that a check of a whole tensor reads while it compiles (PendingUnbackedSymbolNotFound); asserted as a tensor, it
    reads none.
    """
    fastpath, check = torch.backends.mha.get_fastpath_enabled(), torch._check_tensor_all
    torch.backends.mha.set_fastpath_enabled(False)
    if _LOSES_CHECKS:
        torch._check_tensor_all = _assert_all
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch._check_tensor_all = check


def _assert_all(cond: torch.Tensor, message: Any = None) -> None:
    torch._assert_async(cond.all(), "")


def by_name(function: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, without those left at their default."""
    if not args:
        return kwargs
    signature = inspect.signature(function)
    bound = signature.bind(owner, *args, **kwargs).arguments
    named = dict(list(bound.items())[1:])
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD and parameter.name in named:
            named.update(named.pop(parameter.name))
        if parameter.kind is parameter.VAR_POSITIONAL and named.get(parameter.name):
            raise TokcompileError(f"forward with *{parameter.name} cannot be captured; pass arguments by name")
    return named

"""A function captured as one graph, under the settings of Dynamo that this needs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tokcompile.capture.capture import DYNAMO_CONFIG
from tokcompile.errors import TokcompileError
from tokcompile.kinds import Stage
from tokcompile.runtime.gate import GATE, Missing
from tokcompile.runtime.session import Session

#: What Dynamo raises when it cannot capture a stage as one graph.
CAPTURE_FAILURES = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.InternalTorchDynamoError,
    torch._dynamo.exc.FailOnRecompileLimitHit,
    torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode,
)
_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"
_LOSES_CHECKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12)


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own: Dynamo counts recompilations for each code object."""
    code = function.__code__.replace(co_name=function.__name__)
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def captured_only() -> None:
    """The first line of a function for :class:`CompiledStage`: where no graph fits and none may be made, it stops."""
    if not torch.compiler.is_dynamo_compiling():
        raise Missing


class CompiledStage:
    """A function captured as one graph for each kind of call.

    Sizes are static at first and symbolic from the second size on, as in ``torch.compile``. What cannot be captured
    with static sizes is tried once more with symbolic ones; where that works it is done at once from then on.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        session: Session,
        stage: Stage,
        *,
        dynamic: bool = False,
        merges: bool = True,
    ) -> None:
        """
        Args:
            function: calls :func:`captured_only` first.
            dynamic: sizes are symbolic from the start.
            merges: whether image features can enter a sequence of tokens in here.
        """
        self.function, self.stage = function, stage
        self._backend = functools.partial(session.backend, stage=stage, merges=merges)
        self._forms = [_Form(function, self._backend, True if dynamic else None)]
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            CAPTURE_FAILURES: this call cannot be captured. The graphs of other calls stay.
        """
        with torch._dynamo.config.patch(**DYNAMO_CONFIG), _open_forms():
            for form in list(self._forms):
                with contextlib.suppress(Missing), GATE.shared():
                    return form.run(*args, **kwargs)
            with GATE.alone():
                return self._capture(args, kwargs)

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        form = self._forms[-1]
        try:
            return form.capture(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self._forms[-1] = _Form(self.function, self._backend, form.dynamic)  # the old graphs go
            return self._forms[-1].capture(*args, **kwargs)
        except CAPTURE_FAILURES:
            if form.dynamic:
                raise
        symbolic = _Form(self.function, self._backend, True)
        result = symbolic.capture(*args, **kwargs)
        self._forms.append(symbolic)
        return result


class _Form:
    """``torch.compile`` of a function, and the same without the right to compile."""

    def __init__(self, function: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None) -> None:
        self.dynamic = dynamic
        self.capture = torch.compile(_fresh(function), backend=backend, dynamic=dynamic, fullgraph=True)
        self.run = torch._dynamo.run(self.capture)


class _OpenForms:
    """Ask for forms that can be captured, for as long as any thread is inside.

    nn.TransformerEncoder's inference fast path is one opaque operation. torch before 2.12 loses track of the checks
    that transformers makes on tensors while it compiles (PendingUnbackedSymbolNotFound); they have a switch.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._fastpath, self._checks = True, os.environ.get(_CHECKS)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._fastpath, self._checks = torch.backends.mha.get_fastpath_enabled(), os.environ.get(_CHECKS)
                torch.backends.mha.set_fastpath_enabled(False)
                if _LOSES_CHECKS:
                    os.environ[_CHECKS] = "1"
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    torch.backends.mha.set_fastpath_enabled(self._fastpath)
                    if _LOSES_CHECKS:
                        os.environ.pop(_CHECKS, None)
                        os.environ |= {} if self._checks is None else {_CHECKS: self._checks}


_open_forms = _OpenForms()


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

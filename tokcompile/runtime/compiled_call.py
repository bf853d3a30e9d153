"""A function captured as one graph, under the settings of Dynamo that this needs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tokcompile.capture.by_values import ByValues
from tokcompile.capture.capture import DYNAMO_CONFIG
from tokcompile.capture.known_trace import UntraceableError
from tokcompile.errors import CheckError, TokcompileError
from tokcompile.kinds import Stage
from tokcompile.runtime.gate import GATE, Missing
from tokcompile.runtime.gathered import gathered, sharded_layers
from tokcompile.runtime.session import Session

#: What Dynamo raises when it cannot capture a stage as one graph.
CAPTURE_FAILURES = (
    UntraceableError,
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


def captured_only() -> None:
    """The first line of a function for :class:`CompiledStage`: where no graph fits and none may be made, it stops."""
    if not torch.compiler.is_dynamo_compiling() and not getattr(_UNCAPTURED, "allowed", False):
        raise Missing


#: Whether this thread may run such a function without Dynamo: traced for the values of its inputs, say.
_UNCAPTURED = threading.local()


@contextlib.contextmanager
def _uncaptured() -> Iterator[None]:
    _UNCAPTURED.allowed = True
    try:
        yield
    finally:
        _UNCAPTURED.allowed = False


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
        by_values: bool = False,
    ) -> None:
        """
        Args:
            function: calls :func:`captured_only` first.
            dynamic: sizes are symbolic from the start.
            merges: whether image features can enter a sequence of tokens in here.
            by_values: what cannot be captured for sizes of any value is captured for the values of its small integer
                inputs.
        """
        self.function, self.stage, self.by_values = function, stage, by_values
        self._forget = session.forget
        self._backend = functools.partial(session.backend, stage=stage, merges=merges)
        self._forms: list[_Form | _ValueForm] = [_Form(function, self._backend, True if dynamic else None)]
        self._layers: tuple[torch.nn.Module | None, list[Any]] | None = None
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            CAPTURE_FAILURES: this call cannot be captured. The graphs of other calls stay.
            CheckError: a check that the model makes failed, where the model itself does not say so.
        """
        with gathered(self._sharded(args)):
            try:
                with torch._dynamo.config.patch(**DYNAMO_CONFIG), _open_forms():
                    for form in list(self._forms):
                        with contextlib.suppress(Missing), GATE.shared():
                            return form.run(*args, **kwargs)
                    with GATE.alone():
                        return self._capture(args, kwargs)
            except CheckError:
                with _uncaptured():
                    self.function(*args, **kwargs)  # the model says best what is wrong
                raise

    def _sharded(self, args: tuple[Any, ...]) -> list[Any]:
        """The layers that FSDP shards in the module that the function runs."""
        owner = args[0] if args and isinstance(args[0], torch.nn.Module) else None
        if self._layers is None or self._layers[0] is not owner:
            self._layers = owner, [] if owner is None else sharded_layers(owner)
        return self._layers[1]

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        form = self._forms[-1]
        try:
            return form.capture(*args, **kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            self._forms[-1] = _Form(self.function, self._backend, form.dynamic)  # the old graphs go
            return self._forms[-1].capture(*args, **kwargs)
        except CAPTURE_FAILURES as error:
            if isinstance(error, UntraceableError) or (form.dynamic and not self.by_values):
                raise
            failed: BaseException = error
        if not form.dynamic:
            try:
                return self._by(_Form(self.function, self._backend, True), args, kwargs)
            except CAPTURE_FAILURES as error:
                if not self.by_values:
                    raise
                failed = error
        return self._by(_ValueForm(ByValues(self.function, self._backend, self._forget, failed)), args, kwargs)

    def _by(self, form: _Form | _ValueForm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call by a form that is kept where it can capture the call."""
        result = form.capture(*args, **kwargs)
        self._forms.append(form)
        return result


class _Form:
    """``torch.compile`` of a function, and the same without the right to compile."""

    def __init__(self, function: Callable[..., Any], backend: Callable[..., Any], dynamic: bool | None) -> None:
        self.dynamic = dynamic
        self.capture = torch.compile(_fresh(function), backend=backend, dynamic=dynamic, fullgraph=True)
        self.run = torch._dynamo.run(self.capture)


class _ValueForm:
    """As :class:`_Form`, for the values of small integer inputs."""

    dynamic = True

    def __init__(self, values: ByValues) -> None:
        self.values = values

    def run(self, *args: Any) -> Any:
        if not self.values.has(*args):
            raise Missing
        return self.values(*args)

    def capture(self, *args: Any) -> Any:
        with _uncaptured():
            return self.values(*args)


class _OpenForms:
    """Ask for forms that can be captured, for as long as any thread is inside.

    nn.TransformerEncoder's inference fast path is one opaque operation. torch before 2.12 loses track of the numbers
    that a check of a whole tensor reads while it compiles (PendingUnbackedSymbolNotFound); asserted as a tensor, it
    reads none.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._fastpath, self._check = True, torch._check_tensor_all

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._fastpath, self._check = torch.backends.mha.get_fastpath_enabled(), torch._check_tensor_all
                torch.backends.mha.set_fastpath_enabled(False)
                if _LOSES_CHECKS:
                    torch._check_tensor_all = _assert_all
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    torch.backends.mha.set_fastpath_enabled(self._fastpath)
                    torch._check_tensor_all = self._check


def _assert_all(cond: torch.Tensor, message: Any = None) -> None:
    torch._assert_async(cond.all(), "")


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

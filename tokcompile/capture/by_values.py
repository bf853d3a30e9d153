"""Capture a function whose sizes follow from the values of small integer inputs, as one ATen graph for each set of values.

Image encoders read the grid of their patches off a tensor (``image_grid_thw``, ``image_sizes``): how long each image is,
where a window ends, which position a patch has. Dynamo gives such a number a symbol of its own and fails at the first
``if`` on it. Here the function is traced with these inputs as constants, and the graph is used for calls with the same
values::

    encode(pixel_values [900, 1176], image_grid_thw = [[1, 18, 26], [1, 12, 36]])
        trace   pixels and weights are stand-ins without data; the grid, and all that follows from it alone, has its values
        fold    what follows from the grid alone becomes a constant of the graph
        guard   the same values, forms of inputs and weights, settings of the modules that ran

A read of a number (``item``, ``tolist``, ``if``), or of a size, is answered only where it follows from the constants; one
that depends on pixels or weights is refused with the line of the model that reads it. So a graph never holds what
another image would have changed.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    make_fx,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tokcompile.capture.failures import explain_failure
from tokcompile.capture.graph import ancestors
from tokcompile.capture.known import fold
from tokcompile.errors import CaptureError

#: Integer inputs with no more elements than this are taken by value.
MOST_VALUES = 4096
#: Variants that are kept; the one that was not used for the longest time is dropped.
MOST_VARIANTS = 8
#: Values of more elements than this are not followed.
MOST_FOLLOWED = 2**26

_READS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.__int__,
    torch.Tensor.__bool__,
    torch.Tensor.__index__,
    torch.Tensor.__float__,
}
_SIMPLE = (bool, int, float, str, type(None))
_TORCH = str(Path(torch.__file__).parent)


class UntraceableError(CaptureError):
    """A function cannot be captured for the values of its inputs either."""


# .. values that follow from constants


class _ValueMode(FakeTensorMode):
    """Fake tensors; those that follow from constants alone carry their value (``FakeTensor.constant``) whatever its size.

    torch follows single numbers this way, and knows when a value is written to.
    """

    _blank = False

    def may_turn_const(self, t: torch.Tensor) -> bool:
        return t.numel() <= MOST_FOLLOWED and not t.is_sparse and not isinstance(t, FakeTensor) and not t.is_meta

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().dispatch(func, types, args, kwargs)
        if not isinstance(out, FakeTensor) or out.constant is not None or self._blank:
            return out
        if _makes(func) and out.numel() <= MOST_FOLLOWED:
            with _real():
                args, kwargs = pytree.tree_map_only(torch.Tensor, _stand_in, (args, kwargs or {}))
                out.constant = func(*args, **kwargs)
            self.fake_tensor_converter.add_constant_storage_mapping(out)
        return out

    def constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` with its value; later writes to it do not show."""
        return self.fake_tensor_converter.from_real_tensor(self, tensor.detach().clone(), make_constant=True)

    def stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """A plain tensor of the same form without data, whatever class ``tensor`` has."""
        self._blank = True
        try:
            with self:
                return _stand_in(tensor).requires_grad_(tensor.requires_grad)
        finally:
            self._blank = False


@contextlib.contextmanager
def _real() -> Iterator[None]:
    with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch._C._DisableTorchDispatch():
        yield


def _makes(func: Any) -> bool:
    """Whether an operation makes a tensor of nothing but numbers: a range, zeros, also of the size of another tensor."""
    if not isinstance(func, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded in func.tags:
        return False
    name = func._schema.name.removeprefix("aten::")
    if name.startswith("new_") or (name.endswith("_like") and not name.startswith("rand")):
        return True
    return (
        func.namespace == "aten"
        and not any("Tensor" in str(a.type) for a in func._schema.arguments)
        and not (func._schema.is_mutable)
    )


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


class _Reads(TorchFunctionMode):
    """Answers reads of numbers, and notes for every operation the line of the model that asks for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fx_traceback.get_current_meta()["stack_trace"] = _frames()
        if func in _READS and isinstance(args[0], FakeTensor):
            if args[0].constant is None:
                raise UntraceableError(f"reads a number that depends on {_origin(args[0])}")
            with _real():
                return func(args[0].constant, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _frames() -> str:
    """The calls that led here, as a stack trace of the model's own files, the innermost last."""
    lines: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not _trace.__code__:  # type: ignore[name-defined]
        code = frame.f_code
        if not code.co_filename.startswith((_TORCH, __file__, "<")):
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n')
        frame = frame.f_back  # type: ignore[assignment]
    return "".join(reversed(lines))


def _origin(tensor: torch.Tensor) -> str:
    """Names of the inputs that a traced tensor depends on."""
    mode = get_proxy_mode()
    slot = get_proxy_slot(tensor, mode.tracer, None) if mode is not None else None
    if slot is None:
        return "an input"
    node = slot.proxy.node
    found = [n for n in [*ancestors([node]), node] if n.op == "placeholder"]
    names = sorted({str(n.meta.get("argument", n.target)) for n in found})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# .. tracing


@dataclass
class Specialised:
    """A function captured for one set of values.

    Attributes:
        graph_module: placeholders are ``state``, then the tensors among the arguments that are not taken by value.
        state: where each tensor of the modules is found: (dict that holds it, name in it).
        inputs: which leaves of the arguments the others are.
        results: leaves of what the function returns; None stands for the next result of the graph.
        spec: how these leaves make up the result.
        settings: simple attributes of the modules that ran, and of their configurations.
    """

    graph_module: fx.GraphModule
    state: list[tuple[dict[str, Any], str]]
    inputs: list[int]
    results: list[Any]
    spec: Any
    modules: list[nn.Module]
    forms: list[Any] = field(default_factory=list)
    settings: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.forms, self.settings = [_form(holder.get(name)) for holder, name in self.state], _settings(self.modules)

    def is_current(self) -> bool:
        """Whether the modules are still as they were when the function was traced."""
        return self.settings == _settings(self.modules) and self.forms == [
            _form(holder.get(name)) for holder, name in self.state
        ]

    def arguments(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        return [*(holder[name] for holder, name in self.state), *(leaves[i] for i in self.inputs)]

    def result(self, tensors: Sequence[Any]) -> Any:
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if leaf is _TENSOR else leaf for leaf in self.results], self.spec)


_TENSOR = object()


def _form(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return None
    return type(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _settings(modules: Sequence[nn.Module]) -> list[Any]:
    found: list[Any] = []
    configs: dict[int, Any] = {}
    for module in modules:
        own = vars(module)
        found.append([value for value in own.values() if type(value) in _SIMPLE])
        config = own.get("config")
        if hasattr(config, "__dict__"):
            configs[id(config)] = config
    found += [[value for value in vars(config).values() if type(value) in _SIMPLE] for config in configs.values()]
    return found


def is_value(leaf: Any) -> bool:
    """Whether an argument is taken by value: a small tensor of integers."""
    return isinstance(leaf, torch.Tensor) and leaf.numel() <= MOST_VALUES and leaf.dtype in _INTEGERS


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def specialise(function: Callable[..., Any], args: Sequence[Any]) -> Specialised:
    """Trace ``function(*args)`` with the values of its small integer tensors as constants.

    Args:
        args: any nesting of tensors, modules and plain Python values.

    Raises:
        UntraceableError: something is read that depends on other inputs or on weights, or the trace fails; the message names
            the line of the model.
    """
    leaves, spec = pytree.tree_flatten(list(args))
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(list(args))[0]]
    owners = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
    modules = {module: name for owner in owners for name, module in owner.named_modules()}
    mode = _ValueMode(allow_non_fake_inputs=True)
    places, stand_ins, labels = _state(modules, mode)
    inputs = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and not is_value(leaf)]
    values = [i for i, leaf in enumerate(leaves) if is_value(leaf)]
    given = [*stand_ins, *(mode.stand_in(leaves[i]) for i in inputs)]
    labels += [f"inputs_{_label(names[i])}" for i in inputs]
    constants = [mode.constant(leaves[i]) for i in values]
    ran: dict[nn.Module, None] = {}
    found: dict[str, Any] = {}

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        rest = list(leaves)
        for i, tensor in zip([*inputs, *values], tensors[len(places) :], strict=True):
            rest[i] = tensor
        with _following(modules, ran), _Reads():
            results, found["spec"] = pytree.tree_flatten(function(*pytree.tree_unflatten(rest, spec)))
        found["results"] = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in results]
        return [leaf for leaf in results if isinstance(leaf, torch.Tensor)]

    with _holding(modules, places, stand_ins):
        traced = _trace(call, [*given, *constants], labels, mode)
    real = dict(zip(traced.graph.find_nodes(op="placeholder")[len(given) :], (leaves[i] for i in values), strict=True))
    fold(traced, real)
    used = _drop_unused(traced, labels, given)
    return Specialised(
        traced,
        [places[i][0] for i in used if i < len(places)],
        [inputs[i - len(places)] for i in used if i >= len(places)],
        found["results"],
        found["spec"],
        list(ran),
    )


def _label(path: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in path).strip("_")


def _state(modules: dict[nn.Module, str], mode: _ValueMode) -> tuple[list[Any], list[Any], list[str]]:
    """Every tensor that modules hold as parameter, buffer or plain attribute: where all, a stand-in, a name."""
    found: dict[int, tuple[list[Any], torch.Tensor, str]] = {}
    for module, path in modules.items():
        for kind, holder in (
            ("parameters", module._parameters),
            ("buffers", module._buffers),
            ("values", vars(module)),
        ):
            for name, tensor in holder.items():
                if not isinstance(tensor, torch.Tensor):
                    continue
                if id(tensor) not in found:
                    label = "_".join(part for part in (kind, _label(path), name) if part)
                    found[id(tensor)] = [], mode.stand_in(tensor), label
                found[id(tensor)][0].append((holder, name))
    return [p for p, _, _ in found.values()], [t for _, t, _ in found.values()], [n for _, _, n in found.values()]


@contextlib.contextmanager
def _holding(modules: dict[nn.Module, str], places: Sequence[Any], tensors: Sequence[Any]) -> Iterator[None]:
    """Let the modules hold ``tensors``; afterwards all their attributes are what they were.

    Raises:
        UntraceableError: a module keeps a tensor of this call for later ones, which a graph would not do again.
    """
    before = {module: (dict(vars(module)), dict(module._parameters), dict(module._buffers)) for module in modules}
    for spots, tensor in zip(places, tensors, strict=True):
        for holder, name in spots:
            holder[name] = tensor
    held = {module: dict(vars(module)) for module in modules}
    kept = ""
    try:
        yield
        kept = next(
            (
                f"{modules[m]}.{name}"
                for m in modules
                for name, value in vars(m).items()
                if value is not held[m].get(name)
                and any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(value))
            ),
            "",
        )
    finally:
        for module, holders in before.items():
            for holder, content in zip((vars(module), module._parameters, module._buffers), holders, strict=True):
                holder.clear()
                holder.update(content)
    if kept:
        raise UntraceableError(f"{kept} keeps a tensor of one call for the next one")


@contextlib.contextmanager
def _following(modules: dict[nn.Module, str], ran: dict[nn.Module, None]) -> Iterator[None]:
    """Note in ``nn_module_stack`` which module runs, and in ``ran`` which ones did."""
    stack: list[tuple[str, tuple[str, type]]] = []

    def note() -> None:
        fx_traceback.get_current_meta()["nn_module_stack"] = dict(stack)

    def enter(module: nn.Module, *_: Any) -> None:
        ran[module] = None
        stack.append((str(len(stack)), (modules[module], type(module))))
        note()

    def leave(*_: Any) -> None:
        stack.pop()
        note()

    with contextlib.ExitStack() as handles:
        for module in modules:
            for handle in (
                module.register_forward_pre_hook(enter, prepend=True),
                module.register_forward_hook(leave, always_call=True),
            ):
                handles.callback(handle.remove)
        yield


def _trace(
    call: Callable[..., Any], tensors: Sequence[torch.Tensor], labels: Sequence[str], mode: _ValueMode
) -> fx.GraphModule:
    """``call(*tensors)`` as pre-dispatch ATen. Everything that goes wrong on the way is a :class:`UntraceableError`."""
    randomness = random.getstate()
    with mode, fx_traceback.preserve_node_meta():
        try:
            traced = make_fx(call, tracing_mode="real", pre_dispatch=True)(*tensors)
        except Exception as error:
            stack = str(fx_traceback.get_current_meta().get("stack_trace", ""))
            raise UntraceableError(_reason(error, stack)) from error
    if random.getstate() != randomness:
        random.setstate(randomness)
        raise UntraceableError("draws a random number in Python: a graph would draw the same one in each call")
    return traced


def _reason(error: Exception, stack: str) -> str:
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        text = f"{error.func} reads values that depend on an input"
    elif isinstance(error, UntraceableError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    lines = stack.splitlines()
    if not lines:
        return text
    place = lines[-1].strip().removeprefix('File "').replace('", line ', ":").split(", in ")[0]
    return f"{text} [{place}]"


def _drop_unused(traced: fx.GraphModule, labels: Sequence[str], examples: Sequence[torch.Tensor]) -> list[int]:
    """Remove inputs that nothing reads; numbers of those that are left. They get the name and form that they stand for."""
    used = []
    for i, node in enumerate(traced.graph.find_nodes(op="placeholder")):
        if not node.users:
            traced.graph.erase_node(node)
            continue
        used.append(i)
        node.target = labels[i]
        node.meta["example_value"] = examples[i]
    traced.graph.lint()
    traced.recompile()
    return used


# .. the captured function


class ByValues:
    """``function`` captured anew for each set of values; called like it.

    Args:
        backend: takes the graph and example inputs, gives what runs it (as a ``torch.compile`` backend).
        forget: told of what ``backend`` gave for a variant that is dropped.
        first: why the function could not be captured for all values.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        backend: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]],
        forget: Callable[[Any], None] = lambda compiled: None,
        first: Exception | None = None,
    ) -> None:
        self.function, self.backend, self.forget, self.first = function, backend, forget, first
        self.variants: OrderedDict[Any, tuple[Specialised, Callable[..., Any]]] = OrderedDict()
        #: how many variants were made so far
        self.made = 0

    def __call__(self, *args: Any) -> Any:
        leaves, spec = pytree.tree_flatten(list(args))
        key = spec, _mode(), tuple(_key(leaf) for leaf in leaves)
        found = self.variants.pop(key, None)
        if found is None or not found[0].is_current():
            if found is not None:
                self.forget(found[1])
            found = self._make(args)
        self.variants[key] = found  # last, as the one that was used last
        while len(self.variants) > MOST_VARIANTS:
            _, (_, dropped) = self.variants.popitem(last=False)
            self.forget(dropped)
        specialised, compiled = found
        return specialised.result(compiled(*specialised.arguments(leaves)))

    def _make(self, args: Sequence[Any]) -> tuple[Specialised, Callable[..., Any]]:
        why = explain_failure(self.first) if self.first is not None else ""
        try:
            specialised = specialise(self.function, args)
        except UntraceableError as error:
            raise UntraceableError(f"{error}; and with sizes of any value: {why}" if why else str(error)) from error
        self.made += 1
        said = f"variant {self.made} of those for the values of small integer inputs: {_say(args)}"
        specialised.graph_module.meta["values"] = said + (f"; for all values: {why}" if why and self.made == 1 else "")
        leaves = pytree.tree_leaves(list(args))
        return specialised, self.backend(specialised.graph_module, specialised.arguments(leaves))


def _key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (_form(leaf), tuple(leaf.flatten().tolist())) if is_value(leaf) else _form(leaf)
    return (type(leaf), leaf) if type(leaf) in _SIMPLE or isinstance(leaf, torch.dtype | torch.device) else id(leaf)


def _mode() -> Any:
    kinds = [k for k in ("cpu", "cuda") if torch.is_autocast_enabled(k)]
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((k, torch.get_autocast_dtype(k)) for k in kinds),
    )


def _say(args: Sequence[Any]) -> str:
    """The values among ``args``, by name."""
    found = [
        (pytree.keystr(path), leaf) for path, leaf in pytree.tree_flatten_with_path(list(args))[0] if is_value(leaf)
    ]
    texts = [f"{_label(path.rsplit('[', 1)[-1])} {leaf.tolist()}" for path, leaf in found]
    return ", ".join(t if len(t) <= 80 else t[:77] + "..." for t in texts) or "sizes"

"""Trace a function some of whose inputs are known: what follows from these is known, and nothing else can be read."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
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
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, get_proxy_slot, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from tokcompile.capture.graph import ancestors
from tokcompile.errors import CaptureError

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
_TORCH = str(Path(torch.__file__).parent)


class UntraceableError(CaptureError):
    """A function cannot be captured for the values of its inputs."""


class ValueMode(FakeTensorMode):
    """Fake tensors; those that follow from constants alone carry their value, ``FakeTensor.constant``, of any size.

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
    """Whether an operation makes a tensor of numbers alone: a range, zeros, also of the size of another tensor."""
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


class Reads(TorchFunctionMode):
    """Answers reads of numbers, and notes for every operation the line of the model that asks for it."""

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = labels

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fx_traceback.get_current_meta()["stack_trace"] = _frames()
        if func in _READS and isinstance(args[0], FakeTensor):
            if args[0].constant is None:
                raise UntraceableError(f"reads a number that depends on {_origin(args[0], self.labels)}")
            with _real():
                return func(args[0].constant, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _frames() -> str:
    """The calls that led here, as a stack trace of the model's own files, the innermost last."""
    lines: list[str] = []
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not trace_known.__code__:  # type: ignore[name-defined]
        code = frame.f_code
        if not code.co_filename.startswith((_TORCH, __file__, "<")):
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}\n')
        frame = frame.f_back  # type: ignore[assignment]
    return "".join(reversed(lines))


def _origin(tensor: torch.Tensor, labels: Sequence[str]) -> str:
    """Names of the inputs that a traced tensor depends on."""
    mode = get_proxy_mode()
    slot = get_proxy_slot(tensor, mode.tracer, None) if mode is not None else None
    if slot is None:
        return "an input"
    node = slot.proxy.node
    above = {*ancestors([node]), node}
    names = [label for label, n in zip(labels, node.graph.find_nodes(op="placeholder"), strict=False) if n in above]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def holding(modules: dict[nn.Module, str], places: Sequence[Any], tensors: Sequence[Any]) -> Iterator[None]:
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
            three: Any = (vars(module), module._parameters, module._buffers)
            for holder, content in zip(three, holders, strict=True):
                holder.clear()
                holder.update(content)
    if kept:
        raise UntraceableError(f"{kept} keeps a tensor of one call for the next one")


@contextlib.contextmanager
def following(modules: dict[nn.Module, str], ran: dict[nn.Module, None]) -> Iterator[None]:
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


def trace_known(call: Callable[..., Any], tensors: Sequence[torch.Tensor], mode: ValueMode) -> fx.GraphModule:
    """``call(*tensors)`` as pre-dispatch ATen.

    Raises:
        UntraceableError: whatever goes wrong on the way, with the line of the model.
    """
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

"""Capture a function whose sizes follow from values of small integer inputs: one ATen graph for each set of values.

Image encoders read the grid of their patches off a tensor (``image_grid_thw``, ``image_sizes``): how long an image is,
where a window ends, which position a patch has. Dynamo gives such a number a symbol of its own and fails at the first
``if`` on it. Here the function is traced with these inputs as constants, and the graph is used for calls with the same
values::

    encode(pixel_values [900, 1176], image_grid_thw = [[1, 18, 26], [1, 12, 36]])
        trace   pixels and weights are stand-ins without data; the grid, and what follows from it, has its values
        fold    what follows from the grid alone becomes a constant of the graph
        guard   the same values, forms of inputs and weights, settings of the modules that ran

A read of a number (``item``, ``tolist``, ``if``) or of a size is answered only where it follows from the constants;
one that depends on pixels or weights is refused with the line of the model that reads it, so a graph never holds what
another image would have changed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from tokcompile.capture.failures import explain_failure
from tokcompile.capture.known import fold
from tokcompile.capture.known_trace import Reads, UntraceableError, ValueMode, following, holding, trace_known

#: Integer inputs with no more elements than this are taken by value.
MOST_VALUES = 4096
#: Variants that are kept; the one that was not used for the longest time is dropped.
MOST_VARIANTS = 8
_SIMPLE = (bool, int, float, str, type(None))
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_TENSOR = object()
#: A trace puts stand-ins into the modules; nobody else may read their weights meanwhile.
_LOCK = threading.RLock()


@dataclass
class Specialised:
    """A function captured for one set of values.

    Attributes:
        graph_module: placeholders are ``state``, then the tensors among the arguments that are not taken by value.
        state: where each tensor of the modules is found: (dict that holds it, name in it).
        inputs: which leaves of the arguments the others are.
        results: leaves of what the function returns, with a mark for each result of the graph.
        spec: how these leaves make up the result.
        modules: those that ran.
        objects: arguments that are the same objects in every call.
    """

    graph_module: fx.GraphModule
    state: list[tuple[dict[str, Any], str]]
    inputs: list[int]
    results: list[Any]
    spec: Any
    modules: list[nn.Module]
    objects: list[Any]
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
        """What the graph takes, from the modules as they are now and from the leaves of the arguments."""
        with _LOCK:
            return [*(holder[name] for holder, name in self.state), *(leaves[i] for i in self.inputs)]

    def result(self, tensors: Sequence[Any]) -> Any:
        """What the function returns, from the results of the graph."""
        left = iter(tensors)
        return pytree.tree_unflatten([next(left) if leaf is _TENSOR else leaf for leaf in self.results], self.spec)


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


def specialise(function: Callable[..., Any], args: Sequence[Any]) -> Specialised:
    """Trace ``function(*args)`` with the values of its small integer tensors as constants.

    Args:
        args: any nesting of tensors, modules and plain Python values.

    Raises:
        UntraceableError: something is read that depends on other inputs or on weights, or the trace fails; the message
            names the line of the model.
    """
    leaves, spec = pytree.tree_flatten(list(args))
    names = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(list(args))[0]]
    owners = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
    modules = {module: name for owner in owners for name, module in owner.named_modules()}
    mode = ValueMode(allow_non_fake_inputs=True)
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
        with following(modules, ran), Reads(labels):
            results, found["spec"] = pytree.tree_flatten(function(*pytree.tree_unflatten(rest, spec)))
        found["results"] = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in results]
        return [leaf for leaf in results if isinstance(leaf, torch.Tensor)]

    with _LOCK, holding(modules, places, stand_ins):
        traced = trace_known(call, [*given, *constants], mode)
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
        [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)],
    )


def _label(path: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in path).strip("_")


def _state(modules: dict[nn.Module, str], mode: ValueMode) -> tuple[list[Any], list[Any], list[str]]:
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


def _drop_unused(traced: fx.GraphModule, labels: Sequence[str], examples: Sequence[torch.Tensor]) -> list[int]:
    """Remove inputs that nothing reads; numbers of those that are left, which get their names and forms."""
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
        first: BaseException | None = None,
    ) -> None:
        self.function, self.backend, self.forget, self.first = function, backend, forget, first
        self.variants: OrderedDict[Any, tuple[Specialised, Callable[..., Any]]] = OrderedDict()
        #: how many variants were made so far
        self.made = 0

    def has(self, *args: Any) -> bool:
        """Whether a variant fits these arguments."""
        with _LOCK:
            found = self.variants.get(_signature(args))
            return found is not None and found[0].is_current()

    def __call__(self, *args: Any) -> Any:
        key = _signature(args)
        with _LOCK:
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
        return specialised.result(compiled(*specialised.arguments(pytree.tree_leaves(list(args)))))

    def _make(self, args: Sequence[Any]) -> tuple[Specialised, Callable[..., Any]]:
        why = explain_failure(self.first) if self.first is not None else ""
        leaves = pytree.tree_leaves(list(args))
        try:
            if not any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves):
                raise UntraceableError("no floating-point input: graphs for the values of integers alone are not made")
            if self.first is not None and not any(is_value(leaf) for leaf in leaves):
                raise self.first  # there is nothing that could be taken by value
            specialised = specialise(self.function, args)
        except UntraceableError as error:
            raise UntraceableError(f"{error}; and with sizes of any value: {why}" if why else str(error)) from error
        self.made += 1
        said = f"variant {self.made} of those for the values of small integer inputs: {_say(args)}"
        specialised.graph_module.meta["values"] = said + (f"; for all values: {why}" if why and self.made == 1 else "")
        return specialised, self.backend(specialised.graph_module, specialised.arguments(leaves))


def _signature(args: Sequence[Any]) -> Any:
    leaves, spec = pytree.tree_flatten(list(args))
    return spec, _mode(), tuple(_key(leaf) for leaf in leaves)


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

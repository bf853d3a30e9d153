"""The parts of :mod:`tokcompile.lower.repeated`: how layers are told apart, compiled once and put together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils import _pytree as pytree

from tokcompile.capture.captured import Captured

aten = torch.ops.aten
#: (module, example values of its inputs, their fake mode) -> what runs it.
Compiler = Callable[[fx.GraphModule, list[Any], FakeTensorMode], Callable[..., Any]]


class WholeError(Exception):
    """The graph is better compiled as a whole; says why."""


@dataclass(eq=False)
class Place:
    """Where a form occurs.

    Attributes:
        form: what occurs there.
        nodes: node of the form -> node of the graph.
        members: the operations of the graph that one call replaces.
    """

    form: Form
    nodes: dict[fx.Node, fx.Node]
    members: set[fx.Node]


@dataclass(eq=False)
class Form:
    """Operations that occur in one or more places of a graph.

    Attributes:
        members: the operations in graph order, as they stand in the first place.
        results: those at which the comparison with another place starts.
        inputs: the values that the members read from outside.
        outputs: the members that are read outside of at least one place.
    """

    members: list[fx.Node]
    results: list[fx.Node]
    places: list[Place] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        inside = set(self.members)
        self.inputs = list(dict.fromkeys(n for m in self.members for n in m.all_input_nodes if n not in inside))
        self.places.append(Place(self, {n: n for n in (*self.inputs, *self.members)}, inside))

    def match(self, results: Sequence[fx.Node]) -> Place | None:
        """The place that ends in ``results``; None if it is of another form."""
        if len(results) != len(self.results):
            return None
        inside, found = self.places[0].members, dict[fx.Node, fx.Node]()
        todo = list(zip(self.results, results, strict=True))
        while todo:
            mine, other = todo.pop()
            if found.setdefault(mine, other) is not other:
                return None
            if not _alike(mine.meta.get("val"), other.meta.get("val")):
                return None
            if mine in inside:
                pairs = _compare(mine, other)
                if pairs is None:
                    return None
                todo += [pair for pair in pairs if found.get(pair[0]) is not pair[1]]
        members = {found[m] for m in self.members if m in found}
        if len(members) < len(self.members) or any(found[i] in members for i in self.inputs):
            return None
        return Place(self, found, members)

    def numbers(self, place: Place) -> list[int]:
        """The integers among the arguments of the members, in a fixed order."""
        return [n for m in self.members for n in _leaves(place.nodes[m])[0] if type(n) is int]

    def settle_outputs(self) -> None:
        read = {
            m
            for place in self.places
            for m in self.members
            if any(user not in place.members for user in place.nodes[m].users)
        }
        self.outputs = [m for m in self.members if m in read]


def _alike(a: Any, b: Any) -> bool:
    """Whether two values may differ in their sizes only."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dim(), a.dtype, a.device, a.requires_grad) == (b.dim(), b.dtype, b.device, b.requires_grad)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    return type(a) is type(b)


def _leaves(node: fx.Node) -> tuple[list[Any], Any]:
    return pytree.tree_flatten((node.args, node.kwargs))


def _compare(a: fx.Node, b: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """The nodes that two operations read, in pairs; None when they differ in more than the sizes in their arguments."""
    (left, form), (right, other_form) = _leaves(a), _leaves(b)
    if a.op != b.op or a.target is not b.target or form != other_form:
        return None
    pairs = []
    for x, y, size in zip(left, right, _are_sizes(a), strict=True):
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            pairs.append((x, y))
        elif type(x) is not type(y) or (x != y and not (size and type(x) is int)):
            return None
    return pairs


def _are_sizes(node: fx.Node) -> list[bool]:
    """For each leaf of the arguments whether the operator takes a symbol there (a size; not a dimension, say)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [False] * len(_leaves(node)[0])
    takes = {a.name: _takes_symbol(a.real_type) for a in node.target._schema.arguments}
    named = zip(takes, node.args, strict=False)
    return [takes[name] for name, value in (*named, *node.kwargs.items()) for _ in pytree.tree_leaves(value)]


def _takes_symbol(kind: Any) -> bool:
    while hasattr(kind, "getElementType"):
        kind = kind.getElementType()
    return kind.kind() in ("SymIntType", "NumberType", "TensorType")  # a tensor: x + 1


# ------------------------------------------------------------------------------------------------- compiling the parts


class _Sizes:
    """Sizes in several places at once: a number where all agree, else an expression of one of few symbols."""

    def __init__(self, env: ShapeEnv, example: int) -> None:
        self.env, self.example = env, example
        self.symbols: dict[tuple[int, ...], sympy.Symbol] = {}

    def __call__(self, values: tuple[int, ...]) -> Any:
        """The size that is ``values[i]`` in place i, as a sympy expression or an int."""
        if len(set(values)) == 1:
            return values[0]
        for base, symbol in self.symbols.items():
            pairs = list(zip(values, base, strict=True))
            if len({v - b for v, b in pairs}) == 1:
                return symbol + (values[0] - base[0])
            if all(v % b == 0 for v, b in pairs) and len({v // b for v, b in pairs}) == 1:
                return symbol * (values[0] // base[0])
        if min(values) < 2:
            raise WholeError("a stage has less than two tokens")  # Inductor treats 0 and 1 apart
        self.symbols[values] = self.env.create_symbol(
            values[self.example], ConstantSource(f"size_{len(self.symbols)}"), dynamic_dim=DimDynamic.DYNAMIC
        )
        return self.symbols[values]

    def value(self, size: Any) -> Any:
        """``size`` as a SymInt of the environment, or an int."""
        if not isinstance(size, sympy.Basic):
            return size
        hint = int(size.xreplace({s: sympy.Integer(v[self.example]) for v, s in self.symbols.items()}))
        return self.env.create_symintnode(size, hint=hint)

    def hold(self) -> bool:
        """Whether everything that compilation assumed of the symbols is true in every place."""
        guards = [g.expr for g in self.env.guards]
        count = len(next(iter(self.symbols), ()))
        return all(
            bool(g.xreplace({s: sympy.Integer(v[i]) for v, s in self.symbols.items()}))
            for i in range(count)
            for g in guards
        )


class Compiled(nn.Module):
    """What runs one form in all its places."""

    def __init__(self, form: Form, compiler: Compiler) -> None:
        super().__init__()
        form.settle_outputs()
        self.form = form
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        assert mode.shape_env is not None
        inputs = [[place.nodes[i].meta["val"] for place in form.places] for i in form.inputs]
        if not all(isinstance(value, torch.Tensor) for values in inputs for value in values):
            raise WholeError("a part takes something that is no tensor")
        # what a kernel does with its threads follows from the example: the largest place has most to lose
        elements = [sum(v.numel() for v in values) for values in zip(*inputs, strict=True)]
        sizes = _Sizes(mode.shape_env, elements.index(max(elements)) if elements else 0)
        graph, local, values = fx.Graph(), dict[fx.Node, fx.Node](), []
        sources: dict[sympy.Symbol, tuple[fx.Node, int]] = {}
        #: for each input whether its places agree in no layout, so that it must be made contiguous
        self.dense: list[bool] = []
        for node, tensors in zip(form.inputs, inputs, strict=True):
            local[node] = graph.placeholder(node.name)
            shape = [sizes(dim) for dim in zip(*(t.shape for t in tensors), strict=True)]
            for d, size in enumerate(shape):
                if isinstance(size, sympy.Symbol):
                    sources.setdefault(size, (local[node], d))
            strides = _strides(tensors, shape)
            self.dense.append(strides is None)
            strides = _strides([t.contiguous() for t in tensors], shape) if strides is None else strides
            if strides is None:
                raise WholeError("a value lies in memory in another order from place to place")
            strides = [sizes.value(s) for s in strides]
            shape = [sizes.value(s) for s in shape]
            with mode:
                value = torch.empty_strided(shape, strides, dtype=tensors[0].dtype, device=tensors[0].device)
            values.append(value.requires_grad_(tensors[0].requires_grad))
        self._write(graph, local, sizes, sources, values)
        for node in graph.nodes:
            node.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        self.run = compiler(fx.GraphModule(nn.Module(), graph), values, mode)
        if not sizes.hold():
            raise WholeError("compiling a part for all its sizes put conditions on them")

    def _write(
        self,
        graph: fx.Graph,
        local: dict[fx.Node, fx.Node],
        sizes: _Sizes,
        sources: dict[sympy.Symbol, tuple[fx.Node, int]],
        values: list[Any],
    ) -> None:
        """Put the members into ``graph``; numbers that differ between places come from sizes, or as more inputs."""
        form = self.form
        columns = list(zip(*(form.numbers(place) for place in form.places), strict=True))
        numbers = [sizes(column) for column in columns]
        #: for each place the numbers that no size of an input tells
        self.given: list[list[int]] = [[] for _ in form.places]
        symbols: dict[sympy.Symbol, fx.Node] = {}
        for column, symbol in sizes.symbols.items():
            if symbol not in sources:
                symbols[symbol] = graph.placeholder(f"number_{len(values)}")
                values.append(sizes.value(symbol))
                for given, n in zip(self.given, column, strict=True):
                    given.append(n)
        for symbol, source in sources.items():
            symbols[symbol] = graph.call_function(aten.sym_size.int, source)

        def number(size: Any) -> Any:
            if not isinstance(size, sympy.Basic):
                return size
            (symbol,) = size.free_symbols
            offset, node = int(size.xreplace({symbol: sympy.Integer(0)})), symbols[symbol]
            if offset:
                return graph.call_function(operator.add, (node, offset))
            factor = int(size.xreplace({symbol: sympy.Integer(1)}))
            return node if factor == 1 else graph.call_function(operator.mul, (node, factor))

        remaining = iter(numbers)
        for member in form.members:
            leaves, spec = _leaves(member)
            args, kwargs = pytree.tree_unflatten(
                [
                    local[n] if isinstance(n, fx.Node) else number(next(remaining)) if type(n) is int else n
                    for n in leaves
                ],
                spec,
            )
            local[member] = graph.create_node(member.op, member.target, args, kwargs, name=member.name)
            local[member].meta = dict(member.meta)
        graph.output([local[n] for n in form.outputs])

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


def _strides(tensors: Sequence[torch.Tensor], shape: Sequence[Any]) -> list[Any] | None:
    """Strides of the tensors in terms of ``shape``: constant, or dense in one order of the dimensions; else None."""
    order = sorted(range(len(shape)), key=lambda d: (tensors[0].stride(d), -d))
    strides: list[Any] = [0] * len(shape)
    dense, values = sympy.Integer(1), [1] * len(tensors)
    for d in order:
        found = [t.stride(d) for t in tensors]
        if len(set(found)) == 1:
            strides[d] = found[0]
        elif found == values:
            strides[d] = dense
        else:
            return None
        if found == values:
            dense = dense * shape[d]
            values = [v * t.shape[d] for v, t in zip(values, tensors, strict=True)]
    return strides


def assemble(captured: Captured, calls: Sequence[tuple[Compiled, Place]]) -> fx.GraphModule:
    """The graph of calls."""
    root, graph, local = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    names: dict[Compiled, str] = {}
    for node in captured.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            local[node] = graph.node_copy(node)
            if node.op == "get_attr":
                setattr(root, node.target, getattr(captured.graph_module, node.target))
    for compiled, place in calls:
        form = compiled.form
        if compiled not in names:
            names[compiled] = f"form_{len(names)}"
            root.add_module(names[compiled], compiled)
        inputs = [local[place.nodes[i]] for i in form.inputs]
        inputs = [
            graph.call_function(aten.contiguous.default, (value,)) if dense else value
            for value, dense in zip(inputs, compiled.dense, strict=True)
        ]
        result = graph.call_module(names[compiled], (*inputs, *compiled.given[form.places.index(place)]))
        for i, output in enumerate(form.outputs):
            local[place.nodes[output]] = graph.call_function(operator.getitem, (result, i))
    graph.output(fx.map_arg(captured.graph.output_node().args[0], lambda n: local[n]))
    return fx.GraphModule(root, graph)

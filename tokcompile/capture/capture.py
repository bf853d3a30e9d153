"""Bring a Dynamo graph or a ``torch.export`` program into one form: pre-dispatch ATen with symbolic shapes.

In that form ``linear``, ``layer_norm``, ``embedding`` and ``scaled_dot_product_attention`` stay whole, every
node has ``meta["val"]`` (a fake tensor or a symbolic number), the module path and the source line of the code
that made it.

The graph is re-traced under a fake mode of its own. Dynamo freezes the guards of its symbols around the
backend; a rewrite adds a symbol that Dynamo has never heard of (the number of kept tokens) and guards on it, so
both belong to a separate shape environment, see :class:`Captured`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokcompile.capture.captured import Captured
from tokcompile.capture.checks import CheckedInterpreter
from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.known_trace import UntraceableError
from tokcompile.capture.parallel import is_sharded, one_rank
from tokcompile.capture.trace import trace
from tokcompile.errors import CaptureError

#: Dynamo settings under which nearly every model is one graph. Set for the call, never globally. One model meets many
#: kinds of call (with and without cache, one row and several, beams, chat turns, empty slots), each a graph of its own:
#: more than the 8 that Dynamo allows by default before it fails.
DYNAMO_CONFIG: dict[str, Any] = {"capture_scalar_outputs": True, "specialize_float": True, "recompile_limit": 64}


class _Inputs:
    """Rebuild captured example values under another fake mode, keeping the relations between their sizes."""

    def __init__(
        self, mode: FakeTensorMode, hints: dict[Any, int] | None = None, same: Mapping[Any, Any] | None = None
    ) -> None:
        self.mode, self.symbols = mode, {}  # type: ignore[var-annotated]
        self.hints, self.same = hints or {}, dict(same or {})

    def number(self, value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        env = self.mode.shape_env
        assert env is not None
        expr = value.node.expr.xreplace(self.same)
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self.symbols:
                # a size is at least 2 (Dynamo specialises 0 and 1); a plain number, say a length so far, can be 0
                create = env.create_symbol if symbol.is_positive else env.create_unspecified_symbol
                hint = self.hints.get(symbol, _hint(value.node.shape_env, symbol))
                self.symbols[symbol] = create(hint, ConstantSource(f"size_{symbol}"), dynamic_dim=DimDynamic.DYNAMIC)
        new = expr.xreplace(self.symbols)
        hint = int(new.xreplace({self.symbols[s]: _hint(env, self.symbols[s]) for s in expr.free_symbols}))
        return env.create_symintnode(new, hint=hint)

    def value(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            size, stride = [self.number(s) for s in value.shape], [self.number(s) for s in value.stride()]
            with self.mode:
                new = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)
            new.requires_grad_(value.requires_grad)
            return new if value.is_leaf or not value.requires_grad else _with_history(new)
        return self.number(value)


def _with_history(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` as the result of some operation: gradients flow to it, and it may be changed in place."""
    with torch.enable_grad():
        return torch._C._functions.DelayedError("an example input has no history", 1)(tensor)


def _sizes(examples: Sequence[Any], args: Sequence[Any]) -> dict[Any, int]:
    """Symbol -> its value in a call."""
    found: dict[Any, int] = {}
    for example, arg in zip(examples, args, strict=False):
        if is_sharded(arg):
            continue
        pairs = zip(example.shape, arg.shape, strict=True) if isinstance(example, torch.Tensor) else [(example, arg)]
        for size, value in pairs:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, int(value))
    return found


def _hint(env: ShapeEnv, symbol: Any) -> int:
    table = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    return int(table[symbol])


def from_dynamo(graph_module: fx.GraphModule, args: Sequence[Any] = ()) -> Captured:
    """Bring the graph that Dynamo hands to a backend into the common form.

    Args:
        graph_module: as given to a ``torch.compile`` backend; placeholders carry ``meta["example_value"]``.
        args: inputs of a call whose sizes decide what a rewrite asks of a symbolic size; default: those of the capture.

    Raises:
        CaptureError: the graph cannot be rewritten (it checkpoints activations).
    """
    if graph_module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint):
        raise CaptureError(
            "gradient checkpointing is on, and what a checkpoint recomputes cannot be rewritten: call "
            "model.gradient_checkpointing_disable() before training an optimized model (Inductor "
            "recomputes cheap activations anyway), or train with shorter sequences"
        )
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    graph_module, notes = one_rank(graph_module)
    examples = [_example(node) for node in graph_module.graph.nodes if node.op == "placeholder"]
    inputs = _Inputs(mode, _sizes(examples, args))
    fakes = [inputs.value(example) for example in examples]
    graph_module = _flatten_vmap(graph_module, fakes, mode)
    kinds = sorted({type(value).__name__ for value in examples if is_traceable_wrapper_subclass(value)})
    try:
        traced = trace(lambda *args: CheckedInterpreter(graph_module).run(*args), fakes, mode)
    except Exception as error:
        if not kinds:
            raise
        raise UntraceableError(
            f"weights are of class {', '.join(kinds)}, and the graph does more with them than with a plain weight; "
            "weights that torchao quantised can be used, and those of tensor parallelism and of fully_shard"
        ) from error
    for node in traced.graph.find_nodes(op="get_attr"):
        if isinstance(getattr(traced, node.target), FakeTensor):
            raise CaptureError(f"a value computed at {source_line(node)} ({module_path(node)}) cannot be traced")
    _name_arguments(traced, graph_module)
    for node in traced.graph.find_nodes(op="placeholder"):
        node.meta.update(notes.get(node.meta["argument"], {}))
    return Captured(traced, mode, "dynamo", inputs.symbols)


def from_export(program: torch.export.ExportedProgram, same: Mapping[Any, Any] | None = None) -> Captured:
    """Bring a ``torch.export`` program (parameters lifted to inputs) into the common form.

    Args:
        same: symbol of the program -> the size that it always equals, in other symbols: torch.export gives sizes of
            different inputs a symbol each, and an axis can only be followed where it is known to be one.
    """
    graph_module = program.graph_module
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = _Inputs(mode, same=same)
    fakes = [inputs.value(node.meta["val"]) for node in graph_module.graph.nodes if node.op == "placeholder"]
    traced = trace(lambda *args: CheckedInterpreter(graph_module).run(*args), fakes, mode)
    _name_arguments(traced, graph_module)
    return Captured(traced, mode, "export", inputs.symbols)


def _name_arguments(traced: fx.GraphModule, original: fx.GraphModule) -> None:
    """``meta["argument"]`` of each placeholder: its name in the captured graph, which tells where it comes from."""
    given = original.graph.find_nodes(op="placeholder")
    for node, source in zip(traced.graph.find_nodes(op="placeholder"), given, strict=True):
        node.meta["argument"] = str(source.target)


def _flatten_vmap(graph_module: fx.GraphModule, fakes: Sequence[Any], mode: FakeTensorMode) -> fx.GraphModule:
    """Replace spans of ``torch.vmap`` (mask code uses it) by what they compute on whole tensors.

    Pre-dispatch tracing sees operations before vmap has expanded them and loses the result, so a span is traced on
    its own below vmap, and its operations take its place.
    """
    spans: list[list[fx.Node]] = []
    depth = 0
    for node in graph_module.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "_vmap_increment_nesting":
            if depth == 0:
                spans.append([])
            depth += 1
        if depth:
            spans[-1].append(node)
        if name == "_vmap_decrement_nesting":
            depth -= 1
    if not spans:
        return graph_module
    values: dict[fx.Node, Any] = {}

    class Record(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            values[node] = super().run_node(node)
            return values[node]

    assert mode.shape_env is not None
    with mode, enable_python_dispatcher(), mode.shape_env.ignore_fresh_unbacked_symbols():
        Record(graph_module).run(*fakes)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    inside = {node: i for i, span in enumerate(spans) for node in span}
    for node in graph_module.graph.nodes:
        if node in inside:
            span = spans[inside[node]]
            if node is span[-1]:
                _inline_span(graph_module, graph, span, copied, values, mode)
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: copied[n]))
        else:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    return fx.GraphModule(graph_module, graph)


def _inline_span(
    graph_module: fx.GraphModule,
    graph: fx.Graph,
    span: list[fx.Node],
    copied: dict[fx.Node, fx.Node],
    values: dict[fx.Node, Any],
    mode: FakeTensorMode,
) -> None:
    members = set(span)
    inputs = list(dict.fromkeys(n for node in span for n in node.all_input_nodes if n not in members))
    results = [node for node in span if any(user not in members for user in node.users)]
    part, local = fx.Graph(), {}
    for node in inputs:
        local[node] = part.placeholder(node.name)
    for node in span:
        local[node] = part.node_copy(node, lambda n: local[n])
    part.output([local[n] for n in results])
    module = fx.GraphModule(graph_module, part)
    with mode:
        traced = make_fx(lambda *a: fx.Interpreter(module).run(*a), tracing_mode="real")(*(values[n] for n in inputs))
    place = {
        key: next((n.meta[key] for n in [*span, *inputs] if n.meta.get(key)), None)
        for key in ("nn_module_stack", "stack_trace")
    }
    place = {key: value for key, value in place.items() if value is not None}
    below: dict[fx.Node, fx.Node] = dict(
        zip(traced.graph.find_nodes(op="placeholder"), (copied[n] for n in inputs), strict=True)
    )
    for node in traced.graph.nodes:
        if node.op == "output":
            for result, value in zip(results, node.args[0], strict=True):
                copied[result] = below[value]
        elif node.op != "placeholder":
            below[node] = graph.node_copy(node, lambda n: below[n])
            below[node].meta.update(place)


def _example(node: fx.Node) -> Any:
    return node.meta["example_value"] if "example_value" in node.meta else node.meta.get("val")

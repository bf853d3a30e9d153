"""A rewritten graph becomes an ONNX model.

Captured (pre-dispatch ATen, our passes applied)
  repair        operations that ONNX has otherwise, or that the exporter would get wrong
  decompose     operations of our kernels, by their own ``onnx.py``
  convert       ``torch.onnx.export`` of the graph as an ExportedProgram
  name          inputs, outputs, axes; sizes that depend on data are computed in the graph; source paths cleared
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._export.verifier import TrainingIRVerifier
from torch.export import Dim
from torch.export.exported_program import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental import _config as fx_config

import tokcompile.kernels
from tokcompile.capture.capture import from_export
from tokcompile.capture.captured import Captured
from tokcompile.capture.checks import Check, checks_in, describe
from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.trace import ASSERTIONS, inline, propagate
from tokcompile.errors import ExportError
from tokcompile.kinds import Stage as CallStage
from tokcompile.onnx_export.repairs import REPAIRS, WAYS_OUT
from tokcompile.onnx_export.simplify import simplify
from tokcompile.regions.model import Regions
from tokcompile.rewrite.added_inputs import AddedInputs
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.graph_inputs import HostSize, StateInput
from tokcompile.runtime.session import Session

aten = torch.ops.aten

TARGETS = ("standard", "contrib")


@dataclass
class Stage:
    """One file to be: a module over named tensors, and what its axes are called.

    Attributes:
        name: stem of the file.
        module: ``forward(inputs: dict[str, Tensor]) -> dict[str, Tensor]``.
        inputs: example values.
        axes: input -> {dimension: axis name}; other dimensions are fixed. One name is one size.
        output_axes: output -> {dimension: axis name}, for axes that no input has.
        sums: axis name -> the axes whose sizes it is the sum of.
    """

    name: str
    module: torch.nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]
    output_axes: dict[str, dict[int, str]] = field(default_factory=dict)
    sums: dict[str, tuple[str, ...]] = field(default_factory=dict)


def doubled(inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> dict[str, Tensor]:
    """``inputs`` with every axis doubled that has size 1 somewhere: torch.export takes a size of 1 for a constant.

    Args:
        axes: input -> {dimension: name of the axis}.

    Returns:
        The inputs; along a doubled axis their values stand twice, in all inputs that have this axis.
    """
    small = {axis for name, dims in axes.items() for dim, axis in dims.items() if inputs[name].shape[dim] == 1}
    found = dict(inputs)
    for name, dims in axes.items():
        for dim in (d for d, axis in dims.items() if axis in small):
            found[name] = torch.cat([found[name], found[name]], dim)
    return found


@dataclass
class Lowered:
    """A converted stage.

    Attributes:
        model: the ``onnx_ir`` model. program: the same as an ExportedProgram, to compare values with.
        inputs, outputs: names in order. sizes: names of data-dependent sizes and of the values that they have.
        nodes: number of ONNX nodes. context: what the passes did.
        lines: name of an FX node -> source line of the model code.
        checks: outputs (bool, one element) that say whether the inputs pass a check of the model. A file cannot raise.
    """

    found: CapturedStage
    model: Any
    program: ExportedProgram
    inputs: list[str]
    outputs: list[str]
    sizes: dict[str, str]
    context: Context | None
    lines: dict[str, str]
    checks: dict[str, Check] = field(default_factory=dict)

    @property
    def stage(self) -> Stage:
        return self.found.stage

    def size_values(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """The data-dependent sizes for real ``inputs``."""
        stage = dataclasses.replace(self.found.stage, inputs={n: inputs[n] for n in self.inputs})
        args = dataclasses.replace(self.found, stage=stage).args
        return [size(args)[0] for size in (self.context.added.sizes if self.context else ())]

    @property
    def nodes(self) -> int:
        return sum(1 for _ in self.model.graph.all_nodes())


class _Named(torch.nn.Module):
    """``forward`` of a stage with a flat result; notes the output names."""

    def __init__(self, module: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module = module
        self._note = lambda found: names.__setitem__(slice(None), found)  # export puts attributes back as they were

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        outputs = self.module(inputs)
        self._note(list(outputs))
        return tuple(outputs.values())


@dataclass
class CapturedStage:
    """A stage in the common form, before the passes.

    Attributes:
        state: placeholder name -> parameter, buffer or constant. order: all placeholders: (kind, target).
    """

    stage: Stage
    captured: Captured
    specs: list[InputSpec]
    state_dict: dict[str, Any]
    constants: dict[str, Any]
    outputs: list[str]

    @property
    def args(self) -> list[Any]:
        state: dict[Any, Any] = {**self.state_dict, **self.constants}
        inputs = iter(self.stage.inputs.values())
        return [next(inputs) if spec.kind == InputKind.USER_INPUT else state[spec.target] for spec in self.specs]


def capture(stage: Stage) -> CapturedStage:
    """Trace ``stage`` with symbolic axes.

    Raises:
        ExportError: a value decides about the shape or the course of the computation, or an axis turns out fixed.
    """
    names: list[str] = []
    named = _Named(stage.module, names).eval()
    # named dims would have to satisfy every bound of the model (64 positions, say); bounds are no axes
    shapes = {name: dict.fromkeys(stage.axes.get(name, {}), Dim.DYNAMIC) for name in stage.inputs}
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(
                named,
                (dict(stage.inputs),),
                dynamic_shapes=(shapes,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except Exception as error:
        raise _not_traceable(stage, error) from error
    signature = program.graph_signature
    odd = [s for s in signature.output_specs if s.kind != OutputKind.USER_OUTPUT]
    if odd:
        raise ExportError(f"{stage.name}: the model changes '{odd[0].target}' while it runs; a file cannot keep state")
    captured = from_export(program, _same_sizes(stage, program))
    _relative_paths(captured)
    state = {**program.state_dict, **program.constants}
    missing = [s.target for s in signature.input_specs if s.kind != InputKind.USER_INPUT and s.target not in state]
    assert not missing, missing
    found = CapturedStage(
        stage,
        captured,
        list(signature.input_specs),
        program.state_dict,
        {k: v for k, v in program.constants.items() if isinstance(v, Tensor)},
        names,
    )
    _check_axes(found)
    return found


def _same_sizes(stage: Stage, program: ExportedProgram) -> dict[Any, Any]:
    """Symbols that the axes of a stage make equal: -> the first with the same name, or the sum of others."""
    users = [
        n
        for n, s in zip(program.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True)
        if s.kind == InputKind.USER_INPUT
    ]
    found = [
        (axis, node.meta["val"].shape[dim].node.expr)
        for node, name in zip(users, stage.inputs, strict=True)
        for dim, axis in stage.axes.get(name, {}).items()
        if isinstance(node.meta["val"].shape[dim], torch.SymInt)
    ]
    sizes = dict(reversed([(axis, size) for axis, size in found if size.is_Symbol]))
    sums = {axis: sum(sizes[part] for part in parts) for axis, parts in stage.sums.items() if set(parts) <= set(sizes)}
    return {
        symbol: (sizes | sums)[axis] for axis, symbol in found if symbol.is_Symbol and (sizes | sums)[axis] != symbol
    }


def _relative_paths(captured: Captured) -> None:
    """Module paths as the model has them, without the modules of a stage around it."""
    for node in captured.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (re.sub(r"^module(\.model(\.|$)|$)", "", path), kind) for key, (path, kind) in stack.items()
            }


def _check_axes(found: CapturedStage) -> None:
    users = [n for n, s in zip(found.captured.placeholders, found.specs, strict=True) if s.kind == InputKind.USER_INPUT]
    for node, (name, axes) in zip(users, ((n, found.stage.axes.get(n, {})) for n in found.stage.inputs), strict=True):
        for dim, axis in axes.items():
            if isinstance(node.meta["val"].shape[dim], int):
                raise ExportError(
                    f"{found.stage.name}: axis '{axis}' (dimension {dim} of {name}) became fixed at "
                    f"{node.meta['val'].shape[dim]} while the model was traced; leave it out of the "
                    "dynamic axes, or remove what depends on its value from the model"
                )


def _not_traceable(stage: Stage, error: Exception) -> ExportError:
    text = " ".join(str(error).split("\n\n")[0].split())
    found = re.findall(r"#\s*(\S+\.py:\d+)", str(error)) + [
        f"{f}:{n}" for f, n in re.findall(r'File "([^"]+)", line (\d+)', str(error))
    ]
    if not found:
        trace, frames = error.__traceback__, []
        while trace is not None:
            frames.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
            trace = trace.tb_next
        found = frames
    own = [f for f in found if "/torch/" not in f and "/tokcompile/" not in f and "/contextlib.py" not in f]
    node = _read_value(error)
    parts = [*([f"node {node.name} ({node.target})"] if node is not None else []), *own[-1:]]
    place = f" [{', '.join(parts)}]" if parts else ""
    way = (
        "move what depends on values of tensors out of forward, or replace it by operations with shapes that follow "
        "from shapes (torch.where for a branch, a mask for a selection)"
    )
    return ExportError(
        f"{stage.name}: the model cannot be traced with dynamic shapes: {type(error).__name__}: "
        f"{text[:600]}{place}; {way}"
    )


def _read_value(error: BaseException) -> fx.Node | None:
    """The node whose value Python asked for when tracing failed: the last that the tracer wrote down."""
    trace, graph = error.__traceback__, None
    while trace is not None:
        for value in list(trace.tb_frame.f_locals.values()):
            if isinstance(value, fx.Tracer) and hasattr(value, "graph"):
                graph = value.graph
        trace = trace.tb_next
    calls = [n for n in graph.nodes if n.op == "call_function"] if graph is not None else []
    node = next((n for n in reversed(calls) if n.target is aten.item.default), None)
    if node is None:
        return calls[-1] if calls else None
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target is aten.ne.Scalar and source.args[1] == 0:
        source = source.args[0]  # a truth value is read as "not 0"
    return source if isinstance(source, fx.Node) else node


def rewrite(found: CapturedStage, session: Session, name: str) -> Context:
    """Apply the passes; sizes that depend on data stay open, and rows may always keep different numbers of tokens."""
    added = AddedInputs(found.captured, session.prepared, always_ragged=True)
    ctx = Context(found.captured, Regions(), found.args, added=added)
    session.rewrite(ctx, CallStage(name))
    return ctx


def lower(
    found: CapturedStage,
    ctx: Context | None = None,
    *,
    opset: int,
    target: str,
    extra_outputs: Mapping[str, fx.Node] | None = None,
) -> Lowered:
    """Convert a captured (and rewritten) stage.

    Args:
        extra_outputs: nodes to return beside the outputs of the stage.
    """
    captured, stage = found.captured, found.stage
    checks = _checks(captured)
    extra_outputs = {**(extra_outputs or {}), **{name: node for name, (node, _) in checks.items()}}
    names = [*found.outputs, *extra_outputs]
    output = captured.graph.output_node()
    results = [*output.args[0], *extra_outputs.values()]  # type: ignore[misc]
    sizes: dict[str, str] = {}
    added = ctx.added.of if ctx else {}
    for node, item in added.items():
        if isinstance(item, HostSize):  # the graph computes the number that the host reads off the mask elsewhere
            sizes[node.name] = f"{node.name}_value"
            names.append(sizes[node.name])
            results.append(
                inline(captured, lambda mask, rows=item.function: rows(mask.to(torch.bool)).max(), [item.mask], output)
            )
    output.args = (tuple(results),)
    _clean(captured)
    decompose(captured)
    repair(captured, target)
    _clean(captured)
    propagate(captured)
    lines = {n.name: source_line(n) for n in captured.graph.nodes}
    placeholders = [
        n for n, s in zip(captured.placeholders, found.specs, strict=False) if s.kind == InputKind.USER_INPUT
    ]
    placeholders += [n for n, item in added.items() if isinstance(item, HostSize)]
    program = _program(found, ctx)
    try:
        with (
            torch.no_grad(),
            _quiet(),
            fx_config.patch(  # type: ignore[attr-defined]
                backed_size_oblivious=True
            ),
        ):
            converted = torch.onnx.export(program, opset_version=opset, verbose=False, optimize=False)
            assert converted is not None
            simplify(converted.model)
    except Exception as error:
        raise _not_convertible(captured, stage, error) from error
    assert converted.exported_program is not None
    model = converted.model
    user = [*stage.inputs, *sizes]
    _rename(placeholders, found, converted, user, names)
    for size, value in sizes.items():
        _splice(model, size, value)
    _strip(model)
    return Lowered(
        found,
        model,
        converted.exported_program,
        list(stage.inputs),
        [n for n in names if n not in sizes.values()],
        sizes,
        ctx,
        lines,
        {name: check for name, (_, check) in checks.items()},
    )


def _checks(captured: Captured) -> dict[str, tuple[fx.Node, Check]]:
    """Take the checks of the model out of the graph: name of an output -> the value that says whether it holds."""
    found: dict[fx.Node, Check] = {}
    for node in checks_in(captured.graph):
        found.setdefault(node.args[0], describe(node))  # type: ignore[arg-type]
        captured.graph.erase_node(node)
    return {f"check_{number}": pair for number, pair in enumerate(found.items())}


def _clean(captured: Captured) -> None:
    captured.graph.eliminate_dead_code(
        is_impure_node=lambda n: n.is_impure() and n.target not in (aten.item.default, *ASSERTIONS)
    )
    captured.graph_module.recompile()


def repair(captured: Captured, target: str) -> None:
    """Replace operations that the exporter has not, or has wrong (see ``repairs.py``)."""
    for node in list(captured.graph.nodes):
        found = REPAIRS.get(node.target)
        function = None if found is None else found(node, target)
        if function is not None:
            _inline(captured, node, function)


def decompose(captured: Captured) -> None:
    """Put what operations of kernels compute in their place."""
    kernels = decompositions()
    for node in list(captured.graph.nodes):
        if node.target in kernels:
            _inline(captured, node, kernels[node.target])


def _inline(captured: Captured, node: fx.Node, function: Callable[..., Any]) -> None:
    """Put the graph of ``function``, called as ``node`` is, in the place of ``node``."""
    flat = list(dict.fromkeys(node.all_input_nodes))

    def call(*values: Any) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), dict(zip(flat, values, strict=True)).__getitem__)
        return function(*args, **kwargs)

    _replace(captured, node, inline(captured, call, flat, node))


def _replace(captured: Captured, node: fx.Node, new: Any) -> None:
    base = node.args[0]
    if str(node.target).split(".")[1].endswith("_") and isinstance(base, fx.Node):  # in place: later readers too
        later = False
        for user in list(captured.graph.nodes):
            if user is node:
                later = True
            elif later and base in user.all_input_nodes:
                user.replace_input_with(base, new)
    if isinstance(new, fx.Node):
        node.replace_all_uses_with(new)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(new[user.args[1]])
            captured.graph.erase_node(user)
    captured.graph.erase_node(node)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operation of a kernel -> how its ``kernels/<name>/onnx.py`` decomposes it: ``DECOMPOSITIONS``, by name."""
    table: dict[Any, Callable[..., Any]] = {}
    for module in pkgutil.iter_modules(tokcompile.kernels.__path__):
        if not module.ispkg:
            continue
        name = f"tokcompile.kernels.{module.name}"
        try:
            lowering = importlib.import_module(f"{name}.onnx")
        except ModuleNotFoundError as error:
            if error.name != f"{name}.onnx":
                raise
            continue
        importlib.import_module(f"{name}.op")
        for operation, function in lowering.DECOMPOSITIONS.items():
            table[getattr(torch.ops.tokcompile, operation).default] = function
    return table


def _program(found: CapturedStage, ctx: Context | None) -> ExportedProgram:
    """The graph as an ExportedProgram. Guards on its symbols stay behind: ONNX sizes are free."""
    captured = found.captured
    constants = dict(found.constants)
    graph = captured.graph
    specs = list(found.specs)
    for node in list(graph.find_nodes(op="get_attr")):  # constants that passes brought along become inputs
        value = getattr(captured.graph_module, str(node.target))
        if not isinstance(value, Tensor):
            continue
        name = f"constant_{len(constants)}"
        with graph.inserting_before(captured.placeholders[0]):
            lifted = graph.placeholder(name)
        lifted.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(lifted)
        graph.erase_node(node)
        constants[name] = value.detach()
        specs.insert(0, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(lifted.name), name))
    for i, node in enumerate(captured.placeholders):
        kind = SymIntArgument if isinstance(node.meta["val"], torch.SymInt) else TensorArgument
        if i < len(specs):
            specs[i] = InputSpec(specs[i].kind, kind(node.name), specs[i].target, specs[i].persistent)
            continue
        item = ctx.added.of[node] if ctx else None
        if isinstance(item, StateInput):
            assert ctx is not None
            assert ctx.prepared is not None
            name = f"{item.pass_name}.{item.key}.{item.name}"
            constants[name] = getattr(ctx.prepared.scope(item.pass_name, item.key), item.name).detach()
            specs.append(InputSpec(InputKind.CONSTANT_TENSOR, kind(node.name), name))
        else:
            specs.append(InputSpec(InputKind.USER_INPUT, kind(node.name), None))
    results: Any = graph.output_node().args[0]
    users = [s for s in specs if s.kind == InputKind.USER_INPUT]
    _, in_spec = pytree.tree_flatten((tuple(range(len(users))), {}))
    _, out_spec = pytree.tree_flatten(tuple(range(len(results))))
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in results]
    call = ModuleCallEntry("", ModuleCallSignature(inputs=[], outputs=[], in_spec=in_spec, out_spec=out_spec))
    captured.graph_module.recompile()
    return ExportedProgram(
        root=captured.graph_module,
        graph=graph,
        graph_signature=ExportGraphSignature(specs, outputs),
        state_dict=found.state_dict,
        range_constraints={},
        module_call_graph=[call],
        constants=constants,
        verifiers=[TrainingIRVerifier],
    )  # in-place operations are left to the exporter


def _not_convertible(captured: Captured, stage: Stage, error: Exception) -> ExportError:
    """Name the node of the captured graph that the exporter stumbled over."""
    texts, cause = [], error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    text = "\n".join(texts)
    ops = re.findall(r"OpOverload\(op='(\w+)\.(\w+)'(?:, overload='(\w+)')?\)", text) or [
        (a, b, c) for a, b, c in re.findall(r"(\w+)[.:]+(\w+)\.(\w+)", text) if a in ("aten", "tokcompile", "prims")
    ]
    for namespace, name, _ in ops:
        for node in captured.graph.nodes:
            if str(node.target).startswith(f"{namespace}.{name}."):
                place = ", ".join(p for p in (f"node {node.name}", module_path(node), source_line(node)) if p)
                way = WAYS_OUT.get(
                    name,
                    "rewrite it with operations that ONNX has, or give its kernel a "
                    "decomposition in kernels/<name>/onnx.py",
                )
                return ExportError(f"{stage.name}: {node.target} has no ONNX form [{place}]; {way}")
    what = next((t for t in reversed(texts) if t), type(error).__name__)
    named = re.search(r"[Nn]ode '?%?(\w+)'?", text)
    node = next((n for n in captured.graph.nodes if named and n.name == named[1]), None)
    place = "" if node is None else f" [node {node.name}, {source_line(node)}]"
    return ExportError(f"{stage.name}: cannot be converted to ONNX: {' '.join(what.split())[:600]}{place}")


def _rename(
    placeholders: Sequence[fx.Node], found: CapturedStage, converted: Any, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    model = converted.model
    symbols: dict[str, str] = {}
    for node, name in zip(placeholders, inputs, strict=True):
        for dim, axis in found.stage.axes.get(name, {}).items():
            expr = node.meta["val"].shape[dim].node.expr
            if expr.is_Symbol:
                symbols.setdefault(str(expr), axis)
        if isinstance(node.meta["val"], torch.SymInt):
            symbols.setdefault(str(node.meta["val"].node.expr), f"{name}")
    import onnx_ir as ir

    graph = model.graph
    assert len(graph.inputs) == len(inputs), ([v.name for v in graph.inputs], inputs)
    results = list(graph.outputs)
    assert len(results) == len(outputs), ([v.name for v in results], outputs)
    taken = set(graph.inputs)
    for i, value in enumerate(results):  # one value returned twice, or an input handed through
        if value in taken:
            copy = ir.node("Identity", [value])
            copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
            graph.append(copy)
            graph.outputs[i] = copy.outputs[0]
        taken.add(graph.outputs[i])
    wanted = {*inputs, *outputs}
    kept = {*graph.inputs, *graph.outputs}
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in wanted and value not in kept:
                value.name = f"{value.name}__inner"
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    converted.rename_axes(symbols)
    for value in [*graph.inputs, *graph.outputs]:
        axes = {**found.stage.axes.get(value.name, {}), **found.stage.output_axes.get(value.name, {})}
        if value.shape is not None and axes:
            dims = [axes.get(i, d) if not isinstance(d, int) else d for i, d in enumerate(value.shape)]
            value.shape = ir.Shape(dims)


def _splice(model: Any, size: str, value: str) -> None:
    """Feed a data-dependent size from the value that the graph itself computes for it."""
    graph = model.graph
    inner = next(v for v in graph.inputs if v.name == size)
    source = next(v for v in graph.outputs if v.name == value)
    graph.inputs.remove(inner)
    graph.outputs.remove(source)
    inner.replace_all_uses_with(source)
    graph.sort()


def _strip(model: Any) -> None:
    """Remove what only says where the model came from: stack traces with paths, signatures."""
    for holder in [model.graph, *model.functions.values()]:
        holder.metadata_props.clear()
        holder.doc_string = None
        for value in [*holder.inputs, *holder.outputs]:
            value.metadata_props.clear()
        for node in holder.all_nodes() if hasattr(holder, "all_nodes") else holder:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporters print and log about what is no concern of the user here."""
    import logging
    import warnings

    loggers = [
        logging.getLogger(n)
        for n in ("torch.onnx", "torch.onnx._internal.exporter._registration", "torch.export", "onnxscript", "onnx_ir")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

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
import io
import re
from collections.abc import Mapping
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

from tokcompile.capture.capture import from_export
from tokcompile.capture.captured import Captured
from tokcompile.capture.checks import Check, checks_in, describe
from tokcompile.capture.graph import source_line
from tokcompile.capture.trace import ASSERTIONS, inline, propagate
from tokcompile.errors import ExportError
from tokcompile.kinds import Stage as CallStage
from tokcompile.onnx_export.decompose import decompose, inline_call
from tokcompile.onnx_export.naming import rename, splice, strip
from tokcompile.onnx_export.refusals import not_convertible, not_traceable
from tokcompile.onnx_export.repairs import REPAIRS
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
        raise not_traceable(stage.name, error) from error
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
    try:
        converted = _convert(_program(found, ctx), opset)
    except Exception as error:
        raise not_convertible(captured, stage.name, error) from error
    assert converted.exported_program is not None
    model = converted.model
    user = [*stage.inputs, *sizes]
    rename(placeholders, found.stage.axes, found.stage.output_axes, converted, user, names)
    for size, value in sizes.items():
        splice(model, size, value)
    strip(model)
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


def _convert(program: ExportedProgram, opset: int) -> torch.onnx.ONNXProgram:
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
        return converted


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
            inline_call(captured, node, function)


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

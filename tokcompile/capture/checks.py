"""Checks that model code makes on its inputs, held while the rewritten graph runs.

``torch._check*``, ``torch._assert*`` and ``assert`` become, in a captured graph, assertions on numbers that are read
off tensors. Tracing learns from them (a number of placeholders *is* the number of features) and then finds every later
question answered, so the assertion of a traced graph says nothing any more. So each is asked of the tensors as well,
ahead of what tracing learns from it:

    count = mask.sum().item();  _assert_scalar(count == n)   ->   _assert_async(mask.sum() == n, message)

What depends on inputs alone is asked before the graph runs (:class:`Checks`), before anything else can fail on them;
what depends on values of the model is one more result of the graph, read before the results are given back.
"""

from __future__ import annotations

import linecache
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tokcompile.capture.captured import Captured
from tokcompile.capture.flops import node_flops
from tokcompile.capture.graph import ancestors, extract, module_path, source_line
from tokcompile.errors import CheckError

aten = torch.ops.aten

#: The form of a check in a captured graph: a bool tensor, and what to say.
CHECK = aten._assert_async.msg
#: The same without words, which tracing takes for dead code.
_WORDLESS = {torch._assert_async, aten._assert_async.default}
#: Assertions that tracing learns from; each has a :data:`CHECK` beside it.
SCALAR = {aten._assert_scalar.default, torch._check_is_size, aten.sym_constrain_range_for_size.default}
_READS = {aten.item.default, aten._local_scalar_dense.default}
#: What Python operators on numbers are on tensors, where the operator itself does not take these.
_TENSOR_FORMS: dict[Any, Callable[..., Any]] = {
    torch.sym_not: torch.logical_not,
    operator.not_: torch.logical_not,
    torch.sym_float: lambda x: x.double(),
    torch.sym_int: lambda x: x.long(),
    torch.sym_max: lambda a, b: torch.where(_tensor(a) > b, a, b),
    torch.sym_min: lambda a, b: torch.where(_tensor(a) < b, a, b),
    torch.sym_ite: lambda c, a, b: torch.where(c, a, b),
}
#: Messages that tracing made up.
_NO_MESSAGE = re.compile(r"^(Runtime assertion failed for expression|Expected cond to be True|None$|$)")


class CheckedInterpreter(fx.Interpreter):
    """Runs a captured graph for tracing, with every assertion asked of tensors too."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        #: a number -> the same as a tensor that tracing knows nothing of
        self._tensors: dict[fx.Node, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target in SCALAR:
            with fx_traceback.set_current_meta(n):
                self._hold(n)
        if n.target in _WORDLESS and len(n.args) == 1:
            with fx_traceback.set_current_meta(n):
                return CHECK(self.env[n.args[0]], "")  # type: ignore[index]
        result = super().run_node(n)
        with fx_traceback.set_current_meta(n):
            self._follow(n, result)
        return result

    def _follow(self, n: fx.Node, result: Any) -> None:
        """Note the tensor that stands for a number."""
        read = n.target in _READS or (n.op == "call_method" and n.target == "item")
        source = self.env.get(n.args[0]) if read and isinstance(n.args[0], fx.Node) else None
        counted = self._counted(n)
        if counted is not None:
            self._tensors[n] = counted
        elif isinstance(source, torch.Tensor):
            self._tensors[n] = source.reshape(()).double() if source.is_floating_point() else source.reshape(())
        elif (
            n.op == "call_function"
            and not isinstance(result, torch.Tensor)
            and any(a in self._tensors for a in n.all_input_nodes)
        ):
            found = self._as_tensor(n)
            if found is not None:
                self._tensors[n] = found

    def _counted(self, n: fx.Node) -> torch.Tensor | None:
        """How many entries a boolean mask picks, where ``n`` is the size of what it picked: the mask tells it too."""
        if n.target is not aten.sym_size.int or n.args[1] != 0 or not isinstance(n.args[0], fx.Node):
            return None
        picked = n.args[0]
        if picked.target not in (operator.getitem, aten.index.Tensor):
            return None
        index: Any = picked.args[1]
        first = index[0] if isinstance(index, list | tuple) else index
        mask = self.env.get(first) if isinstance(first, fx.Node) else None
        return mask.sum() if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool else None

    def _as_tensor(self, n: fx.Node) -> torch.Tensor | None:
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda a: self._tensors.get(a, self.env.get(a)))
        try:
            function: Any = _TENSOR_FORMS.get(n.target, n.target)
            result = function(*args, **kwargs)
        except Exception:  # a function of numbers alone; the number itself is asked then
            return None
        return result if isinstance(result, torch.Tensor) else None

    def _hold(self, n: fx.Node) -> None:
        held = n.args[0]
        value: Any = self._tensors.get(held, self.env.get(held)) if isinstance(held, fx.Node) else held
        message = str(n.args[1]) if len(n.args) > 1 else ""
        if n.target is not aten._assert_scalar.default:
            value, message = value >= 0, "expected a size"
        if isinstance(value, torch.SymBool):
            if not free_unbacked_symbols(value):
                return  # of sizes of inputs: guards, or axes of one name
            value = torch.scalar_tensor(torch.sym_ite(value, 1, 0), dtype=torch.int64)
        if isinstance(value, torch.Tensor):
            CHECK(value, "" if _NO_MESSAGE.match(message) else message)


def _tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.scalar_tensor(value)


@dataclass(frozen=True)
class Check:
    """One check of the model.

    Attributes:
        message: of the model; "" where its code gives none, or tracing lost it.
        path, source: module path and ``file:line`` of the code that checks.
    """

    message: str
    path: str
    source: str

    def __str__(self) -> str:
        return self._text(self.source)

    def portable(self) -> str:
        """The same without the folders of this machine."""
        return self._text(self.source.rpartition("/")[2])

    def _text(self, source: str) -> str:
        file, _, line = self.source.rpartition(":")
        code = linecache.getline(file, int(line)).strip() if line.isdigit() else ""
        place = ", ".join(part for part in (self.path, source, code) if part)
        what = self.message or "a check that the model makes does not hold for these inputs"
        return f"{what} [{place}]" if place else what


@dataclass
class Checks:
    """The checks of one captured graph.

    Attributes:
        first: asked before the graph runs: what computes them, from which inputs by number; None: none.
        early: what they are. late: those whose outcomes are the last results of the graph, in this order.
    """

    first: tuple[fx.GraphModule, list[int]] | None = None
    early: list[Check] = field(default_factory=list)
    late: list[Check] = field(default_factory=list)

    def ask(self, args: Sequence[Any]) -> None:
        """Raise unless the inputs ``args`` of the graph pass.

        Raises:
            CheckError: says which check does not hold.
        """
        if self.first is not None:
            module, inputs = self.first
            with torch.no_grad():
                judge(self.early, module(*(args[i] for i in inputs)))

    def read(self, results: Sequence[Any]) -> Sequence[Any]:
        """The results of the graph without the outcomes of late checks.

        Raises:
            CheckError: one does not hold.
        """
        if not self.late:
            return results
        own = len(results) - len(self.late)
        judge(self.late, results[own:])
        return results[:own]


def judge(checks: Sequence[Check], outcomes: Sequence[Any]) -> None:
    """Raise :class:`CheckError` for the first check whose outcome (a tensor with one element) is zero."""
    devices: dict[Any, list[int]] = {}
    for place, outcome in enumerate(outcomes):
        devices.setdefault(outcome.device, []).append(place)
    failed = []
    for places in devices.values():  # one transfer for each device
        passed = torch.stack([outcomes[place].detach().reshape(()).ne(0) for place in places]).tolist()
        failed += [place for place, ok in zip(places, passed, strict=True) if not ok]
    if failed:
        raise CheckError(str(checks[min(failed)]))


def checks_in(graph: fx.Graph) -> list[fx.Node]:
    """The checks in ``graph``."""
    return list(graph.find_nodes(op="call_function", target=CHECK))


def take(captured: Captured) -> Checks:
    """Take the checks that need no result of the model out of ``captured``; the others stay in it."""
    found = Checks()
    early = [node for node in checks_in(captured.graph) if _of_inputs(node, ancestors([node]))]
    if early:
        kept: dict[fx.Node, Check] = {}  # one question once, by the name that says most
        for node in early:
            check, question = describe(node), node.all_input_nodes[0]
            if question not in kept or (check.message and not kept[question].message):
                kept[question] = check
        found.early, found.first = list(kept.values()), extract(captured, list(kept))
        for node in early:
            captured.graph.erase_node(node)
        captured.graph.eliminate_dead_code(is_impure_node=lambda n: n.is_impure() and n.target is not aten.item.default)
        captured.graph_module.recompile()
    return found


def give_back(captured: Captured, found: Checks) -> None:
    """Make the checks that are left in ``captured`` results of the graph, behind those that it has."""
    output = captured.graph.output_node()
    for node in checks_in(captured.graph):
        found.late.append(describe(node))
        results: Any = output.args[0]
        output.args = ((*results, node.args[0]),)
        captured.graph.erase_node(node)


def describe(node: fx.Node) -> Check:
    return Check(str(node.args[1]), module_path(node), _caller(node) or source_line(node))


def _caller(node: fx.Node) -> str:
    """``file:line`` of the model code that calls the checking function, which is torch's or transformers' own."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [
        f"{file}:{line}"
        for file, line in frames
        if not re.search(r"/torch/(__init__|_check|_tensor)\.py$|/transformers/utils/", file)
    ]
    return own[-1] if own else ""


def _of_inputs(node: fx.Node, above: set[fx.Node]) -> bool:
    """Whether a check can be asked ahead of the graph: of inputs, without the work of a layer and without writing."""

    def plain(n: fx.Node) -> bool:
        target = n.target
        if isinstance(target, torch._ops.OpOverload):
            return not (
                target._schema.is_mutable
                or target.namespace == "tokcompile"
                or torch.Tag.nondeterministic_seeded in target.tags
                or node_flops(n)
            )
        return n.op in ("placeholder", "get_attr") or (n.op == "call_function" and not isinstance(target, str))

    return all(plain(n) for n in above)

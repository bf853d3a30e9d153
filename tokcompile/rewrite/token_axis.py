"""Follow the token axis through a graph.

Below a *cut* (a value whose token axis will lose entries) every value is labelled: which of its dimensions is a
token axis, which is the batch, and what each dimension is made of when axes were flattened together. Labels
follow the dataflow, op by op; sizes are never compared to guess an axis, so 64 tokens and a head width of 64
cannot be confused. The rules say, for each op, how the dimensions of its operands and results are aligned. From
the alignment follows what a value that enters from outside (cos, sin, a mask, position ids) must look like.

What folds tokens away (a convolution over tokens, a 2-D grid, windows) raises :class:`NarrowError` with the node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from tokcompile.capture.graph import refuse, source_line
from tokcompile.capture.ops import LAYOUT, SOFTMAX, TRIVIAL, op_name
from tokcompile.capture.sizes import equal, expr, guarded_equal, product, shape_of
from tokcompile.errors import NarrowError
from tokcompile.rewrite.labels import (
    Axis,
    Demand,
    Dim,
    Dims,
    Flow,
    is_chosen,
    is_token,
    is_tracked,
    plain,
    same_dim,
    size_of,
)

aten = torch.ops.aten


Rule = Callable[["Follower", fx.Node], Any]
RULES: dict[Any, Rule] = {}


#: What becomes of integers that say where a row comes from; an operation that is not here must not get any.
POSITIONS: dict[Any, Rule] = {}


def rule(*targets: Any, positions: bool = False) -> Callable[[Rule], Rule]:
    """Register the rule of ``targets`` (a name: an operator of others).

    ``positions``: the rule says itself what becomes of places of rows.
    """

    def add(function: Rule) -> Rule:
        for target in targets:
            RULES[target] = function
            if positions:
                POSITIONS[target] = lambda follower, node: None
        return function

    return add


def overloads(*names: str) -> list[Any]:
    """All overloads of the named ATen ops that this torch version has."""
    found = []
    for name in names:
        packet = getattr(aten, name, None)
        if packet is not None:
            found += [getattr(packet, overload) for overload in packet.overloads()]
    return found


class Follower:
    """Applies the rules along the graph. One use: ``Follower(graph, batch).follow(cuts)``.

    One class: every rule adds to the same labels, which the next one reads.
    """

    def __init__(self, graph: fx.Graph, batch: Axis | None) -> None:
        self.graph = graph
        self.flow = Flow(batch=batch)
        self.skip: set[fx.Node] = set()
        self._concats: dict[Any, Axis] = {}
        self.token_symbols: set[Any] = set()

    # .. entry

    def follow(self, cuts: dict[fx.Node, Dims]) -> Flow:
        """Label everything that depends on ``cuts`` (node -> its dimensions at the cut)."""
        labels = self.flow.labels
        self.token_symbols = {
            symbol
            for dims in cuts.values()
            for d in dims
            for f in d
            if f.axis is not None and f.axis.kind == "token"
            for symbol in expr(f.size).free_symbols
        }
        for node in self.graph.nodes:
            if node in cuts:
                labels[node] = cuts[node]
                continue
            if node.op == "output":
                self._no_positions(node)
            if node.op == "output" or node in self.skip or not any(arg in labels for arg in node.all_input_nodes):
                continue
            if node.op != "call_function":
                raise self.refuse(node, f"a '{node.op}' node is not understood")
            if not self._depends_on_values(node):
                continue
            result = self._apply(node)
            if result is not None:
                labels[node] = result
        return self.flow

    def _depends_on_values(self, node: fx.Node) -> bool:
        """Sizes and fresh constants take only a shape or a dtype from their operand, not its values."""
        return node.target not in (aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default) and op_name(
            node
        ) not in ("new_zeros", "new_ones", "new_full", "new_empty")

    def _apply(self, node: fx.Node) -> Any:
        function = RULES.get(node.target) or RULES.get(op_name(node))
        if function is None:
            tags = getattr(node.target, "tags", ())
            if torch.Tag.pointwise in tags:
                function = RULES[torch.Tag.pointwise]
            elif isinstance(node.meta.get("val"), (torch.SymInt, torch.SymBool, torch.SymFloat, int, float, bool)):
                return None
            else:
                if any(is_token(d) for arg in node.all_input_nodes for d in self._flat(arg)):
                    raise self.refuse(
                        node,
                        f"{node.target} is not known to the token-axis analysis, so tokens "
                        "cannot be removed above it; choose a later layer, or add a rule",
                    )
                return None
        result = function(self, node)
        held = [self.flow.positions[arg] for arg in node.all_input_nodes if arg in self.flow.positions]
        if held and node.target in POSITIONS:
            POSITIONS[node.target](self, node)
        elif any(map(_counts_tokens, held)):
            raise self.as_number(node)
        return result

    def _no_positions(self, output: fx.Node) -> None:
        for arg in output.all_input_nodes:
            if _counts_tokens(self.flow.positions.get(arg)):
                raise self.as_number(arg)

    def as_number(self, node: fx.Node) -> NarrowError:
        return refuse(
            node,
            "the place of a row among all tokens is used as a number (a limit by place, such as the capacity of an "
            "expert?), and it changes when tokens are removed; choose a later layer, or a router without such a limit",
        )

    def _flat(self, node: fx.Node) -> Iterable[Dim]:
        dims = self.flow.labels.get(node, ())
        if isinstance(dims, list):
            return [d for item in dims if item for d in item]
        return dims

    # .. helpers for the rules

    def refuse(self, node: fx.Node, reason: str) -> NarrowError:
        return refuse(node, reason)

    def dims(self, arg: Any) -> Dims | None:
        return self.flow.labels.get(arg) if isinstance(arg, fx.Node) else None

    def known(self, arg: Any) -> Dims:
        """Labels of ``arg``, all ordinary when it comes from outside."""
        dims = self.flow.labels.get(arg)
        return dims if dims is not None else tuple(plain(s) for s in shape_of(arg))

    def align(self, node: fx.Node, operands: Sequence[tuple[Any, Sequence[Any]]]) -> dict[Any, Dim]:
        """Unify the dimensions of ``operands``; key -> label of that dimension.

        Each operand comes with the keys of its dimensions at full rank; one with fewer dimensions lacks the
        leading ones (broadcasting). Values from outside get a :class:`Demand` where a key is a token axis.
        """
        table: dict[Any, Dim] = {}
        tensors = [(arg, keys) for arg, keys in operands if isinstance(arg, fx.Node) and is_tensor(arg)]
        for arg, keys in tensors:
            dims = self.dims(arg)
            if dims is None:
                continue
            for key, dim in zip(keys[len(keys) - len(dims) :], dims, strict=True):
                if is_tracked(dim):
                    if key in table and not same_dim(table[key], dim):
                        raise self.refuse(node, f"two different token axes meet ({table[key]} and {dim})")
                    table[key] = dim
        for arg, keys in tensors:
            dims, shape = self.dims(arg), shape_of(arg)
            own = list(keys[len(keys) - len(shape) :])
            wanted: list[Dim] = []
            for i, key in enumerate(own):
                label = table.get(key)
                if label is None or equal(shape[i], 1):
                    wanted.append(plain(shape[i]) if dims is None else dims[i])
                    continue
                if dims is not None and not is_tracked(dims[i]) and is_token(label):
                    raise self.refuse(
                        node, f"a dimension of size {shape[i]} that is not the token axis meets the token axis {label}"
                    )
                size = size_of(label)
                if dims is None and not guarded_equal(shape[i], size):
                    raise self.refuse(node, f"a value from outside has size {shape[i]} where the token axis has {size}")
                wanted.append(label)
            if dims is None and any(is_token(d) for d in wanted):
                self.demand(node, arg, list(keys), wanted, table)
        return table

    def demand(self, node: fx.Node, side: fx.Node, keys: list[Any], wanted: list[Dim], table: dict[Any, Dim]) -> None:
        """Note that ``side``, a value from outside, must be narrowed for ``node`` to dimensions ``wanted``."""
        if any(map(is_chosen, wanted)):
            raise self.refuse(
                node,
                f"'{side.name}' comes from outside and is in the order of places, which rows in an order that values "
                "choose do not have (a limit by place, such as the capacity of an expert?)",
            )
        shares = _normalised(side, [size_of(d) for d in wanted if is_token(d)])
        if shares is not None:
            raise self.refuse(
                node,
                f"'{side.name}' holds shares that sum to one over all tokens ({shares.name}, {source_line(shares)}) "
                "and does not depend on these; without some of them they no longer do. Leave this encoder out with "
                "protect.paths, or cut below the last layer that uses them",
            )
        batch = self.flow.batch
        has_batch = batch is None or any(f.axis is batch for d in wanted for f in d)
        if not has_batch:
            # broadcast over the batch: give it a batch dimension, where the user has it
            places = [i for i, key in enumerate(keys) if any(f.axis is batch for f in table.get(key, ()))]
            lead = len(keys) - len(wanted)
            if places and places[0] < lead:
                wanted = [plain(1)] * (lead - places[0]) + wanted
                wanted[0] = table[keys[places[0]]]
            elif places:
                wanted[places[0] - lead] = table[keys[places[0]]]
            elif not equal(batch.size, 1):  # type: ignore[union-attr]
                raise self.refuse(
                    node,
                    f"'{side.name}' is shared by all rows of the batch, which keep different "
                    "tokens, and has no place for a batch dimension",
                )
        before = self.flow.demands.setdefault(node, [])
        if any(
            d.side is side and not (len(d.dims) == len(wanted) and all(map(same_dim, d.dims, wanted))) for d in before
        ):
            raise self.refuse(node, f"'{side.name}' is used twice with different dimensions as its token axis")
        before.append(Demand(side, tuple(wanted)))

    def output(self, node: fx.Node, keys: Sequence[Any], table: dict[Any, Dim], value: Any = None) -> Dims:
        shape = list((node.meta["val"] if value is None else value).shape)
        return tuple(
            table.get(key, plain(size)) if not equal(size, 1) or _is_one(table.get(key)) else plain(size)
            for key, size in zip(keys, shape, strict=True)
        )

    def product(
        self, node: fx.Node, operands: Sequence[tuple[Any, Sequence[Any]]], out: Sequence[Any]
    ) -> dict[Any, Dim]:
        """Align a product that sums over the keys that are not in ``out``, and note where it sums over tokens.

        Such a sum (probabilities x values) runs over the kept tokens, which is what masking the others gives.
        """
        table = self.align(node, operands)
        for key, dim in table.items():
            places = [
                (arg, list(keys)[len(keys) - len(shape_of(arg)) :].index(key))
                for arg, keys in operands
                if isinstance(arg, fx.Node) and key in list(keys)[len(keys) - len(shape_of(arg)) :]
            ]
            if key not in out:
                self.flow.contractions.setdefault(node, []).extend(
                    (f.axis, places) for f in dim if f.axis is not None and f.axis.kind == "token"
                )
        return table

    def concat(self, parts: tuple[Any, ...], total: Any) -> Axis:
        key = tuple(p if isinstance(p, Axis) else expr(p) for p in parts)
        if key not in self._concats:
            prefix = 0
            for part in parts:
                if isinstance(part, Axis):
                    prefix += part.prefix
                    break
                if not isinstance(part, int):
                    break
                prefix += part
            last = parts[-1]
            suffix = last.suffix if isinstance(last, Axis) else (last if isinstance(last, int) else 1)
            self._concats[key] = Axis("cat", total, prefix=prefix, suffix=suffix, parts=parts)
        return self._concats[key]

    def tail(self, base: Axis, start: int) -> Axis:
        key = ("tail", base, start)
        if key not in self._concats:
            self._concats[key] = Axis(
                f"{base.name}[{start}:]",
                base.size - start,
                prefix=max(base.prefix - start, 0),
                suffix=base.suffix,
                base=base,
                start=start,
            )
        return self._concats[key]


#: Operations through which a share of something stays one, or nearly.
_KEEP_SHARES = TRIVIAL | LAYOUT | {"mul", "add", "sub", "getitem", "select", "slice", "stack", "cat", "where"}


def _normalised(side: fx.Node, sizes: Sequence[Any]) -> fx.Node | None:
    """Where the entries of ``side`` were divided by their sum over an axis of one of ``sizes``; None: they were not."""
    seen, todo = {side}, [side]
    while todo:
        node = todo.pop()
        name = op_name(node).rstrip("_")
        if name in SOFTMAX:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)
            if isinstance(dim, int) and any(equal(shape_of(node)[dim], size) for size in sizes):
                return node
        elif name == "div" and isinstance(node.args[1], fx.Node):
            total = node.args[1]
            while op_name(total) in TRIVIAL | LAYOUT | {"add", "clamp", "clamp_min"} and total.all_input_nodes:
                total = total.all_input_nodes[0]
            if (
                op_name(total) == "sum"
                and total.all_input_nodes[0] is node.args[0]
                and any(equal(shape_of(total.args[0])[d], size) for d in _axes(total.args[1]) for size in sizes)
            ):
                return node
        if name in _KEEP_SHARES or node.target is operator.getitem or name == "div":
            todo += [n for n in node.all_input_nodes if n not in seen and is_tensor(n)]
            seen.update(node.all_input_nodes)
    return None


def _counts_tokens(held: Any) -> bool:
    """Whether integers of this kind count entries that may go."""
    return any(map(_counts_tokens, held)) if isinstance(held, list) else bool(held) and is_token(held)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_one(dim: Dim | None) -> bool:
    return dim is not None and equal(product(f.size for f in dim), 1)


def _axes(given: Any) -> list[int]:
    """The dimensions that an argument ``dim`` names."""
    return [given] if isinstance(given, int) else list(given)

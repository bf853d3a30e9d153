"""Compile what a graph repeats once, whatever its number of tokens.

A cut leaves every stage of a stack with a token count of its own, and Inductor writes kernels for sizes: a graph of
four stages becomes four sets of kernels. Here each part that occurs more than once, a layer or what chooses the tokens
of a cut, is compiled once, with symbols for the sizes that differ, and called in every place::

    before   patches -> layer 0, 1, 2 (257) -> choose -> layer 3, 4, 5 (145) -> choose -> layer 6 .. -> norm
    after    patches -> layer x 3           -> choose -> layer x 3           -> choose -> layer ..   -> norm

Only for graphs whose sizes are numbers and whose layers differ in their token count: elsewhere Inductor finds equal
kernels itself, and one graph has less to call. Layers lie between the values of the residual stream that detection
found; two are of one form when the same operations lead to their outputs.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.graph import ancestors
from tokcompile.capture.trace import propagate
from tokcompile.lower.repeated_parts import Compiled, Compiler, Form, Place, WholeError, assemble

aten = torch.ops.aten


def compile_repeated(
    captured: Captured, streams: Sequence[Sequence[fx.Node]], compiler: Compiler
) -> tuple[Callable[..., Any], str]:
    """Compile ``captured`` part by part, parts of one form together.

    Args:
        streams: for each stack of layers the value that enters it and those that leave its layers, in order, as
            detection found them. Those that are no longer in the graph are passed over.

    Returns:
        What runs the graph, and a line about it for the report.

    Raises:
        WholeError: the graph is better compiled as a whole.
    """
    graph = captured.graph
    present = set(graph.nodes)
    streams = [[n for n in stream if n in present] for stream in streams]
    if not any(len(stream) > 3 for stream in streams):
        raise WholeError("it has no stack of layers")
    _check_simple(captured)
    if not any(len({tuple(n.meta["val"].shape[:-1]) for n in stream}) > 1 for stream in streams):
        raise WholeError("no stack of layers loses tokens")
    propagate(captured)
    _spell_alike(graph)
    layers = _shared(part for stream in streams for part in _layers(graph, stream))
    layers = [form for form in layers if len(form.places) > 1]
    order = _schedule(graph, layers)
    between = _shared(((unit, _results(unit)) for unit in order if isinstance(unit, list)), keep_order=True)
    by_member = {n: place for form in between for place in form.places for n in place.members}
    calls = [by_member[unit[0]] if isinstance(unit, list) else unit for unit in order]
    runs = {form: Compiled(form, compiler) for form in dict.fromkeys(place.form for place in calls)}
    run = assemble(captured, [(runs[place.form], place) for place in calls])
    return run, f"{len(runs)} parts, called in {len(calls)} places"


# ------------------------------------------------------------------------------------------------- finding the parts


def _check_simple(captured: Captured) -> None:
    """Raise unless all sizes are numbers, nothing is changed in place, and no gradient will be asked for."""
    for node in captured.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            if not isinstance(value, torch.Tensor) or any(isinstance(s, torch.SymInt) for s in value.shape):
                raise WholeError("its sizes are symbols")
            if value.requires_grad and torch.is_grad_enabled():
                raise WholeError("gradients are asked for")
        elif (
            node.op not in ("get_attr", "output")
            and node.target is not operator.getitem
            and not (isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable)
        ):
            raise WholeError(f"{node.name} may change a value in place")


#: Different words for one thing; narrowing may have replaced one by another below a cut.
RESHAPES = {aten.view.default, aten.reshape.default, aten.unflatten.int, aten.flatten.using_ints}


def _spell_alike(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target in RESHAPES:
            node.target, node.kwargs = aten.reshape.default, {}
            node.args = (node.args[0], list(node.meta["val"].shape))


def _layers(graph: fx.Graph, stream: Sequence[fx.Node]) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
    """(operations, results) of each layer, with whatever a rewrite has put between it and the layer before."""
    for start, end in itertools.pairwise(stream):
        below, todo = set[fx.Node](), [start]
        while todo:
            fresh = [user for user in todo.pop().users if user not in below]
            below.update(fresh)
            todo += fresh
        inside = below & {*ancestors([end]), end}
        for node in reversed(graph.nodes):  # what is made of parameters for this layer alone
            if node.op == "call_function" and node is not start and node.users and inside.issuperset(node.users):
                inside.add(node)
        if end in inside:
            yield [n for n in graph.nodes if n in inside], [end]


def _shared(parts: Iterable[tuple[list[fx.Node], list[fx.Node]]], keep_order: bool = False) -> list[Form]:
    """The forms of ``parts``. The smallest are taken as examples: a layer below a cut has the choice in front of it."""
    forms: list[Form] = []
    taken: set[fx.Node] = set()
    for members, results in parts if keep_order else sorted(parts, key=lambda part: len(part[0])):
        places = ((form, form.match(results)) for form in forms)
        form, place = next(((f, p) for f, p in places if p is not None and not p.members & taken), (None, None))
        if form is not None and place is not None:
            form.places.append(place)
            taken |= place.members
        elif not taken.intersection(members):
            forms.append(Form(members, results))
            taken.update(members)
    return forms


def _results(members: Sequence[fx.Node]) -> list[fx.Node]:
    inside = set(members)
    return [n for n in members if any(user not in inside for user in n.users)]


def _schedule(graph: fx.Graph, forms: Sequence[Form]) -> list[Place | list[fx.Node]]:
    """Calls and the operations between them, each as late as it can be.

    Raises:
        WholeError: calls would wait for each other.
    """
    position = {n: i for i, n in enumerate(graph.nodes)}
    places = sorted((p for f in forms for p in f.places), key=lambda p: max(position[n] for n in p.members))
    inside = {n for p in places for n in p.members}
    done = {n for n in graph.nodes if n.op in ("placeholder", "get_attr")}
    order: list[Place | list[fx.Node]] = []
    for place in (*places, None):
        wanted = graph.output_node().all_input_nodes if place is None else [place.nodes[i] for i in place.form.inputs]
        before = sorted((ancestors(wanted) | set(wanted)) - done, key=position.__getitem__)
        if inside.intersection(before):
            raise WholeError("layers read values of each other")
        if before:
            order.append(before)
            done.update(before)
        if place is not None:
            order.append(place)
            done |= place.members
            inside -= place.members
    return order

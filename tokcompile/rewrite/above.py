"""Values from below a node, computed a second time right behind it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tokcompile.capture.graph import ancestors, erase, refuse
from tokcompile.capture.ops import is_in_place


def check_above(node: fx.Node, values: Sequence[fx.Node]) -> list[fx.Node]:
    """What :func:`compute_above` has to do again, in order; changes nothing.

    Raises:
        NarrowError: something on the way writes into memory, which is not to be done twice.
    """
    needed = ancestors(values) | set(values)
    late, passed = [], False
    for other in node.graph.nodes:
        if passed and other in needed and other.op != "placeholder":
            if is_in_place(other):
                raise refuse(
                    other,
                    f"{other.target} writes in place, so a score that needs the next layer cannot compute this "
                    "a second time (a static cache, say; use a dynamic one, or a method that reads the layer above)",
                )
            late.append(other)
        passed = passed or other is node
    return late


def compute_above(node: fx.Node, values: Sequence[fx.Node]) -> list[fx.Node]:
    """``values``, each computed from ``node`` in front of all else that reads ``node``.

    What they need and ``node`` does not enter moves up; what it enters is computed twice: once here, and once where it
    was, for the model. So tokens can be removed from ``node`` by a choice that has read the layer below.

    Returns:
        The nodes that stand for ``values``.
    """
    again: dict[fx.Node, fx.Node] = {node: node}
    last = node
    for other in check_above(node, values):
        if any(source in again for source in other.all_input_nodes):
            with node.graph.inserting_after(last):
                last = again[other] = node.graph.node_copy(other, lambda n: again.get(n, n))
        else:
            if last.next is not other:
                last.append(other)
            last = other
    result = [again.get(value, value) for value in values]
    for value in values:
        if value in again and value is not node and not value.users:
            erase(value)  # nobody but the score read it
    return result

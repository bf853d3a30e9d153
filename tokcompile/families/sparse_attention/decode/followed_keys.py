"""Follow the keys of a layer from the cache to the attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tokcompile.capture.ops import LAYOUT, TRIVIAL, is_in_place, op_name
from tokcompile.capture.sizes import dims_of, equal, shape_of
from tokcompile.formulas.attention import AttentionForm
from tokcompile.regions.flow import Flow
from tokcompile.rewrite.context import Context

#: In-place operations that put new keys into a buffer and leave the others where they are.
_WRITES = {"index_copy", "index_put"}


@dataclass(frozen=True)
class Followed:
    """Where the keys of a layer come from and go to, from one decode step to the next.

    Attributes:
        past: input of the graph. grown: output of the graph, the keys so far and the new one; None: written in place.
        rows: axis of ``past`` that is the batch; None: the batch is a number in the graph.
    """

    past: fx.Node
    grown: fx.Node | None
    rows: int | None


def followed_keys(ctx: Context, form: AttentionForm) -> Followed | None:
    """How a next step finds the keys of this one, each at its place; None: it does not (a window drops old ones)."""
    flow, outputs = Flow(ctx.captured.graph), set(ctx.captured.graph.output_node().all_input_nodes)
    total, node, grown = shape_of(form.key)[2], form.key, None
    while node.op != "placeholder":
        op, source = op_name(node), node.args[0] if node.args else None
        if op in ("cat", "concat") and grown is None and node in outputs:
            axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
            if not equal(shape_of(node)[axis], total):
                return None
            grown, source = node, source[0]  # type: ignore[index]
        elif (
            op not in (TRIVIAL | LAYOUT) - {"roll"}
            and not (op in _WRITES and is_in_place(node))
            and not (
                op == "slice" and isinstance(source, fx.Node) and dims_of(shape_of(source)) == dims_of(shape_of(node))
            )
        ):
            return None
        if not isinstance(source, fx.Node):
            return None
        node = source
    writes = {op_name(n) for n in flow.writes(node, form.output)}
    if writes - _WRITES or bool(writes) == (grown is not None):  # a buffer that is rolled is copied to
        return None
    rows = form.query.meta["val"].shape[0]
    if isinstance(rows, int):
        return Followed(node, grown, None)
    axes = [axis for axis, size in enumerate(shape_of(node)) if equal(size, rows)]
    return Followed(node, grown, axes[0]) if axes else None

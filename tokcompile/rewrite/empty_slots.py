"""Rows that keep fewer tokens than others have empty slots: what would let these count is refused."""

from __future__ import annotations

import torch
from torch import fx

from tokcompile.capture.graph import refuse
from tokcompile.capture.ops import TRIVIAL, op_name
from tokcompile.capture.sizes import shape_of
from tokcompile.rewrite.labels import Axis, Flow, is_token
from tokcompile.rewrite.token_rules.pointwise import dim_argument

aten = torch.ops.aten


def check_ragged(flow: Flow, ragged: set[Axis]) -> None:
    """Refuse what would let the empty slots of the ``ragged`` axes (and of axes made from them) count."""

    def padded(axis: Axis | None) -> bool:
        return axis is not None and (
            axis in ragged
            or padded(axis.base)
            or any(padded(p) for p in axis.parts if isinstance(p, Axis))
            or any(padded(f.axis) for f in axis.rows)
        )

    counts = (
        "over the tokens, and rows of this batch keep different numbers of them; run rows with equal numbers of "
        "visual tokens in one batch"
    )
    for node in flow.reductions:
        dims = flow.labels[node.args[0]]  # type: ignore[index]
        if any(padded(f.axis) for d in dims for f in d):
            raise refuse(node, f"{node.target} reduces {counts}")
    for node in flow.counts:
        dims = flow.labels[node.args[0]]  # type: ignore[index]
        if any(padded(f.axis) for d in dims for f in d) and not _only_ends_groups(node):
            raise refuse(node, f"{node.target} counts {counts}")
    for node, axes in flow.contractions.items():
        for axis, places in axes:
            if padded(axis) and not any(_vanishes(flow, arg, dim) for arg, dim in places):
                raise refuse(node, f"{node.target} sums {counts}")
    for node, (_query, key) in flow.attention.items():
        if not any(padded(f.axis) for f in key):
            continue
        if len(key) > 1:
            raise refuse(node, "attention over a flattened token axis cannot mask empty slots")
        if node.target is not aten.scaled_dot_product_attention.default and not any(
            d[0].axis is flow.batch and len(d) == 1 for d in flow.labels[node]
        ):
            raise refuse(node, "attention with batch and heads flattened together cannot mask empty slots")


def _only_ends_groups(counts: fx.Node) -> bool:
    """Whether a histogram only says where groups of rows end: those of empty slots are rows as well."""
    todo = [counts]
    while todo:
        node = todo.pop()
        for user in node.users:
            if "grouped_mm" in op_name(user):
                continue
            if op_name(user) not in TRIVIAL | {"cumsum"}:
                return False
            todo.append(user)
    return True


#: Ops whose result is zero where their first operand is, and that keep the token axes in their order.
KEEPS_ZEROS = {
    "to",
    "_to_copy",
    "type_as",
    "dropout",
    "native_dropout",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "view",
    "reshape",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "expand",
    "slice",
    "select",
    "div",
    "neg",
    "nan_to_num",
    "split",
    "chunk",
    "split_with_sizes",
    "repeat_interleave",
    "getitem",
}


def _vanishes(flow: Flow, node: fx.Node, dim: int) -> bool:
    """Whether ``node`` is known to be zero at the empty slots of dimension ``dim``: a softmax over it made it so."""
    dims = flow.labels.get(node)
    if dims is None:
        return False
    if node in flow.attention:
        softmax = op_name(node) in ("softmax", "_softmax", "_safe_softmax")
        return softmax and dim_argument(node, 1, -1, len(dims)) == dim
    if node in flow.orders:
        return _vanishes(flow, node.args[0], flow.orders[node][dim])  # type: ignore[arg-type]
    name = op_name(node)
    if name == "mul":
        return any(
            _vanishes(flow, arg, dim - len(dims) + len(shape_of(arg)))
            for arg in node.all_input_nodes
            if arg in flow.labels and dim - len(dims) + len(shape_of(arg)) >= 0
        )
    if name in KEEPS_ZEROS or (name == "masked_fill" and node.args[2] == 0):
        source = node.args[0]
        if isinstance(dims, list):  # the pieces of a split
            dims = dims[0]
        number = sum(is_token(d) for d in dims[:dim])
        before = flow.labels.get(source)  # type: ignore[arg-type]
        if isinstance(before, list):
            before = before[0]
        tokens = [i for i, d in enumerate(before or ()) if is_token(d)]
        return number < len(tokens) and _vanishes(flow, source, tokens[number])  # type: ignore[arg-type]
    return False

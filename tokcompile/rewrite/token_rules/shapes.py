"""Rules for operations that change the shape: views, expansion, permutation, concatenation, splits."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from tokcompile.capture.ops import op_name
from tokcompile.capture.sizes import equal, expr, product, shape_of
from tokcompile.rewrite.labels import Axis, Dim, Factor, is_chosen, is_token, is_tracked, plain
from tokcompile.rewrite.token_axis import Follower, overloads, rule
from tokcompile.rewrite.token_rules.pointwise import dim_argument

aten = torch.ops.aten


# .. shapes


@rule(
    *overloads(
        "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as"
    )
)
def _view(self: Follower, node: fx.Node) -> Any:
    if node.target is aten.view.dtype:
        return self.known(node.args[0])
    factors = [f for d in self.known(node.args[0]) for f in d if f.axis is not None or not equal(f.size, 1)]
    out: list[Dim] = []
    for size in shape_of(node):
        taken: list[Factor] = []
        rest = expr(size)
        if rest == 1:
            if factors and factors[0].axis is not None and equal(factors[0].size, 1):
                taken.append(factors.pop(0))
            out.append(tuple(taken) or plain(1))
            continue
        while rest != 1:
            if not factors:
                raise self.refuse(node, f"the sizes of a view cannot be followed ({shape_of(node)})")
            factor = factors.pop(0)
            quotient = sympy.cancel(rest / expr(factor.size))
            if sympy.denom(quotient) == 1:
                taken.append(factor)
                rest = quotient
                continue
            inverse = sympy.cancel(expr(factor.size) / rest)
            if factor.axis is not None and factor.axis.kind == "token":
                raise self.refuse(
                    node,
                    f"a view splits the token axis of {factor.size} into {shape_of(node)}: tokens "
                    "are folded to a grid or to windows, so they cannot be removed above this node",
                )
            if sympy.denom(inverse) != 1:
                raise self.refuse(node, f"the sizes of a view cannot be followed ({shape_of(node)})")
            taken.append(Factor(_concrete(rest, size)))
            factors.insert(0, Factor(_concrete(inverse, factor.size)))
            rest = sympy.Integer(1)
        out.append(tuple(taken))
    dims = tuple(out)
    if any(is_token(d) for d in dims) and node.target in SIZED | RESIZED:
        self.flow.sizes[node] = dims
    return dims


def _concrete(value: sympy.Expr, like: Any) -> Any:
    if value.is_Integer:
        return int(value)
    return like.node.shape_env.create_symintnode(value, hint=None) if isinstance(like, torch.SymInt) else value


#: Ops whose second argument is the list of new sizes.
SIZED = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.broadcast_to.default,
}
#: Ops that name the new sizes in another way; with a token axis they become a reshape.
RESIZED = {aten.unflatten.int, aten.view_as.default, aten.reshape_as.default}


@rule(aten.expand.default, aten.broadcast_to.default, aten.expand_as.default)
def _expand(self: Follower, node: fx.Node) -> Any:
    dims, shape = self.known(node.args[0]), shape_of(node)
    lead = len(shape) - len(dims)
    out = tuple(
        plain(size)
        if i < lead or not is_tracked(dims[i - lead]) or not equal(product(f.size for f in dims[i - lead]), size)
        else dims[i - lead]
        for i, size in enumerate(shape)
    )
    if node.target is aten.expand_as.default:
        rank = len(shape)
        table = self.align(node, [(node.args[0], list(range(rank))), (node.args[1], list(range(rank)))])
        return self.output(node, list(range(rank)), table)
    if any(is_token(d) for d in out):
        self.flow.sizes[node] = out
    return out


@rule(
    *overloads("transpose", "permute", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT", "adjoint")
)
def _permute(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    rank, name = len(dims), op_name(node)
    order = list(range(rank))
    if name == "permute":
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[arg-type, union-attr]
    elif name in ("t", "mT", "adjoint"):
        order[-2:] = order[-2:][::-1]
    elif name == "numpy_T":
        order = order[::-1]
    elif name in ("movedim", "moveaxis"):
        given = [list(d) if isinstance(d, (list, tuple)) else [d] for d in node.args[1:3]]
        source, target = ([int(d) % rank for d in which] for which in given)  # type: ignore[arg-type]
        rest = iter(d for d in range(rank) if d not in source)
        order = [source[target.index(i)] if i in target else next(rest) for i in range(rank)]
    else:
        a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    self.flow.orders[node] = order
    return tuple(dims[i] for i in order)


@rule(aten.repeat.default, aten.tile.default)
def _repeat(self: Follower, node: fx.Node) -> Any:
    dims, shape = self.known(node.args[0]), shape_of(node)
    lead = len(shape) - len(dims)
    out = []
    for i, size in enumerate(shape):
        dim = dims[i - lead] if i >= lead else plain(size)
        if is_tracked(dim) and not equal(product(f.size for f in dim), size):
            raise self.refuse(node, "repeat repeats the token axis or the batch")
        out.append(dim if is_tracked(dim) else plain(size))
    return tuple(out)


@rule(*overloads("repeat_interleave"))
def _repeat_interleave(self: Follower, node: fx.Node) -> Any:
    dims, shape = self.known(node.args[0]), shape_of(node)
    which = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
    each = node.args[1] if len(node.args) > 1 else None
    if which is None:
        raise self.refuse(node, "repeat_interleave repeats all values in one row")
    at = int(which) % len(dims)  # type: ignore[arg-type]
    if not is_tracked(dims[at]):
        return tuple(plain(shape[i]) if i == at else d for i, d in enumerate(dims))
    if isinstance(each, fx.Node) and not isinstance(each.meta["val"], torch.SymInt):
        raise self.refuse(node, "repeat_interleave repeats some tokens more often than others")
    number = each.meta["val"] if isinstance(each, fx.Node) else each
    self.flow.repeats.append(node)
    return tuple((*d, Factor(number)) if i == at else d for i, d in enumerate(dims))


@rule(aten.cat.default, aten.concat.default)
def _cat(self: Follower, node: fx.Node) -> Any:
    tensors: list[fx.Node] = [t for t in node.args[0] if not equal(product(shape_of(t)), 0)]  # type: ignore[misc, union-attr]
    shape = shape_of(node)
    rank = len(shape)
    dim = dim_argument(node, 1, 0, rank)
    keys = [[i if i != dim else ("cat", j) for i in range(rank)] for j in range(len(tensors))]
    table = self.align(node, list(zip(tensors, keys, strict=True)))
    parts: list[Any] = []
    for j, tensor in enumerate(tensors):
        label = table.get(("cat", j))
        if label is not None and is_token(label):
            if is_chosen(label):
                raise self.refuse(node, "rows in an order that values choose are concatenated")
            if len(label) > 1:
                raise self.refuse(node, "a flattened token axis is concatenated")
            parts.append(label[0].axis)
        else:
            parts.append(shape_of(tensor)[dim])
    if (
        len(parts) > 1
        and isinstance(parts[1], Axis)
        and parts[1].base is not None
        and isinstance(parts[0], int)
        and parts[0] == parts[1].start
    ):
        parts[:2] = [parts[1].base]  # protected tokens and what follows them, put together again
    if not any(isinstance(p, Axis) for p in parts):
        along = plain(shape[dim])
        if len(tensors) == 1 and ("cat", 0) in table:
            along = table["cat", 0]
    elif len(parts) == 1:
        along = (Factor(parts[0].size, parts[0]),)
    else:
        along = (Factor(shape[dim], self.concat(tuple(parts), shape[dim])),)
    return tuple(along if i == dim else table.get(i, plain(s)) for i, s in enumerate(shape))


@rule(aten.stack.default)
def _stack(self: Follower, node: fx.Node) -> Any:
    tensors = list(node.args[0])  # type: ignore[arg-type]
    rank = len(shape_of(tensors[0]))
    dim = dim_argument(node, 1, 0, rank + 1)
    table = self.align(node, [(t, list(range(rank))) for t in tensors])
    dims = [table.get(i, plain(s)) for i, s in enumerate(shape_of(tensors[0]))]
    dims.insert(dim, plain(len(tensors)))
    return tuple(dims)


@rule(*overloads("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk", "tensor_split"))
def _split(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    unbind = node.target is aten.unbind.int
    dim = dim_argument(node, 1 if unbind else 2, 0, len(dims))
    if is_token(dims[dim]):
        raise self.refuse(node, "a split divides the token axis")
    results = []
    for value in node.meta["val"]:
        if unbind:
            results.append(tuple(d for i, d in enumerate(dims) if i != dim))
        else:
            results.append(tuple(plain(value.shape[i]) if i == dim else d for i, d in enumerate(dims)))
    return results


def getitem(self: Follower, node: fx.Node) -> Any:
    """One of several results; registered by ``rows``, which carries along what it says of places."""
    dims = self.dims(node.args[0])
    return dims[node.args[1]] if isinstance(dims, list) else None

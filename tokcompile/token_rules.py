"""How the dimensions of each operation's operands and results are aligned: one rule for each kind of operation.

A rule gets the :class:`~tokcompile.token_axis.Follower` and a node; it returns the labels of the node's value (a list
for several values, None for what carries no axis), asks for what must enter narrowed, or refuses. Importing this module
registers the rules.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import fx

from tokcompile.token_axis import (
    MAX_INT,
    Axis,
    Dim,
    Factor,
    Follower,
    equal,
    expr,
    is_token,
    is_tracked,
    op_name,
    overloads,
    plain,
    product,
    rule,
    same_dim,
    shape_of,
)

aten = torch.ops.aten


def dim_argument(node: fx.Node, position: int, default: int, rank: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    return int(value) % rank  # type: ignore[arg-type]


# .. pointwise and other ops that keep all dimensions


def _pointwise(self: Follower, node: fx.Node) -> Any:
    value = node.meta["val"]
    several = isinstance(value, (tuple, list))
    if several and any(v.dim() != len(shape_of(node.all_input_nodes[0])) for v in value):
        raise self.refuse(node, f"{op_name(node)} picks entries by their values")
    if not several and not isinstance(value, torch.Tensor):
        return None
    rank = value[0].dim() if several else value.dim()
    keys = list(range(rank))
    flat = list(_nodes(node.args)) + list(_nodes(node.kwargs))
    for arg in flat:
        if isinstance(arg.meta.get("val"), (torch.SymInt, torch.SymFloat)) and (
                self.token_symbols & arg.meta["val"].node.expr.free_symbols):
            raise self.refuse(node, "the number of tokens is used as a number in arithmetic")
    table = self.align(node, [(arg, keys) for arg in flat])
    if several:
        return [self.output(node, keys, table, v) for v in value]
    return self.output(node, keys, table)


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


POINTWISE = overloads(
    "to", "_to_copy", "clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy", "dropout", "dropout_",
    "native_dropout", "masked_fill", "masked_fill_", "where", "__and__", "__or__", "__xor__", "logical_and",
    "logical_not", "type_as", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "softplus", "prelu",
    "relu6", "leaky_relu", "hardtanh", "clamp", "clip", "square", "rsub", "add_", "mul_", "sub_", "div_", "copy",
    "feature_dropout", "alpha_dropout", "nan_to_num", "conj", "resolve_conj", "float_power", "_conj", "gelu")
rule(torch.Tag.pointwise, *POINTWISE)(_pointwise)


@rule(*overloads("isin"))
def _isin(self: Follower, node: fx.Node) -> Any:
    """Elements against a set: the set is not aligned with them."""
    if any(is_token(d) for arg in _nodes(node.args[1]) for d in self._flat(arg)):
        raise self.refuse(node, "tokens are looked up among tokens")
    return self.known(node.args[0]) if isinstance(node.args[0], fx.Node) else None


@rule(aten.prelu.default)
def _prelu(self: Follower, node: fx.Node) -> Any:
    """``prelu(x [B, C, ...], weight [C] or [1])``"""
    x, weight = node.args[:2]
    dims = self.known(x)  # type: ignore[arg-type]
    if any(is_token(d) for d in self._flat(weight)) or (  # type: ignore[arg-type]
            len(dims) > 1 and is_token(dims[1]) and not equal(product(shape_of(weight)), 1)):  # type: ignore[arg-type]
        raise self.refuse(node, "prelu has one slope for each token")
    return dims


@rule(aten.glu.default)
def _glu(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])  # type: ignore[arg-type]
    dim = dim_argument(node, 1, -1, len(dims))
    if is_token(dims[dim]):
        raise self.refuse(node, "glu divides the token axis")
    return tuple(plain(shape_of(node)[dim]) if i == dim else d for i, d in enumerate(dims))


@rule(*overloads("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"))
def _softmax(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    dim = dim_argument(node, 1, -1, len(dims))
    if is_token(dims[dim]):
        query = next((d for i, d in enumerate(dims) if i != dim and is_token(d)), plain(1))
        self.flow.attention[node] = (query, dims[dim])
    return dims


@rule(*overloads("layer_norm", "rms_norm", "native_layer_norm", "group_norm", "batch_norm", "normalize",
                 "linalg_vector_norm", "norm"))
def _norm(self: Follower, node: fx.Node) -> Any:
    name = op_name(node)
    dims = self.known(node.args[0])
    if name in ("linalg_vector_norm", "norm"):
        return _reduce(self, node)
    if name in ("layer_norm", "native_layer_norm", "rms_norm"):
        normalised = len(node.args[1])  # type: ignore[arg-type]
        if any(is_token(d) for d in dims[len(dims) - normalised:]):
            raise self.refuse(node, "a norm runs over the token axis")
        if name == "native_layer_norm":
            stat = tuple(dims[: len(dims) - normalised]) + tuple(plain(1) for _ in range(normalised))
            return [dims, stat, stat]
        return dims
    raise self.refuse(node, f"{name} mixes tokens")


REDUCTIONS = overloads("sum", "mean", "amax", "amin", "max", "min", "var", "std", "prod", "any", "all", "logsumexp",
                       "argmax", "argmin", "var_mean")


@rule(*REDUCTIONS)
def _reduce(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    name = op_name(node)
    if node.target in (aten.max.other, aten.min.other):
        return _pointwise(self, node)  # max(a, b)
    position = 2 if name in ("linalg_vector_norm", "norm") else 1
    which = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    keep = node.kwargs.get("keepdim", node.args[position + 1] if len(node.args) > position + 1 else False)
    if name in ("var", "std", "var_mean"):  # (x, dim, unbiased, keepdim) or (x, dim, *, correction, keepdim)
        keep = node.kwargs.get("keepdim", node.args[3] if len(node.args) > 3 else False)
        if isinstance(which, bool):
            which = None
    rank = len(dims)
    chosen = set(range(rank)) if which is None or which == [] else {
        int(d) % rank for d in (which if isinstance(which, (list, tuple)) else [which])}  # type: ignore[arg-type]
    if any(is_token(dims[d]) for d in chosen):
        if name in ("argmax", "argmin") or (name in ("max", "min") and isinstance(node.meta["val"], (tuple, list))):
            raise self.refuse(node, f"{name} over the token axis gives a position in the unpruned sequence")
        self.flow.reductions.append(node)
    out = tuple(plain(1) if d in chosen else dims[d] for d in range(rank) if keep or d not in chosen)
    values = node.meta["val"]
    return [out] * len(values) if isinstance(values, (tuple, list)) else out


@rule(*overloads("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "flip", "roll", "sort", "argsort", "topk",
                 "tril", "triu", "diff"))
def _along(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    name = op_name(node)
    if name in ("tril", "triu"):
        touched = [len(dims) - 2, len(dims) - 1]
    elif name == "topk":
        touched = [int(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)) % len(dims)]  # type: ignore
    elif name in ("flip", "roll"):
        place = 1 if name == "flip" else 2
        which = node.args[place] if len(node.args) > place else []
        touched = [int(d) % len(dims) for d in which] or list(range(len(dims)))  # type: ignore
    else:
        touched = [dim_argument(node, 1, -1, len(dims))]
    if any(is_token(dims[d]) for d in touched):
        raise self.refuse(node, f"{name} runs along the token axis")
    values = node.meta["val"]
    if isinstance(values, (tuple, list)):
        return [tuple(dims[i] if i not in touched else plain(v.shape[i]) for i in range(len(dims))) for v in values]
    return tuple(dims[i] if i not in touched else plain(values.shape[i]) for i in range(len(dims)))


# .. contractions


@rule(aten.linear.default)
def _linear(self: Follower, node: fx.Node) -> Any:
    x, weight = node.args[:2]
    if self.dims(weight) is not None and any(is_token(d) for d in self._flat(weight)):  # type: ignore[arg-type]
        raise self.refuse(node, "the weight of a linear layer depends on tokens")
    dims = self.known(x)  # type: ignore[arg-type]
    if is_token(dims[-1]):
        raise self.refuse(node, "a linear layer mixes the token axis (a token-mixing MLP)")
    return (*dims[:-1], plain(shape_of(node)[-1]))


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(self: Follower, node: fx.Node) -> Any:
    a, b = node.args[:2]
    ra, rb = len(shape_of(a)), len(shape_of(b))  # type: ignore[arg-type]
    rank = max(ra, rb, 2)
    lead = [("b", i) for i in range(rank - 2)]
    keys_a = [*lead, "i", "k"] if ra > 1 else ["k"]
    keys_b = [*lead, "k", "j"] if rb > 1 else ["k"]
    out = lead + (["i"] if ra > 1 else []) + (["j"] if rb > 1 else [])
    table = self.product(node, [(a, keys_a), (b, keys_b)], out)
    return self.output(node, out, table)


@rule(aten.addmm.default, aten.baddbmm.default)
def _addmm(self: Follower, node: fx.Node) -> Any:
    c, a, b = node.args[:3]
    lead = ["b"] if node.target is aten.baddbmm.default else []
    out = [*lead, "i", "j"]
    table = self.product(node, [(a, [*lead, "i", "k"]), (b, [*lead, "k", "j"]), (c, out)], out)
    return self.output(node, out, table)


@rule(aten.einsum.default)
def _einsum(self: Follower, node: fx.Node) -> Any:
    equation, operands = node.args[:2]
    if "..." in equation:  # type: ignore[operator]
        raise self.refuse(node, f"einsum '{equation}' with an ellipsis is not followed")
    left, arrow, right = equation.replace(" ", "").partition("->")  # type: ignore[union-attr]
    if not arrow:  # letters that occur once, in alphabetical order
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    table = self.product(node, [(arg, list(keys)) for arg, keys in zip(operands, left.split(","), strict=True)], right)  # type: ignore
    return self.output(node, list(right), table)


@rule(aten.scaled_dot_product_attention.default)
def _sdpa(self: Follower, node: fx.Node) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    args = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    rank = len(shape_of(args["query"]))
    lead = [("b", i) for i in range(rank - 2)]
    heads_differ = bool(args.get("enable_gqa"))
    key_lead = [*lead[:-1], "h_kv"] if heads_differ else lead
    table = self.align(node, [
        (args["query"], [*lead, "q", "d"]), (args["key"], [*key_lead, "t", "d"]),
        (args["value"], [*key_lead, "t", "v"]), (args.get("attn_mask"), [*lead, "q", "t"])])
    query, key = table.get("q", plain(1)), table.get("t", plain(1))
    if args.get("is_causal") and (is_token(query) or is_token(key)) and not same_dim(query, key):
        raise self.refuse(node, "is_causal aligns queries with keys by position, and they are pruned differently")
    if is_token(query) or is_token(key):
        self.flow.attention[node] = (query, key)
    return self.output(node, [*lead, "q", "v"], table)


@rule(aten.embedding.default)
def _embedding(self: Follower, node: fx.Node) -> Any:
    dims = self.dims(node.args[1])
    if dims is None:
        raise self.refuse(node, "an embedding table depends on tokens")
    return (*dims, plain(shape_of(node)[-1]))


# .. shapes


@rule(*overloads("view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as",
                 "reshape_as"))
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
                raise self.refuse(node, f"a view splits the token axis of {factor.size} into {shape_of(node)}: tokens "
                                        "are folded to a grid or to windows, so they cannot be removed above this node")
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
SIZED = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default,
         aten.broadcast_to.default}
#: Ops that name the new sizes in another way; with a token axis they become a reshape.
RESIZED = {aten.unflatten.int, aten.view_as.default, aten.reshape_as.default}


@rule(aten.expand.default, aten.broadcast_to.default, aten.expand_as.default)
def _expand(self: Follower, node: fx.Node) -> Any:
    dims, shape = self.known(node.args[0]), shape_of(node)
    lead = len(shape) - len(dims)
    out = tuple(plain(size) if i < lead or not is_tracked(dims[i - lead]) or not equal(
        product(f.size for f in dims[i - lead]), size) else dims[i - lead] for i, size in enumerate(shape))
    if node.target is aten.expand_as.default:
        rank = len(shape)
        table = self.align(node, [(node.args[0], list(range(rank))), (node.args[1], list(range(rank)))])
        return self.output(node, list(range(rank)), table)
    if any(is_token(d) for d in out):
        self.flow.sizes[node] = out
    return out


@rule(*overloads("transpose", "permute", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "numpy_T", "mT",
                 "adjoint"))
def _permute(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    rank, name = len(dims), op_name(node)
    order = list(range(rank))
    if name == "permute":
        order = [int(d) % rank for d in node.args[1]]  # type: ignore
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
    if which is None or is_tracked(dims[int(which) % len(dims)]):  # type: ignore[arg-type]
        raise self.refuse(node, "repeat_interleave repeats tokens")
    return tuple(plain(shape[i]) if i == int(which) % len(dims) else d for i, d in enumerate(dims))  # type: ignore


@rule(aten.cat.default, aten.concat.default)
def _cat(self: Follower, node: fx.Node) -> Any:
    tensors: list[fx.Node] = [t for t in node.args[0] if not equal(product(shape_of(t)), 0)]  # type: ignore
    shape = shape_of(node)
    rank = len(shape)
    dim = dim_argument(node, 1, 0, rank)
    keys = [[i if i != dim else ("cat", j) for i in range(rank)] for j in range(len(tensors))]
    table = self.align(node, list(zip(tensors, keys, strict=True)))
    parts: list[Any] = []
    for j, tensor in enumerate(tensors):
        label = table.get(("cat", j))
        if label is not None and is_token(label):
            if len(label) > 1:
                raise self.refuse(node, "a flattened token axis is concatenated")
            parts.append(label[0].axis)
        else:
            parts.append(shape_of(tensor)[dim])
    if len(parts) > 1 and isinstance(parts[1], Axis) and parts[1].base is not None and isinstance(
            parts[0], int) and parts[0] == parts[1].start:
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


@rule(operator.getitem)
def _getitem(self: Follower, node: fx.Node) -> Any:
    dims = self.dims(node.args[0])
    return dims[node.args[1]] if isinstance(dims, list) else None  # type: ignore[index]


@rule(aten.slice.Tensor)
def _slice(self: Follower, node: fx.Node) -> Any:
    dims, shape = self.known(node.args[0]), shape_of(node)  # type: ignore[arg-type]
    args: list[Any] = [*node.args, *[None] * 5]
    dim = int(args[1] or 0) % len(dims)
    start, end, step = args[2] or 0, MAX_INT if args[3] is None else args[3], args[4] or 1
    along = dims[dim]
    if not is_token(along):
        return tuple(plain(shape[i]) if i == dim and not equal(shape[i], product(f.size for f in d)) else d
                     for i, d in enumerate(dims))
    before = product(f.size for f in along)
    end_value = end.meta["val"] if isinstance(end, fx.Node) else end
    if isinstance(end_value, int) and end_value < 0:
        end_value = before + end_value
    to_end = (isinstance(end_value, int) and end_value == MAX_INT) or equal(end_value, before)
    if start == 0 and step == 1 and to_end:
        self.flow.full_slices[node] = dim
        return dims
    if len(along) != 1 or step != 1:
        raise self.refuse(node, "a slice takes part of a flattened or strided token axis")
    axis = along[0].axis
    assert axis is not None
    return tuple(d if i != dim else self_slice(self, node, axis, start, end_value, to_end, shape[dim])
                 for i, d in enumerate(dims))


def self_slice(self: Follower, node: fx.Node, axis: Axis, start: Any, end: Any, to_end: bool, size: Any) -> Dim:
    """A slice of a token axis: allowed where its borders lie among tokens that are all kept."""
    if isinstance(start, fx.Node):
        start = start.meta["val"]
    if axis.parts:
        at: Any = 0
        borders = [at]
        for part in axis.parts:
            at = at + (part.size if isinstance(part, Axis) else part)
            borders.append(at)
        first = axis.size + start if isinstance(start, int) and start < 0 else start
        starts = [i for i, b in enumerate(borders) if equal(b, first)]
        ends = [len(axis.parts)] if to_end else [i for i, b in enumerate(borders) if equal(b, end)]
        if starts and ends and starts[0] < ends[0]:
            picked = axis.parts[starts[0]:ends[0]]
            self.flow.slices[node] = (axis.parts[: starts[0]], picked, to_end)
            if not any(isinstance(p, Axis) for p in picked):
                return plain(size)
            return (Factor(size, picked[0] if len(picked) == 1 else self.concat(picked, size)),)
    if to_end and isinstance(start, int):
        if start < 0 and -start <= axis.suffix:
            return plain(size)
        if 0 < start <= axis.prefix:
            return (Factor(size, self.tail(axis, start)),)
    if isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= axis.prefix:
        return plain(size)
    raise self.refuse(node, f"a slice [{start}:{'' if to_end else end}] of the token axis {axis} has its border among "
                            "tokens that may be dropped; protect them, or cut later")


@rule(aten.select.int)
def _select(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])  # type: ignore[arg-type]
    dim, index = int(node.args[1]) % len(dims), node.args[2]  # type: ignore[arg-type]
    if is_token(dims[dim]):
        axis = dims[dim][0].axis
        fits = len(dims[dim]) == 1 and isinstance(index, int) and axis is not None and (
            0 <= index < axis.prefix or -axis.suffix <= index < 0)
        if not fits:
            raise self.refuse(node, f"token {index} is read, and it may be dropped")
    return tuple(d for i, d in enumerate(dims) if i != dim)


@rule(aten.index_select.default)
def _index_select(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])  # type: ignore[arg-type]
    dim = int(node.args[1]) % len(dims)  # type: ignore[arg-type]
    if is_tracked(dims[dim]):
        raise self.refuse(node, "index_select picks tokens or rows")
    return tuple(plain(shape_of(node)[i]) if i == dim else d for i, d in enumerate(dims))


@rule(aten.gather.default)
def _gather(self: Follower, node: fx.Node) -> Any:
    value, dim, index = node.args[:3]
    rank = len(shape_of(node))
    dim = int(dim) % rank  # type: ignore[arg-type]
    keys = [i if i != dim else "from" for i in range(rank)]
    table = self.align(node, [(value, keys), (index, [i if i != dim else "to" for i in range(rank)])])
    if is_token(table.get("from", ())):
        raise self.refuse(node, "gather picks tokens")
    return self.output(node, [i if i != dim else "to" for i in range(rank)], table)


@rule(aten.index.Tensor)
def _index(self: Follower, node: fx.Node) -> Any:
    """``x[rows, positions]``: positions in the unpruned sequence are mapped to positions among the kept."""
    value, indices = node.args[:2]
    if self.dims(value) is None:
        raise self.refuse(node, "tokens choose entries of a value from outside")
    dims = self.known(value)  # type: ignore[arg-type]
    tensors = [(i, t) for i, t in enumerate(indices) if t is not None]  # type: ignore[union-attr, arg-type]
    if any(t.meta["val"].dtype == torch.bool for _, t in tensors):  # type: ignore[union-attr]
        raise self.refuse(node, "a boolean mask picks tokens")
    if any(self.dims(t) is not None for _, t in tensors):
        raise self.refuse(node, "an index is computed from tokens")
    positions = [i for i, _ in tensors]
    if positions != list(range(positions[0], positions[0] + len(positions))):
        raise self.refuse(node, "indices with a gap are not followed")
    rank = max(len(shape_of(t)) for _, t in tensors)  # type: ignore[arg-type]
    made = [plain(s) for s in shape_of(node)[positions[0]: positions[0] + rank]]
    batch = self.flow.batch
    for i, _ in tensors:
        if is_token(dims[i]):
            if len(dims[i]) != 1:
                raise self.refuse(node, "an index into a flattened token axis")
            rows = 1 if batch is None else batch.size
            if not equal(rows, 1) and not (i - 1 in positions and dims[i - 1] == (Factor(rows, batch),)):
                raise self.refuse(node, "tokens are picked by one index for all rows of the batch")
            if not equal(product(d[0].size for d in made), rows):
                raise self.refuse(node, "an index picks several tokens of a row, and some of them may be dropped")
            by_row = i - 1 in positions and any(f.axis is batch for f in dims[i - 1])
            self.flow.indices[node, i] = dims[i][0].axis, by_row  # type: ignore[assignment]
    return (*dims[: positions[0]], *made, *dims[positions[-1] + 1:])


@rule(aten.cross_entropy_loss.default)
def _cross_entropy(self: Follower, node: fx.Node) -> Any:
    """``cross_entropy_loss(logits [N, C, ...], target [N, ...])``: the loss of the tokens that are left."""
    logits, target = node.args[:2]
    rank = len(shape_of(logits))
    if len(shape_of(target)) == rank:
        raise self.refuse(node, "a loss against probabilities is not followed; labels are")
    keys = ["n", "c", *range(rank - 2)] if rank > 1 else ["c"]
    places = [k for k in keys if k != "c"]
    table = self.align(node, [(logits, keys), (target, places)])
    if is_token(table.get("c", plain(1))):
        raise self.refuse(node, "the classes of a loss are tokens")
    return self.output(node, places, table) if shape_of(node) else ()


@rule(*overloads("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose2d", "avg_pool2d", "max_pool2d", "pad",
                 "constant_pad_nd", "unfold", "im2col", "interpolate", "upsample_bilinear2d", "upsample_bicubic2d",
                 "adaptive_avg_pool1d", "adaptive_avg_pool2d", "pixel_shuffle", "pixel_unshuffle", "conv2d_padding"))
def _grid(self: Follower, node: fx.Node) -> Any:
    name = op_name(node)
    dims = self.known(node.args[0])  # type: ignore[arg-type]
    if name in ("pad", "constant_pad_nd"):
        amounts = list(node.args[1])  # type: ignore[arg-type]
        touched = {len(dims) - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
        if not any(is_token(dims[d]) for d in touched):
            return tuple(plain(s) if i in touched else dims[i] for i, s in enumerate(shape_of(node)))
    if any(is_token(d) for d in dims):
        raise self.refuse(node, f"{name} works on neighbouring tokens (a grid), so tokens cannot be removed above it; "
                                "cut below this node, or leave this region dense")
    return None


def held_rule(self: Follower, node: fx.Node) -> Any:
    """``tokcompile::held(keys [B, H, T, Dh], positions [B, T]) -> [B, T]``: aligned on batch and tokens."""
    table = self.align(node, [(node.args[0], ["b", "h", "t", "d"]), (node.args[1], ["b", "t"])])
    return self.output(node, ["b", "t"], table)


def marker_rule(self: Follower, node: fx.Node) -> Any:
    """A marker that only reads, or gives all tokens back: what follows is not narrowed."""
    return None

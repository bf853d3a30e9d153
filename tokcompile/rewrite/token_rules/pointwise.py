"""Rules for operations that act value by value, norms and reductions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcompile.capture.ops import op_name
from tokcompile.capture.sizes import equal, product, shape_of
from tokcompile.rewrite.labels import is_chosen, is_token, plain
from tokcompile.rewrite.token_axis import Follower, overloads, rule

aten = torch.ops.aten


def dim_argument(node: fx.Node, position: int, default: int, rank: int) -> int:
    value = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    return int(value) % rank  # type: ignore[arg-type]


# .. pointwise and other ops that keep all dimensions


def pointwise(self: Follower, node: fx.Node) -> Any:
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
            self.token_symbols & arg.meta["val"].node.expr.free_symbols
        ):
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
    "to",
    "_to_copy",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "detach_",
    "lift_fresh_copy",
    "dropout",
    "dropout_",
    "native_dropout",
    "masked_fill",
    "masked_fill_",
    "where",
    "__and__",
    "__or__",
    "__xor__",
    "logical_and",
    "logical_not",
    "type_as",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "softplus",
    "prelu",
    "relu6",
    "leaky_relu",
    "hardtanh",
    "clamp",
    "clip",
    "square",
    "rsub",
    "add_",
    "mul_",
    "sub_",
    "div_",
    "copy",
    "feature_dropout",
    "alpha_dropout",
    "nan_to_num",
    "conj",
    "resolve_conj",
    "float_power",
    "_conj",
    "gelu",
)
rule(torch.Tag.pointwise, *POINTWISE)(pointwise)


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
    dims = self.known(x)
    if any(is_token(d) for d in self._flat(weight)) or (  # type: ignore[arg-type]
        len(dims) > 1 and is_token(dims[1]) and not equal(product(shape_of(weight)), 1)
    ):
        raise self.refuse(node, "prelu has one slope for each token")
    return dims


@rule(aten.glu.default)
def _glu(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    dim = dim_argument(node, 1, -1, len(dims))
    if is_token(dims[dim]):
        raise self.refuse(node, "glu divides the token axis")
    return tuple(plain(shape_of(node)[dim]) if i == dim else d for i, d in enumerate(dims))


@rule(*overloads("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"))
def _softmax(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    dim = dim_argument(node, 1, -1, len(dims))
    if is_chosen(dims[dim]):
        raise self.refuse(node, "a softmax over rows in an order that values choose")
    if is_token(dims[dim]):
        query = next((d for i, d in enumerate(dims) if i != dim and is_token(d)), plain(1))
        self.flow.attention[node] = (query, dims[dim])
    return dims


@rule(
    *overloads(
        "layer_norm",
        "rms_norm",
        "native_layer_norm",
        "group_norm",
        "batch_norm",
        "normalize",
        "linalg_vector_norm",
        "norm",
    )
)
def _norm(self: Follower, node: fx.Node) -> Any:
    name = op_name(node)
    dims = self.known(node.args[0])
    if name in ("linalg_vector_norm", "norm"):
        return _reduce(self, node)
    if name in ("layer_norm", "native_layer_norm", "rms_norm"):
        normalised = len(node.args[1])  # type: ignore[arg-type]
        if any(is_token(d) for d in dims[len(dims) - normalised :]):
            raise self.refuse(node, "a norm runs over the token axis")
        if name == "native_layer_norm":
            stat = tuple(dims[: len(dims) - normalised]) + tuple(plain(1) for _ in range(normalised))
            return [dims, stat, stat]
        return dims
    raise self.refuse(node, f"{name} mixes tokens")


REDUCTIONS = overloads(
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "prod",
    "any",
    "all",
    "logsumexp",
    "argmax",
    "argmin",
    "var_mean",
)


@rule(*REDUCTIONS)
def _reduce(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    name = op_name(node)
    if node.target in (aten.max.other, aten.min.other):
        return pointwise(self, node)  # max(a, b)
    position = 2 if name in ("linalg_vector_norm", "norm") else 1
    which = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    keep = node.kwargs.get("keepdim", node.args[position + 1] if len(node.args) > position + 1 else False)
    if name in ("var", "std", "var_mean"):  # (x, dim, unbiased, keepdim) or (x, dim, *, correction, keepdim)
        keep = node.kwargs.get("keepdim", node.args[3] if len(node.args) > 3 else False)
        if isinstance(which, bool):
            which = None
    rank = len(dims)
    given: Any = which if isinstance(which, (list, tuple)) else [which]
    chosen = set(range(rank)) if which is None or which == [] else {int(d) % rank for d in given}
    if any(is_token(dims[d]) for d in chosen):
        if name in ("argmax", "argmin") or (name in ("max", "min") and isinstance(node.meta["val"], (tuple, list))):
            raise self.refuse(node, f"{name} over the token axis gives a position in the unpruned sequence")
        self.flow.reductions.append(node)
    out = tuple(plain(1) if d in chosen else dims[d] for d in range(rank) if keep or d not in chosen)
    values = node.meta["val"]
    return [out] * len(values) if isinstance(values, (tuple, list)) else out


@rule(
    *overloads(
        "cumsum",
        "cumprod",
        "cummax",
        "cummin",
        "logcumsumexp",
        "flip",
        "roll",
        "topk",
        "tril",
        "triu",
        "diff",
    )
)
def _along(self: Follower, node: fx.Node) -> Any:
    dims = self.known(node.args[0])
    name = op_name(node)
    if name in ("tril", "triu"):
        touched = [len(dims) - 2, len(dims) - 1]
    elif name == "topk":
        touched = [int(node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)) % len(dims)]  # type: ignore[arg-type]
    elif name in ("flip", "roll"):
        place = 1 if name == "flip" else 2
        which = node.args[place] if len(node.args) > place else []
        touched = [int(d) % len(dims) for d in which] or list(range(len(dims)))  # type: ignore[arg-type, union-attr]
    else:
        touched = [dim_argument(node, 1, -1, len(dims))]
    if any(is_token(dims[d]) for d in touched):
        raise self.refuse(node, f"{name} runs along the token axis")
    values = node.meta["val"]
    if isinstance(values, (tuple, list)):
        return [tuple(dims[i] if i not in touched else plain(v.shape[i]) for i in range(len(dims))) for v in values]
    return tuple(dims[i] if i not in touched else plain(values.shape[i]) for i in range(len(dims)))

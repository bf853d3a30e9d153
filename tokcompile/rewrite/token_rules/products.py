"""Rules for products, attention, embeddings and losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tokcompile.capture.ops import op_name, sdpa_arguments
from tokcompile.capture.packed import PACKED
from tokcompile.capture.sizes import shape_of
from tokcompile.rewrite.labels import is_chosen, is_token, plain, same_dim
from tokcompile.rewrite.token_axis import Follower, overloads, rule

aten = torch.ops.aten


# .. contractions


@rule(aten.linear.default)
def _linear(self: Follower, node: fx.Node) -> Any:
    x, weight = node.args[:2]
    if self.dims(weight) is not None and any(is_token(d) for d in self._flat(weight)):  # type: ignore[arg-type]
        raise self.refuse(node, "the weight of a linear layer depends on tokens")
    dims = self.known(x)
    if is_token(dims[-1]):
        raise self.refuse(node, "a linear layer mixes the token axis (a token-mixing MLP)")
    return (*dims[:-1], plain(shape_of(node)[-1]))


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def _matmul(self: Follower, node: fx.Node) -> Any:
    a, b = node.args[:2]
    ra, rb = len(shape_of(a)), len(shape_of(b))
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
    table = self.product(node, [(arg, list(keys)) for arg, keys in zip(operands, left.split(","), strict=True)], right)  # type: ignore[arg-type]
    return self.output(node, list(right), table)


@rule(aten.scaled_dot_product_attention.default)
def _sdpa(self: Follower, node: fx.Node) -> Any:
    given = sdpa_arguments(node)
    rank = len(shape_of(given.query))
    lead = [("b", i) for i in range(rank - 2)]
    key_lead = [*lead[:-1], "h_kv"] if given.enable_gqa else lead
    table = self.align(
        node,
        [
            (given.query, [*lead, "q", "d"]),
            (given.key, [*key_lead, "t", "d"]),
            (given.value, [*key_lead, "t", "v"]),
            (given.mask, [*lead, "q", "t"]),
        ],
    )
    query, key = table.get("q", plain(1)), table.get("t", plain(1))
    if given.is_causal and (is_token(query) or is_token(key)) and not same_dim(query, key):
        raise self.refuse(node, "is_causal aligns queries with keys by position, and they are pruned differently")
    if is_chosen(query) or is_chosen(key):
        raise self.refuse(node, "attention between rows in an order that values choose")
    if is_token(query) or is_token(key):
        self.flow.attention[node] = (query, key)
    return self.output(node, [*lead, "q", "v"], table)


@rule(PACKED)
def _packed(self: Follower, node: fx.Node) -> Any:
    lead = [("b", 0), ("b", 1)]
    table = self.align(node, [(arg, [*lead, "q", width]) for arg, width in zip(node.args, "ddv", strict=False)])
    if is_token(table.get("q", plain(1))):
        raise self.refuse(
            node,
            "attention within pieces of one row of tokens (images or windows one behind the other) "
            "is divided where the pieces are, and tokens would leave them",
        )
    return self.output(node, [*lead, "q", "v"], table)


@rule(aten.embedding.default)
def _embedding(self: Follower, node: fx.Node) -> Any:
    dims = self.dims(node.args[1])
    if dims is None:
        raise self.refuse(node, "an embedding table depends on tokens")
    return (*dims, plain(shape_of(node)[-1]))


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
    if any(map(is_chosen, table.values())):
        raise self.refuse(node, "a loss over rows in an order that values choose")
    return self.output(node, places, table) if shape_of(node) else ()


@rule(
    *overloads(
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
        "conv_transpose2d",
        "avg_pool2d",
        "max_pool2d",
        "pad",
        "constant_pad_nd",
        "unfold",
        "im2col",
        "interpolate",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "pixel_shuffle",
        "pixel_unshuffle",
        "conv2d_padding",
    )
)
def _grid(self: Follower, node: fx.Node) -> Any:
    name = op_name(node)
    dims = self.known(node.args[0])
    if name in ("pad", "constant_pad_nd"):
        amounts = list(node.args[1])  # type: ignore[arg-type]
        touched = {len(dims) - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
        if not any(is_token(dims[d]) for d in touched):
            return tuple(plain(s) if i in touched else dims[i] for i, s in enumerate(shape_of(node)))
    if any(is_token(d) for d in dims):
        raise self.refuse(
            node,
            f"{name} works on neighbouring tokens (a grid), so tokens cannot be removed above it; "
            "cut below this node, or leave this region dense",
        )
    return None

"""The vocabulary of pre-dispatch ATen, sorted by what an operation does to the data that flows through it.

Names are those of the overload packet without the trailing underscore of in-place forms (``add_`` is ``add``).
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

#: Same values, same order: looked through wherever a value is named.
TRIVIAL = {
    "to",
    "_to_copy",
    "dropout",
    "native_dropout",
    "feature_dropout",
    "contiguous",
    "clone",
    "alias",
    "detach",
    "lift_fresh",
    "lift_fresh_copy",
    "type_as",
}

#: Same values, another shape or order.
LAYOUT = {
    "view",
    "reshape",
    "_unsafe_view",
    "view_as",
    "reshape_as",
    "unsqueeze",
    "squeeze",
    "flatten",
    "unflatten",
    "transpose",
    "permute",
    "t",
    "T",
    "mT",
    "numpy_T",
    "movedim",
    "swapaxes",
    "expand",
    "expand_as",
    "broadcast_to",
    "roll",
}

#: Copies of some of the values.
SELECT = {
    "slice",
    "select",
    "getitem",
    "chunk",
    "split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_chunk",
    "unbind",
    "tensor_split",
    "narrow",
    "repeat",
    "repeat_interleave",
    "pad",
    "constant_pad_nd",
}

#: Operations that put values together without mixing them.
JOIN = {
    "cat",
    "concat",
    "stack",
    "copy",
    "slice_scatter",
    "select_scatter",
    "index_copy",
    "index_put",
    "_index_put_impl",
}

#: The bend in an activation function.
NONLINEAR = {
    "gelu",
    "silu",
    "relu",
    "relu6",
    "sigmoid",
    "tanh",
    "erf",
    "mish",
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "softplus",
    "logsigmoid",
    "prelu",
    "exp",
    "expm1",
    "clamp_min",
    "threshold",
    "glu",
    "softsign",
    "square",
}

POINTWISE = NONLINEAR | {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "true_divide",
    "neg",
    "pow",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "abs",
    "clamp",
    "clamp_max",
    "minimum",
    "maximum",
    "where",
    "masked_fill",
    "log",
    "log1p",
    "sin",
    "cos",
    "addcmul",
    "nan_to_num",
}

NORM = {
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "_fused_rms_norm",
    "group_norm",
    "batch_norm",
    "instance_norm",
    "normalize",
}

#: Reductions of which normalisations are made when they are written out.
REDUCE = {"mean", "var", "std", "sum", "linalg_vector_norm", "norm", "var_mean", "amax", "max"}

CONTRACTION = {"matmul", "bmm", "einsum", "baddbmm", "mm"}
SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
SDPA = {"scaled_dot_product_attention", "packed_attention"}

#: Whole layers as one operation (nn.TransformerEncoderLayer and nn.MultiheadAttention without gradients).
FUSED = {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"}

CONV = {"conv1d", "conv2d", "conv3d", "convolution"}

#: The result depends on the operand's shape, type and device only.
SHAPE_ONLY = {
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "new_zeros",
    "new_ones",
    "new_empty",
    "new_full",
    "rand_like",
    "randn_like",
    "arange",
    "zeros",
    "ones",
    "empty",
    "full",
    "new_empty_strided",
    "sym_size",
}

#: The result shares memory with its first operand, so that writing to it writes to the operand.
VIEWS = LAYOUT | {
    "slice",
    "select",
    "getitem",
    "chunk",
    "split",
    "split_with_sizes",
    "unbind",
    "narrow",
    "alias",
    "detach",
    "to",
    "contiguous",
}

COMPARE = {"le", "lt", "ge", "gt"}


def op_name(node: fx.Node) -> str:
    """The operation's name ("" for placeholders, attributes, the output and Python functions on sizes)."""
    if node.op != "call_function":
        return ""
    if isinstance(node.target, OpOverload):
        name = node.target.overloadpacket.__name__
        return name if name.startswith("__") else name.rstrip("_")
    return "getitem" if node.target is operator.getitem else ""


def is_pointwise(node: fx.Node) -> bool:
    """Whether each number of the result depends on the numbers at its place alone (after broadcasting)."""
    return op_name(node) in POINTWISE or (
        isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags
    )


def is_in_place(node: fx.Node) -> bool:
    """Whether the operation writes to its first operand."""
    if not isinstance(node.target, OpOverload):
        return False
    name = node.target.overloadpacket.__name__
    return name.endswith("_") and not name.startswith("__")


@dataclass(frozen=True)
class SdpaArguments:
    """What a ``scaled_dot_product_attention`` node is called with, by position or by name.

    Attributes:
        query: [..., H, S, D]. key: [..., Hkv, T, D]. value: [..., Hkv, T, Dv].
        mask: broadcasts to [..., H, S, T], bool (True: visible) or float (added to the logits); None.
        dropout: share of the weights that is dropped.
        is_causal: query i sees keys up to i, counted from the start of both.
        scale: as given; None: 1 / sqrt(D), see :attr:`factor`.
        enable_gqa: query head h reads key head ``h // (H / Hkv)``.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None = None
    dropout: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def factor(self) -> float:
        """What the products of queries and keys are multiplied with."""
        return 1 / math.sqrt(int(self.query.meta["val"].shape[-1])) if self.scale is None else float(self.scale)

    def write(self, node: fx.Node) -> None:
        """Make these the arguments of ``node``."""
        node.args = (self.query, self.key, self.value, self.mask, self.dropout, self.is_causal)
        named = {"scale": self.scale, "enable_gqa": self.enable_gqa or None}
        node.kwargs = {name: value for name, value in named.items() if value is not None}


_SDPA_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def sdpa_arguments(node: fx.Node) -> SdpaArguments:
    """The arguments of a ``scaled_dot_product_attention`` node."""
    given: dict[str, Any] = {**dict(zip(_SDPA_NAMES, node.args, strict=False)), **node.kwargs}
    return SdpaArguments(
        given["query"],
        given["key"],
        given["value"],
        given.get("attn_mask"),
        float(given.get("dropout_p") or 0),
        bool(given.get("is_causal")),
        given.get("scale"),
        bool(given.get("enable_gqa")),
    )

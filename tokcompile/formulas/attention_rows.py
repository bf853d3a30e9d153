"""Attention rows for scoring, read off a layer that was found in the graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from tokcompile.regions.model import Layer
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.selection import row_attention


def sdpa_scale(node: fx.Node) -> float:
    """The factor on the logits of a ``scaled_dot_product_attention`` node."""
    scale = node.kwargs.get("scale")
    if scale is None and len(node.args) > 6:
        scale = node.args[6]
    width = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    return float(scale) if scale is not None else 1 / math.sqrt(width)  # type: ignore[arg-type]


def attention_rows(ctx: Context, layer: Layer, rows: int | None) -> fx.Node:
    """Attention probabilities of the first ``rows`` queries (None: all) of ``layer``: fp32 ``[B, H, rows, T]``.

    Fused attention stays fused; the rows are computed beside it. The eager form has them already.
    """
    attention = layer.attention
    if attention is None:
        raise ctx.refuse(layer.output, f"layer {layer.index} has no attention to score with")
    weights = attention.softmax
    inputs = [attention.query, attention.key] if weights is None else [weights]
    if any(n.meta["val"].dim() != 4 for n in inputs):
        raise ctx.refuse(attention.output, "attention with batch and heads flattened together cannot be scored")
    if weights is None:
        scale = sdpa_scale(attention.output)

        def compute(query: Tensor, key: Tensor) -> Tensor:
            return row_attention(query if rows is None else query[:, :, :rows], key, scale)
    else:

        def compute(weights: Tensor) -> Tensor:  # type: ignore[misc]
            return (weights if rows is None else weights[:, :, :rows]).to(torch.float32)

    return ctx.emit(compute, *inputs, before=ctx.after(*inputs))  # type: ignore[no-any-return]


def class_row(ctx: Context, layer: Layer) -> fx.Node:
    """Attention of the class token (row 0) of ``layer``: fp32 ``[B, H, T]``."""
    row = attention_rows(ctx, layer, 1)
    return ctx.emit(lambda r: r[:, :, 0], row, before=ctx.after(row))  # type: ignore[no-any-return]

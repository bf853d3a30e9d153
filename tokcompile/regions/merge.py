"""Merge points: where image features enter the sequence of text embeddings.

::

    embedding(input_ids), or inputs_embeds ------------+
    features (vision encoder output or a graph input) -+-> masked_scatter | index_put | where | cat -> decoder stack
    mask (positions of the image tokens) --------------+

With the form ``copy`` (``x[:, 1:3] = features``) the output is the buffer as it is after the node ``write``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import fx

from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.ops import LAYOUT, NORM, POINTWISE, REDUCE, TRIVIAL

from .feed_forward import batch_tokens_width
from .flow import Flow
from .misses import Misses
from .model import EncoderRegion, MergePoint
from .stack import Stream

_MERGES = {"masked_scatter", "index_put", "where", "cat", "index_copy", "scatter", "slice_scatter", "copy"}
_ABOVE = TRIVIAL | LAYOUT | NORM | REDUCE | POINTWISE | _MERGES | {"new_empty", "empty", "zeros", "zeros_like", "slice"}


def find_merge_points(
    flow: Flow, streams: Sequence[Stream], encoders: Sequence[EncoderRegion], misses: Misses
) -> list[MergePoint]:
    """Walk from the start of each stack up to the embeddings; what joins features to them on the way is a merge."""
    embeddings = flow.mask(flow.by_op.get("embedding", []))
    # features may come from any layer of the encoder (LLaVA takes the last but one), so from where its tokens start
    images = [r.tokens for r in encoders]
    found: list[MergePoint] = []
    seen: set[fx.Node] = set()
    for stream in streams:
        for node in flow.back(stream.start, _ABOVE, limit=200, reader=stream.end).passed:
            if flow.op[node] not in _MERGES or node in seen:
                continue
            seen.add(node)
            region = _merge(flow, node, embeddings, images)
            if region is not None:
                found.append(region)
    for op in ("masked_scatter", "index_put"):
        for node in flow.by_op.get(op, []):
            attempt = misses.attempt("merge_point", "values put among others")
            if node not in seen and _floating(node):
                inside = any(flow.reaches(s.start, node) and flow.reaches(node, s.end) for s in streams)
                attempt.fails(
                    node,
                    f"expected {op} to make the sequence that enters a decoder stack, "
                    + (
                        "found it inside a stack, between its layers"
                        if inside
                        else "found that its result is not the residual stream of one"
                    ),
                )
            elif node in seen and not any(r.output is node for r in found) and _floating(node):
                attempt.passes("start of a decoder stack").fails(
                    node,
                    f"expected {op} of image features into text embeddings, found "
                    "no embedding on one side or no features on the other",
                )
    return sorted(found, key=lambda r: flow.position[r.output])


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2


def _merge(flow: Flow, node: fx.Node, embeddings: int, images: list[fx.Node]) -> MergePoint | None:
    op, args = flow.op[node], node.args
    mask: Any = None
    sides: list[Any]
    if op == "masked_scatter":
        sides, mask = [args[0], args[2]], args[1]
    elif op == "where" and len(args) == 3:
        sides, mask = [args[1], args[2]], args[0]
    elif op == "index_put":
        indices = args[1]
        sides, mask = [args[0], args[2]], indices[0] if indices else None  # type: ignore[index]
    elif op in ("index_copy", "scatter"):
        sides = [args[0], args[3]]
    elif op in ("slice_scatter", "copy"):
        sides = [_base(flow, args[0]) if op == "copy" else args[0], args[1]]
    else:
        sides = list(args[0])  # type: ignore[arg-type]
        if not _token_axis(flow, node):
            return None
    sides = [n for n in sides if isinstance(n, fx.Node)]
    text = [n for n in sides if flow.reached_by(n, embeddings)]
    if len(text) != 1:  # one alone may hold other images already: those of a merge above
        text = [n for n in text if not _from_images(flow, n, images)]
    if not text and op not in ("cat", "where") and len(sides) == 2 and _is_sequence(flow, sides[0]):
        text = sides[:1]  # embedded already; what is written into the sequence is the features
    features = [n for n in sides if n not in text and _is_features(flow, n, images)]
    if not text:
        text = [n for n in sides if flow.reached_by(n, embeddings) and n not in features]
    if not text or not features:
        return None
    batch, tokens, width = batch_tokens_width(flow, node)
    return MergePoint(
        path=module_path(node),
        source=source_line(node),
        output=_base(flow, node) if op == "copy" else node,
        embeddings=text[0],
        features=features[0],
        mask=mask if isinstance(mask, fx.Node) else None,
        write=node if op == "copy" else None,
        batch=batch,
        tokens=tokens,
        width=width,
        form=op,
        encoded=_from_images(flow, features[0], images),
        modality=_modality(flow, features[0]),
    )


def _modality(flow: Flow, features: fx.Node) -> Literal["image", "video"] | None:
    """By the names of the arguments that the features come from; None where these do not say.

    The arguments of forward are all that tells them apart: pixel_values_videos, say, or the entry "video" of what the
    encoder made. Parameters say nothing: an image may go through a module named after videos.
    """
    names = [
        str(node.meta.get("argument", "")).lower()
        for node in flow.nodes
        if node.op == "placeholder" and flow.reaches(node, features)
    ]
    names = [name for name in names if not any(word in name for word in ("modules_", "parameters_", "buffers_"))]
    if any("video" in name for name in names):
        return None if any("image" in name for name in names) else "video"
    return "image" if any(word in name for name in names for word in ("image", "pixel")) else None


def _base(flow: Flow, node: Any) -> Any:
    while isinstance(node, fx.Node) and flow.op[node] in ("slice", "copy", "select") and flow.inputs[node]:
        node = flow.inputs[node][0]
    return node


def _token_axis(flow: Flow, node: fx.Node) -> bool:
    dims = flow.dims(node) or ()
    axis = node.args[1] if len(node.args) > 1 else 0
    return len(dims) in (2, 3) and isinstance(axis, int) and axis % len(dims) == len(dims) - 2


def _from_images(flow: Flow, node: fx.Node, images: list[fx.Node]) -> bool:
    return any(flow.reaches(image, node) for image in images)


def _is_sequence(flow: Flow, node: fx.Node) -> bool:
    """Embeddings ``[B, S, D]`` that the graph is given, perhaps scaled or normalised."""
    leaves = [n for n in (node, *flow.back(node, TRIVIAL | NORM | POINTWISE, limit=20).stops) if n.op == "placeholder"]
    return any(_floating(n) and n.meta["val"].dim() == 3 for n in leaves)


def _is_features(flow: Flow, node: fx.Node, images: list[fx.Node]) -> bool:
    """Made by a vision encoder, or from a floating-point input of the graph with a width."""
    if _from_images(flow, node, images):
        return True
    leaves = [n for n in flow.nodes[: flow.position[node] + 1] if n.op == "placeholder" and flow.reaches(n, node)]
    return any(_floating(n) for n in leaves)

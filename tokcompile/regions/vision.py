"""Vision encoders: a stack of layers whose tokens are patches of an image or a video.

::

    pixels -> patch_embedding (conv, stride = kernel; or unfold and linear) -> flatten
           -> [cat class_token in front, or learned tokens behind]
           -> [+ positions, norm] -> tokens -> layers -> output
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.ops import LAYOUT, TRIVIAL
from tokcompile.capture.sizes import hint

from .flow import Flow
from .misses import Misses
from .model import Layer, VisionEncoder
from .stack import Stream


@dataclass
class Patches:
    """The node that turns pixels into one vector for each patch."""

    node: fx.Node
    form: Literal["conv", "overlapping_conv", "linear"]


def find_vision_encoders(
    flow: Flow, streams: Sequence[Stream], misses: Misses
) -> tuple[list[VisionEncoder], list[Stream]]:
    """The vision encoders, and the streams that are none. Stages joined by patch merging make one encoder."""
    found: list[tuple[VisionEncoder, Stream]] = []
    rest: list[Stream] = []
    claimed: set[fx.Node] = set()
    joins = flow.mask(block.join.add for stream in streams for block in stream.blocks)
    embeddings = flow.mask(flow.by_op.get("embedding", []))
    for stream in streams:
        above = flow.reached_by(stream.start, joins)
        before = next((pair for pair in found if above and flow.reaches(pair[1].end, stream.start)), None)
        if before is not None and not _reads_text(flow, stream.start, embeddings) and not _is_merge(flow, stream.start):
            _extend(before[0], stream)
            found[found.index(before)] = (before[0], stream)
            continue
        patches = None if above else _patches(flow, stream.start, misses)
        if patches is None:
            rest.append(stream)
            continue
        claimed.add(patches.node)
        found.append((_describe(flow, stream, patches), stream))
    _unclaimed(flow, claimed, [s.start for s in streams], misses)
    return [region for region, _ in found], rest


def _reads_text(flow: Flow, node: fx.Node, embeddings: int) -> bool:
    return bool(flow.reached_by(node, embeddings))


def _is_merge(flow: Flow, node: fx.Node) -> bool:
    return flow.op[node] in ("masked_scatter", "index_put", "where", "scatter")


def _extend(region: VisionEncoder, stream: Stream) -> None:
    """Append the layers of a later stage, after patch merging."""
    first = len(region.layers)
    region.layers += [
        Layer(n.path, first + n.index, n.input, n.output, n.attention, n.feed_forward) for n in stream.layers
    ]
    region.output = stream.output
    region.stages += 1


def _patches(flow: Flow, start: fx.Node, misses: Misses) -> Patches | None:
    convs = [
        n
        for n in flow.by_op.get("conv2d", []) + flow.by_op.get("conv3d", []) + flow.by_op.get("convolution", [])
        if flow.is_conv(n) and flow.reaches(n, start)
    ]
    if convs:
        last = max(convs, key=flow.position.__getitem__)
        kernel, stride = kernel_and_stride(flow, last)
        if max(stride) > 1:
            return Patches(last, "conv" if kernel == stride else "overlapping_conv")
        misses.attempt("vision_encoder", "convolution over pixels", "layers over the patches").fails(
            last,
            "expected a patch embedding (convolution with stride equal to its "
            f"kernel), found kernel {kernel} with stride {stride}: tokens of a convolutional backbone",
        )
        return None
    return _linear_patches(flow, start)


def _linear_patches(flow: Flow, start: fx.Node) -> Patches | None:
    """A linear over pixels: of an image that is cut up by views, or of rows that are whole patches already."""
    node = _towards(flow, start, lambda n: flow.linear(n) is not None)
    linear = flow.linear(node) if node is not None else None
    if linear is None:
        return None
    source, ops = linear.input, set()
    while (
        not flow.is_leaf(source)
        and flow.inputs[source]
        and (
            flow.op[source]
            in TRIVIAL | LAYOUT | {"im2col", "unfold", "slice", "pad", "constant_pad_nd", "sub", "div", "mul"}
        )
    ):
        ops.add(flow.op[source])
        source = flow.inputs[source][0]
    value = source.meta.get("val")
    if not flow.is_leaf(source) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return None
    width = (flow.dims(linear.input) or (0,))[-1]
    image = value.dim() >= 4 and bool(ops & (LAYOUT | {"im2col", "unfold"}))
    if image or (value.dim() in (2, 3) and _patch_width(width)):
        return Patches(linear.node, "linear")
    return None


def _patch_width(width: Any) -> bool:
    """Whether a row can be a square patch of an RGB image, or of two RGB frames."""
    return isinstance(width, int) and any(
        width == 3 * frames * side * side for frames in (1, 2) for side in range(4, 65)
    )


def _towards(flow: Flow, start: fx.Node, goal: Any) -> fx.Node | None:
    walk = flow.back(
        start, TRIVIAL | LAYOUT | {"add", "cat", "layer_norm", "slice", "mul", "rms_norm"}, limit=40, stop=goal
    )
    return next((n for n in walk.stops if goal(n)), None)


def kernel_and_stride(flow: Flow, conv: fx.Node) -> tuple[list[int], list[int]]:
    """Kernel and stride of a convolution, one number for each spatial axis."""
    kernel = list((flow.dims(conv.args[1]) or ())[2:])  # type: ignore[arg-type]
    given = conv.args[3] if len(conv.args) > 3 else conv.kwargs.get("stride", 1)
    stride = list(given) if isinstance(given, (list, tuple)) else [given]
    return kernel, (stride * len(kernel))[: len(kernel)]  # type: ignore[return-value]


def _describe(flow: Flow, stream: Stream, patches: Patches) -> VisionEncoder:
    sizes, layers = flow.sizes(stream.start), list(stream.layers)
    grid = len(sizes) == 4
    prefix, suffix, token = tokens_around(flow, stream.start, patches.node)
    path = module_path(patches.node)
    return VisionEncoder(
        path=common_prefix(path, layers[0].path if layers else path),
        source=source_line(patches.node),
        patch_embedding=patches.node,
        tokens=stream.start,
        output=stream.output,
        class_token=token,
        batch=sizes[0] if len(sizes) > 2 else 1,
        width=sizes[-1],
        patch_count=_patch_count(flow, patches),
        token_count=sizes[1] * sizes[2] if grid else sizes[-2],
        prefix=prefix,
        suffix=suffix,
        patches=patches.form,
        grid=grid,
        layers=layers,
    )


def common_prefix(path: str, other: str) -> str:
    """The modules that two paths have in common."""
    return ".".join(a for a, b in zip(path.split("."), other.split("."), strict=False) if a == b)


def _patch_count(flow: Flow, patches: Patches) -> Any:
    sizes = flow.sizes(patches.node)
    if patches.form == "linear":
        return math.prod(sizes[1:-1]) if len(sizes) > 2 else sizes[0]
    space = math.prod(sizes[2:])
    return sizes[0] if isinstance(space, int) and space == 1 else space


def tokens_around(flow: Flow, start: fx.Node, patches: fx.Node) -> tuple[Any, Any, fx.Node | None]:
    """Tokens in front of those that ``patches`` makes, tokens behind, and the (last) ``cat`` that put any in front."""
    count: Any = 0
    behind: Any = 0
    token: fx.Node | None = None
    node = start
    while node is not patches:
        sources = [n for n in flow.inputs[node] if flow.reaches(patches, n)]
        if not sources:
            break
        following = sources[-1]
        axis = _axis(flow, node)
        if flow.op[node] == "cat" and axis == len(flow.dims(node) or ()) - 2:
            following = max(sources, key=lambda n: (hint(flow.sizes(n)[-2], 0), flow.position[n]))
            operands = list(node.args[0])  # type: ignore[arg-type]
            place = operands.index(following)
            count = count + sum(flow.sizes(n)[axis] for n in operands[:place])
            behind = behind + sum(flow.sizes(n)[axis] for n in operands[place + 1 :])
            token = token or (node if place else None)
        elif flow.op[node] in ("pad", "constant_pad_nd") and len(node.args[1]) == 4:  # type: ignore[arg-type]
            pads: Any = node.args[1]
            count, behind = count + pads[2], behind + pads[3]
        elif flow.op[node] == "slice" and axis == len(flow.dims(node) or ()) - 2:
            first = node.args[2] if len(node.args) > 2 else 0
            if isinstance(first, int) and first > 0:
                count = count - first
            before, after = flow.sizes(following)[axis], flow.sizes(node)[axis]
            if isinstance(before, int) and isinstance(after, int) and isinstance(first, int) and first >= 0:
                behind = behind - (before - first - after)
        node = following
    return count, behind, token


def _axis(flow: Flow, node: fx.Node) -> int:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return given % len(flow.dims(node) or (0,)) if isinstance(given, int) else -1


def _unclaimed(flow: Flow, claimed: set[fx.Node], starts: list[fx.Node], misses: Misses) -> None:
    for node in flow.by_op.get("conv2d", []) + flow.by_op.get("conv3d", []):
        kernel, stride = kernel_and_stride(flow, node)
        if node in claimed or kernel != stride or max(kernel) == 1 or any(flow.reaches(node, n) for n in starts):
            continue
        misses.attempt("vision_encoder", "convolution over pixels", "one vector for each patch").fails(
            node,
            "expected the patches to become the tokens of a stack of attention "
            f"layers, found a convolution with kernel and stride {kernel} whose result reaches none",
        )

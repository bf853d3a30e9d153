"""Which part of a joint sequence is the picture, and which is text: by dataflow from the noisy input.

A diffusion transformer gives back what it was given, cleaner: an output has the shape of an input, the latents. Where a
sequence of an attention is a concatenation of two, the part that is computed from the latents is the picture. Behind
the first joint attention both parts are computed from everything; there the order of the first concatenation and the
length of its text tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from tokcompile.capture.graph import ancestors
from tokcompile.capture.ops import op_name
from tokcompile.capture.sizes import equal, hint
from tokcompile.formulas.attention import AttentionForm
from tokcompile.rewrite.context import Context


@dataclass(frozen=True)
class TextPart:
    """The text of a joint sequence: as many tokens as ``node`` has along ``axis``; ``first``: before the picture."""

    node: fx.Node
    axis: int
    first: bool


def find_text(ctx: Context, form: AttentionForm) -> TextPart | None:
    """The text part of the sequence of an attention; None: the sequence is no concatenation.

    Raises:
        NarrowError: it is one, but nothing tells which part is the picture.
    """
    length = form.key.meta["val"].shape[2]
    joined = _concatenations({form.key, *ancestors([form.key])}, length)
    if not joined:
        return None
    noisy = _descendants(_latents(ctx))
    order = {node: i for i, node in enumerate(ctx.captured.graph.nodes)}
    joined.sort(key=lambda found: order[found[0]])
    nearest, axis = joined[-1]
    every = _concatenations(ctx.captured.graph.nodes, length)
    known = next((part for node, dim in every if (part := _by_origin(node, dim, noisy)) is not None), None)
    if known is None:
        raise ctx.refuse(
            nearest,
            "the sequence is a concatenation, and nothing tells which part is the picture: an input that has the shape "
            "of an output was expected to lead into one of them alone; set text_tokens and text_first",
        )
    if _by_origin(nearest, axis, noisy) is not None:
        return _by_origin(nearest, axis, noisy)
    parts = _parts(nearest)
    size = known.node.meta["val"].shape[known.axis]
    for first in (known.first, not known.first):
        if equal(parts[0 if first else 1].meta["val"].shape[axis], size):
            return TextPart(parts[0 if first else 1], axis, first)
    raise ctx.refuse(nearest, f"neither part of the sequence has the {size} tokens of the text; set text_tokens")


def _parts(node: fx.Node) -> list[fx.Node]:
    return list(node.args[0])  # type: ignore[arg-type]


def _concatenations(nodes: Iterable[fx.Node], length: Any) -> list[tuple[fx.Node, int]]:
    """Concatenations of two values along an axis of ``length``, and that axis."""
    found = []
    for node in nodes:
        value = node.meta.get("val")
        if (
            op_name(node) != "cat"
            or not isinstance(value, Tensor)
            or value.dim() not in (3, 4)
            or len(_parts(node)) != 2
        ):
            continue
        given: Any = node.args[1] if len(node.args) > 1 else 0
        axis = int(given) % value.dim()
        if 0 < axis < value.dim() - 1 and value.is_floating_point() and equal(value.shape[axis], length):
            found.append((node, axis))
    return found


def _by_origin(node: fx.Node, axis: int, noisy: set[fx.Node]) -> TextPart | None:
    """The part that is not computed from the latents, where the other is."""
    parts = _parts(node)
    from_latents = [part in noisy for part in parts]
    if from_latents[0] == from_latents[1]:
        return None
    text = from_latents.index(False)
    return TextPart(parts[text], axis, text == 0)


def _latents(ctx: Context) -> list[fx.Node]:
    """Inputs of three axes or more that have the shape of an output, at the sizes at hand.

    A picture that is cut into patches and put together again has ``2 * (h // 2)`` rows, which is ``h`` where it runs.
    """

    def shape(node: fx.Node) -> tuple[int, ...] | None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() < 3:
            return None
        return tuple(hint(size, unknown=-1) for size in value.shape)

    outputs = {shape(node) for node in ctx.captured.graph.output_node().all_input_nodes} - {None}
    return [node for node in ctx.captured.placeholders if shape(node) in outputs]


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that is computed from ``nodes``, and themselves."""
    seen, todo = set(nodes), list(nodes)
    while todo:
        for user in todo.pop().users:
            if user not in seen:
                seen.add(user)
                todo.append(user)
    return seen

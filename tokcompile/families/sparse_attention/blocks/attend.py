"""Attention over the blocks that were chosen, and what is always attended to whatever was chosen.

::

    one sequence     keep [B, M, n, n] and own block, first block (causal), last queries, dense rows -> lists -> kernel
    with a text      picture queries: chosen blocks of the picture, all of the text; text queries: everything
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokcompile.families.sparse_attention.blocks.lists import (
    BlockLists,
    as_lists,
    blocks_of,
    filled,
    in_blocks,
    seen_blocks,
    visible_of,
)
from tokcompile.formulas.attention import with_sink
from tokcompile.kernels.block_list_attention import block_list_attention


@dataclass(frozen=True)
class Text:
    """The tokens of a joint sequence that are no part of the picture; all queries attend to all of them.

    Attributes:
        key: [B, Hkv, T, D]. value: [B, Hkv, T, Dv]. visible: bool [B or 1, T], or None: all.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None


@dataclass(frozen=True)
class BlockForm:
    """What a choice of blocks is told of the attention.

    Attributes:
        scale, softcap: of the logits; ``softcap`` 0: none.
        causal: a query sees keys up to its own place. window: only so many before it; 0: all.
        block: tokens of a block, of queries and of keys.
        layer: number of the layer, from 0.
        last: so many last visible queries attend to all that they see.
        own: a block of queries always attends to the keys of the same tokens.
        visible: bool [B or 1, L]: the keys that are there; None: all.
        dense: bool, broadcasts to [B, 1, 1, 1]: rows of the batch that attend to everything; None: none does.
        text: the text of a joint sequence, which query, key and value of a choice do not hold; None.
    """

    scale: float
    softcap: float = 0.0
    causal: bool = True
    window: int = 0
    block: int = 128
    layer: int = 0
    last: int = 0
    own: bool = True
    visible: Tensor | None = None
    dense: Tensor | None = None
    text: Text | None = None


Choose = Callable[[Tensor, Tensor, Tensor, BlockForm], BlockLists]


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, form: BlockForm, choose: Choose, sink: Tensor | None = None
) -> Tensor:
    """Attention ``[B, H, L, Dv]`` of each block of queries over the blocks of keys that ``choose`` keeps.

    Args:
        query: [B, H, L, D]. key: [B, Hkv, L, D]. value: [B, Hkv, L, Dv].
        sink: see :class:`~tokcompile.formulas.attention.AttentionForm`; not together with a ``mass``.
    """
    given = choose(query, key, value, form)
    keep = _with_fixed(given.keep, seen_of(query, form), query.shape[2], form)
    return _over(query, key, value, keep, given, form, sink)


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    form: BlockForm,
    choose: Choose,
    text: Any,
    first: bool,
    sink: Tensor | None = None,
) -> Tensor:
    """As :func:`block_attention`, in both directions, of a sequence in which ``text`` tokens are no picture.

    The picture is filled up to whole blocks, so that no block holds tokens of both.

    Args:
        text: their number. first: they stand in front of the picture, else behind it.
    """
    parts = [_split(t, text, first, 2) for t in (query, key, value)]
    seen = (None, None) if form.visible is None else _split(form.visible, text, first, 1)
    (picture, words), (key_picture, key_words), (value_picture, value_words) = parts
    inner = replace(form, visible=seen[0], text=Text(key_words, value_words, seen[1]))
    given = choose(picture, key_picture, value_picture, inner)
    keep = _with_fixed(given.keep, seen_of(picture, inner), picture.shape[2], inner)
    there = in_blocks(visible_of(text, seen[1], key.device), form.block, 1).any(-1)[:, None, None, :]
    rows = torch.broadcast_shapes(keep.shape[:1], there.shape[:1])
    keep = torch.cat([keep.expand(*rows, *keep.shape[1:]), there.expand(*rows, *keep.shape[1:3], there.shape[3])], 3)
    visible = [visible_of(n, v, key.device) for n, v in zip((picture.shape[2], text), seen, strict=True)]
    whole = replace(form, visible=torch.cat([filled(visible[0], form.block, 1), visible[1]], 1), text=None)
    keys, values = (
        torch.cat([filled(a, form.block), b], 2) for a, b in ((key_picture, key_words), (value_picture, value_words))
    )
    of_picture = _over(picture, keys, values, keep, given, whole, sink)
    of_words = _over(words, key, value, None, BlockLists(keep), form, sink)
    return torch.cat([of_words, of_picture] if first else [of_picture, of_words], 2)


def seen_of(query: Tensor, form: BlockForm) -> Tensor:
    """bool [B or 1, 1, n, n]: the pairs of blocks that can be kept."""
    seen: Tensor = seen_blocks(query.shape[2], form.block, form.causal, form.window, form.visible, query.device)
    return seen


def _split(t: Tensor, text: Any, first: bool, dim: int) -> tuple[Tensor, Tensor]:
    """The picture's part, the text's part."""
    length = t.shape[dim]
    if first:
        return t.narrow(dim, text, length - text), t.narrow(dim, 0, text)
    return t.narrow(dim, 0, length - text), t.narrow(dim, length - text, text)


def _with_fixed(keep: Tensor, seen: Tensor, length: Any, form: BlockForm) -> Tensor:
    """``keep`` with the blocks that are always attended to, without those that cannot be seen."""
    device = keep.device
    number = torch.arange(blocks_of(length, form.block), device=device)
    if form.own:
        keep = keep | (number[:, None] == number)
    if form.causal:  # the first block that holds a token: attention sinks
        there = in_blocks(visible_of(length, form.visible, device), form.block, 1).any(-1)
        keep = keep | (torch.cumsum(there.to(torch.int64), 1) == 1)[:, None, None, :]
    if form.last:
        there = visible_of(length, form.visible, device)
        behind = there.flip(1).to(torch.int64).cumsum(1).flip(1)
        keep = keep | in_blocks(there & (behind <= form.last), form.block, 1).any(-1)[:, None, :, None]
    if form.dense is not None:
        keep = keep | form.dense
    return keep & seen


def _over(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keep: Tensor | None,
    given: BlockLists,
    form: BlockForm,
    sink: Tensor | None,
) -> Tensor:
    """The kernel over the kept blocks (None: all), rectified."""
    batch, size = query.shape[0], form.block
    index = count = position = None
    if keep is not None:
        lists = key.shape[1] if keep.shape[1] == 1 else keep.shape[1]
        index, count = (t.expand(batch, lists, *t.shape[2:]) for t in as_lists(keep))
    if form.visible is not None:
        place = torch.arange(key.shape[2], device=key.device)
        position = torch.where(form.visible, place, -1).expand(batch, key.shape[2]).unsqueeze(1)
    output: Tensor
    output, lse = block_list_attention(
        query, key, value, index, count, position, size, size, form.scale, form.causal, form.window, form.softcap
    )
    if sink is not None:
        output = with_sink(output, lse, sink)
    if keep is None or (given.mass is None and given.rest is None):
        return output
    mass, rest = given.mass, given.rest
    dense = None if form.dense is None else form.dense.reshape(-1, 1, 1)
    result: Tensor = output.to(torch.promote_types(output.dtype, torch.float32))
    if mass is not None:
        mass = mass if dense is None else torch.where(dense, 1.0, mass)
        result = result * _rows(mass.unsqueeze(-1), size, query.shape[2])
    if rest is not None:
        rest = rest if dense is None else torch.where(dense.unsqueeze(-1), 0.0, rest)
        result = result + _rows(rest, size, query.shape[2])
    return result.to(output.dtype)


def _rows(blocks: Tensor, size: int, length: Any) -> Tensor:
    """``[B, H, n, D] -> [B, H, L, D]``: the value of its block for each query."""
    rows = blocks.unsqueeze(3).expand(*blocks.shape[:3], size, blocks.shape[3]).flatten(2, 3)
    return rows.narrow(2, 0, length)

"""Selection of visual tokens inside a graph: segments, budgets, ranks, kept positions, and the plain scores.

Every function here is meant to be traced (pre-dispatch ATen, symbolic ``B`` and ``S``), compiled with Inductor and
exported to ONNX. So: no data-dependent shape, no ``.item()``, no Python branch on a value, counts in integer
arithmetic, and only operations that every runtime has (plain ``sort``, ``cumsum``, ``gather``, ``scatter_add``).

Ties, segments, budgets and ranks are those of :mod:`tokcompile.kernels.segments`.

Shapes: ``B`` batch, ``S`` tokens, ``D`` model width, ``H`` query heads, ``Hkv`` key heads, ``Dh`` head width,
``R`` selected query rows, ``T`` keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokcompile.kernels.hidden import is_visible
from tokcompile.kernels.precision import matmul
from tokcompile.kernels.segments import (
    NO_RANK,
    budgets,
    budgets_count,
    index_of,
    rank_in_segment,
    segment_positions,
    segment_sizes,
    segments,
)

__all__ = [
    "NO_RANK",
    "budgets",
    "budgets_count",
    "class_attention_scores",
    "keep_index",
    "keep_mask",
    "kept_rows",
    "kept_size",
    "pooled",
    "random_scores",
    "rank_in_segment",
    "row_attention",
    "segment_positions",
    "segment_sizes",
    "segments",
]

_PRIME = (1 << 31) - 1  # modulus of the hash; every product of two residues stays below 2 ** 62


def keep_mask(scores: Tensor, segment: Tensor, budget: Tensor) -> Tensor:
    """bool [B, S]: True outside segments, and for the ``budget`` best tokens of each segment."""
    return torch.logical_or(segment < 0, rank_in_segment(scores, segment) < budget)


def keep_index(keep: Tensor, size: int | torch.SymInt) -> Tensor:
    """Positions of the kept tokens, ascending and right-aligned.

    Args:
        keep: bool [B, S].
        size: length of the result, known outside the graph (:func:`kept_size`), at least the largest kept count.
            In a row that keeps more, the leftmost are lost.

    Returns:
        int64 [B, size]: kept positions; a row that keeps fewer than ``size`` tokens is filled with -1 in front, so
        that the last column is always the last kept token.
    """
    flag = keep.to(torch.int64)
    seen = torch.cumsum(flag, dim=1)
    slot: Tensor = (seen - seen[:, -1:] + size) * flag  # type: ignore[assignment]  # from the right: size, size - 1, ...
    slot = slot.clamp(min=0)  # slot 0 collects what is dropped
    table = torch.zeros((keep.shape[0], size + 1), dtype=torch.int64, device=keep.device)
    return table.scatter_add(1, slot, (index_of(keep) + 1) * flag)[:, 1:] - 1


def kept_rows(visual: Tensor, num: int | None = None, den: int = 1, *, count: int | None = None) -> Tensor:
    """How many tokens each row keeps, in traceable form: what :func:`keep_mask` leaves.

    Args:
        visual: bool [B, S].
        num, den: ratio as in :func:`budgets`; or
        count: tokens per segment as in :func:`budgets_count`. Exactly one of the two forms.

    Returns:
        int64 [B].

    Raises:
        ValueError: if not exactly one of ``num`` and ``count`` is given.
    """
    if (num is None) == (count is None):
        raise ValueError("kept_rows takes either num and den (a ratio), or count (tokens per segment)")
    segment = segments(visual)
    budget = budgets(segment, num, den) if num is not None else budgets_count(segment, count)  # type: ignore[arg-type]
    first = torch.logical_and(segment >= 0, segment_positions(segment) == 0)
    return torch.logical_not(visual).sum(dim=1) + (budget * first).sum(dim=1)


def kept_size(rows: Tensor) -> tuple[int, bool]:
    """The ``size`` for :func:`keep_index`, computed on the host before the graph runs.

    Args:
        rows: int64 [B], real values: the kept count of each row.

    Returns:
        (largest kept count over the rows, True if the rows keep different numbers of tokens).
    """
    rows = rows.detach().to("cpu")
    if rows.numel() == 0:
        return 0, False
    return int(rows.max()), bool((rows != rows[0]).any())


def random_scores(segment: Tensor, seed: int) -> Tensor:
    """Random scores that every runtime reproduces: a hash of (seed, segment id, place inside the segment).

    They do not depend on the batch row, on what else the row holds, or on earlier calls. The hash is a fifth power
    in the field of ``2 ** 31 - 1`` elements (a permutation of it) between affine maps, so two places of one segment
    never collide before the rounding to 24 bits.

    Returns:
        float32 [B, S] in [0, 1), multiples of ``2 ** -24``; 0 outside segments.
    """
    flag = (segment >= 0).to(torch.int64)
    place, number = segment_positions(segment), segment.clamp(min=0)
    state = torch.remainder(number * 1_000_003 + (seed * 48_271 + 11) % _PRIME, _PRIME)
    state = torch.remainder(_fifth_power(state) + place * 69_621, _PRIME)
    for factor, shift in ((16_807, 1_013_904_223), (1_103_515_245, 12_345), (630_360_016, 907_633_385)):
        state = torch.remainder(_fifth_power(state) * factor + shift, _PRIME)
    return torch.div(state * flag, 128, rounding_mode="floor").to(torch.float32) * 2.0**-24


def _fifth_power(x: Tensor) -> Tensor:
    square = torch.remainder(x * x, _PRIME)
    return torch.remainder(torch.remainder(square * square, _PRIME) * x, _PRIME)


def pooled(x: Tensor, segment: Tensor, budget: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Average pooling as a baseline for token selection.

    The ``n`` tokens of a segment fall into ``k = budget`` groups of consecutive tokens (token ``i`` into group
    ``i * k // n``); the mean of a group is written over the group's middle token, and the scores make exactly these
    middle tokens win. Pooling runs along the sequence, also where the segment is a square grid of patches.

    Args:
        x: [B, S, D].
        segment: int64 [B, S].
        budget: int64 [B, S]; equal within a segment.

    Returns:
        (``x`` with the means, same dtype; float32 [B, S] scores, 1 at the tokens to keep and 0 elsewhere; int64 [B, S]
        the place of the token that holds the mean of each).
    """
    inside = segment >= 0
    index, place = index_of(segment), segment_positions(segment)
    size, count = segment_sizes(segment).clamp(min=1), budget.clamp(min=1)
    group = torch.div(place * count, size, rounding_mode="floor")
    first = torch.div(group * size + count - 1, count, rounding_mode="floor")
    last = torch.div((group + 1) * size + count - 1, count, rounding_mode="floor") - 1
    middle = torch.where(inside, index - place + torch.div(first + last, 2, rounding_mode="floor"), index)
    total = torch.zeros_like(x, dtype=torch.float32).scatter_add(
        1, middle.unsqueeze(-1).expand_as(x), x.to(torch.float32)
    )
    members = (last - first + 1).unsqueeze(-1)
    chosen = torch.logical_and(inside, middle == index)
    mean = (total / members.to(torch.float32)).to(x.dtype)
    new = torch.where(torch.logical_and(chosen.unsqueeze(-1), members > 1), mean, x)
    return new, chosen.to(torch.float32), middle


def row_attention(
    query_rows: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention probabilities of a few query rows, so that the main path can stay fused.

    Args:
        query_rows: [B, H, R, Dh], the selected rows, after RoPE.
        key: [B, Hkv, T, Dh], all keys, after RoPE; query head ``h`` reads key head ``h // (H // Hkv)``.
        scale: factor on the logits.
        mask: broadcastable to [B, H, R, T]; bool (True = may attend) or an additive float mask.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the mask (Gemma 2).
        sink: float, broadcastable to [B, H, R, 1]: one more logit of the softmax, which belongs to no key.

    Returns:
        float32 [B, H, R, T]: softmax over ``T`` in fp32. A row that may attend to nothing is all zeros
        (:mod:`tokcompile.kernels.hidden` says which masks hide a key).
    """
    batch, heads, rows, width = query_rows.shape
    groups = key.shape[1]
    query_rows, key = query_rows.to(torch.float32), key.to(torch.float32)
    if groups != heads:  # fold the heads that share a key head into the rows instead of repeating the keys
        query_rows = query_rows.reshape(batch, groups, heads // groups * rows, width)
    logits = matmul(query_rows * scale, key.transpose(-1, -2))
    if groups != heads:
        logits = logits.reshape(batch, heads, rows, key.shape[2])
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is None:
        return _softmax(logits, sink)
    allowed = is_visible(mask)
    if mask.dtype != torch.bool:
        logits = logits + mask.to(torch.float32)
    logits = torch.where(allowed, logits, torch.finfo(torch.float32).min)
    return torch.where(allowed, _softmax(logits, sink), 0.0)


def _softmax(logits: Tensor, sink: Tensor | None) -> Tensor:
    if sink is None:
        return torch.softmax(logits, dim=-1)
    more = sink.to(torch.float32).expand(*logits.shape[:3], 1)
    return torch.softmax(torch.cat([logits, more], dim=-1), dim=-1)[..., :-1]


def class_attention_scores(query: Tensor, key: Tensor, context: Tensor, scale: float, prefix: int) -> Tensor:
    """Patch scores from the attention of the class token, weighted per head (AS-ViT, arXiv 2209.13802).

    ``score_i = sum_h c[h, i] * r[h, i]`` with ``c`` the class row of the attention (softmax over all keys; only this
    row is computed) and ``r[h, i]`` the norm of patch ``i``'s context in head ``h``, divided by its sum over heads.
    Typical size ``1 / S``.

    Args:
        query: [B, H, S, Dh]; the class token is row 0.
        key: [B, Hkv, S, Dh].
        context: [B, H, S, Dh], ``softmax(Q K^T) V`` before the output projection.
        scale: factor on the logits.
        prefix: number of class and register tokens in front of the patches (at least 1).

    Returns:
        float32 [B, S - prefix].
    """
    attention = row_attention(query[:, :, :1], key, scale)[:, :, 0, prefix:]
    norm = torch.linalg.vector_norm(context[:, :, prefix:].to(torch.float32), dim=-1)
    share: Tensor = norm / (norm.sum(dim=1, keepdim=True) + 1e-8)
    return (attention * share).sum(dim=1)

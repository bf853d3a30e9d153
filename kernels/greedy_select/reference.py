"""Greedy selection of diverse tokens: the definition, in plain torch.

Three criteria over the cosine similarity of the tokens of one segment (an image, a tile, a frame):

* ``max_sum`` (ToDRE, arXiv 2505.18757): next comes the token with the smallest *cumulative* similarity to the chosen
  ones.
* ``k_center`` (the max-min rule of DivPrune, CVPR 2025): next comes the token whose largest similarity to a chosen one
  is smallest, that is, whose smallest cosine distance is largest.

* ``herding`` (kernel herding, Chen, Welling and Smola, UAI 2010; its use for visual tokens is this project's own): next
  comes the token that brings the mean of the chosen ones nearest to the mean of all. From each similarity the mean
  similarity of the token is taken, and ``max_sum`` of what is left follows; the first choice is the most typical token.

All are "add (or take the maximum with) one row of similarities, then take the smallest": equal values go to the lower
index.

**Exact similarities.** A greedy rule amplifies rounding: one changed bit in one dot product may change every choice
after it. Dot products are therefore made exact. A token is scaled to norm 2048 and rounded to integers
(:func:`quantise`). All products and all partial sums of a dot product are then integers below ``2 ** 24`` (by
Cauchy-Schwarz they are at most ``norm ** 2``, about ``2 ** 22``), so fp32 adds them without rounding, in any order,
with or without fused multiply-add; and single entries have at most 11 bits, so TF32 and fp16 matrix units read them
exactly too. It follows that

* a matrix product, a matrix-vector product, a Triton kernel and an ONNX runtime agree to the last bit,
* duplicate tokens tie exactly, wherever they stand,
* a batch of n selects what n single runs select.

The price is an error of about ``0.41 / 2048 = 2e-4`` (one standard deviation) in each cosine; it may reorder tokens
whose scores differ by less than that. (bf16 matrix units keep 8 bits and are not exact; the op does not use them.)
"""

from __future__ import annotations

import torch
from torch import Tensor

CRITERIA = ("max_sum", "k_center", "herding")

#: Norm of a quantised token; single entries are integers of at most 11 bits.
NORM = 2048.0

#: Tokens shorter than this are not scaled up to :data:`NORM`; a zero token is similar to nothing (cosine 0).
EPSILON = 1e-12

#: Largest token width for which partial sums stay below 2 ** 24: (2048 + sqrt(D) / 2) ** 2.
MAX_WIDTH = 1 << 24


def quantise(features: Tensor) -> Tensor:
    """Scale tokens to norm 2048 and round to integers, so that dot products are exact in fp32.

    The norm is summed in fp64 and then rounded to fp32; what follows is elementwise IEEE arithmetic. A token with an
    entry that is not finite becomes the zero token.

    Args:
        features: float [..., D].

    Returns:
        float32 [..., D], integers in [-2048, 2048]; cosine = dot product / 2048 ** 2.
    """
    features = features.detach().to(torch.float32)
    norm = features.to(torch.float64).square().sum(dim=-1, keepdim=True).sqrt().to(torch.float32)
    finite = norm < float("inf")  # False for NaN as well
    scale = torch.where(finite, NORM / norm.clamp(min=EPSILON), 0.0)
    return torch.round(torch.where(finite, features, 0.0) * scale)


def greedy_select_reference(
    features: Tensor, segment: Tensor, budget: Tensor, criterion: str, pivot: Tensor | None = None
) -> Tensor:
    """Order in which the tokens of each segment are chosen; one token at a time, on the host.

    Args:
        features: float [B, S, D].
        segment: int64 [B, S]; equal ids >= 0 in a row form a segment, negative positions are never chosen.
        budget: int64 [B, S]; the entry at the first token of a segment counts (at most its size is used).
        criterion: one of :data:`CRITERIA`.
        pivot: float [B, S] or None. The first choice in a segment is its token with the largest pivot (NaN counts as
            ``-inf``, ties: lower index); without pivot its middle token, the lower of two. ToDRE reports that the
            choice of the first token hardly matters and takes the one with the largest class attention. ``herding``
            without pivot starts with the token of the largest mean similarity.

    Returns:
        int64 [B, S]: 0 for the first choice of a segment, 1 for the second, ...; S where never chosen.
    """
    batch, length, _ = features.shape
    order = torch.full((batch, length), length, dtype=torch.int64)
    for row in range(batch):
        for number in sorted({int(i) for i in segment[row].tolist() if i >= 0}):
            members = [i for i, other in enumerate(segment[row].tolist()) if other == number]
            tokens = quantise(features[row, members].cpu())
            values = None if pivot is None else [float(pivot[row, i]) for i in members]
            if criterion == "herding" and pivot is None:
                values = mean_similarity(tokens).tolist()
            steps = min(int(budget[row, members[0]]), len(members))
            for step, chosen in enumerate(choose(tokens, steps, criterion, first_token(len(members), values))):
                order[row, members[chosen]] = step
    return order.to(features.device)


def isolation(features: Tensor, segment: Tensor) -> Tensor:
    """A pivot for ``k_center``: DivPrune starts with the token whose nearest other token is farthest away.

    Needs all similarities of a row, ``B * S * S`` fp32 values. Traceable and expressible in ONNX.

    Args:
        features: float [B, S, D].
        segment: int64 [B, S].

    Returns:
        float32 [B, S]: minus the largest similarity to another token of the segment (cosine times 2048 ** 2, exact);
        no meaning outside segments and in a segment of one token.
    """
    tokens = quantise(features)
    index = torch.arange(segment.shape[1], device=segment.device)
    other = torch.logical_and(segment.unsqueeze(1) == segment.unsqueeze(2), index.unsqueeze(0) != index.unsqueeze(1))
    return -torch.where(other, torch.matmul(tokens, tokens.transpose(1, 2)), -(2.0**25)).amax(dim=-1)


def mean_similarity(tokens: Tensor) -> Tensor:
    """int64 [n]: mean similarity of each quantised token [n, D] to all of them, rounded down; exact."""
    tokens = tokens.to(torch.float64)  # sums stay below 2 ** 53
    return torch.div((tokens @ tokens.sum(0)).to(torch.int64), len(tokens), rounding_mode="floor")


def mean_in_segment(similarity: Tensor, segment: Tensor) -> Tensor:
    """int64 [B, S]: as :func:`mean_similarity`, from the similarities [B, S, S] and segments [B, S] of whole rows."""
    same = torch.logical_and(segment.unsqueeze(1) == segment.unsqueeze(2), (segment >= 0).unsqueeze(1))
    total = torch.where(same, similarity, 0.0).to(torch.int64).sum(dim=2)
    return torch.div(total, same.to(torch.int64).sum(dim=2).clamp(min=1), rounding_mode="floor")


def first_token(size: int, values: list[float] | None = None) -> int:
    """Place of the first choice in a segment of ``size`` tokens with pivot ``values``."""
    if values is None:
        return (size - 1) // 2
    values = [float("-inf") if value != value else value for value in values]
    return values.index(max(values))


def choose(tokens: Tensor, steps: int, criterion: str, first: int) -> list[int]:
    """Greedy selection within one segment.

    Args:
        tokens: quantised [n, D].
        steps: number of tokens to choose, at most n.
        criterion: one of :data:`CRITERIA`.
        first: place of the first choice.

    Returns:
        places in the order of choice.
    """
    check_criterion(criterion)
    mean = mean_similarity(tokens) if criterion == "herding" else torch.zeros(len(tokens), dtype=torch.int64)
    score = torch.full_like(mean, -(1 << 40)) if criterion == "k_center" else -mean
    free = torch.ones(len(tokens), dtype=torch.bool)
    chosen: list[int] = []
    while len(chosen) < steps:
        best = int(torch.where(free, score, 1 << 60).argmin()) if chosen else first
        chosen.append(best)
        free[best] = False
        similarity = (tokens * tokens[best]).sum(dim=-1).to(torch.int64)
        score = torch.maximum(score, similarity) if criterion == "k_center" else score + (similarity - mean)
    return chosen


def check_criterion(criterion: str) -> None:
    """Raise ValueError unless ``criterion`` is known."""
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known: {', '.join(CRITERIA)}")

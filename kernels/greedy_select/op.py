"""The operation ``torch.ops.tokcompile.greedy_select``: an opaque leaf in a graph.

A greedy loop of K steps would be thousands of tiny nodes in a graph; as one operation it is captured, compiled around
and exported (``onnx.py``) whole. It returns indices and has no derivative; inputs may require one.

On the host, where the tokens exceed the processor's cache, the loop first guesses the next few dozen choices among the
tokens with the smallest scores, and computes the similarities of *all* tokens to them in one matrix product; a step
whose choice was guessed then only adds a row. This gives the same result as the definition in ``reference.py`` because
dot products of quantised tokens are exact. On CUDA the Triton kernel runs, where
:func:`supports` allows it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..precision import operation
from . import triton as kernel
from .reference import EPSILON, MAX_WIDTH, NORM, check_criterion, first_token, mean_similarity

# Tuning of the host's loop; no influence on the result.
_SMALL = 16 << 20  # bytes of tokens up to which one matrix-vector product per step is fastest
_AHEAD = 32  # choices that are guessed ahead
_POOL = 4  # tokens among which they are guessed, per choice
_CHUNK = 1 << 17  # entries that are quantised at a time


@operation("tokcompile::greedy_select", mutates_args=())
def greedy_select(
    features: Tensor, segment: Tensor, budget: Tensor, criterion: str, pivot: Tensor | None = None
) -> Tensor:
    """Order in which the tokens of each segment are chosen; see ``reference.greedy_select_reference``.

    Args:
        features: float [B, S, D].
        segment: int64 [B, S].
        budget: int64 [B, S].
        criterion: "max_sum", "k_center" or "herding".
        pivot: float [B, S] or None.

    Returns:
        int64 [B, S]; S where never chosen.

    Raises:
        ValueError: unknown criterion, or shapes and types that do not fit together.
    """
    check(features, segment, budget, criterion, pivot)
    if features.is_cuda and supports(features, segment, budget, criterion, pivot)[0]:
        return kernel.greedy_select_triton(features, segment, budget, criterion, pivot)
    return greedy_select_host(features, segment, budget, criterion, pivot)


@greedy_select.register_fake
def _(features: Tensor, segment: Tensor, budget: Tensor, criterion: str, pivot: Tensor | None = None) -> Tensor:
    check(features, segment, budget, criterion, pivot)
    return segment.new_empty(segment.shape)


def check(features: Tensor, segment: Tensor, budget: Tensor, criterion: str, pivot: Tensor | None) -> None:
    """Raise ValueError where the arguments do not fit together; puts no guard on symbolic sizes."""
    check_criterion(criterion)
    if features.ndim != 3 or not features.is_floating_point():
        raise ValueError(f"features must be float [B, S, D], found {features.dtype} {tuple(features.shape)}")
    for name, value, expected in (("segment", segment, torch.int64), ("budget", budget, torch.int64)):
        if value.ndim != 2 or value.dtype != expected:
            raise ValueError(f"{name} must be int64 [B, S], found {value.dtype} {tuple(value.shape)}")
    if pivot is not None and (pivot.ndim != 2 or not pivot.is_floating_point()):
        raise ValueError(f"pivot must be float [B, S], found {pivot.dtype} {tuple(pivot.shape)}")
    width = features.shape[2]
    if isinstance(width, int) and width > MAX_WIDTH:
        raise ValueError(f"tokens of width {width} are too wide for exact dot products (at most {MAX_WIDTH})")


def supports(
    features: Tensor, segment: Tensor, budget: Tensor, criterion: str, pivot: Tensor | None = None
) -> tuple[bool, str]:
    """Whether the Triton kernel can run on these arguments, and why not."""
    if not kernel.AVAILABLE:
        return False, "Triton is not installed"
    if not features.is_cuda and not kernel.interpreted():
        return False, f"the Triton kernel needs a CUDA device, the tokens are on {features.device}"
    batch, length, _ = features.shape
    if length > kernel.MAX_TOKENS:
        return False, f"{length} tokens in a row; the Triton kernel holds at most {kernel.MAX_TOKENS}"
    if batch * length * length > kernel.MAX_ENTRIES:
        return False, f"the similarity matrices of {batch} x {length} tokens exceed {kernel.MAX_ENTRIES} entries"
    return True, ""


def greedy_select_host(
    features: Tensor, segment: Tensor, budget: Tensor, criterion: str, pivot: Tensor | None = None
) -> Tensor:
    """As :func:`greedy_select`, segment by segment on the host (tokens on a device are copied)."""
    check_criterion(criterion)
    batch, length, _ = features.shape
    order = np.full((batch, length), length, dtype=np.int64)
    numbers, counts = segment.detach().cpu().numpy(), budget.detach().cpu().numpy()
    pivots = None if pivot is None else pivot.detach().to("cpu", torch.float32).numpy()
    for row in range(batch):
        for number in np.unique(numbers[row]):
            if number < 0:
                continue
            members = np.flatnonzero(numbers[row] == number)
            steps = min(int(counts[row, members[0]]), len(members))
            if steps <= 0:
                continue
            low, high = int(members[0]), int(members[-1]) + 1
            tokens = features[row, low:high] if high - low == len(members) else features[row, members.tolist()]
            with _without_mkldnn():
                tokens = _quantise(tokens.detach().to("cpu", torch.float32))
                mean = mean_similarity(tokens).numpy() if criterion == "herding" else None
                values = mean if pivots is None else pivots[row, members]
                first = first_token(len(members), None if values is None else values.tolist())
                chosen = _choose(tokens, steps, criterion, first, mean)
            order[row, members[chosen]] = np.arange(steps)
    return torch.from_numpy(order).to(segment.device)


@contextlib.contextmanager
def _without_mkldnn() -> Iterator[None]:
    """mkldnn may be set to compute fp32 products in bf16, which are not exact."""
    enabled: Any = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def _quantise(tokens: Tensor) -> Tensor:
    """The values of ``reference.quantise``, a few tokens at a time so that they stay in the processor's cache."""
    result = torch.empty_like(tokens)
    step = max(1, _CHUNK // max(1, tokens.shape[1]))
    for start in range(0, len(tokens), step):
        some, out = tokens[start : start + step], result[start : start + step]
        norm = torch.linalg.vector_norm(some, dim=-1, keepdim=True, dtype=torch.float64).to(torch.float32)
        finite = norm < float("inf")
        if not bool(finite.all()):
            some = torch.where(finite, some, 0.0)
        torch.mul(some, torch.where(finite, NORM / norm.clamp(min=EPSILON), 0.0), out=out).round_()
    return result


def _choose(tokens: Tensor, steps: int, criterion: str, first: int, mean: np.ndarray | None = None) -> list[int]:
    """As ``reference.choose``; ``mean`` is taken from each similarity.

    Products are torch's and not NumPy's: the threads of NumPy's BLAS go on spinning for a while after a product, and
    took 100 ms off the two cores that the language model (700 ms) then ran on.
    """
    size, small = len(tokens), tokens.numel() * tokens.element_size() <= _SMALL
    combine = np.maximum if criterion == "k_center" else np.add
    mean = np.zeros(size) if mean is None else mean.astype(np.float64)
    score = np.full(size, -np.inf) if criterion == "k_center" else -mean  # integers: exact up to 2 ** 53
    rows: dict[int, Tensor] = {}
    best, chosen = first, [first]
    while True:
        if small:
            row = tokens @ tokens[best]
        else:
            if best not in rows:
                ahead = _look_ahead(tokens, score, best, min(_AHEAD, steps - len(chosen) + 1), combine, mean)
                ahead = [place for place in ahead if place not in rows]
                rows.update(zip(ahead, tokens[ahead] @ tokens.T, strict=True))
            row = rows[best]
        combine(score, row.numpy() - mean, out=score)
        score[best] = np.inf
        if len(chosen) == steps:
            return chosen
        best = int(score.argmin())  # the first of equal ones
        chosen.append(best)


def _look_ahead(
    tokens: Tensor, score: np.ndarray, best: int, steps: int, combine: np.ufunc, mean: np.ndarray
) -> list[int]:
    """``best`` and the choices after it, if all came from the tokens that have the smallest scores now.

    A guess: it decides only for which tokens similarities are computed together.
    """
    size = min(len(score), _POOL * steps)
    pool = np.argpartition(score, size - 1)[:size]
    pool = np.concatenate([[best], pool[(pool != best) & (score[pool] < np.inf)]])
    some = tokens[pool.tolist()]
    similarity = (some @ some.T).numpy() - mean[pool]
    score, place, guess = score[pool], 0, [best]
    while len(guess) < min(steps, len(pool)):
        score = combine(score, similarity[place])
        score[place] = np.inf
        place = int(score.argmin())
        guess.append(int(pool[place]))
    return guess

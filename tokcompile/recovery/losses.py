"""What recovery minimises, token by token, and which tokens it looks at.

All functions take logits of single positions, ``[N, V]`` with N positions of a batch in a row, and compute in fp32.

Sources:
    "TIP: Token Importance in On-Policy Distillation", arXiv 2604.14084 (:class:`Tip`);
    "ssToken: Self-modulated and Semantic-aware Token Selection", arXiv 2510.18250 (:class:`SsToken`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LossKind = Literal["forward_kl", "reverse_kl"]
LOSSES = ("forward_kl", "reverse_kl")

_CHUNK = 512  # positions whose probabilities are in memory at once


@dataclass(frozen=True)
class Tip:
    """Train on the positions where the student is unsure, or far from the teacher.

    Entropy ``h`` of the student (over ``log V``) and divergence ``d`` (reverse KL) are clipped and scaled to 0..1 over
    all valid positions of the global batch, whatever it is split into. Of each row the best share is kept.

    Attributes:
        ratio: share of the valid positions of a row that is trained on, in (0, 1]. The paper: 0.5, or 0.2.
        rule: "soft_or": ``h + d - h * d``. "entropy": ``h``. "confident": ``KL(teacher | student) * (1 - h)``, sure and
            wrong (the paper's third quadrant).
        clip: quantile at which both are clipped. The paper clips the entropy only; a compressed model is close to its
            teacher nearly everywhere, and a few outliers would decide the scale of the divergence too.
    """

    ratio: float = 0.5
    rule: Literal["soft_or", "entropy", "confident"] = "soft_or"
    clip: float = 0.98

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        _check_ratio(self.clip, "clip")
        if self.rule not in ("soft_or", "entropy", "confident"):
            raise ValueError(f"rule={self.rule!r}: choose soft_or, entropy or confident")


@dataclass(frozen=True)
class SsToken:
    """Train on the tokens that the model has improved on since the start, and that look at the prompt.

    ``score = gamma * scaled(loss before training - loss now) + (1 - gamma) * attention on the prompt``, by row.

    The attention is that of the teacher's last layer (the paper takes the model in training): it needs no second
    attention in the compressed graph, and it does not move while training goes on. It needs to know the prompt, so
    the data must have ``labels`` with -100 there; with ``gamma=1`` plain text will do.

    Attributes:
        ratio: share of the labelled tokens of a row that is trained on, in (0, 1]. The paper: 0.6.
        gamma: weight of the improvement, in [0, 1]. The paper: 0.5.
        warmup: steps in which the attention alone decides, for nothing has improved yet.
    """

    ratio: float = 0.6
    gamma: float = 0.5
    warmup: int = 10

    def __post_init__(self) -> None:
        _check_ratio(self.ratio)
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: expected a number from 0 to 1")


TokenChoice = Tip | SsToken


def _check_ratio(value: float, name: str = "ratio") -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value}: expected a number above 0, up to 1")


# .. losses


def token_losses(student: Tensor, teacher: Tensor, kind: LossKind = "forward_kl", temperature: float = 1.0) -> Tensor:
    """Divergence at each position, ``[N]`` fp32, times ``temperature ** 2``.

    Only logits are kept for the backward pass; probabilities are computed again there, in chunks.

    Args:
        student, teacher: ``[N, V]``; gradients flow to ``student``.
        kind: "forward_kl": ``KL(teacher | student)``; "reverse_kl": ``KL(student | teacher)``.
        temperature: logits are divided by it first.
    """

    def part(student: Tensor, teacher: Tensor) -> Tensor:
        ours = F.log_softmax(student.float() / temperature, -1)
        theirs = F.log_softmax(teacher.float() / temperature, -1)
        first, second = (theirs, ours) if kind == "forward_kl" else (ours, theirs)
        return (first.exp() * (first - second)).sum(-1) * temperature**2

    return _chunked(part, student, teacher.detach())


def label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at each position, ``[N]`` fp32. ``labels``: int64 ``[N]``."""
    return _chunked(lambda z, t: F.cross_entropy(z.float(), t, reduction="none"), logits, labels)


def _chunked(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    parts = [
        checkpoint(function, x, y, use_reentrant=False) if torch.is_grad_enabled() else function(x, y)
        for x, y in zip(a.split(_CHUNK), b.split(_CHUNK), strict=True)
    ]
    return torch.cat(parts) if parts else a.new_zeros(0, dtype=torch.float32)


# .. choices of positions


@torch.no_grad()
def tip_measures(student: Tensor, teacher: Tensor) -> Tensor:
    """Entropy of the student over ``log V``, reverse and forward divergence: fp32 ``[3, N]``."""
    rows = []
    for ours, theirs in zip(student.split(_CHUNK), teacher.split(_CHUNK), strict=True):
        a, b = F.log_softmax(ours.float(), -1), F.log_softmax(theirs.float(), -1)
        entropy = -(a.exp() * a).sum(-1) / torch.log(torch.tensor(float(a.shape[-1])))
        rows.append(torch.stack([entropy, (a.exp() * (a - b)).sum(-1), (b.exp() * (b - a)).sum(-1)]))
    return torch.cat(rows, 1) if rows else student.new_zeros(3, 0, dtype=torch.float32)


def tip_scores(measures: Tensor, everywhere: Tensor, choice: Tip) -> Tensor:
    """Scores ``[N]`` of positions with ``measures [3, N]``, scaled over ``everywhere [3, M]``."""
    entropy = _scaled(measures[0], everywhere[0], choice.clip)
    if choice.rule == "entropy":
        return entropy
    if choice.rule == "confident":
        return measures[2] * (1 - entropy)
    divergence = _scaled(measures[1], everywhere[1], choice.clip)
    return entropy + divergence - entropy * divergence


def _scaled(values: Tensor, everywhere: Tensor, clip: float) -> Tensor:
    """0..1 between the least value and the quantile ``clip``; 0 where all values are one."""
    if not everywhere.numel():
        return values
    low = everywhere.min()
    high = everywhere.kthvalue(max(1, min(everywhere.numel(), round(clip * everywhere.numel())))).values
    return ((values.clamp(max=high) - low) / (high - low).clamp(min=1e-8)).clamp(0, 1)


def sstoken_scores(before: Tensor, now: Tensor, on_prompt: Tensor | None, rows: Tensor, gamma: float) -> Tensor:
    """Scores ``[N]``.

    Args:
        before, now: ``[N]`` losses of the tokens at the start of training and now.
        on_prompt: ``[N]`` share of the attention of a token that falls on the prompt; None counts as 0.
        rows: int64 ``[N]``, the sample that a token belongs to; each is scaled by itself.
        gamma: see :class:`SsToken`.
    """
    gain = before - now
    scaled = torch.zeros_like(gain)
    for row in rows.unique():
        mine = rows == row
        low, high = gain[mine].min(), gain[mine].max()
        scaled[mine] = (gain[mine] - low) / (high - low + 1e-8)
    return gamma * scaled if on_prompt is None else gamma * scaled + (1 - gamma) * on_prompt


def best_of_rows(scores: Tensor, rows: Tensor, ratio: float, *, up: bool) -> Tensor:
    """bool ``[N]``: the best share of each row, at least one position; equal scores by order.

    Args:
        rows: int64 ``[N]``.
        up: round the number up (ssToken) or down (TIP).
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for row in rows.unique():
        mine = (rows == row).nonzero()[:, 0]
        exact = ratio * len(mine)
        count = max(1, int(-(-exact // 1)) if up else int(exact + 1e-9))
        order = scores[mine].sort(descending=True, stable=True).indices
        chosen[mine[order[:count]]] = True
    return chosen


# .. hidden states


def hidden_losses(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error of hidden states over their squared norm, mean over layers: fp32 ``[N]``.

    Args:
        student, teacher: for each layer ``[N, D]``.
    """
    terms = [
        ((a.float() - b.float()) ** 2).sum(-1) / (b.float() ** 2).sum(-1).clamp(min=1e-12)
        for a, b in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean(0)

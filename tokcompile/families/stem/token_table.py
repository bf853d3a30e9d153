"""A table of up-projections for token ids, from what a layer computed on calibration data.

With ``g`` the activated gate and ``u`` the up-projection of a token with id ``t``, replacing ``u`` by a row ``U[t]``
costs a layer ``W_down (g * (u - U[t]))``. Without the products of different neurons its square is smallest for the mean
of ``u`` weighted by ``g ** 2``. Ids that are rare are pulled towards a prior: the mean over all tokens, or what an
affine map (ridge regression) predicts from the embedding of the id. How strongly, and which prior, is chosen on
sequences that were held out. STEM (arXiv 2601.10639) trains its tables; this conversion of a trained model is this
project's own.

Everything is computed from running sums, so memory is bounded by the number of ids, not by the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Shrinkage towards the prior, in tokens, from which the held-out data chooses.
SHRINKAGES = (0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
#: Without held-out data.
DEFAULT_SHRINKAGE = 16.0
#: Of the ridge regression, relative to the mean square of the embedding.
_RIDGE = 0.03
_TINY = 1e-6
_SUMS = ("s0", "s1", "s2", "su")


def accumulate(
    sums: dict[str, Any], ids: Tensor, gate: Tensor, up: Tensor, held: Tensor, vocabulary: int, limit: int
) -> None:
    """Add some tokens to the running sums of a layer.

    Sums over the tokens of an id, ``[R, f]`` in fp32 for used and (with the prefix ``held_``) held-out tokens:
    ``s0 = sum g^2``, ``s1 = sum g^2 u``, ``su = sum u``, ``n`` [R]; over all tokens ``s2 = sum g^2 u^2`` [f].
    ``row`` int32 [V] says which row an id has, -1 for none.

    Args:
        ids: int64 [N]; negative ids, and those outside the vocabulary, are left out.
        gate: [N, f], after the activation.
        up: [N, f].
        held: bool [N].
        vocabulary: V.
        limit: most rows; ids that first come after that are left out.
    """
    width = gate.shape[-1]
    if "row" not in sums:
        sums["row"] = torch.full((vocabulary,), -1, dtype=torch.int32)
        sums["rows"], sums["left_out"] = 0, 0
        for prefix in ("", "held_"):
            sums |= {f"{prefix}{name}": torch.zeros(0 if name != "s2" else 1, width) for name in _SUMS}
            sums[f"{prefix}n"] = torch.zeros(0)
    inside = (ids >= 0) & (ids < vocabulary)
    row, present = sums["row"], torch.unique(ids[inside]).cpu()
    new = present[row[present] < 0][: max(0, limit - sums["rows"])]
    row[new] = torch.arange(sums["rows"], sums["rows"] + len(new), dtype=torch.int32)
    sums["rows"] += len(new)
    _grow(sums)
    places = torch.where(inside, row.to(ids.device)[ids.clamp(0, vocabulary - 1)], -1)
    sums["left_out"] += int((places < 0).sum())
    for prefix, chosen in (("", ~held), ("held_", held)):
        chosen = chosen & (places >= 0)
        at, inverse = torch.unique(places[chosen], return_inverse=True)
        weight, value = gate[chosen].float().square(), up[chosen].float()
        for name, part in (("s0", weight), ("s1", weight * value), ("su", value), ("n", torch.ones_like(value[:, 0]))):
            total = part.new_zeros(len(at), *part.shape[1:]).index_add_(0, inverse, part)
            sums[f"{prefix}{name}"][at.long().cpu()] += total.cpu()
        sums[f"{prefix}s2"] += (weight * value.square()).sum(0, keepdim=True).cpu()


def _grow(sums: dict[str, Any]) -> None:
    """Room for twice as many rows where there are too few; the slack is zero."""
    have, need = len(sums["n"]), sums["rows"]
    if need > have:
        more = max(need, 2 * have) - have
        for name in [f"{p}{n}" for p in ("", "held_") for n in ("s0", "s1", "su", "n")]:
            old = sums[name]
            sums[name] = torch.cat([old, old.new_zeros(more, *old.shape[1:])])


@dataclass
class Table:
    """What :func:`fit` gives.

    Attributes:
        rows: fp32 [R, f]. remap: int32 [V], id -> row or -1. mean: fp32 [f], for ids without a row.
        score: share of the weighted square of ``u`` around its mean that the rows explain on held-out tokens; NaN
            without any.
        shrinkage: towards the prior, in tokens. prior: "mean" or "ridge".
        tokens: number of tokens seen.
    """

    rows: Tensor
    remap: Tensor
    mean: Tensor
    score: float
    shrinkage: float
    prior: str
    tokens: int


def fit(
    sums: dict[str, Any], embedding: Tensor, down: Tensor, *, shrinkage: float | None, least: int, every_id: bool
) -> Table:
    """The table of a layer from its running sums.

    Args:
        embedding: [V, d], input embedding. down: [d, f], the output projection: its columns weight the neurons.
        shrinkage: a number of tokens, or None to choose it.
        least: ids that came less often get no row.
        every_id: ids that never came (or too rarely) get the row that the prior predicts.

    Raises:
        ValueError: no token was seen.
    """
    count = sums["rows"]
    used = {n: sums[n][:count] for n in ("s0", "s1", "su", "n")}
    held = {n: sums[f"held_{n}"][:count] for n in ("s0", "s1", "su", "n")}
    if float(used["n"].sum()) == 0:
        used, held = held, used  # a single sequence, held out
    if float(used["n"].sum()) == 0:
        raise ValueError("no token with an id came through the layer")
    row_of = sums["row"]
    ids = torch.empty(count, dtype=torch.int64)
    known = torch.nonzero(row_of >= 0).squeeze(-1)
    ids[row_of[known].long()] = known
    keys = embedding.detach().float().cpu()
    keys = keys / keys.square().mean(-1, keepdim=True).sqrt().clamp(min=_TINY)
    weight = down.detach().float().cpu().square().sum(0)

    score, prior, strength = math.nan, "mean", DEFAULT_SHRINKAGE if shrinkage is None else shrinkage
    ridge = len(ids) > 4 * keys.shape[1]
    if float(held["n"].sum()) > 0:
        prior, strength, score = _choose(used, held, sums["held_s2"], keys[ids], weight, shrinkage)
        ridge = prior == "ridge"
        used = {n: used[n] + held[n] for n in used}
    elif ridge:
        prior = "ridge"
    mean = _mean(used)
    predict = _predictor(used, keys[ids], mean) if ridge else None
    rows = _shrunk(used, mean if predict is None else predict(keys[ids]), strength)
    keep = used["n"] >= least
    remap = torch.full_like(row_of, -1)
    remap[ids[keep]] = torch.arange(int(keep.sum()), dtype=torch.int32)
    rows = rows[keep]
    if every_id:
        missing = torch.nonzero(remap < 0).squeeze(-1)
        remap[missing] = torch.arange(len(rows), len(rows) + len(missing), dtype=torch.int32)
        more = mean.expand(len(missing), -1) if predict is None else predict(keys[missing])
        rows = torch.cat([rows, more])
    return Table(rows.contiguous(), remap, mean, score, strength, prior, int(used["n"].sum()))


def _choose(
    used: dict[str, Tensor],
    held: dict[str, Tensor],
    square: Tensor,
    keys: Tensor,
    weight: Tensor,
    shrinkage: float | None,
) -> tuple[str, float, float]:
    """Prior and shrinkage with the smallest weighted error on the held-out tokens: -> (prior, shrinkage, score)."""

    def error(rows: Tensor) -> float:
        terms = square.squeeze(0) + (rows * (rows * held["s0"] - 2 * held["s1"])).sum(0)
        return float((terms * weight).double().sum())

    mean = _mean(used)
    priors = {"mean": mean, "ridge": _predictor(used, keys, mean)(keys)}
    strengths = SHRINKAGES if shrinkage is None else (shrinkage,)
    found = [(error(_shrunk(used, p, s)), name, s) for name, p in priors.items() for s in strengths]
    best = min(found)
    return best[1], best[2], 1 - best[0] / max(error(mean.expand_as(held["s0"])), 1e-30)


def _mean(sums: dict[str, Tensor]) -> Tensor:
    """The mean of ``u`` over all tokens, weighted by ``g ** 2``: [f]."""
    energy = sums["s0"].sum(0)
    plain = sums["su"].sum(0) / sums["n"].sum()
    return torch.where(energy > _TINY, sums["s1"].sum(0) / energy.clamp(min=_TINY), plain)


def _average(sums: dict[str, Tensor]) -> Tensor:
    """The mean of ``u`` for each id, weighted by ``g ** 2`` where that is not next to nothing: [R, f]."""
    plain = sums["su"] / sums["n"].clamp(min=1).unsqueeze(-1)
    return torch.where(sums["s0"] > _TINY, sums["s1"] / sums["s0"].clamp(min=_TINY), plain)


def _shrunk(sums: dict[str, Tensor], prior: Tensor, strength: float) -> Tensor:
    n = sums["n"].unsqueeze(-1)
    return torch.where(n > 0, (n * _average(sums) + strength * prior) / (n + strength).clamp(min=_TINY), prior)


def _predictor(sums: dict[str, Tensor], keys: Tensor, mean: Tensor) -> Any:
    """Affine ridge regression from keys [R, d] to the rows of the ids, weighted by how often they came."""
    share = (sums["n"] / sums["n"].sum()).unsqueeze(-1)
    middle = (share * keys).sum(0)
    x, y = keys - middle, _average(sums) - mean
    centre = (share * y).sum(0)
    gram = x.T @ (share * x)
    scale = _RIDGE * gram.diagonal().mean().clamp(min=_TINY)
    gram.diagonal().add_(scale)
    matrix = torch.linalg.solve(gram, x.T @ (share * (y - centre)))
    return lambda some: mean + centre + (some - middle) @ matrix

"""Split the neurons of a trained feed-forward layer into shared and routed experts, without training.

By energy (:func:`energy_split`, this project's own): the energy of a neuron at a token is the square of what it adds to
the output, ``h_j^2 * |down_j|^2``, as a share of all neurons' at this token. The neurons of most energy are shared. The
others go to the expert with which most of their energy is chosen, by the router that can be fitted to these experts
(:class:`Routers`); then the router is fitted anew, and so on.

By activity (:func:`split`, CMoE): neurons that are among the most active ones of a token again and again are shared;
the others are clustered into experts of equal size, such that neurons of an expert are active for the same tokens. Each
expert is stood for by its most typical neuron, and the router is made of the weights of these neurons.

Source of the second: CMoE, "Analytical FFN-to-MoE Restructuring via Activation Pattern Analysis", arXiv 2502.04416.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

#: Weight of the distance of the neurons' weights beside that of their activity (whole numbers): it decides ties.
_TIE = 1e-3
#: A sum of costs below this is an improvement.
_IMPROVES = -1e-9
#: Weight of the penalty in :class:`Routers`, for columns of unit variance and a mean over tokens.
_RIDGE = 0.1


@dataclass
class Split:
    """Which neuron goes where.

    Attributes:
        shared: int64 [s], neurons of the shared expert, most active first; the remainder of the division among them.
        experts: int64 [E, m], neurons of the routed experts.
        typical: int64 [E], the neuron that stands for an expert (by energy: the one of most).
    """

    shared: Tensor
    experts: Tensor
    typical: Tensor

    @property
    def order(self) -> Tensor:
        """int64 [f]: all neurons in the order shared, expert 0, expert 1, ..."""
        return torch.cat([self.shared, self.experts.reshape(-1)])


def split(top: Tensor, neurons: int, experts: int, shared: int, keys: Tensor, rounds: int = 1) -> Split:
    """Split ``neurons`` neurons into experts of equal size.

    Args:
        top: int [q, K], the K most active neurons of each of q tokens.
        neurons: f.
        experts: number of experts, shared ones included; the size of an expert is ``f // experts``.
        shared: how many of them are shared; neurons that remain of the division join them.
        keys: float [f, d], rows of weights: equally active neurons go to the expert with the nearest centre.
        rounds: assignments; the centres move to the means of their clusters in between.
    """
    size, routed = neurons // experts, experts - shared
    top = top.long()
    count = torch.bincount(top.reshape(-1), minlength=neurons)
    by_rate = torch.sort(count, descending=True, stable=True).indices
    first = neurons - routed * size
    common, rest = by_rate[:first], by_rate[first:].sort().values
    centres = by_rate[first : first + routed]  # the most active neurons that are left
    activity = functional.one_hot(torch.arange(routed), routed).float()
    member = torch.zeros(neurons, routed).index_copy_(0, centres, activity)
    directions = functional.normalize(keys.float(), dim=-1)
    closeness = directions[rest] @ directions[centres].T
    labels = torch.empty(0, dtype=torch.int64)
    for _ in range(max(1, rounds)):
        cost = _distance(top, member, count)[rest] + _TIE * (1 - closeness)
        labels = torch.from_numpy(assign(cost.double().numpy(), size))
        member = torch.zeros(neurons, routed).index_copy_(0, rest, activity[labels] / size)
    final = _distance(top, member, count)[rest]
    groups = torch.stack([rest[labels == expert] for expert in range(routed)])
    typical = torch.stack([rest[labels == e][final[labels == e, e].argmin()] for e in range(routed)])
    return Split(common, groups, typical)


def energy_split(routers: Routers, experts: int, shared: int, active: int, rounds: int = 8) -> Split:
    """Split neurons such that a fitted router chooses much of their energy.

    Args:
        routers: of the layer.
        experts, shared: as of :func:`split`.
        active: routed experts that a token uses.
        rounds: fits of the router, each followed by the best assignment under what this router chooses.
    """
    energy = routers.energy
    neurons = energy.shape[1]
    size, routed = neurons // experts, experts - shared
    by_mean = torch.sort(energy.mean(0), descending=True, stable=True).indices
    first = neurons - routed * size
    common, rest = by_mean[:first], by_mean[first:]
    labels = torch.arange(len(rest)) % routed
    for _ in range(rounds):
        groups = torch.stack([rest[labels == expert] for expert in range(routed)])
        best = functional.linear(routers.x, *routers.fit(groups)).topk(min(active, routed), dim=-1).indices
        chosen = torch.zeros(len(energy), routed).scatter_(1, best, 1.0)
        before, labels = labels, torch.from_numpy(assign(-(energy[:, rest].T @ chosen).double().numpy(), size))
        if torch.equal(labels, before):
            break
    groups = torch.stack([rest[labels == expert] for expert in range(routed)])
    return Split(common, groups, groups[:, 0].clone())


class Routers:
    """Linear routers that predict the root of the energy of each expert: ridge regression on standardised inputs.

    Args:
        x: [q, d], inputs of the layer. energy: float [q, f], what each neuron adds to the output at each token.
    """

    def __init__(self, x: Tensor, energy: Tensor) -> None:
        self.x, self.energy = x.float(), energy

    @functools.cached_property
    def _solver(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean and deviation of the inputs, the standardised inputs, and a Cholesky factor: for all groups the same."""
        mean, deviation = self.x.mean(0), self.x.std(0, correction=0)
        deviation = deviation.clamp(min=max(1e-6, 1e-3 * float(deviation.mean())))  # a column may be constant
        columns = (self.x - mean) / deviation
        square = columns.T @ columns / len(columns)
        return mean, deviation, columns, torch.linalg.cholesky(square + _RIDGE * torch.eye(len(square)))

    def fit(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Weight fp32 [E, d] and offset fp32 [E] for experts of the neurons ``groups``, int64 [E, m]."""
        mean, deviation, columns, factor = self._solver
        target = torch.stack([self.energy[:, group].sum(-1) for group in groups], 1).sqrt()
        centre = target.mean(0)
        found = torch.cholesky_solve(columns.T @ (target - centre) / len(target), factor).T / deviation
        return found.contiguous(), centre - found @ mean


def random_split(neurons: int, experts: int, shared: int, generator: torch.Generator) -> Split:
    """As :func:`split`, at random: the control."""
    size, routed = neurons // experts, experts - shared
    order = torch.randperm(neurons, generator=generator)
    first = neurons - routed * size
    groups = order[first:].reshape(routed, size)
    return Split(order[:first], groups, groups[:, 0].clone())


def _distance(top: Tensor, member: Tensor, count: Tensor) -> Tensor:
    """Squared distance of the activity of each neuron, one number per token, to weighted means: [f, E].

    Args:
        member: [f, E], the weight of each neuron in each mean.
    """
    mean = member[top].sum(1)  # [q, E], the means at each token
    product = torch.zeros_like(member).index_add_(0, top.reshape(-1), mean.repeat_interleave(top.shape[1], dim=0))
    return count.unsqueeze(-1) + mean.square().sum(0) - 2 * product


def assign(cost: np.ndarray, size: int) -> np.ndarray:
    """The cheapest assignment of n things to k groups of ``size`` each, n = k * size: int64 [n].

    Exact: a greedy start, then things move along cycles of groups that lower the cost, until there is none (a
    minimum-cost flow without negative cycles is the cheapest).
    """
    things, groups = cost.shape
    label = np.full(things, -1, dtype=np.int64)
    if groups == 1:
        return np.zeros(things, dtype=np.int64)
    room = np.full(groups, size)
    two = np.partition(cost, 1, axis=1)
    for thing in np.argsort(-(two[:, 1] - two[:, 0]), kind="stable"):
        label[thing] = np.argmin(np.where(room > 0, cost[thing], np.inf))
        room[label[thing]] -= 1
    price, mover = np.full((groups, groups), np.inf), np.zeros((groups, groups), dtype=np.int64)
    changed = range(groups)
    while True:
        for group in changed:  # the cheapest thing to move from a group to each other one
            members = np.flatnonzero(label == group)
            moves = cost[members] - cost[members, group][:, None]
            place = moves.argmin(axis=0)
            price[group], mover[group] = moves[place, np.arange(groups)], members[place]
            price[group, group] = np.inf
        cycle = _negative_cycle(price)
        if cycle is None:
            return label
        moved = [mover[one, other] for one, other in zip(cycle, [*cycle[1:], cycle[0]], strict=True)]
        label[moved] = [*cycle[1:], cycle[0]]
        changed = cycle  # type: ignore[assignment]


def _negative_cycle(price: np.ndarray) -> list[int] | None:
    """Groups along a cycle whose prices sum to less than zero (Bellman and Ford)."""
    groups = len(price)
    least, before = np.zeros(groups), np.full(groups, -1)
    for _ in range(groups):
        through = least[:, None] + price
        source = through.argmin(axis=0)
        found = through[source, np.arange(groups)]
        better = found < least + _IMPROVES
        if not better.any():
            return None
        least, before = np.where(better, found, least), np.where(better, source, before)
        cycle = _loop(before)
        if cycle is not None and sum(price[a, b] for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True)) < 0:
            return cycle
    return None


def _loop(before: np.ndarray) -> list[int] | None:
    """A cycle in the graph ``before[i] -> i``, in the direction of its edges."""
    state = np.zeros(len(before), dtype=np.int64)
    for start in range(len(before)):
        path, node = [], start
        while node >= 0 and state[node] == 0:
            state[node] = start + 1
            path.append(node)
            node = int(before[node])
        if node >= 0 and state[node] == start + 1:
            return path[path.index(node) :][::-1]
    return None

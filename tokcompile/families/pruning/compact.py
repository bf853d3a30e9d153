"""``positions: compact``: the tokens that are left behind a cut at the merge point stand without gaps.

    before   positions -> angles -> cos, sin ---------------------+
             merge -> narrow ------------------> query, key -> rotate -> attention
    after    positions + dropped tokens behind -> angles -> cos, sin, narrowed likewise

A rotary embedding is a matter of differences: a query at p and a key at q see p - q. So nothing is counted anew from
zero. Each token moves up, over the dropped tokens between it and the end of its row; the last one stays where it is.
All differences are then those of the short prompt, and what follows continues from the last position as it always does:
decode steps, beams, further turns and the cache need no change, and a row that drops nothing stays bit for bit.

What is not a matter of differences of positions is refused: embeddings that are added or looked up, several axes of
positions (multi-axis rotary), masks that count tokens (a sliding window), and tokens before these in a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tokcompile.capture.ops import CONTRACTION, JOIN, LAYOUT, SELECT, TRIVIAL
from tokcompile.capture.sizes import equal
from tokcompile.capture.trace import derive
from tokcompile.errors import CacheError, NarrowError
from tokcompile.formulas.attention import read_attention
from tokcompile.formulas.mask import read_mask
from tokcompile.formulas.rope import read_rope
from tokcompile.regions.flow import Flow
from tokcompile.regions.model import AttentionRegion
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.labels import Flow as AxisFlow

_SAME = LAYOUT | SELECT | TRIVIAL
_TRIG = {"cos", "sin", "polar"}
#: What may stand between integer positions and the factors of a rotation: linear up to the angle, and then per angle.
_LINEAR = _SAME | CONTRACTION | JOIN | _TRIG | {"mul", "div", "outer", "view_as_real", "view_as_complex"}
#: What may make positions out of a mask or of nothing.
_COUNTS = _SAME | {"arange", "cumsum", "add", "sub", "masked_fill", "clamp", "where", "scalar_tensor", "full"}


@dataclass(frozen=True)
class _Factor:
    """Cosines or sines for each token, which enter below the cut at ``users``, and the ``positions [B or 1, S]``."""

    side: fx.Node
    positions: fx.Node
    chain: list[fx.Node]
    users: list[fx.Node]


class Compact:
    """What has to be moved for a cut at ``merged [B, S, D]``; nothing is changed before :meth:`move`.

    Args:
        below: what :meth:`Context.check` says of this cut.

    Raises:
        NarrowError: the positions of this model cannot be moved; the reason, the node and a way out.
        CacheError: the prompt continues from a cache that holds tokens.
    """

    def __init__(self, ctx: Context, merged: fx.Node, below: AxisFlow) -> None:
        self.ctx, self.merged = ctx, merged
        self.flow = Flow(ctx.captured.graph)
        self.factors = self._factors(self._masks(), below)

    def move(self, keep: fx.Node) -> None:
        """Move the tokens where ``keep [B, S]`` is true up; to be followed by the cut."""
        moved: dict[fx.Node, fx.Node] = {}
        for factor in self.factors:
            place = self.ctx.after(keep, factor.side)
            if factor.positions not in moved:
                moved[factor.positions] = self.ctx.emit(_closed_up, factor.positions, keep, before=place)
                self.ctx.cuts.indices.append(moved[factor.positions])  # chosen in front of the graph with the tokens
            for node in factor.chain:
                if node not in moved:
                    moved[node] = self._again(node, moved, place)
            for user in factor.users:
                user.replace_input_with(factor.side, moved[factor.side])

    def _again(self, node: fx.Node, moved: dict[fx.Node, fx.Node], place: fx.Node) -> fx.Node:
        with self.ctx.captured.graph.inserting_before(place):
            new = self.ctx.captured.graph.node_copy(node, lambda n: moved.get(n, n))
        derive(self.ctx.captured, [new])
        return new

    # .. what the model does with positions

    def _masks(self) -> list[fx.Node]:
        """The masks of the attentions below the cut, which must be causal or about padding."""
        masks: dict[fx.Node, None] = {}
        rotated = False
        for region in self.ctx.regions.of(AttentionRegion):
            output = region.output
            if not self.flow.reaches(self.merged, output):
                continue
            mask = region.mask
            if rotated and (mask is None or mask in masks):
                continue  # layers alike
            form = read_attention(self.ctx, region, dropout=True)
            query, key = form.query.meta["val"], form.key.meta["val"]
            if not equal(query.shape[2], key.shape[2]):
                raise CacheError(
                    "positions: compact cannot drop tokens of an image after tokens that are in the cache "
                    f"(attention '{region.path}' reads more keys than this call has tokens); start from a "
                    "fresh cache with the whole conversation, or use positions: keep"
                )
            if not rotated:
                try:
                    read_rope(self.ctx, region, region.query)
                except NarrowError as error:
                    raise self._refuse(
                        output, "positions are moved in rotary embeddings only, and none is recognised in this layer"
                    ) from error
                rotated = True
            if mask is None:
                continue
            masks[mask] = None
            said = read_mask(self.ctx, form)
            if said.window is not None:
                raise self._refuse(mask, f"a window of {said.window} tokens counts the tokens that are dropped too")
            if said.rest is not None:
                raise self._refuse(
                    mask, "a mask that is more than causal and padding may count the tokens that are dropped too"
                )
        if not rotated:
            raise self._refuse(self.merged, "no attention is recognised below this merge point")
        return list(masks)

    def _factors(self, masks: list[fx.Node], below: AxisFlow) -> list[_Factor]:
        """What enters below the cut, one value for each token, and is no mask: the factors of the rotations."""
        users: dict[fx.Node, list[fx.Node]] = {}
        for user, demands in below.demands.items():
            for demand in demands:
                value = demand.side.meta["val"]
                if (value.is_floating_point() or value.is_complex()) and not any(
                    self.flow.reaches(demand.side, m) or self.flow.reaches(m, demand.side) for m in masks
                ):
                    users.setdefault(demand.side, []).append(user)
        if not users:
            raise self._refuse(self.merged, "no positions enter below this merge point")
        order = {node: i for i, node in enumerate(self.ctx.captured.graph.nodes)}
        return [self._factor(side, users[side]) for side in sorted(users, key=order.__getitem__)]

    def _factor(self, side: fx.Node, users: list[fx.Node]) -> _Factor:
        integers = self._integers(side)
        roots = {self._root(node): None for node in integers}
        if len(roots) != 1:
            raise self._refuse(
                side, f"this value of each token comes from {len(roots)} rows of positions, expected one"
            )
        (positions,) = roots
        chain = [
            n
            for n in self.flow.nodes[self.flow.position[positions] + 1 : self.flow.position[side] + 1]
            if self.flow.reaches(positions, n) and self.flow.reaches(n, side)
        ]
        moving = {positions, *chain}
        for node in chain:
            name = self.flow.op[node]
            operands = sum(isinstance(a, fx.Node) and a in moving for a in (*node.args, *node.kwargs.values()))
            if name not in _LINEAR or operands > 1:  # a product of two of them is no multiple of the position
                raise self._refuse(
                    node,
                    f"{name} is computed from positions, and only rotary embeddings, computed in "
                    "the graph as cos and sin of multiples of the position, can be moved",
                )
        if not any(self.flow.op[node] in _TRIG for node in chain):
            raise self._refuse(side, "positions enter here other than by a rotation")
        return _Factor(side, positions, chain, users)

    def _integers(self, side: fx.Node) -> list[fx.Node]:
        """The nearest integer tensors that ``side`` is computed from."""
        return self.flow.back(side, set(self.flow.op.values()), limit=len(self.flow.nodes), stop=_holds_integers).stops

    def _root(self, node: fx.Node) -> fx.Node:
        """The first form ``[B or 1, S]`` of integers, above views of it."""
        batch, length = self.merged.meta["val"].shape[:2]
        path = [node]
        while self.flow.op[path[-1]] in _SAME and len(self.flow.inputs[path[-1]]) == 1:
            path.append(self.flow.inputs[path[-1]][0])
        for value in reversed(path):
            shape = value.meta["val"].shape
            if len(shape) == 2 and equal(shape[1], length) and (equal(shape[0], 1) or equal(shape[0], batch)):
                self._counts_by_one(value)
                return value
        first = tuple(path[-1].meta["val"].shape)
        if len(first) == 3:
            raise self._refuse(
                path[-1],
                f"positions with {first[0]} axes (multi-axis rotary, {_text(first)}) say "
                "where a token is in its image, which closing up would change",
            )
        raise self._refuse(path[-1], f"positions of the form [B, S] are expected here, found {_text(first)}")

    def _counts_by_one(self, positions: fx.Node) -> None:
        """Refuse positions that the graph computes by more than counting: one token further is one position further."""

        def given(node: fx.Node) -> bool:
            value = node.meta["val"]
            return not isinstance(value, Tensor) or value.dtype == torch.bool or node.op in ("placeholder", "get_attr")

        walk = self.flow.back(positions, _COUNTS, limit=len(self.flow.nodes), stop=given)
        others = [node for node in walk.stops if not given(node)]
        others += [n for n in walk.passed if self.flow.op[n] == "arange" and len(n.args) > 2 and n.args[2] != 1]
        for node in others:
            raise self._refuse(
                node, f"{self.flow.op[node]} makes these positions, and only those that count tokens can be moved"
            )

    def _refuse(self, node: fx.Node, reason: str) -> NarrowError:
        return self.ctx.refuse(node, f"{reason}; use positions: keep")


def _holds_integers(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def _closed_up(positions: Tensor, keep: Tensor) -> Tensor:
    """``positions [B or 1, S]``, each moved up by the number of dropped tokens behind it: ``[B, S]``."""
    dropped = torch.logical_not(keep).to(torch.int64)
    behind = dropped.sum(1, keepdim=True) - torch.cumsum(dropped, dim=1)
    return positions + behind.to(positions.dtype)


def _text(shape: tuple[object, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"

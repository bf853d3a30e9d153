"""The exact formula of an attention region: operands by head, scale, soft cap, mask, sinks.

Region detection names the roles; a rewrite has to know what is computed between them, to the last factor::

    logit  = softcap * tanh(scale * q.k / softcap)          (softcap 0: scale * q.k)
    weight = softmax(logit + mask), with exp(sink) as one more term of the denominator where there is a sink
    output = weight @ value

Both spellings are read: ``scaled_dot_product_attention``, and two contractions (matmul, bmm, baddbmm, einsum) around a
softmax. What is not of this form is refused with the node at which it differs.

One file: nearly all of it is the reader of one region, which says why it is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from tokcompile.capture.graph import erase
from tokcompile.capture.ops import TRIVIAL, sdpa_arguments
from tokcompile.capture.packed import block_mask
from tokcompile.capture.sizes import equal
from tokcompile.kernels.hidden import hides
from tokcompile.regions.flow import Flow
from tokcompile.regions.model import AttentionRegion
from tokcompile.rewrite.context import Context


@dataclass(frozen=True)
class AttentionForm:
    """An attention, operands in one layout whatever the model's own is.

    Attributes:
        query: [B, H, S, D], after norms and RoPE. key: [B, Hkv, T, D]. value: [B, Hkv, T, Dv]. Query head h reads head
            ``h // (H / Hkv)``: copies of key heads are taken off where they are such copies.
        scale, softcap: see the module.
        causal: query i sees keys up to i (the flag; a mask may say it too: :mod:`tokcompile.formulas.mask`). S is T.
        mask: broadcasts to [B, H, S, T]: bool (True: visible), or float and added; None.
        sink: float [B or 1, H, S or 1, 1] or None.
        output: the node that is computed, of whatever layout.
        layout: the layout of ``output`` from [B, H, S, Dv], traceable.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    softcap: float
    causal: bool
    mask: fx.Node | None
    sink: fx.Node | None
    output: fx.Node
    layout: Callable[[Tensor], Tensor]

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key heads."""
        return int(self.query.meta["val"].shape[1]), int(self.key.meta["val"].shape[1])

    def replace(self, ctx: Context, function: Callable[..., Tensor], *nodes: Any) -> None:
        """Compute the output by ``function`` of ``nodes``, traceable, -> [B, H, S, Dv] instead."""
        dtype = self.output.meta["val"].dtype

        def attention(*values: Any) -> Tensor:
            return self.layout(function(*values)).to(dtype)

        result = ctx.emit(attention, *nodes, before=self.output)
        self.output.replace_all_uses_with(result)
        erase(self.output)


def with_sink(output: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """``output [B, H, S, Dv]`` of an attention without sinks -> with: one more term of the softmax, of value 0.

    Args:
        lse: [B, H, S]: log-sum-exp of the logits. sink: [B or 1, H, S or 1, 1].
    """
    return (output * torch.sigmoid(lse.unsqueeze(-1) - sink)).to(output.dtype)


def read_attention(ctx: Context, region: AttentionRegion, *, dropout: bool = False) -> AttentionForm:
    """The formula of an attention region. Puts views of the operands into the graph, dead until they are used.

    Args:
        dropout: read one with dropout on its weights too, for a caller that does not compute it.

    Raises:
        NarrowError: it is another one; nothing was rewritten.
    """
    return _Reader(ctx, region, dropout).read()


@dataclass
class _Chain:
    """What happens between the first contraction and the softmax."""

    inner: float = 1.0  # before tanh
    outer: float = 1.0  # after it; without tanh all factors are inner
    bent: bool = False
    #: (node, hidden?): added numbers, or a condition that is true where the logit is replaced by a large negative one
    masks: list[tuple[fx.Node, str]] = field(default_factory=list)
    sink: fx.Node | None = None


class _Reader:
    """Reads one attention from its output back to its inputs.

    One class: each operation on the way is read with what was found so far, and adds to it.
    """

    def __init__(self, ctx: Context, region: AttentionRegion, dropout: bool) -> None:
        self.ctx, self.region, self.dropout = ctx, region, dropout
        self.flow = Flow(ctx.captured.graph)
        self.output = region.output

    @property
    def scores(self) -> fx.Node:
        """The first of two contractions."""
        assert self.region.scores is not None
        return self.region.scores

    def read(self) -> AttentionForm:
        if self.region.form == "packed":
            return self._packed()
        return self._sdpa() if self.region.form == "sdpa" else self._eager()

    def _packed(self) -> AttentionForm:
        """Pieces of one row: the mask says which keys are of the same piece."""
        node = self.output
        query, key, value, lengths, scale = cast(tuple[Any, ...], (*node.args, None)[:5])
        mask = self._emit(lambda q: block_mask(lengths, q.device), query)
        key, value = self._single(key, value)
        width = query.meta["val"].shape[-1]
        return AttentionForm(
            query,
            key,
            value,
            1 / math.sqrt(width) if scale is None else float(scale),
            0.0,
            False,
            mask,
            None,
            node,
            lambda t: t,
        )

    # .. scaled_dot_product_attention

    def _sdpa(self) -> AttentionForm:
        node = self.output
        given = sdpa_arguments(node)
        if given.dropout and not self.dropout:
            raise self._refuse(node, f"dropout of {given.dropout} on the attention weights; call model.eval()")
        query, key, value, mask = given.query, given.key, given.value, given.mask
        rank = query.meta["val"].dim()
        if rank not in (3, 4):
            raise self._refuse(node, f"expected operands [B, H, S, D], found {rank} axes")
        if given.is_causal and not equal(query.meta["val"].shape[-2], key.meta["val"].shape[-2]):
            raise self._refuse(
                node,
                "is_causal with more keys than queries aligns both at their start; no pass can "
                "tell which keys are later",
            )
        if rank == 3:  # one head
            query, key, value = (self._emit(lambda t: t.unsqueeze(1), n) for n in (query, key, value))
            if mask is not None and mask.meta["val"].dim() == 3:
                mask = self._emit(lambda t: t.unsqueeze(1), mask)
        key, value = self._single(key, value)
        return AttentionForm(
            query,
            key,
            value,
            given.factor,
            0.0,
            given.is_causal,
            mask,
            None,
            node,
            (lambda t: t.squeeze(1)) if rank == 3 else (lambda t: t),
        )

    # .. two contractions

    def _eager(self) -> AttentionForm:
        scores, softmax = self.scores, self.region.softmax
        assert softmax is not None
        if softmax.args[1] not in (-1, softmax.meta["val"].dim() - 1):
            raise self._refuse(softmax, f"expected a softmax over the last axis, found axis {softmax.args[1]}")
        chain = self._chain(scores, softmax)
        self._weights(softmax, chain)
        query, key, value, layout = self._operands()
        heads, rows = int(query.meta["val"].shape[1]), query.meta["val"].shape[0]
        masks = [(self._by_head(node, rows, heads), kind) for node, kind in chain.masks]
        key, value = self._single(key, value)
        sink = None if chain.sink is None else self._by_head(chain.sink, rows, heads)
        return AttentionForm(
            query,
            key,
            value,
            chain.inner * chain.outer,
            chain.outer if chain.bent else 0.0,
            False,
            self._joined(masks),
            sink,
            self.output,
            layout,
        )

    def _chain(self, scores: fx.Node, softmax: fx.Node) -> _Chain:
        """The operations from the scores to the softmax, in order."""
        chain, flow, node = _Chain(), self.flow, scores
        if flow.op[scores] == "baddbmm":
            chain.inner = float(scores.kwargs.get("alpha", 1))  # type: ignore[arg-type]
            beta = scores.kwargs.get("beta", 1)
            if beta not in (0, 1):
                raise self._refuse(scores, f"the bias of the scores has a factor of {beta}")
            if beta:
                chain.masks.append((scores.args[0], "add"))  # type: ignore[arg-type]
        target = flow.inputs[softmax][0]
        while node is not target:
            following = [u for u in flow.users[node] if flow.reaches(u, target)]
            step = min(following, key=flow.position.__getitem__)
            if flow.op[step] in ("max", "amax"):  # softmax(x - max(x)) is softmax(x)
                step = self._centred(step, following)
            elif len(following) != 1:
                raise self._refuse(step, "the scores are used in several ways before the softmax")
            else:
                self._step(chain, node, step)
            node = step
        return chain

    def _centred(self, peak: fx.Node, following: list[fx.Node]) -> fx.Node:
        others = [u for u in following if u is not peak]
        last = peak.args[1] if len(peak.args) > 1 else None
        axes = last if isinstance(last, (list, tuple)) else [last]
        if (
            len(others) == 1
            and self.flow.op[others[0]] == "sub"
            and list(axes) in ([-1], [3])
            and isinstance(others[0].args[1], fx.Node)
            and self.flow.reaches(peak, others[0].args[1])
        ):
            return others[0]
        raise self._refuse(peak, "expected the maximum over the keys to be subtracted from the scores")

    def _step(self, chain: _Chain, node: fx.Node, step: fx.Node) -> None:
        op: str = self.flow.op[step]
        args: Any = step.args
        if op in TRIVIAL or op in ("view", "reshape", "_unsafe_view", "unflatten", "flatten"):
            self._check_dropout(step)
            return
        if chain.sink is not None:
            raise self._refuse(step, f"expected the softmax after the sinks, found {op}")
        other = next((a for a in args[:2] if a is not node), None)
        number = self._number(other)
        if op in ("mul", "div", "true_divide") and number is not None and not (op != "mul" and args[0] is not node):
            if chain.masks:
                raise self._refuse(step, "the scores are scaled after the mask was added")
            factor = number if op == "mul" else 1 / number
            if chain.bent:
                chain.outer *= factor
            else:
                chain.inner *= factor
        elif op == "tanh" and not chain.bent and not chain.masks:
            chain.bent = True
        elif op == "add" and isinstance(other, fx.Node) and number is None and step.kwargs.get("alpha", 1) == 1:
            chain.masks.append((other, "add"))
        elif op == "masked_fill" and args[0] is node and self._hides(args[2]):
            chain.masks.append((args[1], "hidden"))
        elif op == "where" and node in args[1:3] and self._hides(args[2] if args[1] is node else args[1]):
            chain.masks.append((args[0], "visible" if args[1] is node else "hidden"))
        elif (
            op == "cat"
            and len(args[0]) == 2
            and args[0][0] is node
            and args[1] in (-1, 3)
            and equal(args[0][1].meta["val"].shape[-1], 1)
        ):
            chain.sink = args[0][1]
        else:
            raise self._refuse(step, f"expected scale, soft cap, mask or sinks between scores and softmax, found {op}")

    def _weights(self, softmax: fx.Node, chain: _Chain) -> None:
        """Check that nothing but views (and the removal of the sink's column) follows the softmax."""
        node, cut = softmax, chain.sink is None
        while node is not self.output:
            following = [u for u in self.flow.users[node] if self.flow.reaches(u, self.output)]
            step = min(following, key=self.flow.position.__getitem__)
            op = self.flow.op[step]
            if step is self.output or op in TRIVIAL or op in ("view", "reshape", "_unsafe_view", "flatten"):
                self._check_dropout(step)
            elif op == "slice" and not cut and tuple(step.args[1:4]) in ((3, 0, -1), (-1, 0, -1)):
                cut = True
            else:
                raise self._refuse(step, f"expected the product with the values after the softmax, found {op}")
            node = step
        if not cut:
            raise self._refuse(softmax, "the sinks' column of the weights is multiplied with the values")

    def _operands(self) -> tuple[fx.Node, fx.Node, fx.Node, Callable[[Tensor], Tensor]]:
        """Query, key and value as [B, H, S, D] and so on, and the way back from [B, H, S, Dv] to the output."""
        flow, scores, output = self.flow, self.scores, self.output
        query, key, value = self.region.query, self.region.key, self.region.value
        if flow.op[scores] == "einsum" or flow.op[output] == "einsum":
            return self._einsum(query, key, value)
        factor = scores.args[1 if flow.op[scores] == "baddbmm" else 0]
        second = scores.args[2 if flow.op[scores] == "baddbmm" else 1]
        if factor is not query:
            raise self._refuse(scores, "expected query times key, found the factors the other way round")
        if second is key:  # [.., D, T] as it stands: the model multiplies with the transposed keys
            key = self._emit(lambda t: t.transpose(-1, -2), key)
        rank = query.meta["val"].dim()
        if rank == 4:
            return query, key, value, lambda t: t
        heads = self.region.heads
        if rank != 3 or not isinstance(heads, int):
            raise self._refuse(scores, f"expected operands [B, H, S, D] or [B * H, S, D], found {rank} axes")

        def unfold(t: Tensor) -> Tensor:
            return t.unflatten(0, (t.shape[0] // heads, heads))

        if any(not equal(n.meta["val"].shape[0], query.meta["val"].shape[0]) for n in (key, value)):
            raise self._refuse(scores, "queries and keys are folded into their leading axis in different ways")
        return (*(self._emit(unfold, n) for n in (query, key, value)), lambda t: t.flatten(0, 1))  # type: ignore[return-value]

    def _einsum(
        self, query: fx.Node, key: fx.Node, value: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node, Callable[[Tensor], Tensor]]:
        scores, output = self.scores, self.output
        first, second = (self._equation(n) for n in (scores, output))
        names = {"query": first[0], "key": first[1], "scores": first[2]}
        shared = [c for c in names["scores"] if c in names["query"] and c in names["key"]]
        row = [c for c in names["query"] if c not in names["key"]]
        column = [c for c in names["key"] if c not in names["query"]]
        inner = [c for c in names["query"] if c in names["key"] and c not in names["scores"]]
        if (len(shared), len(row), len(column), len(inner)) != (2, 1, 1, 1) or (
            names["scores"] != "".join((*shared, *row, *column))
        ):
            raise self._refuse(scores, "expected scores [B, H, S, T] of queries and keys with batch and head axes")
        # the second equation has letters of its own: the weights are [B, H, S, T] in both
        letters = dict(zip(second[0], names["scores"], strict=True))
        values, out = ("".join(letters.get(c, "@") for c in part) for part in second[1:])
        order = [*shared, *column, "@"]
        if sorted(values) != sorted(order) or sorted(out) != sorted([*shared, *row, "@"]):
            raise self._refuse(output, "expected weights [B, H, S, T] times values")

        def arranged(node: fx.Node, have: str, want: list[str]) -> fx.Node:
            order = [have.index(c) for c in want]
            return node if order == sorted(order) else self._emit(lambda t: t.permute(order), node)

        back = [[*shared, *row, "@"].index(c) for c in out]
        return (
            arranged(query, names["query"], [*shared, *row, *inner]),
            arranged(key, names["key"], [*shared, *column, *inner]),
            arranged(value, values, order),
            lambda t: t.permute(back),
        )

    def _equation(self, node: fx.Node) -> tuple[str, str, str]:
        """Letters of both operands and of the result; a matmul as the equation that it is."""
        if self.flow.op[node] == "einsum":
            left, arrow, out = str(node.args[0]).replace(" ", "").partition("->")
            terms = left.split(",")
            if not arrow or len(terms) != 2 or "." in left or len(out) != 4:
                raise self._refuse(node, f"expected an equation with the letters of four axes, found {node.args[0]}")
            return terms[0], terms[1], out
        if self.flow.op[node] != "matmul" or node.meta["val"].dim() != 4:
            raise self._refuse(node, "expected einsum or matmul of four axes")
        scores = node is self.scores
        if scores and node.args[1] is not self.region.key:
            return "bhqd", "bhkd", "bhqk"  # the transposition was taken off the key
        return ("bhqd", "bhdk", "bhqk") if scores else ("bhqk", "bhkd", "bhqd")

    # .. pieces

    def _single(self, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """Keys and values before each head was copied for the query heads that share it."""
        one, other = self._source(key), self._source(value)
        if one is not None and other is not None and equal(one.meta["val"].shape[1], other.meta["val"].shape[1]):
            return one, other
        return key, value

    def _source(self, node: fx.Node) -> fx.Node | None:
        """[B, Hkv, T, D] of which ``node`` is the copy for H heads, neighbours alike; None where it is no such copy."""
        flow = self.flow
        current = node
        if current not in flow.op:
            return None  # a view that this reader made
        while flow.op[current] in ("contiguous", "clone", "alias") and flow.inputs[current]:
            current = flow.inputs[current][0]
        if (
            flow.op[current] == "repeat_interleave"
            and len(current.args) > 2
            and current.args[2] == 1
            and (isinstance(current.args[1], int))
        ):
            return flow.inputs[current][0]
        if flow.op[current] not in ("reshape", "view", "_unsafe_view", "flatten"):
            return None
        wide = flow.canonical(flow.inputs[current][0])
        if flow.op[wide] not in ("expand", "broadcast_to", "repeat") or len(flow.dims(wide) or ()) != 5:
            return None
        inner = flow.inputs[wide][0]
        before, after, result = flow.dims(inner), flow.dims(wide), flow.dims(node)
        if before is None or after is None or result is None or len(before) != 5 or before[2] != 1:
            return None
        if any(before[i] != after[i] for i in (0, 1, 3, 4)) or len(result) != 4 or result[3] != after[4]:
            return None
        return self._emit(lambda t: t.squeeze(2), inner)

    def _by_head(self, node: fx.Node, rows: Any, heads: int) -> fx.Node:
        """A mask in the layout [B, H, S, T] where it has that of folded scores [B * H, S, T]."""
        shape = node.meta["val"].shape
        if len(shape) != 3 or equal(shape[0], 1) or self.output.meta["val"].dim() != 3:
            return node
        return self._emit(lambda t: t.unflatten(0, (t.shape[0] // heads, heads)), node)

    def _joined(self, masks: list[tuple[fx.Node, str]]) -> fx.Node | None:
        """One mask out of all that are applied: bool if all hide, else float."""
        if not masks:
            return None
        kinds = [kind for _, kind in masks]
        if kinds == ["add"] or kinds == ["visible"]:
            return masks[0][0]

        def join(*values: Tensor) -> Tensor:
            if "add" not in kinds:
                seen = [v if k == "visible" else v.logical_not() for v, k in zip(values, kinds, strict=True)]
                result = seen[0]
                for value in seen[1:]:
                    result = result & value
                return result
            added = [v for v, k in zip(values, kinds, strict=True) if k == "add"]
            total = added[0]
            for value in added[1:]:
                total = total + value
            for value, kind in zip(values, kinds, strict=True):
                if kind != "add":
                    total = torch.where(value if kind == "visible" else value.logical_not(), total, -math.inf)
            return total

        return self._emit(join, *(node for node, _ in masks))

    def _number(self, value: Any) -> float | None:
        """A constant, also as a tensor of no axes that the graph fills with a number."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, fx.Node):
            return None
        while value in self.flow.op and self.flow.op[value] in TRIVIAL and self.flow.inputs[value]:
            value = self.flow.inputs[value][0]
        if value.op == "get_attr" and value.meta["val"].dim() == 0:
            return float(getattr(self.ctx.captured.graph_module, str(value.target)))
        name = self.flow.op.get(value, "")
        place = {"full": 1, "scalar_tensor": 0, "full_like": 1}.get(name)
        if place is not None and value.meta["val"].dim() == 0 and isinstance(value.args[place], (int, float)):
            return float(value.args[place])
        return None

    def _hides(self, value: Any) -> bool:
        number = self._number(value)
        return number is not None and hides(number)

    def _check_dropout(self, node: fx.Node) -> None:
        if not self.dropout and "dropout" in self.flow.op[node] and node.args[1] and node.args[2]:
            raise self._refuse(node, f"dropout of {node.args[1]} on the attention weights; call model.eval()")

    def _emit(self, function: Callable[..., Tensor], *nodes: fx.Node) -> fx.Node:
        written = any(n in self.flow.position and self.flow.written(n) for n in nodes)
        return self.ctx.emit(function, *nodes, before=self.output if written else self.ctx.after(*nodes))

    def _refuse(self, node: fx.Node, reason: str) -> Exception:
        return self.ctx.refuse(node, reason)

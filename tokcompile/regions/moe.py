"""Mixture of experts: a router that chooses, experts that compute, a sum that joins the residual stream.

::

    input -> router (linear) -> [softmax | sigmoid] -> top_k --------------+
      |                                                                   |
      +-> experts (loop with index_add, batched or grouped matmul) -> weighted sum -> [+ shared expert] -> output
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx

from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.ops import LAYOUT, POINTWISE, SELECT, SOFTMAX, TRIVIAL

from .feed_forward import FeedForward, batch_tokens_width
from .flow import Flow, Linear
from .misses import Misses
from .model import MoeRegion
from .residual import Join, find_join

_SCORE = TRIVIAL | LAYOUT | POINTWISE | SELECT | SOFTMAX | {"sum", "scatter", "gather", "topk", "cat"}
_CHOICE = ("topk", "argmax", "max")


@dataclass
class MixtureOfExperts:
    """A mixture-of-experts region with its place on the residual stream."""

    region: MoeRegion
    join: Join
    inside: list[FeedForward] = field(default_factory=list)


def find_moe(flow: Flow, blocks: list[FeedForward], misses: Misses) -> list[MixtureOfExperts]:
    """All mixtures of experts. ``inside`` names the feed-forward blocks that are experts or shared experts."""
    routers: dict[fx.Node, tuple[Linear, list[fx.Node]]] = {}
    choices = [n for op in _CHOICE for n in flow.by_op.get(op, []) if op != "max" or _names_places(flow, n)]
    for choice in sorted(choices, key=flow.position.__getitem__):
        walk = flow.back(choice, _SCORE | {*_CHOICE}, limit=40, stop=lambda n: flow.linear(n) is not None)
        linears = [m for m in (flow.linear(n) for n in walk.stops) if m is not None]
        if linears:
            routers.setdefault(linears[0].node, (linears[0], []))[1].append(choice)
    found = []
    for router, by_router in routers.values():
        choice = by_router[-1]  # a later choice by the same router is the final one
        join = find_join(flow, [router.input], router.node, through_all=True)
        if join is None or not flow.reaches(choice, join.branch):
            misses.attempt("moe", "router", "choice").fails(
                choice,
                "expected a router whose choice weights experts that join the residual "
                f"stream, found that {choice} of the linear {router.node} never reaches one",
            )
            continue
        experts = choice.args[1] if flow.op[choice] == "topk" else sum(flow.op[n] != "topk" for n in by_router)
        found.append(_describe(flow, router, choice, experts, join, blocks))
    return found


def _names_places(flow: Flow, node: fx.Node) -> bool:
    """Whether the places of the largest values are read, not the values alone."""
    return any(flow.op[user] == "getitem" and user.args[1] == 1 for user in flow.users[node])


def _describe(
    flow: Flow, router: Linear, choice: fx.Node, chosen: Any, join: Join, blocks: list[FeedForward]
) -> MixtureOfExperts:
    source = flow.canonical(router.input, layout=True)
    inside, shared = [], False
    for block in blocks:
        if block.join.add is not join.add and not flow.reaches(block.region.output, join.branch):
            continue
        routed = flow.reaches(router.node, block.region.input) or flow.reaches(router.node, block.region.output)
        if routed or block.region.input is source:
            inside.append(block)
            shared = shared or not routed
    batch, tokens, width = batch_tokens_width(flow, source)
    between = [
        n for n in flow.nodes[flow.position[router.node] : flow.position[join.add]] if flow.reaches(router.node, n)
    ]
    ops = {flow.op[n] for n in between}
    scores: Literal["softmax", "sigmoid", "linear"] = (
        "softmax" if ops & SOFTMAX else "sigmoid" if "sigmoid" in ops else "linear"
    )
    form: Literal["loop", "batched", "grouped", "other"] = (
        "grouped"
        if any("grouped_mm" in op for op in ops)
        else "loop"
        if ops & {"index_add", "nonzero"}
        else "batched"
        if ops & {"bmm", "matmul", "baddbmm", "einsum"}
        else "other"
    )
    region = MoeRegion(
        path=module_path(join.branch) or module_path(router.node),
        source=source_line(router.node),
        input=source,
        router=router.node,
        top_k=choice,
        output=flow.canonical(join.branch),
        batch=batch,
        tokens=tokens,
        width=width,
        experts=router.features,
        experts_per_token=chosen,
        form=form,
        score_function=scores,
        shared_expert=shared,
    )
    return MixtureOfExperts(region, join, inside)

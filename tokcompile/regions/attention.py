"""Attention: two contractions joined by a softmax, or one ``scaled_dot_product_attention`` node.

::

    query_source -> query_proj -> [view, transpose, norm, rope] -> query --+
    key_source   -> key_proj   -> [view, transpose, norm, rope, cache] -> key --+-> scores
    scores -> [scale, tanh, + mask, cat sinks] -> softmax -> [dropout, slice] --+
    value_source -> value_proj -> [view, transpose, cache] -> value ------------+-> output -> output_proj
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.ops import (
    CONTRACTION,
    CONV,
    FUSED,
    JOIN,
    LAYOUT,
    NORM,
    POINTWISE,
    REDUCE,
    SDPA,
    SELECT,
    SOFTMAX,
    TRIVIAL,
    sdpa_arguments,
)

from .causal import Order
from .flow import Flow, Linear, Walk
from .heads import HeadSizes, head_sizes
from .misses import STEPS, Misses
from .model import AttentionRegion

#: Between a projection and the contraction.
_HEADS = (
    TRIVIAL
    | LAYOUT
    | SELECT
    | JOIN
    | POINTWISE
    | NORM
    | REDUCE
    | {"view_as_complex", "view_as_real", "new_empty", "empty", "zeros", "new_zeros", "_conj", "index", "index_select"}
)
#: Between the two contractions.
_SCORES = TRIVIAL | LAYOUT | POINTWISE | SELECT | {"cat", "max", "amax"}
#: Between a low-rank projection and the one that feeds it.
_LATENT = TRIVIAL | LAYOUT | SELECT | NORM | REDUCE | {"mul", "pow", "rsqrt", "add"}
#: Between the tokens and a shorter sequence of keys made from them (spatial reduction, pooling).
_REDUCED = TRIVIAL | LAYOUT | NORM | CONV | {"avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "mean", "max"}
#: Between the attention and its output projection.
_AFTER = TRIVIAL | LAYOUT | NORM | REDUCE | {"mul", "div", "pow", "rsqrt", "slice", "getitem", "sigmoid"}

#: What a fused layer has by its definition; its parts cannot be told apart.
_INSIDE_FUSED = STEPS["attention"][:-1]


def find_attention(flow: Flow, misses: Misses) -> list[AttentionRegion]:
    """All attention regions, in graph order."""
    found: list[AttentionRegion] = []
    order = Order(flow)
    for node in flow.nodes:
        region = None
        if flow.op[node] in SDPA:
            region = _from_sdpa(flow, node)
        elif flow.op[node] in SOFTMAX:
            region = _from_softmax(flow, node, misses)
        elif flow.op[node] in FUSED:
            misses.attempt("attention", *_INSIDE_FUSED).fails(
                node,
                f"expected attention in parts, found the fused operation {flow.op[node]}, "
                "which computes a whole layer; torch.backends.mha.set_fastpath_enabled(False) before the capture "
                "keeps its parts",
            )
        if region is not None:
            _describe(flow, region)
            region.causal = region.causal_flag or region.cached or order.is_in(region.mask)
            found.append(region)
    return found


def _from_sdpa(flow: Flow, node: fx.Node) -> AttentionRegion:
    path, source = module_path(node), source_line(node)
    if flow.op[node] == "packed_attention":
        query, key, value = node.all_input_nodes[:3]
        return AttentionRegion(path=path, source=source, query=query, key=key, value=value, output=node, form="packed")
    given = sdpa_arguments(node)
    return AttentionRegion(
        path=path,
        source=source,
        query=given.query,
        key=given.key,
        value=given.value,
        output=node,
        mask=given.mask,
        form="sdpa",
        causal_flag=given.is_causal,
    )


def _from_softmax(flow: Flow, softmax: fx.Node, misses: Misses) -> AttentionRegion | None:
    attempt = misses.attempt("attention", "softmax")
    before = flow.back(flow.inputs[softmax][0], _SCORES, limit=60)
    scores = next((n for n in before.stops if flow.op[n] in CONTRACTION and flow.linear(n) is None), None)
    output = None
    for node in flow.forward(softmax, lambda n: flow.op[n] in _SCORES, limit=30):
        if flow.op[node] in CONTRACTION and flow.linear(node) is None:
            output = node
            break
    if scores is None or output is None:
        if scores is not output:
            side, where = ("before", output) if scores is None else ("after", scores)
            attempt.passes("weights x value" if scores is None else "query x key").fails(
                softmax,
                f"expected a softmax between two contractions (query x key, then "
                f"weights x value), found no contraction {side} the softmax; the other one is {where}",
            )
        return None
    attempt.passes("query x key", "weights x value")
    first, second = _operands(flow, scores), _operands(flow, output)
    if first is None or second is None:
        attempt.fails(
            softmax,
            f"expected contractions of two tensors, found {flow.op[scores]} and {flow.op[output]} with other operands",
        )
        return None
    attempt.passes("two tensors in each product")
    query, key = first
    weights = [n for n in second if flow.reaches(softmax, n)]
    values = [n for n in second if not flow.reaches(softmax, n)]
    if len(weights) != 1 or len(values) != 1:
        attempt.fails(
            softmax,
            f"expected weights x value after the softmax, found both operands of {output} to come from the softmax",
        )
        return None
    for contraction, left, right in ((scores, query, key), (output, weights[0], values[0])):
        low, high = sorted((len(flow.dims(left) or ()), len(flow.dims(right) or ())))
        if low < 3 <= high:
            attempt.fails(
                softmax,
                f"expected query x key before the softmax and weights x value behind it, found in {contraction} a "
                f"product with a matrix of {low} axes: it mixes heads",
            )
            return None
    bends = [n for n in before.passed if flow.op[n] == "tanh"]
    return AttentionRegion(
        path=module_path(softmax),
        source=source_line(softmax),
        query=query,
        key=key,
        value=values[0],
        scores=scores,
        softmax=softmax,
        output=output,
        mask=_eager_mask(flow, scores, before),
        form="eager",
        softcap=any(flow.reaches(scores, n) for n in bends),
    )


def _operands(flow: Flow, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two factors of a contraction; a transposition of the second one's last axes is taken off."""
    args: Any = node.args
    pair: Any = args[1:3] if flow.op[node] == "baddbmm" else args[:2]
    if flow.op[node] == "einsum":
        pair = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
    if len(pair) != 2 or not all(isinstance(n, fx.Node) for n in pair):
        return None
    left: fx.Node = pair[0]
    right: fx.Node = pair[1]
    last = len(flow.dims(right) or ()) - 1
    inner = flow.canonical(right)
    axes: Any = inner.args[1:3]
    if flow.op[inner] in ("transpose", "swapaxes") and {axis % (last + 1) for axis in axes} == {last - 1, last}:
        right = flow.inputs[inner][0]
    return left, right


def _eager_mask(flow: Flow, scores: fx.Node, before: Walk) -> fx.Node | None:
    """What is added to the scores, or fills them, on the way to the softmax (also through baddbmm)."""
    added = flow.op[scores] == "baddbmm" and scores.kwargs.get("beta", 1) != 0
    extra = flow.inputs[scores][0] if added else None
    for node in before.passed:
        if flow.op[node] not in ("add", "masked_fill", "where", "sub") or not flow.reaches(scores, node):
            continue
        for operand in flow.inputs[node]:
            if not flow.reaches(scores, operand) and len(flow.dims(operand) or ()) >= 2:
                return operand
    return extra


def _describe(flow: Flow, region: AttentionRegion) -> None:
    """Fill in what stands around the contractions."""
    reader = region.scores or region.output
    ends = {"query": (region.query, reader), "key": (region.key, reader), "value": (region.value, region.output)}
    walks = {
        role: flow.back(node, _HEADS, stop=lambda n: flow.linear(n) is not None, reader=reader)
        for role, (node, reader) in ends.items()
    }
    projections = {role: _projection(flow, walk) for role, walk in walks.items()}
    _name_sources(flow, region, projections, walks)
    after = next(
        (
            n
            for n in flow.forward(region.output, lambda n: flow.op[n] in _AFTER and flow.linear(n) is None, limit=25)
            if flow.linear(n) is not None
        ),
        None,
    )
    if after is not None and _leads_to(flow, region.output, after):
        region.output_proj = after
    _set_sizes(region, head_sizes(flow, region))
    region.rope = _has_rope(flow, walks["query"])
    region.qk_norm = _has_norm(flow, walks["query"]) or _has_norm(flow, walks["key"])
    _find_cache(flow, region, walks)


def _set_sizes(region: AttentionRegion, sizes: HeadSizes) -> None:
    region.batch, region.queries, region.keys = sizes.batch, sizes.queries, sizes.keys
    region.heads, region.kv_heads, region.head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim
    region.grouping = "mha" if sizes.heads == sizes.kv_heads else "mqa" if sizes.kv_heads == 1 else "gqa"


def _projection(flow: Flow, walk: Walk) -> Linear | None:
    found = [flow.linear(n) for n in walk.stops]
    linears = [n for n in found if n is not None]
    last = [n for n in linears if not any(m is not n and flow.reaches(n.node, m.node) for m in linears)]
    return max(last, key=lambda n: flow.position[n.node], default=None)


def _sources(flow: Flow, projection: Linear | None) -> list[fx.Node]:
    """The inputs of a projection and of the low-rank projections before it, nearest first."""
    sources: list[fx.Node] = []
    while projection is not None and len(sources) < 3:
        sources.append(flow.canonical(projection.input, layout=True))
        walk = flow.back(
            sources[-1],
            _LATENT,
            limit=20,
            stop=lambda n: (
                flow.linear(n) is not None
                or (flow.op[n] == "add" and flow.primary(n) is None and len(flow.inputs[n]) == 2)
            ),
        )
        linears = [m for m in (flow.linear(n) for n in walk.stops) if m is not None]
        projection = linears[0] if len(linears) == 1 else None
    return sources


def _name_sources(
    flow: Flow, region: AttentionRegion, projections: dict[str, Linear | None], walks: dict[str, Walk]
) -> None:
    chains = {role: _sources(flow, projections[role]) for role in projections}
    shared = next((n for n in chains["query"] if n in chains["key"]), None)

    def source(role: str) -> fx.Node | None:
        return shared if shared in chains[role] else next(iter(chains[role]), None)

    nodes = {role: None if p is None else p.node for role, p in projections.items()}
    region.query_proj, region.key_proj, region.value_proj = nodes["query"], nodes["key"], nodes["value"]
    region.query_source, region.key_source, region.value_source = source("query"), source("key"), source("value")
    if region.key_proj is not None and region.key_proj is region.value_proj:
        region.projection = "fused_qkv" if region.query_proj is region.key_proj else "fused_kv"
    roots = {_root(flow, chain[0]) if chain else None for chain in (chains["query"], chains["key"])}
    same = shared is not None or (None not in roots and len(roots) == 1)
    reduced = (
        bool(chains["query"] and chains["key"])
        and chains["query"][0]
        in flow.back(chains["key"][0], _REDUCED, limit=30, stop=lambda n: n is chains["query"][0]).stops
    )
    unprojected = not chains["query"] and not chains["key"] and (_stems(walks["query"]) == _stems(walks["key"]))
    region.cross = not (same or reduced or unprojected)


def _stems(walk: Walk) -> set[fx.Node]:
    return {n for n in walk.stops if n.op == "call_function"}


def _root(flow: Flow, node: fx.Node) -> fx.Node:
    """Look through norms, scales and position embeddings."""
    while True:
        source = flow.primary(node)
        if source is None:
            return node
        node = source


def _leads_to(flow: Flow, output: fx.Node, projection: fx.Node) -> bool:
    linear = flow.linear(projection)
    return linear is not None and flow.reaches(output, linear.input)


def _has_rope(flow: Flow, walk: Walk) -> bool:
    """Halves of a head swapped with one sign changed and weighted, or multiplied as complex numbers."""
    ops = {flow.op[n] for n in walk.passed}
    if "view_as_complex" in ops:
        return True
    joined = bool(ops & {"cat", "stack", "copy"}) and "mul" in ops
    return joined and ("neg" in ops or ("sub" in ops and "add" in ops))


def _has_norm(flow: Flow, walk: Walk) -> bool:
    return any(flow.op[n] in NORM or flow.op[n] in ("rsqrt", "linalg_vector_norm") for n in walk.passed)


def _find_cache(flow: Flow, region: AttentionRegion, walks: dict[str, Walk]) -> None:
    """Keys that come, in front of the new ones or all of them, from an input of the graph."""
    region.past_key = _past(flow, region.key_proj, walks["key"])
    region.past_value = _past(flow, region.value_proj, walks["value"])
    region.cached = region.past_key is not None or region.past_value is not None


def _past(flow: Flow, projection: fx.Node | None, walk: Walk) -> fx.Node | None:
    """The input of the graph that holds the keys (or values) so far."""
    if projection is None:
        stems = [n for n in walk.stops if n.op == "placeholder" and len(flow.dims(n) or ()) >= 3]
        return next(iter(stems), None)
    past = None
    for node in walk.passed:
        if flow.op[node] not in ("cat", "index_copy", "index_put", "slice_scatter", "copy"):
            continue
        first = flow.canonical(flow.inputs[node][0], layout=True)
        while flow.op[first] == "slice":
            first = flow.canonical(flow.inputs[first][0], layout=True)
        if first.op == "placeholder" and len(flow.dims(first) or ()) >= 3:
            past = first
    return past

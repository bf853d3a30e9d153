"""Find all regions of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.graph import source_line
from tokcompile.kinds import KINDS

from .attention import find_attention
from .audio import find_audio_encoders
from .causal import is_causal
from .feed_forward import common_path, find_feed_forward
from .flow import Flow
from .merge import find_merge_points
from .misses import Misses
from .model import Region, Regions
from .moe import find_moe
from .residual import find_join
from .stack import Block, Stream, find_streams
from .vision import find_vision_encoders


def find_regions(captured: Captured | fx.GraphModule | fx.Graph) -> Regions:
    """Find attention, feed-forward, mixture-of-experts, encoder, decoder-stack and merge-point regions.

    Detection reads dataflow only; module paths and source lines name what was found.

    Args:
        captured: a capture, or its pre-dispatch ATen graph with ``meta["val"]`` on every node.

    Returns:
        The regions by kind in the order of :data:`~tokcompile.regions.model.KINDS`, in graph order within a kind, and
        the near misses.
    """
    flow = Flow(captured if isinstance(captured, fx.Graph) else captured.graph)
    misses = Misses()
    attentions = find_attention(flow, misses)
    feeds = find_feed_forward(flow, misses)
    mixtures = find_moe(flow, feeds, misses)
    inside = {id(block) for mixture in mixtures for block in mixture.inside}
    feeds = [block for block in feeds if id(block) not in inside]
    blocks = [Block(b.region, b.join) for b in feeds] + [Block(b.region, b.join) for b in mixtures]
    blocks += _attention_blocks(flow, attentions)
    streams = [s for s in find_streams(flow, blocks) if _is_stack(s)]
    encoders, others = find_vision_encoders(flow, streams, misses)
    hearing, others = find_audio_encoders(flow, others, misses)
    encoders += hearing
    stacks = [_decoder_stack(flow, stream) for stream in others]
    merges = find_merge_points(flow, others, encoders, misses)
    regions = [*encoders, *merges, *stacks, *attentions, *(b.region for b in feeds), *(b.region for b in mixtures)]
    regions.sort(key=lambda r: (KINDS.index(r.kind), flow.position[r.roles["output"]]))
    return Regions(regions, misses.found)


def _attention_blocks(flow: Flow, attentions: Sequence[Region]) -> list[Block]:
    blocks = []
    for region in attentions:
        roles = region.roles
        sources = [roles[n] for n in ("query_source", "query") if n in roles][:1]
        result = roles.get("output_proj", roles["output"])
        join = find_join(flow, sources, result) or find_join(flow, sources, result, shortcut=True)
        if join is not None:
            blocks.append(Block(region, join))
    return blocks


def _is_stack(stream: Stream) -> bool:
    kinds = [block.region.kind for block in stream.blocks]
    return "attention" in kinds or len(kinds) > 1


def _decoder_stack(flow: Flow, stream: Stream) -> Region:
    sizes = flow.sizes(stream.start)
    shapes: dict[str, Any] = {
        "D": sizes[-1],
        "S": sizes[-2] if len(sizes) > 1 else 1,
        "B": sizes[0] if len(sizes) > 2 else 1,
    }
    own = [b.region for b in stream.blocks if b.region.kind == "attention" and b.region.variant["cross"] == "self"]
    variant = {"causal": "yes" if any(is_causal(flow, region) for region in own) else "no"}
    path = common_path([layer.path for layer in stream.layers])
    roles = {"input": stream.start, "output": stream.output}
    return Region("decoder_stack", path, roles, shapes, variant, source_line(stream.start), stream.layers)

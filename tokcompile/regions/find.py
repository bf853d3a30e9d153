"""Find all regions of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.graph import source_line
from tokcompile.kinds import KINDS

from .attention import find_attention
from .audio import find_audio_encoders
from .feed_forward import common_path, find_feed_forward
from .flow import Flow
from .merge import find_merge_points
from .misses import Misses
from .model import AttentionRegion, DecoderStack, Region, Regions
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
    seeing, others = find_vision_encoders(flow, streams, misses)
    hearing, others = find_audio_encoders(flow, others, misses)
    encoders = [*seeing, *hearing]
    stacks = [_decoder_stack(flow, stream) for stream in others]
    merges = find_merge_points(flow, others, encoders, misses)
    regions: list[Region] = [*encoders, *merges, *stacks, *attentions]
    regions += [b.region for b in feeds]
    regions += [b.region for b in mixtures]
    regions.sort(key=lambda r: (KINDS.index(r.kind), flow.position[r.output]))
    return Regions(regions, misses.found)


def _attention_blocks(flow: Flow, attentions: Sequence[AttentionRegion]) -> list[Block]:
    blocks = []
    for region in attentions:
        sources, result = [region.query_source or region.query], region.output_proj or region.output
        join = find_join(flow, sources, result) or find_join(flow, sources, result, shortcut=True)
        if join is not None:
            blocks.append(Block(region, join))
    return blocks


def _is_stack(stream: Stream) -> bool:
    return bool(stream.attentions) or len(stream.blocks) > 1


def _decoder_stack(flow: Flow, stream: Stream) -> DecoderStack:
    sizes = flow.sizes(stream.start)
    return DecoderStack(
        path=common_path([layer.path for layer in stream.layers]),
        source=source_line(stream.start),
        input=stream.start,
        output=stream.output,
        batch=sizes[0] if len(sizes) > 2 else 1,
        tokens=sizes[-2] if len(sizes) > 1 else 1,
        width=sizes[-1],
        causal=any(region.causal for region in stream.self_attentions),
        layers=stream.layers,
    )

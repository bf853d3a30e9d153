"""Audio encoders: a stack of layers whose tokens are frames of a signal, made by convolutions along time.

::

    mel frames or samples -> convolutions over one axis (some with a stride) -> transpose -> [linear, norm]
                          -> [+ positions, which may be a convolution too] -> tokens -> layers -> output

Convolutions over what an embedding made (characters, say) make no audio encoder: their tokens are text. A stack in
which a token sees only what came before it stays a ``decoder_stack``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tokcompile.capture.graph import module_path, source_line

from .flow import Flow
from .misses import Misses
from .model import AudioEncoder
from .stack import Stream
from .vision import common_prefix, tokens_around


def find_audio_encoders(
    flow: Flow, streams: Sequence[Stream], misses: Misses
) -> tuple[list[AudioEncoder], list[Stream]]:
    """The audio encoders, and the streams that are none."""
    joins = flow.mask(block.join.add for stream in streams for block in stream.blocks)
    embeddings = flow.mask(flow.by_op.get("embedding", []))
    convs = [
        n
        for op in ("conv1d", "convolution")
        for n in flow.by_op.get(op, [])
        if _along_time(flow, n) and not flow.reached_by(n.all_input_nodes[0], embeddings | joins)
    ]
    found: list[AudioEncoder] = []
    rest: list[Stream] = []
    for stream in streams:
        above = flow.reached_by(stream.start, flow.mask(convs))
        later = flow.reached_by(stream.start, joins)
        own = stream.self_attentions
        causal = any(region.causal for region in own)
        if above and not later and causal:
            misses.attempt("audio_encoder", "convolution along time", "layers over the frames").fails(
                above[-1],
                "expected layers in which every frame sees all others, found a causal order behind the convolution",
            )
        if not above or later or not own or causal:
            rest.append(stream)
            continue
        found.append(_describe(flow, stream, above))
    return found, rest


def _along_time(flow: Flow, node: fx.Node) -> bool:
    """A convolution over one axis that mixes neighbours; with a kernel of 1 it is a linear."""
    dims = flow.dims(node.args[1]) if isinstance(node.args[1], fx.Node) else None
    return dims is not None and len(dims) == 3 and dims[-1] != 1


def _describe(flow: Flow, stream: Stream, convs: Sequence[fx.Node]) -> AudioEncoder:
    sizes, last = flow.sizes(stream.start), convs[-1]
    prefix, suffix, token = tokens_around(flow, stream.start, last)
    return AudioEncoder(
        path=common_prefix(module_path(last), stream.layers[0].path),
        source=source_line(last),
        convolution=last,
        tokens=stream.start,
        output=stream.output,
        class_token=token,
        batch=sizes[0] if len(sizes) > 2 else 1,
        width=sizes[-1],
        token_count=sizes[-2],
        prefix=prefix,
        suffix=suffix,
        convolutions=len(convs),
        layers=list(stream.layers),
    )

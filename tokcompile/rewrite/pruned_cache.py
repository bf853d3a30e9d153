"""Reading a cache whose layers hold fewer tokens than the sequence has."""

from __future__ import annotations

import torch
from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.markers import LOGICAL
from tokcompile.capture.sizes import guarded_equal
from tokcompile.errors import TokcompileError
from tokcompile.regions.flow import Flow
from tokcompile.regions.model import AttentionRegion
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.narrow import Cut, narrow

aten = torch.ops.aten


def check_readers(ctx: Context) -> None:
    """Refuse a decoder that counts the tokens of a pruned encoder: it cannot know which ones are left.

    Raises:
        TokcompileError: a cross attention has a mask over them, or its weights are given back.
    """
    flow = Flow(ctx.captured.graph)
    results = {flow.canonical(node) for node in ctx.captured.graph.output_node().all_input_nodes}
    for region in ctx.regions.of(AttentionRegion):
        if not region.cross:
            continue
        reason = "", ""
        if region.mask is not None:
            reason = "masks", "leave the encoder's attention_mask out, or call forward without encoder_outputs"
        elif region.softmax in results:
            reason = "gives back the weights of", "leave output_attentions and token timestamps out"
        if reason[0]:
            raise TokcompileError(
                f"cross attention '{region.path}' [{region.source}] {reason[0]} the tokens of an "
                f"encoder that ran before it and lost some of them; {reason[1]}"
            )


def narrow_pruned_cache(captured: Captured) -> None:
    """Replace the marked keys and values of pruned cache layers by what the layers really hold."""
    cuts: list[Cut] = []
    sizes: dict[fx.Node, fx.Node] = {}
    for node in list(captured.graph.nodes):
        if node.target is not LOGICAL:
            continue
        states, held, _length, ragged = node.args
        if held not in sizes:
            with captured.graph.inserting_before(node):
                sizes[held] = captured.graph.call_function(aten.sym_size.int, (states, 2))
            sizes[held].meta["val"] = states.meta["val"].shape[2]
        # keys and values hold the same entries, though Dynamo may give the length of each a symbol of its own
        same = guarded_equal(states.meta["val"].shape[2], sizes[held].meta["val"])  # tells the symbols so
        assert same
        cuts.append(Cut(node, held, sizes[held], ragged=ragged, token_dim=2, narrowed=states))
    if cuts:
        narrow(captured, cuts)
        for cut in cuts:
            if not cut.node.users:
                captured.graph.erase_node(cut.node)
        captured.graph_module.recompile()

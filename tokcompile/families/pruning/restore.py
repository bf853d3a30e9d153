"""Give every patch back where the tokens leave the layers of an encoder."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tokcompile.capture.graph import ancestors
from tokcompile.regions.model import EncoderRegion
from tokcompile.rewrite.context import Context


class Restored:
    """What leaves a stack of layers below a cut, with all the tokens that there were above it.

    Marks stand in for it while the graph is narrowed, so that what follows is left as it is; then each token that was
    there takes the value of the token that it is part of.
    """

    def __init__(self, ctx: Context, region: EncoderRegion, first: int) -> None:
        self.ctx = ctx
        self.place: fx.Node | None = None
        self.places: dict[int, fx.Node] = {}
        self.marks: dict[int, fx.Node] = {}
        last = region.layers[-1].output
        inside = {*ancestors([last]), last}
        for index in range(first - 1, len(region.layers)):  # the value at the first cut is read before it
            value = region.layers[index].output
            leaving = [user for user in value.users if user not in inside]
            if leaving:
                with ctx.captured.graph.inserting_after(value):
                    mark = ctx.captured.graph.call_function(torch.ops.tokcompile.restored.default, (value,))
                mark.meta = dict(value.meta)
                for user in leaving:
                    user.replace_input_with(value, mark)
                self.marks[index] = mark

    def take_back(self) -> None:
        """Leave the graph as it was."""
        for mark in self.marks.values():
            mark.replace_all_uses_with(mark.all_input_nodes[0])
            self.ctx.captured.graph.erase_node(mark)

    def stage(self, kept: fx.Node, into: fx.Node, layers: range) -> None:
        """Follow the tokens over a cut, for what leaves ``layers``: see :meth:`PatchSelection.score`."""

        def place(kept: Tensor, into: Tensor, *before: Tensor) -> Tensor:
            slot = torch.arange(kept.shape[1], device=kept.device)[None].expand_as(kept)
            now = torch.zeros_like(into).scatter(1, kept, slot).gather(1, into)
            return now.gather(1, before[0]) if before else now

        before = [] if self.place is None else [self.place]
        self.place = self.ctx.emit(place, kept, into, *before, before=self.ctx.after(kept, into, *before))
        self.places |= dict.fromkeys(layers, self.place)

    def finish(self) -> None:
        """Put the values in place of the marks."""
        for index, mark in self.marks.items():
            (full,) = mark.all_input_nodes
            if index in self.places:
                full = self.ctx.emit(
                    lambda v, i: v.gather(1, i.unsqueeze(-1).expand(-1, -1, v.shape[2])),
                    full,
                    self.places[index],
                    before=self.ctx.after(full, self.places[index]),
                )
            mark.replace_all_uses_with(full)
            self.ctx.captured.graph.erase_node(mark)

"""What a pass works with: :class:`Pass`, and the :class:`Context` of the one graph that it rewrites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.graph import ancestors, extract, module_path, source_line
from tokcompile.capture.markers import HELD
from tokcompile.capture.trace import inline
from tokcompile.errors import NarrowError
from tokcompile.regions.model import (
    AttentionRegion,
    DecoderStack,
    EncoderRegion,
    Layer,
    MergePoint,
    Region,
    Regions,
)
from tokcompile.regions.places import layer_of, region_keys
from tokcompile.rewrite.graph_inputs import HostSize, Kept, Memory, MemoryInput, Observer, SizeFunction, StateInput
from tokcompile.rewrite.labels import Flow, is_token
from tokcompile.rewrite.narrow import Cut, check, narrow
from tokcompile.state import PreparedState

aten = torch.ops.aten


@dataclass(eq=False)
class Context:
    """One graph being rewritten.

    Attributes:
        captured, regions: the graph and what was found in it.
        args: the real arguments of the call that triggered compilation.
        step: index of the recipe step at work.
        whole: the graph is a whole forward, so its outputs may be shorter than before.
        kept, indices: the nodes that hold kept positions, for recording and for :func:`session.hoist`.
        prepared, inputs: the state that calibration made; the placeholders that the rewrite added, and what each takes.
        static: sizes read off the data may be numbers in the graph; another number compiles it anew.
        always_ragged: the graph must serve rows that keep different numbers of tokens, whatever ``args`` keep.
        places: region key -> its layer, in the graph as it was found.
        streams: for each stack what enters it and what leaves its layers, likewise.
        leading_tokens: how many tokens at the head of an encoder the recipe protects; None: those that are found.
        shared: what passes emit once for several regions, by a key of their own.
        memories: what decode steps hand on; None where nothing can (a graph that is exported).
    """

    captured: Captured
    regions: Regions
    args: Sequence[Any]
    step: int = 0
    whole: bool = True
    static: bool = False
    always_ragged: bool = False
    leading_tokens: int | None = None
    places: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    streams: list[list[fx.Node]] = field(default_factory=list)
    shared: dict[Any, Any] = field(default_factory=dict)
    sizes: list[HostSize] = field(default_factory=list)
    ragged: list[bool] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    indices: list[fx.Node] = field(default_factory=list)
    prepared: PreparedState | None = None
    counting: Callable[[], bool] = lambda: True
    inputs: dict[fx.Node, HostSize | StateInput | MemoryInput] = field(default_factory=dict)
    memories: list[Memory] | None = None
    _positions: dict[str, fx.Node] = field(default_factory=dict)
    _masks: dict[fx.Node, fx.Node] = field(default_factory=dict)

    # .. building blocks for passes

    def emit(self, function: Callable[..., Any], *args: Any, before: fx.Node) -> Any:
        """Trace plain torch code over nodes into the graph, in front of ``before``."""
        return inline(self.captured, function, args, before)

    def emit_once(self, name: str, function: Callable[..., Any], *nodes: fx.Node) -> Any:
        """As :meth:`emit`, right behind ``nodes``; further calls with this name and these nodes get the same result."""
        if (name, *nodes) not in self.shared:
            self.shared[name, *nodes] = self.emit(function, *nodes, before=self.after(*nodes))
        return self.shared[name, *nodes]

    def state(self, pass_name: str, region: Region) -> tuple[dict[str, fx.Node], dict[str, Any]]:
        """The prepared state of a region: name -> input node of the graph, and its facts.

        Raises:
            NarrowError: calibration made no state for the region.
        """
        key = self.key(region)
        if self.prepared is None or not self.prepared.has(pass_name, key):
            raise self.refuse(
                region.output,
                f"no prepared state of {pass_name} for {key or 'this region'}; "
                "pass calibration= to tokcompile.optimize, with inputs that run "
                "through it",
            )
        nodes = {}
        for name, tensor in self.prepared.tensors(pass_name, key).items():
            with self.captured.graph.inserting_after(self.captured.placeholders[-1]):
                node = self.captured.graph.placeholder(f"{pass_name}_{name}_{len(self.inputs)}")
            node.meta["val"] = self.captured.fake(tensor)
            self.inputs[node] = StateInput(pass_name, key, name)
            nodes[name] = node
        return nodes, self.prepared.facts[pass_name, key]

    def remember(
        self,
        region: Region,
        past: fx.Node,
        grown: fx.Node | None,
        fresh: Callable[[torch.Tensor], list[torch.Tensor]],
        *forms: tuple[Sequence[Any], torch.dtype],
    ) -> Memory:
        """A memory of ``region``; the caller sets its ``outputs`` and ``reused``.

        Args:
            past, grown, fresh: see :class:`Memory`.
            forms: shape (numbers, or sizes in the graph) and type of each value.
        """
        assert self.memories is not None
        memory = Memory(self.step, region.path, (self.layer(region) or (0, 0))[0], past, grown, fresh)
        for place, (shape, dtype) in enumerate(forms):
            with self.captured.graph.inserting_after(self.captured.placeholders[-1]):
                node = self.captured.graph.placeholder(f"memory_{len(self.memories)}_{place}")
            with self.captured.fake_mode:
                node.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device=past.meta["val"].device)
            self.inputs[node] = MemoryInput(memory, place)
            memory.inputs.append(node)
        self.memories.append(memory)
        return memory

    def key(self, region: Region) -> str:
        """See :func:`region_keys`."""
        return region_keys(self.regions)[region]

    def layer(self, region: Region) -> tuple[int, int] | None:
        """See :func:`layer_of`; as it was before any rewrite, since a cut between layers divides a stack."""
        key = self.key(region)
        return self.places[key] if key in self.places else layer_of(self.regions, region)

    def real(self, node: fx.Node) -> torch.Tensor:
        """The tensor behind an input of the graph, such as a weight.

        Raises:
            NarrowError: ``node`` is computed in the graph.
        """
        placeholders = self.captured.placeholders
        if node in placeholders and placeholders.index(node) < len(self.args):
            return self.args[placeholders.index(node)]
        raise self.refuse(node, "expected a parameter of the model, found a value that is computed in the graph")

    def observe(self, function: Callable[..., None], *nodes: fx.Node) -> None:
        """Call ``function`` with the values of ``nodes`` whenever the graph runs (calibration only)."""
        module, graph = self.captured.graph_module, self.captured.graph
        name = f"observer_{sum(n.op == 'call_module' for n in graph.nodes)}"
        module.add_module(name, Observer(function, self.counting))
        with graph.inserting_before(self.after(*nodes)):
            graph.call_module(name, nodes)

    def after(self, *nodes: fx.Node) -> fx.Node:
        """The place right behind all ``nodes``."""
        order = {n: i for i, n in enumerate(self.captured.graph.nodes)}
        following = max(nodes, key=order.__getitem__).next
        while following.op == "placeholder":
            following = following.next
        return following

    def visual_mask(self, region: MergePoint) -> fx.Node:
        """bool ``[B, S]``: the positions that a merge point fills with image features, except the last of a row.

        The last position is what the next token is read from, so it is never up for removal.
        """
        return self.emit_once(  # type: ignore[no-any-return]
            "visual mask",
            lambda m: m & (torch.arange(m.shape[1], device=m.device) < m.shape[1] - 1),
            self.feature_mask(region),
        )

    def feature_mask(self, region: MergePoint) -> fx.Node:
        """bool ``[B, S]``: the positions that a merge point fills with image features."""
        merged = region.output
        if merged not in self._masks:
            mask = region.mask
            if mask is None:
                mask = self._features_mask(region)
            rank = mask.meta["val"].dim()

            def visual(mask: torch.Tensor, merged: torch.Tensor) -> torch.Tensor:
                mask = mask.to(torch.bool)
                if rank == 3:
                    mask = mask.select(2, 0)
                return mask.expand(merged.shape[0], merged.shape[1])

            self._masks[merged] = self.emit(visual, mask, merged, before=self.after(mask, merged))
        return self._masks[merged]

    def _features_mask(self, region: MergePoint) -> fx.Node:
        """The mask of a merge by concatenation: the span of the image features along the sequence."""
        merged, features = region.output, region.features
        if merged.target not in (aten.cat.default, aten.concat.default):
            raise self.refuse(merged, "the positions of the visual tokens cannot be read off this merge point")
        tensors = list(merged.args[0])  # type: ignore[arg-type]
        below = [i for i, t in enumerate(tensors) if t is features or features in ancestors([t])]
        if len(below) != 1:
            raise self.refuse(merged, "image features enter the concatenation in several places")
        which = below[0]

        def mask(merged: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
            start = sum(p.shape[1] for p in parts[:which])
            position = torch.arange(merged.shape[1], device=merged.device)
            inside = (position >= start) & (position < start + parts[which].shape[1])
            return inside[None].expand(merged.shape[0], merged.shape[1])

        return self.emit(mask, merged, *tensors, before=self.after(merged))

    def host_size(self, mask: fx.Node, function: SizeFunction, name: str) -> tuple[Any, bool]:
        """A size read off the real visual mask before each call (a node, or an int), and whether rows differ."""
        size = HostSize(*extract(self.captured, [mask]), function, mask)
        hint, ragged = size(self.args)
        ragged = ragged or self.always_ragged
        self.sizes.append(size)
        self.ragged.append(ragged)
        if self.static:
            size.static = hint
            return hint, ragged
        placeholders = self.captured.placeholders
        with self.captured.graph.inserting_after(placeholders[-1]):
            node = self.captured.graph.placeholder(f"{name}_{len(self.sizes)}")
        node.meta["val"] = self.captured.new_size(hint, node.name)
        self.inputs[node] = size
        return node, ragged

    def cut(
        self,
        node: fx.Node,
        keep: fx.Node,
        size: Any,
        *,
        stack: str,
        layer: Layer | None,
        index: int,
        ragged: bool = False,
        prefix: int = 0,
        suffix: int = 0,
        value: fx.Node | None = None,
    ) -> fx.Node:
        """Keep the tokens of ``node [B, S, D]`` where ``keep [B, S]`` is true, in ``size`` slots for each row.

        Args:
            value: ``[B, S, D]`` to take the kept tokens from instead of ``node`` (tokens that were merged, say).
            stack: name of the residual stream; later cuts of the same stack compose with this one.
            layer, index: the first layer below the cut, and its position in the stack.

        Returns:
            int64 ``[B, size]``: the kept positions of ``node``, ascending; -1 in empty slots.
        """
        from tokcompile.rewrite.selection import keep_index

        at = self.after(node, keep, *(n for n in (size, value) if isinstance(n, fx.Node)))
        kept = self.emit(keep_index, keep, size, before=at)
        narrowed = (
            None
            if value is None
            else self.emit(
                lambda v, i: v.gather(1, i.clamp(min=0).unsqueeze(-1).expand(-1, -1, v.shape[2])),
                value,
                kept,
                before=at,
            )
        )
        narrow(self.captured, [Cut(node, kept, size, ragged=ragged, prefix=prefix, suffix=suffix, narrowed=narrowed)])
        before = self._positions.get(stack)
        total = (
            kept
            if before is None
            else self.emit(
                lambda p, i: torch.where(i >= 0, p.gather(1, i.clamp(min=0)), -1),
                before,
                kept,
                before=self.after(before, kept),
            )
        )
        self._positions[stack] = total
        self.indices += [kept, total]
        self.kept.append(Kept(self.step, layer.path if layer else module_path(node), index, total))
        return kept

    def surviving(self, values: fx.Node, stack: str, fill: bool, before: fx.Node) -> fx.Node:
        """bool ``[B, S]`` over the unpruned sequence -> over the tokens that the cuts of ``stack`` left."""
        positions = self._positions.get(stack)
        if positions is None:
            return values
        return self.emit(
            lambda v, p: torch.where(p >= 0, v.gather(1, p.clamp(min=0)), fill), values, positions, before=before
        )

    def check(self, node: fx.Node, **kwargs: Any) -> Flow:
        """What the token axis of ``node`` reaches; raises :class:`NarrowError` if tokens cannot be removed there.

        Changes nothing.
        """
        flow = check(self.captured, node, **kwargs)
        leaving = [r for r in self.captured.graph.output_node().all_input_nodes if r in flow.labels]
        if not self.whole and leaving:
            raise self.refuse(
                leaving[0],
                "the model breaks into several graphs here, and a value that carries tokens "
                "leaves this one; compile with fullgraph=True, or use tokcompile.optimize",
            )
        if not self.captured.graph.find_nodes(op="call_function", target=HELD):
            attentions = self.regions.of(AttentionRegion)
            # a cross attention reads its cache whole, wherever its tokens came from
            crossed = {node for r in attentions if r.cross for node in (r.key, r.value)}
            keys = {r.key for r in attentions}
            keys |= ancestors(keys)
            for result in leaving:
                if (
                    result in keys - crossed
                    and result.meta["val"].dim() == 4
                    and any(is_token(dim) for dim in flow.labels[result])
                ):
                    raise self.refuse(
                        result,
                        "keys of an attention layer leave the graph as a cache that cannot say "
                        "which tokens it holds; use tokcompile.optimize, or pass use_cache=False",
                    )
        return flow

    def check_rows(self, encoder: EncoderRegion, features: fx.Node) -> None:
        """Raise unless ``features`` are, row by row, the patches of ``encoder`` (one image after the other)."""
        tokens, prefix = encoder.tokens, int(encoder.prefix)
        flow = check(self.captured, tokens, prefix=prefix)
        dims = flow.labels.get(features)
        axes = [f.axis for d in dims[:-1] for f in d if f.axis is not None and f.axis.kind == "token"] if dims else []
        parts = [p for axis in axes for p in (axis.parts or (axis,))]
        fits = bool(parts) and all(
            getattr(p, "kind", "") == "token" and p.start == prefix and (prefix == 0 or p.base is not None)
            for p in parts
        )
        if not fits:
            raise self.refuse(
                features,
                "the image features are not one for each patch of the encoder, so scores of patches do not fit them",
            )

    def stack_below(self, node: fx.Node) -> DecoderStack | None:
        """The stack of layers whose residual stream starts at ``node``, or as near below it as any does."""
        order = {n: i for i, n in enumerate(self.captured.graph.nodes)}
        stacks = [
            s
            for s in self.regions.of(DecoderStack)
            if s.layers and (s.layers[0].input is node or node in ancestors([s.layers[0].input]))
        ]
        return min(stacks, key=lambda s: order[s.layers[0].input], default=None)

    def refuse(self, node: fx.Node, reason: str) -> NarrowError:
        return NarrowError(reason, node=node.name, path=module_path(node), source=source_line(node))

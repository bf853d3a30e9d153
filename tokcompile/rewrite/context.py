"""What a pass works with: :class:`Pass`, and the :class:`Context` of the one graph that it rewrites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.graph import ancestors, module_path, refuse
from tokcompile.capture.markers import HELD
from tokcompile.capture.parallel import part_of, process_group
from tokcompile.capture.trace import inline
from tokcompile.errors import NarrowError
from tokcompile.lower.parallel import from_first
from tokcompile.lower.wrapped import wrapped_kind
from tokcompile.regions.model import AttentionRegion, Layer, Region, Regions
from tokcompile.regions.places import layer_of, region_keys
from tokcompile.rewrite.added_inputs import AddedInputs
from tokcompile.rewrite.graph_inputs import Kept, Memory, Observer, SizeFunction
from tokcompile.rewrite.labels import Flow, is_token
from tokcompile.rewrite.narrow import Cut, check, narrow
from tokcompile.state import PreparedState

aten = torch.ops.aten


@dataclass(eq=False)
class Cuts:
    """The cuts that were made in a graph.

    Attributes:
        kept: one for each cut, in order, for recording.
        indices: nodes that hold kept positions, which may be computed in front of the graph.
        positions: name of a residual stream -> the kept positions of all its cuts so far, in the unpruned sequence.
    """

    kept: list[Kept] = field(default_factory=list)
    indices: list[fx.Node] = field(default_factory=list)
    positions: dict[str, fx.Node] = field(default_factory=dict)

    def add(self, stack: str, index: fx.Node, kept: Kept) -> None:
        """Note one cut: ``index`` counts in the sequence above it, ``kept.node`` in the unpruned one."""
        self.positions[stack] = kept.node
        self.indices += [index, kept.node]
        self.kept.append(kept)


@dataclass(eq=False)
class Context:
    """One graph being rewritten.

    One class: it is all that the author of a pass sees of a rewrite.

    Attributes:
        captured, regions: the graph and what was found in it.
        args: the real arguments of the call that triggered compilation.
        step: index of the recipe step at work.
        whole: the graph is a whole forward, so its outputs may be shorter than before.
        places: region key -> its layer, in the graph as it was found.
        streams: for each stack what enters it and what leaves its layers, likewise.
        leading_tokens, trailing_tokens: how many tokens at the head and at the end of an encoder the recipe protects;
            None: those that are found.
        shared: what passes emit once for several regions, by a key of their own.
        counting: whether observers note what they see.
        added: the inputs that the rewrite adds. cuts: what was cut so far.
        merges: image features can enter a sequence of tokens in this graph; not in that of an image encoder.
        left_out: step -> why it is not applied: it failed at an earlier capture of this graph.
    """

    captured: Captured
    regions: Regions
    args: Sequence[Any]
    step: int = 0
    whole: bool = True
    leading_tokens: int | None = None
    trailing_tokens: int | None = None
    places: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    streams: list[list[fx.Node]] = field(default_factory=list)
    shared: dict[Any, Any] = field(default_factory=dict)
    counting: Callable[[], bool] = lambda: True
    added: AddedInputs = None  # type: ignore[assignment]  # made for ``captured`` where it is not given
    merges: bool = True
    left_out: Mapping[int, str] = field(default_factory=dict)
    cuts: Cuts = field(default_factory=Cuts)

    def __post_init__(self) -> None:
        if self.added is None:
            self.added = AddedInputs(self.captured)

    @property
    def prepared(self) -> PreparedState | None:
        """The state that calibration made."""
        return self.added.prepared

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
        facts = self.facts(pass_name, region)
        return self.added.state(pass_name, self.key(region)), facts

    def facts(self, pass_name: str, region: Region) -> dict[str, Any]:
        """The facts of the prepared state of a region; changes nothing.

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
        return self.prepared.facts[pass_name, key]

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
        layer = (self.layer(region) or (0, 0))[0]
        return self.added.memory(self.step, region.path, layer, past, grown, fresh, forms)

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
            NarrowError: ``node`` is computed in the graph, or it is no plain tensor.
        """
        placeholders = self.captured.placeholders
        if node in placeholders and placeholders.index(node) < len(self.args):
            value = self.args[placeholders.index(node)]
            if kind := wrapped_kind(value):
                raise self.refuse(
                    node,
                    f"the weight is of class {kind}, whose entries cannot be read one by one; change the model with "
                    "plain weights first, and quantise or shard what comes out",
                )
            return value
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

    def host_size(self, mask: fx.Node, function: SizeFunction, name: str, *, padded: bool = False) -> tuple[Any, bool]:
        """A size read off the real visual mask before each call (a node, or an int), and whether rows differ.

        Args:
            padded: the graph is the same whether rows differ or not: count them as rows that do.
        """
        return self.added.size(mask, function, name, self.args, padded)

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
        aside: Sequence[fx.Node] = (),
    ) -> fx.Node:
        """Keep the tokens of ``node [B, S, D]`` where ``keep [B, S]`` is true, in ``size`` slots for each row.

        Args:
            value: ``[B, S, D]`` to take the kept tokens from instead of ``node`` (tokens that were merged, say).
            aside: values that are computed from ``node`` and keep all of its tokens.
            stack: name of the residual stream; later cuts of the same stack compose with this one.
            layer, index: the first layer below the cut, and its position in the stack.

        Returns:
            int64 ``[B, size]``: the kept positions of ``node``, ascending; -1 in empty slots.
        """
        from tokcompile.rewrite.selection import keep_index

        at = self.after(node, keep, *(n for n in (size, value) if isinstance(n, fx.Node)))
        kept = self._agreed(self.emit(keep_index, keep, size, before=at), keep)
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
        made = Cut(node, kept, size, ragged=ragged, prefix=prefix, suffix=suffix, narrowed=narrowed, aside=tuple(aside))
        narrow(self.captured, [made])
        before = self.cuts.positions.get(stack)
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
        self.cuts.add(stack, kept, Kept(self.step, layer.path if layer else module_path(node), index, total))
        return kept

    def _agreed(self, kept: fx.Node, keep: fx.Node) -> fx.Node:
        """The same positions on all ranks of a model whose layers are shared between them.

        Raises:
            NarrowError: each rank would choose by its own part of a layer.
        """
        group = process_group(self.captured.graph)
        if not group:
            return kept
        part = self.part_of_rank(keep)
        if part is not None:
            raise self.refuse(
                part,
                "tokens are chosen by the result of a layer that is divided between processes (tensor parallelism), "
                "and each would choose others; choose by something that all of them hold, such as image features "
                "(todre, random), or run the model in one process",
            )
        agreed: fx.Node = self.emit(lambda k: from_first(k, group), kept, before=kept.next)
        return agreed

    def part_of_rank(self, node: fx.Node) -> fx.Node | None:
        """The layer that makes ``node`` differ between the processes that share a model; None where they agree."""
        return part_of(node) if process_group(self.captured.graph) else None

    def surviving(self, values: fx.Node, stack: str, fill: bool, before: fx.Node) -> fx.Node:
        """bool ``[B, S]`` over the unpruned sequence -> over the tokens that the cuts of ``stack`` left."""
        positions = self.cuts.positions.get(stack)
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
                        "which tokens it holds; pass use_cache=False, or call a forward that "
                        "takes the cache as an argument (tokcompile.optimize tells it what is "
                        "kept)",
                    )
        return flow

    def refuse(self, node: fx.Node, reason: str) -> NarrowError:
        return refuse(node, reason)

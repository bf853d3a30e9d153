"""What the backend gives Dynamo for one graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tokcompile.capture.capture import from_dynamo
from tokcompile.capture.checks import give_back, take
from tokcompile.capture.trace import ASSERTIONS, propagate
from tokcompile.lower.constants import fold_constants
from tokcompile.lower.guard import Guard
from tokcompile.lower.hoist import hoist
from tokcompile.lower.inductor import lower
from tokcompile.regions.model import Regions
from tokcompile.reporting.report import StageReport
from tokcompile.rewrite.context import Context
from tokcompile.runtime.recording import KeptEntry, ReusedEntry
from tokcompile.runtime.variants import Variant

if TYPE_CHECKING:
    from tokcompile.runtime.session import Session

aten = torch.ops.aten


class CompiledGraph:
    """What the backend gives Dynamo for one graph: compiles at the first call, and again where sizes differ in kind."""

    def __init__(self, session: Session, graph_module: fx.GraphModule, whole: bool) -> None:
        self.session, self.graph_module, self.whole = session, graph_module, whole
        self.stage = session.stage
        self.variants: list[Variant] = []

    def __call__(self, *args: Any) -> Any:
        for variant in self.variants:
            extra = variant.extra(args)
            if extra is not None and variant.guard([*args, *extra]):
                variant.checks.ask(args)
                return self._run(variant, args, extra)
        variant = self._compile(args)
        extra = variant.extra(args)
        assert extra is not None
        return self._run(variant, args, extra)

    def _run(self, variant: Variant, args: Sequence[Any], extra: list[int]) -> Any:
        results = variant.checks.read(variant.run(*args, *extra))
        if not variant.kept and not variant.memories:
            return results
        count = len(variant.kept)
        own = len(results) - count - sum(len(memory.outputs) + 1 for memory, _, _ in variant.memories)
        results, kept, handed = results[:own], results[own : own + count], list(results[own + count :])
        for memory, past, grown in variant.memories:
            values, reused = handed[: len(memory.outputs)], handed[len(memory.outputs)]
            handed = handed[len(memory.outputs) + 1 :]
            self.session.remembered.put(args[past] if grown is None else results[grown], values, grown is None)
            for recording in self.session.recordings:
                name = self.session.passes[memory.step][0].pass_
                recording.reused.append(ReusedEntry(memory.step, name, memory.path, memory.layer, reused))
        for recording in self.session.recordings:
            for item, indices in zip(variant.kept, kept, strict=True):
                name = self.session.passes[item.step][0].pass_
                recording.kept.append(KeptEntry(item.step, name, item.path, item.layer, indices.detach().clone()))
        return results

    def _compile(self, args: Sequence[Any]) -> Variant:
        session = self.session
        started = time.perf_counter()
        captured = from_dynamo(self.graph_module, args)
        checks = take(captured)
        checks.ask(args)
        # the first compilation of a graph of static sizes is static throughout, as torch.compile does it
        ctx = Context(
            captured,
            Regions(),
            args,
            whole=self.whole,
            static=not captured.symbols and not self.variants,
            prepared=session.prepared,
            counting=lambda: session.counting,
            memories=[],
        )
        session.rewrite(ctx, self.stage)
        if ctx.kept:
            session.pruned_encoder |= self.stage == "encoder"
        output = next(iter(captured.graph.find_nodes(op="output")))
        results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        memories = [
            (m, captured.placeholders.index(m.past), None if m.grown is None else results.index(m.grown))
            for m in ctx.memories or ()
        ]
        handed = [n for m, _, _ in memories for n in (*m.outputs, m.reused)]
        if ctx.kept or handed:
            output.args = ((*results, *(k.node for k in ctx.kept), *handed),)
        give_back(captured, checks)
        inputs = [ctx.inputs[node] for node in captured.placeholders[len(args) :]]
        prologue = hoist(captured, ctx.indices)
        captured.graph.eliminate_dead_code(
            is_impure_node=lambda n: n.is_impure() and n.target not in (aten.item.default, *ASSERTIONS)
        )
        captured.graph_module.recompile()
        session.check_matches(self.stage)
        if not session.observing:
            fold_constants(captured)
        if session.lowering == "eager":
            propagate(captured)  # Inductor traces the graph anyway, and so derives every shape
        run, compiled = lower(captured, session.lowering, ctx.streams)
        variant = Variant(
            run,
            Guard(captured),
            ctx.sizes,
            ctx.ragged,
            ctx.kept,
            prologue,
            inputs,
            session.prepared,
            memories,
            session.remembered,
            checks,
        )
        self.variants.append(variant)
        session.report.stages.append(
            StageReport(
                name=self.stage,
                captured=True,
                nodes=len(captured.graph.nodes),
                compiled=compiled,
                seconds=time.perf_counter() - started,
            )
        )
        return variant

"""What the backend gives Dynamo for one graph."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tokcompile.capture.capture import from_dynamo
from tokcompile.capture.captured import Captured
from tokcompile.capture.checks import Checks, give_back, take
from tokcompile.capture.trace import ASSERTIONS, loosen_view, propagate
from tokcompile.errors import RewriteError
from tokcompile.kinds import Stage
from tokcompile.lower.constants import fold_constants
from tokcompile.lower.guard import Guard
from tokcompile.lower.hoist import hoist
from tokcompile.lower.inductor import lower
from tokcompile.lower.wrapped import note_wrapped
from tokcompile.regions.model import Regions
from tokcompile.reporting.report import StageReport
from tokcompile.rewrite.added_inputs import AddedInputs
from tokcompile.rewrite.context import Context
from tokcompile.runtime.gate import GATE
from tokcompile.runtime.owner import Owner
from tokcompile.runtime.recording import ReusedEntry
from tokcompile.runtime.variants import Variant

aten = torch.ops.aten


class CompiledGraph:
    """What the backend gives Dynamo for one graph: compiles at the first call, and again where sizes differ in kind."""

    def __init__(self, session: Owner, graph_module: fx.GraphModule, stage: Stage, whole: bool, merges: bool) -> None:
        self.session, self.graph_module, self.stage = session, graph_module, stage
        self.whole, self.merges = whole, merges
        self.variants: list[Variant] = []

    def __call__(self, *args: Any) -> Any:
        found = self._fitting(args)
        if found is None:
            with GATE.alone():
                found = self._fitting(args)  # another thread may have been faster
                if found is None:
                    variant = self._compile(args)
                    extra = variant.extra(args)
                    assert extra is not None
                    found = variant, extra
        return self._run(found[0], args, found[1])

    def _fitting(self, args: Sequence[Any]) -> tuple[Variant, list[Any]] | None:
        for variant in list(self.variants):
            extra = variant.extra(args)
            if extra is not None and variant.guard([*args, *extra]):
                variant.checks.ask(args)
                return variant, extra
        return None

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
            name = self.session.passes[memory.step][0].pass_
            self.session.recordings.reused(ReusedEntry(memory.step, name, memory.path, memory.layer, reused))
        for item, indices in zip(variant.kept, kept, strict=True):
            name = self.session.passes[item.step][0].pass_
            self.session.recordings.kept(item.step, name, item.path, item.layer, indices)
        return results

    def _rewritten(self, args: Sequence[Any]) -> tuple[Context, Checks]:
        """The graph, captured and rewritten. Where a step fails by an error of its own, captured afresh without it.

        Raises:
            RewriteError: it failed, and ``on_no_match="error"``.
        """
        session = self.session
        left_out: dict[int, str] = {}
        while True:
            captured = from_dynamo(self.graph_module, args)
            note_wrapped(captured, args)
            checks = take(captured)
            checks.ask(args)
            # the first compilation of a graph of static sizes is static throughout, as torch.compile does it
            static = not captured.symbols and not self.variants
            ctx = Context(
                captured,
                Regions(),
                args,
                whole=self.whole,
                counting=lambda: session.counting,
                added=AddedInputs(captured, session.prepared, static=static, memories=[]),
                merges=self.merges,
                left_out=left_out,
            )
            try:
                session.rewrite(ctx, self.stage)
            except RewriteError as error:
                session.leave_out(error)
                left_out[error.step] = str(error)
            else:
                return ctx, checks

    def _compile(self, args: Sequence[Any]) -> Variant:
        """Compile for the kind of sizes at hand.

        One function: the steps from a capture to a variant, in their order, each on what the one before left.
        """
        session = self.session
        started = time.perf_counter()
        ctx, checks = self._rewritten(args)
        captured = ctx.captured
        output = next(iter(captured.graph.find_nodes(op="output")))
        results: list[Any] = list(output.args[0])
        memories = [
            (m, captured.placeholders.index(m.past), None if m.grown is None else results.index(m.grown))
            for m in ctx.added.memories or ()
        ]
        handed = [n for m, _, _ in memories for n in (*m.outputs, m.reused)]
        if ctx.cuts.kept or handed:
            output.args = ((*results, *(k.node for k in ctx.cuts.kept), *handed),)
        give_back(captured, checks)
        inputs = [ctx.added.of[node] for node in captured.placeholders[len(args) :]]
        prologue = hoist(captured, ctx.cuts.indices)
        _clean(captured)
        session.check_matches(self.stage)
        if session.observed is None:
            fold_constants(captured)
        for node in captured.graph.find_nodes(op="call_function", target=aten.view.default):
            loosen_view(node)  # a kernel may order its result in memory otherwise than the one it replaces
        captured.graph_module.recompile()
        if session.lowering == "eager":
            propagate(captured)  # Inductor traces the graph anyway, and so derives every shape
        run, compiled = lower(captured, session.lowering, ctx.streams)
        variant = Variant(
            run,
            Guard(captured),
            ctx.added.sizes,
            ctx.added.ragged,
            ctx.cuts.kept,
            prologue,
            inputs,
            session.prepared,
            memories,
            session.remembered,
            checks,
        )
        self.variants.append(variant)
        session.note_compiled(
            StageReport(
                name=self.stage.value,
                captured=True,
                reason=self.graph_module.meta.get("values", ""),
                nodes=len(captured.graph.nodes),
                compiled=compiled,
                seconds=time.perf_counter() - started,
            ),
            cut=bool(ctx.cuts.kept),
        )
        return variant


def _clean(captured: Captured) -> None:
    """Leave out what no output needs, assertions on sizes included."""
    captured.graph.eliminate_dead_code(
        is_impure_node=lambda n: n.is_impure() and n.target not in (aten.item.default, *ASSERTIONS)
    )
    captured.graph_module.recompile()

"""What belongs to one optimized model: what is matched, compiled, recorded, and remembered between calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tokcompile.errors import RewriteError
from tokcompile.kinds import Stage
from tokcompile.plan.apply import Matching
from tokcompile.plan.observed import Observed
from tokcompile.plan.pass_base import Pass
from tokcompile.recipes import Recipe, Step
from tokcompile.registry import get_pass
from tokcompile.reporting.report import Report, StageReport, StepReport
from tokcompile.reporting.status import Status
from tokcompile.rewrite.context import Context
from tokcompile.runtime.calls import Calls
from tokcompile.runtime.compiled_graph import CompiledGraph
from tokcompile.runtime.fallback import Fallbacks
from tokcompile.runtime.memories import Memories
from tokcompile.runtime.recording import Recordings
from tokcompile.state import PreparedState, Sources


class Session:
    """See the module. One for each optimized model; only its methods change it.

    Attributes:
        matching: what the recipe matches. report: of that. fallbacks: calls that ran without a graph.
        observed: what calibration saw; None where graphs are rewritten.
        graphs: what Dynamo captured, each with its compiled variants.
        recordings: who listens to what is kept. remembered: what decode steps hand on.
        calls: what is being called in each thread.
        prepared: what calibration made. counting: whether observers count (see :mod:`tokcompile.prepare`).
        origin: tensors of the dense model when it was optimized (see ``state.origin``). changed: those that a saved
            model had lost.
    """

    def __init__(
        self,
        recipe: Recipe | None,
        *,
        lowering: str = "inductor",
        on_no_match: str = "error",
        model: str = "",
        state: PreparedState | None = None,
        observed: Observed | None = None,
        visual_mask: Any = None,
    ) -> None:
        """
        Args:
            state: what calibration prepared.
            observed: put the observers of the passes into the graphs instead of rewriting them, and note here what
                they see.
            visual_mask: arguments of a call -> bool ``[B, S]``, or None where these do not say: the tokens of images.
        """
        self.recipe, self.lowering, self.on_no_match = recipe, lowering, on_no_match
        self.prepared, self.visual_mask = state, visual_mask
        self.counting = True
        self.report = Report(
            model=model,
            recipe=recipe.name if recipe is not None else "",
            recipe_data=recipe.to_dict() if recipe is not None else {},
        )
        self.passes: list[tuple[Step, Pass]] = []
        if recipe is not None:
            self.passes = [(step, get_pass(step.pass_)(step.params)) for step in recipe.steps]
        self.report.steps = [
            StepReport(pass_name=step.pass_, status=Status.NOT_CAPTURED, matches=0, reason="no graph was captured yet")
            for step, _ in self.passes
        ]
        self.observed = observed
        self.matching = Matching(recipe, self.passes, self.report, on_no_match, self.observed)
        self.fallbacks = Fallbacks(self.matching)
        self.graphs: list[CompiledGraph] = []
        self.recordings, self.remembered, self.calls = Recordings(), Memories(), Calls()
        self.origin: dict[str, tuple[int, torch.dtype]] = {}
        self.sources: Sources | None = None
        self.changed: dict[str, str] = {}

    def check_sources(self, model: torch.nn.Module) -> None:
        """Warn, once for each change, when weights changed that prepared parts were made from."""
        if self.prepared is None:
            return
        if self.sources is None:
            self.sources = Sources(model, self.prepared)
        changed = self.sources.changed()
        if changed:
            more = f" and {len(changed) - 1} more parameters" if len(changed) > 1 else ""
            names = ", ".join(dict.fromkeys(name for name, _ in self.prepared.facts))
            text = (
                f"weights changed that {names} was prepared from ({changed[0]}{more}), and what was prepared is used "
                "as it was; call tokcompile.optimize again on the changed model, with calibration= made from it"
            )
            self.report.problems.append(text)
            warnings.warn(text, stacklevel=4)

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy starts without compiled graphs: they read the state of this session
        return _session, (
            self.recipe,
            self.lowering,
            self.on_no_match,
            self.report.model,
            self.prepared,
            self.visual_mask,
        )

    # .. what is matched

    @property
    def scored_features(self) -> bool:
        return self.matching.scored_features

    @property
    def wants_scores(self) -> bool:
        return self.matching.wants_scores

    def rewrite(self, ctx: Context, stage: Stage) -> None:
        """See :meth:`tokcompile.plan.apply.Matching.rewrite`."""
        self.matching.rewrite(ctx, stage)

    def leave_out(self, error: RewriteError) -> None:
        """See :meth:`tokcompile.plan.apply.Matching.leave_out`."""
        self.matching.leave_out(error)

    def check_matches(self, stage: Stage) -> None:
        """See :meth:`tokcompile.plan.expectations.Expectations.check`."""
        if self.observed is None:
            self.matching.expectations.check(stage)

    # .. what is compiled

    def backend(
        self, graph_module: fx.GraphModule, _inputs: Sequence[Any], *, stage: Stage = Stage.FORWARD, merges: bool = True
    ) -> CompiledGraph:
        """A backend of torch.compile, for the graphs of one stage."""
        reason = getattr(graph_module, "compile_subgraph_reason", None)
        graph = CompiledGraph(
            self, graph_module, stage, whole=not (reason is not None and reason.graph_break), merges=merges
        )
        self.graphs.append(graph)
        return graph

    def forget(self, graph: CompiledGraph) -> None:
        """A graph that nothing will call again."""
        self.graphs.remove(graph)

    @property
    def compilations(self) -> int:
        """How many graphs were lowered so far (each variant counts)."""
        return sum(len(g.variants) for g in self.graphs)

    def note_compiled(self, stage: StageReport, *, cut: bool) -> None:
        """One more graph. ``cut``: it has fewer tokens behind some layer than in front of it."""
        self.report.stages.append(stage)
        self.matching.pruned_encoder |= cut and stage.name == Stage.ENCODER

    def count(self, counting: bool) -> None:
        self.counting = counting

    # .. what became of a call

    def served(self, stage: Stage) -> None:
        """A graph took this part of a call."""
        self.calls.note(stage)
        self.fallbacks.served(stage)

    def fell_back(self, stage: Stage, reason: str) -> None:
        """This part of a call ran uncompiled; see :meth:`Fallbacks.fell_back`."""
        self.fallbacks.fell_back(stage, reason)

    def never_reached(self, what: str, why: str) -> None:
        """No graph took part in a whole call; see :meth:`Fallbacks.never_reached`."""
        self.fallbacks.never_reached(what, why)

    # .. what is known of the tensors of the dense model

    def note_origin(self, origin: Mapping[str, tuple[int, torch.dtype]]) -> None:
        self.origin = dict(origin)

    def note_changed(self, changed: Mapping[str, str]) -> None:
        self.changed = dict(changed)


def _session(
    recipe: Recipe | None,
    lowering: str,
    on_no_match: str,
    model: str,
    state: PreparedState | None,
    visual_mask: Any = None,
) -> Session:
    return Session(
        recipe, lowering=lowering, on_no_match=on_no_match, model=model, state=state, visual_mask=visual_mask
    )

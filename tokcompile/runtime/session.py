"""One optimized model's state: the recipe, the graphs compiled for it, and the report of what was done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from tokcompile.capture.failures import explain_failure
from tokcompile.plan.apply import Matching
from tokcompile.plan.expectations import check_supported
from tokcompile.plan.observed import Observed
from tokcompile.plan.pass_base import Pass
from tokcompile.recipes import Recipe, Step
from tokcompile.registry import get_pass
from tokcompile.reporting.report import Report, StageReport, StepReport
from tokcompile.reporting.status import Status
from tokcompile.rewrite.context import Context
from tokcompile.runtime.compiled_graph import CompiledGraph
from tokcompile.runtime.memories import Memories
from tokcompile.runtime.recording import Recording
from tokcompile.state import PreparedState


class Session:
    """See the module. One for each optimized model."""

    def __init__(
        self,
        recipe: Recipe | None,
        *,
        lowering: str = "inductor",
        on_no_match: str = "error",
        model: str = "",
        state: PreparedState | None = None,
        observed: Observed | None = None,
    ) -> None:
        """
        Args:
            state: what calibration prepared.
            observed: put the observers of the passes into the graphs instead of rewriting them, and note here what
                they see.
        """
        self.recipe, self.lowering, self.on_no_match = recipe, lowering, on_no_match
        self.prepared, self.counting = state, True
        self.observed = observed
        self.passes: list[tuple[Step, Pass]] = []
        if recipe is not None:
            for step in recipe.steps:
                kind = get_pass(step.pass_)
                self.passes.append((step, kind(step.params)))
            check_supported(recipe)
        self.stage = "forward"
        self.tracks_cache = False
        self.recordings: list[Recording] = []
        self.remembered = Memories()
        self.graphs: list[CompiledGraph] = []
        self.report = Report(model=model, recipe=recipe.name if recipe is not None else "")
        self.report.steps = [
            StepReport(pass_name=step.pass_, status=Status.NOT_CAPTURED, matches=0, reason="no graph was captured yet")
            for step, _ in self.passes
        ]
        self.matching = Matching(recipe, self.passes, self.report, on_no_match, self.observed)
        #: tensors of the dense model when it was optimized (see state.origin); and those that a saved model had lost
        self.origin: dict[str, tuple[int, torch.dtype]] = {}
        self.changed: dict[str, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy starts without compiled graphs: they read the state of this session
        return _session, (self.recipe, self.lowering, self.on_no_match, self.report.model, self.prepared)

    # .. the torch.compile backend

    def backend(self, graph_module: fx.GraphModule, _inputs: Sequence[Any]) -> CompiledGraph:
        reason = getattr(graph_module, "compile_subgraph_reason", None)
        graph = CompiledGraph(self, graph_module, whole=not (reason is not None and reason.graph_break))
        self.graphs.append(graph)
        return graph

    @property
    def compilations(self) -> int:
        """How many graphs were lowered so far (each variant counts)."""
        return sum(len(g.variants) for g in self.graphs)

    def note_uncaptured(self, stage: str, error: BaseException) -> None:
        self.report.stages.append(StageReport(name=stage, captured=False, reason=explain_failure(error)))

    @contextlib.contextmanager
    def at_stage(self, name: str) -> Iterator[None]:
        previous, self.stage = self.stage, name
        try:
            yield
        finally:
            self.stage = previous

    # .. matching

    @property
    def wants_scores(self) -> bool:
        """Whether a pass scores image features inside the image encoder."""
        return self.matching.wants_scores

    @property
    def scored_features(self) -> bool:
        """Whether one did."""
        return self.matching.scored_features

    def rewrite(self, ctx: Context, stage: str) -> None:
        """Apply the recipe to one graph and note in the report what happened."""
        self.matching.rewrite(ctx, stage)

    def check_matches(self, stage: str | None) -> None:
        """See :meth:`tokcompile.plan.expectations.Expectations.check`."""
        if self.observed is None:
            self.matching.expectations.check(stage)


def _session(
    recipe: Recipe | None, lowering: str, on_no_match: str, model: str, state: PreparedState | None
) -> Session:
    return Session(recipe, lowering=lowering, on_no_match=on_no_match, model=model, state=state)

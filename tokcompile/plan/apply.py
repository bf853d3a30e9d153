"""Plan the steps of a recipe on one graph, then rewrite by the plan: :class:`Matching`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import fx

from tokcompile.capture.canonical import canonicalise
from tokcompile.capture.flops import graph_flops
from tokcompile.capture.markers import FEATURE_SCORES
from tokcompile.errors import NarrowError, RecipeError, RewriteError, UnprofitableError
from tokcompile.kinds import LOCAL, MERGED, Stage
from tokcompile.plan.blame import blamed
from tokcompile.plan.expectations import Expectations, miss
from tokcompile.plan.layer_tokens import LayerTokens
from tokcompile.plan.observed import Observed
from tokcompile.plan.pass_base import Pass
from tokcompile.plan.plan import Plan, PlannedStep
from tokcompile.recipes import Recipe, Step
from tokcompile.regions import find_regions
from tokcompile.regions.model import Region
from tokcompile.regions.places import layer_of, region_keys
from tokcompile.reporting.paths import path_globs
from tokcompile.reporting.report import Report, StepReport
from tokcompile.reporting.status import Status
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.pruned_cache import check_readers, narrow_pruned_cache


class Matching:
    """The steps of one recipe on the graphs of one model; what came of them goes into the report.

    One class: a step goes from its regions to its entry in the report, whatever becomes of it on the way.

    Attributes:
        passes: step and pass, in the order of the recipe.
        observed: what calibration saw; None where graphs are rewritten instead.
        expectations: what the recipe expects of the report.
        scored_features: some pass scored image features inside the image encoder.
        pruned_encoder: an encoder that runs ahead of the decoder hands on fewer tokens than it had.
    """

    def __init__(
        self,
        recipe: Recipe | None,
        passes: Sequence[tuple[Step, Pass]],
        report: Report,
        on_no_match: str,
        observed: Observed | None = None,
    ) -> None:
        self.recipe, self.passes, self.report, self.observed = recipe, passes, report, observed
        self.on_no_match = on_no_match
        self.expectations = Expectations(recipe, passes, report, on_no_match)
        self.scored_features = self.pruned_encoder = False
        self._failed: set[tuple[int, str]] = set()  # step, cause
        #: step -> regions of a stack without a layer that it names, with the depth of that stack
        self._shallow: dict[int, dict[str, int]] = {}

    @property
    def wants_scores(self) -> bool:
        """Whether a pass scores image features inside the image encoder."""
        return any(method.scores_features for _, method in self.passes)

    # .. plan

    def find(self, ctx: Context) -> None:
        """Bring the graph of ``ctx`` into the form that regions are found in, and find them."""
        canonicalise(ctx.captured)
        narrow_pruned_cache(ctx.captured)
        ctx.regions = find_regions(ctx.captured.graph)
        ctx.places = {key: layer_of(ctx.regions, region) for region, key in region_keys(ctx.regions).items()}
        ctx.streams = [
            [s.layers[0].input, *(layer.output for layer in s.layers)] for s in ctx.regions.stacks if s.layers
        ]
        if self.recipe is not None and self.recipe.protect is not None:
            ctx.leading_tokens = self.recipe.protect.leading_tokens
            ctx.trailing_tokens = self.recipe.protect.trailing_tokens

    def plan(self, ctx: Context, stage: str) -> Plan:
        """What the recipe will do to the graph of ``ctx``, in which regions were found; changes nothing."""
        steps = []
        for index, (step, method) in enumerate(self.passes):
            ctx.step = index
            if not method.acts_in(stage) or (step.region in MERGED and not ctx.merges):
                continue
            steps.append(self._plan_step(ctx, step, method, stage))
        return Plan(stage, ctx.regions, steps)

    def _plan_step(self, ctx: Context, step: Step, method: Pass, stage: str) -> PlannedStep:
        planned = PlannedStep(ctx.step, step.pass_, reason=ctx.left_out.get(ctx.step, ""))
        if planned.reason:
            return planned
        for region in self._candidates(ctx, step, stage):
            if ctx.prepared is not None and ctx.prepared.has(step.pass_, ctx.key(region)):
                planned.state.append(region.path)
            try:
                with blamed(ctx, step, method, stage, region):
                    planned.taken[region] = method.plan(ctx, region)
            except NarrowError as error:
                planned.refused[region] = error
        if not planned.taken and not planned.refused:
            planned.reason = miss(ctx, step, self.recipe, stage)
        return planned

    def _candidates(self, ctx: Context, step: Step, stage: str) -> list[Region]:
        """The regions that a step is for.

        Raises:
            RecipeError: ``target.layers`` asks for a layer that no stack has.
        """
        protect = self.recipe.protect if self.recipe else None
        found, shallow = [], self._shallow.setdefault(ctx.step, {})
        for region in ctx.regions.of(step.region):
            if not step.target.matches_path(region.path) or (protect and protect.covers(region.path)):
                continue
            if step.target.modality not in (None, getattr(region, "modality", None)):
                continue
            if step.target.layers is not None:
                place = ctx.layer(region)
                if place is None:
                    continue
                try:
                    if place[0] not in step.target.layer_indices(place[1]):
                        continue
                except RecipeError:
                    shallow[region.path] = place[1]
                    continue
            found.append(region)
        # an image encoder is compiled ahead of the decoder, which may be deeper
        if shallow and not found and stage != Stage.ENCODER and not self.report.steps[ctx.step].matches:
            raise RecipeError(f"steps[{ctx.step}] ({step.pass_}): {_too_deep(step, shallow)}")
        return found

    # .. rewrite

    def rewrite(self, ctx: Context, stage: str) -> None:
        """Apply the recipe to one graph and note in the report what happened.

        Raises:
            RewriteError: a pass failed by an error of its own. The graph may be half rewritten and must not run; see
                :meth:`leave_out`.
        """
        self.find(ctx)
        self.expectations.cover(ctx.regions)
        before = graph_flops(ctx.captured.graph)
        self._note_regions(ctx, stage)
        if self.pruned_encoder and stage != "encoder":
            check_readers(ctx)
        layers = LayerTokens(ctx.regions, stage)
        markers = ctx.captured.graph.find_nodes(op="call_function", target=FEATURE_SCORES)
        scored = [self._score_features(ctx, node, stage) for node in markers]
        if self.observed is not None:
            self._observe(ctx, stage)
        else:
            plan = self.plan(ctx, stage)
            planned = plan.as_dict(ctx.captured.graph)
            changed = self._by(ctx, plan)
            self._note_plan(planned)
            after = graph_flops(ctx.captured.graph)
            for entry in changed:
                entry.flop_ratio = before / max(after, 1)
        self.scored_features |= any(scored)
        if not any(layer["stage"] == stage for layer in self.report.layers):
            self.report.layers += layers.after()

    def leave_out(self, error: RewriteError) -> None:
        """A step failed at a graph, which is captured afresh and rewritten without it; says so once for each cause.

        Raises:
            RewriteError: with ``on_no_match="error"``, and while observing.
        """
        entry, cause = self.report.steps[error.step], f"{type(error.__cause__).__name__}: {error.__cause__}"
        told = (error.step, cause) in self._failed
        if not told:
            self._failed.add((error.step, cause))
            earlier = entry.reason if entry.status == Status.REWRITE_FAILED else ""
            entry.status, entry.reason = Status.REWRITE_FAILED, "; ".join(filter(None, (earlier, str(error))))
            self.expectations.note(-1, str(error))
        if self.on_no_match == "error" or self.observed is not None:
            raise error
        if not told and self.on_no_match == "warn":
            warnings.warn(f"{error}. This graph runs as without that step", stacklevel=5)

    def _by(self, ctx: Context, plan: Plan) -> list[StepReport]:
        """Rewrite the graph by ``plan``; the reports of the steps that changed it."""
        changed: list[StepReport] = []
        for planned in plan.steps:
            ctx.step = planned.index
            step, method = self.passes[planned.index]
            if changed:  # earlier steps moved what the regions of this one are made of
                if step.region in LOCAL:
                    ctx.regions = find_regions(ctx.captured.graph)
                planned = self._plan_step(ctx, step, method, plan.stage)
            if self._apply(ctx, planned, plan.stage):
                changed.append(self.report.steps[planned.index])
        return changed

    def _apply(self, ctx: Context, planned: PlannedStep, stage: str) -> bool:
        """Apply one step and note what came of it; whether the graph was changed."""
        (step, method), entry = self.passes[planned.index], self.report.steps[planned.index]
        problems = [(region.path, error) for region, error in planned.refused.items()]  # several can have one path
        done: list[Region] = []
        details: dict[str, dict[str, Any]] = {}
        for region in planned.taken:
            try:
                with blamed(ctx, step, method, stage, region):
                    details[region.path] = method.apply(ctx, region)
                done.append(region)
            except NarrowError as error:
                problems.append((region.path, error))
        self._note(entry, done, problems, planned.reason, stage, step, method)
        entry.details.update(merged_details(details))
        return bool(done)

    def _observe(self, ctx: Context, stage: str) -> None:
        """Let the passes that are calibrated put their observers on the graph."""
        assert self.observed is not None
        for index, (step, method) in enumerate(self.passes):
            ctx.step = index
            if method.calibration == "none" or not method.acts_in(stage) or (step.region in MERGED and not ctx.merges):
                continue
            problems: list[tuple[str, NarrowError]] = []
            done: list[Region] = []
            for region in self._candidates(ctx, step, stage):
                try:
                    seen = self.observed.of(ctx, region)
                    with blamed(ctx, step, method, stage, region):
                        method.observe(ctx, region, seen)
                    self.observed.note(ctx, seen)
                    done.append(region)
                except NarrowError as error:
                    problems.append((region.path, error))
                    self.observed.forget(ctx, region)
            reason = "" if done or problems else miss(ctx, step, self.recipe, stage)
            self._note(self.report.steps[index], done, problems, reason, stage, step, method)

    def _score_features(self, ctx: Context, marker: fx.Node, stage: str) -> bool:
        """Whether some pass scored the features that ``marker`` marks."""
        features: Any = marker.args[0]
        scored = False
        for index, (step, method) in enumerate(self.passes):
            if not method.scores_features or index in ctx.left_out:
                continue
            try:
                with blamed(ctx, step, method, stage, features, index):
                    scores = method.score_features(ctx, features)
            except NarrowError as error:
                self.report.steps[index].status, self.report.steps[index].reason = Status.CONDITION_FAILED, str(error)
                continue
            marker.replace_all_uses_with(scores)
            scored = True
        return scored

    # .. the report

    def _note(
        self,
        entry: StepReport,
        done: Sequence[Region],
        problems: Sequence[tuple[str, NarrowError]],
        missing: str,
        stage: str,
        step: Step,
        method: Pass,
    ) -> None:
        """What one step did to one graph."""
        reasons = list(dict.fromkeys(str(error) for _, error in problems))
        if entry.status == Status.REWRITE_FAILED:
            pass  # in some graph, whatever becomes of it in others
        elif entry.matches:
            entry.status = Status.MATCHED
            later = self._no_longer(step, method, entry, stage, problems)
            entry.reason = "; ".join(filter(None, (entry.reason, *later)))
        elif done:
            entry.status, entry.reason = Status.MATCHED, "; ".join(reasons)
        elif problems:
            unprofitable = all(isinstance(error, UnprofitableError) for _, error in problems)
            entry.status = Status.UNPROFITABLE if unprofitable else Status.CONDITION_FAILED
            entry.reason = reasons[0]
        elif entry.status in (Status.NOT_CAPTURED, Status.STRUCTURE_MISS):
            entry.status, entry.reason = Status.STRUCTURE_MISS, missing
        if done:
            entry.matches = max(entry.matches, len(done))
            entry.regions = sorted({*entry.regions, *(region.path for region in done)})

    def _no_longer(
        self, step: Step, method: Pass, entry: StepReport, stage: str, problems: Sequence[tuple[str, NarrowError]]
    ) -> list[str]:
        """Regions that were changed in one graph and stay as they are in another; warns of each once."""
        if method.stage == "decode" and stage != "decode":
            return []
        texts = dict.fromkeys(
            f"not in another {stage} graph of '{path}': {error}"
            for path, error in problems
            if path in entry.regions and not isinstance(error, UnprofitableError)
        )
        found = [text for text in texts if text not in entry.reason]
        if found and self.on_no_match != "ignore":
            warnings.warn(f"step '{step.pass_}': " + "; ".join(found), stacklevel=2)
        return found

    def _note_regions(self, ctx: Context, stage: str) -> None:
        if any(region.get("stage") == stage for region in self.report.regions):
            return
        fresh = Report.from_regions(ctx.regions)
        for item in fresh.regions:
            item["stage"] = stage
        self.report.regions += fresh.regions
        self.report.near_misses += fresh.near_misses

    def _note_plan(self, planned: dict[str, Any]) -> None:
        if planned["steps"] and not any(known["stage"] == planned["stage"] for known in self.report.plans):
            self.report.plans.append(planned)


def _too_deep(step: Step, shallow: dict[str, int]) -> str:
    """What to say where no stack has the layers that ``target.layers`` names; ``shallow``: region path -> depth."""
    stacks = {depth: [path for path, other in shallow.items() if other == depth] for depth in shallow.values()}
    text = ""
    for depth in sorted(stacks):  # of the deepest one it says which layer is outside
        try:
            step.target.layer_indices(depth)
        except RecipeError as error:
            text = str(error)
    return f"{text}; " + "; ".join(f"{', '.join(path_globs(paths))}: {n} layers" for n, paths in stacks.items())


def merged_details(details: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the pass said of each region: once where all regions agree, else by module path."""
    names = dict.fromkeys(name for item in details.values() for name in item)
    merged: dict[str, Any] = {}
    for name in names:
        values = {path: item[name] for path, item in details.items() if name in item}
        same = all(v == next(iter(values.values())) for v in values.values())
        merged[name] = next(iter(values.values())) if same else values
    return merged

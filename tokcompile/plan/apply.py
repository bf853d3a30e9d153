"""Apply the steps of a recipe to one graph."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import fx

from tokcompile.capture.canonical import canonicalise
from tokcompile.capture.flops import graph_flops
from tokcompile.capture.markers import FEATURE_SCORES
from tokcompile.errors import NarrowError, RecipeError, UnprofitableError
from tokcompile.kinds import Stage
from tokcompile.plan.expectations import LOCAL, MERGED, NOT_YET, check_supported, miss
from tokcompile.plan.layer_tokens import LayerTokens
from tokcompile.plan.pass_base import Pass, Seen
from tokcompile.recipes import Recipe, Step
from tokcompile.regions import find_regions
from tokcompile.regions.model import Region, Regions
from tokcompile.regions.places import layer_of, region_keys
from tokcompile.registry import get_pass
from tokcompile.reporting.report import Report, StepReport
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.pruned_cache import check_readers, narrow_pruned_cache


class Matching:
    """What a recipe matches in the graphs of one model, and the report of it.

    Attributes:
        recipe, passes: the steps, each with its pass.
        report: what was found and changed so far.
        seen: step -> region key -> what calibration saw there.
        resumed: sums of an earlier calibration that was broken off.
        covering: globs of ``protect.paths`` that cover a region.
        scored_features: some pass scores image features inside the image encoder.
        pruned_encoder: an encoder that runs ahead of the decoder hands on fewer tokens than it had.
    """

    def __init__(self, recipe: Recipe | None, *, on_no_match: str, model: str, observing: bool) -> None:
        self.recipe, self.on_no_match, self.observing = recipe, on_no_match, observing
        self.passes: list[tuple[Step, Pass]] = []
        if recipe is not None:
            self.passes = [(step, get_pass(step.pass_)(step.params)) for step in recipe.steps]
            check_supported(recipe)
        self.seen: dict[int, dict[str, Seen]] = {}
        self.resumed: dict[tuple[int, str], dict[str, Any]] = {}
        self.scored_features = self.pruned_encoder = False
        self.covering: set[str] = set()
        self.report = Report(model=model, recipe=recipe.name if recipe is not None else "")
        self.report.steps = [
            StepReport(pass_name=step.pass_, status="structure_miss", matches=0, regions=[], reason=NOT_YET)
            for step, _ in self.passes
        ]

    def rewrite(self, ctx: Context, stage: Stage) -> None:
        """Apply the recipe to one graph and note in the report what happened."""
        canonicalise(ctx.captured)
        narrow_pruned_cache(ctx.captured)
        ctx.regions = find_regions(ctx.captured.graph)
        ctx.places = {key: layer_of(ctx.regions, region) for region, key in region_keys(ctx.regions).items()}
        ctx.streams = [
            [s.layers[0].input, *(layer.output for layer in s.layers)] for s in ctx.regions.stacks if s.layers
        ]
        protect = self.recipe.protect if self.recipe is not None else None
        if protect is not None:
            ctx.leading_tokens = protect.leading_tokens
            self.covering.update(*(protect.covering(region.path) for region in ctx.regions.regions))
        before = graph_flops(ctx.captured.graph)
        self._note_regions(ctx.regions, stage)
        if self.pruned_encoder and stage is not Stage.ENCODER:
            check_readers(ctx)
        layers = LayerTokens(ctx.regions, stage.value)
        for node in ctx.captured.graph.find_nodes(op="call_function", target=FEATURE_SCORES):
            self._score_features(ctx, node)
        changed: list[StepReport] = []
        for index, (step, method) in enumerate(self.passes):
            ctx.step = index
            if changed and step.region in LOCAL:
                ctx.regions = find_regions(ctx.captured.graph)  # earlier steps moved what these regions are made of
            if self._apply(ctx, step, method, self.report.steps[index], stage):
                changed.append(self.report.steps[index])
        after = graph_flops(ctx.captured.graph)
        for entry in changed:
            entry.flop_ratio = before / max(after, 1)
        if not any(layer["stage"] == stage for layer in self.report.layers):
            self.report.layers += layers.after()

    @property
    def wants_scores(self) -> bool:
        """Whether a pass scores image features inside the image encoder."""
        return any(method.scores_features for _, method in self.passes)

    def _score_features(self, ctx: Context, marker: fx.Node) -> None:
        for index, (_, method) in enumerate(self.passes):
            if not method.scores_features:
                continue
            try:
                scores = method.score_features(ctx, marker.args[0])  # type: ignore[arg-type]
            except NarrowError as error:
                self.report.steps[index].status, self.report.steps[index].reason = "condition_failed", str(error)
                continue
            marker.replace_all_uses_with(scores)
            self.scored_features = True

    def _candidates(self, ctx: Context, step: Step) -> list[Region]:
        """The regions that a step is for.

        Raises:
            RecipeError: ``target.layers`` asks for a layer that no stack has.
        """
        protect = self.recipe.protect if self.recipe else None
        found, outside = [], None
        for region in ctx.regions.of(step.region):
            if not step.target.matches_path(region.path) or (protect and protect.covers(region.path)):
                continue
            if step.target.modality not in (None, region.variant.get("modality")):
                continue
            if step.target.layers is not None:
                place = ctx.layer(region)
                try:
                    if place is None or place[0] not in step.target.layer_indices(place[1]):
                        continue
                except RecipeError as error:
                    outside = error  # another stack of the model may be deeper
                    continue
            found.append(region)
        if outside is not None and not found:
            raise RecipeError(f"steps[{ctx.step}] ({step.pass_}): {outside}")
        return found

    def _apply(self, ctx: Context, step: Step, method: Pass, entry: StepReport, stage: Stage) -> bool:
        """Apply one step (or observe for it), note what came of it; whether the graph was changed."""
        if (self.observing and method.calibration == "none") or (stage is Stage.DECODE and method.stage == "prefill"):
            return False
        if not ctx.merges and step.region in MERGED:
            return False
        problems: list[tuple[str, NarrowError]] = []  # with the path of the region; several can have one
        done: list[Region] = []
        details: dict[str, dict[str, Any]] = {}
        for region in self._candidates(ctx, step):
            try:
                if self.observing:
                    seen = self._seen(ctx, region)
                    method.observe(ctx, region, seen)
                    self.seen.setdefault(ctx.step, {})[seen.key] = seen
                else:
                    details[region.path] = method.apply(ctx, region)
                done.append(region)
            except NarrowError as error:
                problems.append((region.path, error))
                if self.observing:
                    self._forget(ctx, region)
        reasons = list(dict.fromkeys(str(p) for _, p in problems))
        if entry.matches:
            entry.status = "matched"
            later = self._no_longer(step, method, entry, stage, problems)
            entry.reason = "; ".join(filter(None, (entry.reason, *later)))
        elif done:
            entry.status, entry.reason = "matched", "; ".join(reasons)
        elif problems:
            unprofitable = all(isinstance(p, UnprofitableError) for _, p in problems)
            entry.status, entry.reason = "unprofitable" if unprofitable else "condition_failed", reasons[0]
        elif entry.status in ("structure_miss", "not_captured"):
            entry.status, entry.reason = "structure_miss", miss(self.recipe, ctx, step, stage)
        if done:
            entry.matches = max(entry.matches, len(done))
            entry.regions = sorted({*entry.regions, *(r.path for r in done)})
            entry.details.update(merged_details(details))
        return bool(done) and not self.observing

    def _no_longer(
        self, step: Step, method: Pass, entry: StepReport, stage: Stage, problems: Sequence[tuple[str, NarrowError]]
    ) -> list[str]:
        """Regions that were changed in one graph and stay as they are in another; warns of each once."""
        if method.stage == "decode" and stage is not Stage.DECODE:
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

    def _seen(self, ctx: Context, region: Region) -> Seen:
        """What calibration has seen of ``region``; noted only once the pass takes the region."""
        key = ctx.key(region)
        seen = self.seen.get(ctx.step, {}).get(key)
        if seen is None:
            layer, depth = ctx.layer(region) or (None, None)
            seen = Seen(key, region.path, layer, depth, sums=self.resumed.pop((ctx.step, key), {}))
        return seen

    def _forget(self, ctx: Context, region: Region) -> None:
        """A region that was refused before anything was noted of it was not seen."""
        regions, key = self.seen.get(ctx.step, {}), ctx.key(region)
        seen = regions.get(key)
        if seen is not None and not (seen.sums or seen.weights or seen.facts):
            del regions[key]

    def _note_regions(self, regions: Regions, stage: Stage) -> None:
        fresh = Report.from_regions(regions)
        for item in fresh.regions:
            item["stage"] = stage.value
        if not any(r.get("stage") == stage for r in self.report.regions):
            self.report.regions += fresh.regions
            self.report.near_misses += fresh.near_misses


def merged_details(details: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the pass said of each region: once where all regions agree, else by module path."""
    names = dict.fromkeys(name for item in details.values() for name in item)
    merged: dict[str, Any] = {}
    for name in names:
        values = {path: item[name] for path, item in details.items() if name in item}
        same = all(v == next(iter(values.values())) for v in values.values())
        merged[name] = next(iter(values.values())) if same else values
    return merged

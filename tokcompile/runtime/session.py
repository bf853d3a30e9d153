"""One optimized model's state: the recipe, the graphs compiled for it, and the report of what was done."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from tokcompile.capture.canonical import canonicalise
from tokcompile.capture.flops import graph_flops
from tokcompile.capture.markers import FEATURE_SCORES
from tokcompile.errors import NarrowError, NoMatchError, RecipeError, UnprofitableError
from tokcompile.kinds import KINDS
from tokcompile.plan.apply import LOCAL, merged_details
from tokcompile.plan.expectations import check_supported
from tokcompile.plan.layer_tokens import LayerTokens
from tokcompile.plan.pass_base import Pass, Seen
from tokcompile.recipes import Recipe, Step
from tokcompile.regions import find_regions
from tokcompile.regions.model import Region, Regions
from tokcompile.regions.places import layer_of, region_keys
from tokcompile.registry import get_pass
from tokcompile.reporting.paths import path_globs
from tokcompile.reporting.report import Report, StageReport, StepReport
from tokcompile.reporting.status import Status
from tokcompile.rewrite.context import Context
from tokcompile.rewrite.pruned_cache import check_readers, narrow_pruned_cache
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
        observing: bool = False,
    ) -> None:
        """
        Args:
            state: what calibration prepared.
            observing: put the observers of the passes into the graphs instead of rewriting them.
        """
        self.recipe, self.lowering, self.on_no_match = recipe, lowering, on_no_match
        self.prepared, self.observing, self.counting = state, observing, True
        #: step -> region key -> what calibration saw there; and sums of an earlier run that was broken off
        self.seen: dict[int, dict[str, Seen]] = {}
        self.resumed: dict[tuple[int, str], dict[str, Any]] = {}
        self.passes: list[tuple[Step, Pass]] = []
        if recipe is not None:
            for step in recipe.steps:
                kind = get_pass(step.pass_)
                self.passes.append((step, kind(step.params)))
            check_supported(recipe)
        self.stage = "forward"
        self.scored_features = False
        self.tracks_cache = False
        #: an encoder that runs ahead of the decoder hands on fewer tokens than it had
        self.pruned_encoder = False
        self.recordings: list[Recording] = []
        self.remembered = Memories()
        self.graphs: list[CompiledGraph] = []
        self.report = Report(model=model, recipe=recipe.name if recipe is not None else "")
        self.report.steps = [
            StepReport(pass_name=step.pass_, status=Status.NOT_CAPTURED, matches=0, reason="no graph was captured yet")
            for step, _ in self.passes
        ]
        self._checked: set[int] = set()
        self._covering: set[str] = set()  # globs of protect.paths that cover a region
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
        reason = " ".join(str(error).split("\n\n")[0].split())[:500]
        self.report.stages.append(StageReport(name=stage, captured=False, reason=f"{type(error).__name__}: {reason}"))

    @contextlib.contextmanager
    def at_stage(self, name: str) -> Iterator[None]:
        previous, self.stage = self.stage, name
        try:
            yield
        finally:
            self.stage = previous

    # .. matching

    def rewrite(self, ctx: Context, stage: str) -> None:
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
            self._covering.update(*(protect.covering(region.path) for region in ctx.regions.regions))
        before = graph_flops(ctx.captured.graph)
        self._note_regions(ctx.regions, stage)
        if self.pruned_encoder and stage != "encoder":
            check_readers(ctx)
        layers = LayerTokens(ctx.regions, stage)
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
                self.report.steps[index].status, self.report.steps[index].reason = Status.CONDITION_FAILED, str(error)
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
            if step.target.modality not in (None, getattr(region, "modality", None)):
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

    def _apply(self, ctx: Context, step: Step, method: Pass, entry: StepReport, stage: str) -> bool:
        """Apply one step (or observe for it), note what came of it; whether the graph was changed."""
        if (self.observing and method.calibration == "none") or (stage == "decode" and method.stage == "prefill"):
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
        if entry.status == Status.MATCHED:
            later = self._no_longer(step, method, entry, stage, problems)
            entry.reason = "; ".join(filter(None, (entry.reason, *later)))
        elif done:
            entry.status, entry.reason = Status.MATCHED, "; ".join(reasons)
        elif problems:
            unprofitable = all(isinstance(p, UnprofitableError) for _, p in problems)
            entry.status = Status.UNPROFITABLE if unprofitable else Status.CONDITION_FAILED
            entry.reason = reasons[0]
        elif entry.status in (Status.NOT_CAPTURED, Status.STRUCTURE_MISS):
            entry.status, entry.reason = Status.STRUCTURE_MISS, self._miss(ctx.regions, step.region, stage, step)
        if done:
            entry.matches = max(entry.matches, len(done))
            entry.regions = sorted({*entry.regions, *(r.path for r in done)})
            entry.details.update(merged_details(details))
        return bool(done) and not self.observing

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

    def _miss(self, regions: Regions, kind: str, stage: str, step: Step) -> str:
        found = ", ".join(f"{len(regions.of(k))} {k}" for k in KINDS if regions.of(k)) or "no region"
        near = regions.nearest_miss(kind)
        text = f"no {kind} in the {stage} graph (found {found})"
        if regions.of(kind):
            where = ", ".join(path_globs(region.path or "(model)" for region in regions.of(kind)))
            text = f"{len(regions.of(kind))} {kind} found ({where}), none fits the step's target filters"
            if self.recipe is not None and self.recipe.protect is not None and self.recipe.protect.paths:
                text += " and is outside of protect.paths"
        if near is not None:
            place = ", ".join(p for p in (near.path, near.source) if p)
            text += f"; nearest miss: {near.reason} [node {near.node.name}{', ' + place if place else ''}]"
        elif others := [k for k in get_pass(step.pass_).also if step.target.region is None and regions.of(k)]:
            text += f"; say target: {{region: {others[0]}}} to act there"
        elif kind == "merge_point":
            text += "; call with an image (pixel_values), or use a recipe for models without images"
        return text

    def _note_regions(self, regions: Regions, stage: str) -> None:
        fresh = Report.from_regions(regions)
        for item in fresh.regions:
            item["stage"] = stage
        if not any(r.get("stage") == stage for r in self.report.regions):
            self.report.regions += fresh.regions
            self.report.near_misses += fresh.near_misses

    def check_matches(self, stage: str | None) -> None:
        """Raise or warn, once for each step, when a step of the recipe changed nothing (or less than it expects).

        Args:
            stage: the stage that was just compiled, or None after a whole call: then steps that had no decode step to
                act on are not judged.
        """
        if self.recipe is None or self.observing:
            return
        problems, judged = self._unprotected(stage), []
        decoded = any(s.name == "decode" for s in self.report.stages)
        for index, ((step, method), entry) in enumerate(zip(self.passes, self.report.steps, strict=True)):
            due = (stage == "decode" or decoded) if method.stage == "decode" else stage != "encoder"
            if index in self._checked or not due or (stage == "decode" and method.stage != "decode"):
                continue
            judged.append(index)
            least, most = step.expect.min_matches, step.expect.max_matches
            if entry.matches < least and entry.status != Status.UNPROFITABLE:
                problems.append(
                    f"step '{step.pass_}' changed {entry.matches} region(s), expected at least {least}: {entry.reason}"
                )
            elif most is not None and entry.matches > most:
                problems.append(f"step '{step.pass_}' changed {entry.matches} regions, expected at most {most}")
        self.report.problems += [problem for problem in problems if problem not in self.report.problems]
        if problems and self.on_no_match == "error":
            stages = "; ".join(
                f"stage '{s.name}' was not captured: {s.reason}" for s in self.report.stages if not s.captured
            )
            text = "\n".join(problems) + (f"\n{stages}" if stages else "")
            raise NoMatchError(text + "\nPass on_no_match='warn' or 'ignore' to run the model unchanged.")
        self._checked.update(judged)
        if problems and self.on_no_match == "warn":
            warnings.warn("\n".join(problems), stacklevel=3)

    def _unprotected(self, stage: str | None) -> list[str]:
        """What is wrong with ``protect.paths``, once what there is to protect has been seen."""
        protect = self.recipe.protect if self.recipe else None
        if protect is None or stage == "encoder" or not all(s.captured for s in self.report.stages):
            return []
        known = path_globs(dict.fromkeys(region["path"] for region in self.report.regions if region["path"]))
        return [
            f"protect.paths: {glob!r} covers no region (there are {', '.join(known) or 'none'})"
            for glob in protect.paths
            if glob not in self._covering
        ]


def _session(
    recipe: Recipe | None, lowering: str, on_no_match: str, model: str, state: PreparedState | None
) -> Session:
    return Session(recipe, lowering=lowering, on_no_match=on_no_match, model=model, state=state)

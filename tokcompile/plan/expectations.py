"""What a recipe expects of the report once graphs are compiled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from tokcompile.errors import NoMatchError
from tokcompile.kinds import KINDS, Stage
from tokcompile.plan.pass_base import Pass
from tokcompile.recipes import Recipe, Step
from tokcompile.regions.model import AttentionRegion, Regions
from tokcompile.registry import get_pass
from tokcompile.reporting.paths import path_globs
from tokcompile.reporting.report import Report
from tokcompile.reporting.status import Status
from tokcompile.rewrite.context import Context

#: Steps of these say themselves why they changed nothing.
_TOLD = (Status.UNPROFITABLE, Status.REWRITE_FAILED)
WAY_OUT = "\nPass on_no_match='warn' or 'ignore' to run the model unchanged."


def miss(ctx: Context, step: Step, recipe: Recipe | None, stage: str) -> str:
    """Why ``step`` has no region in a graph: what there is, and what came nearest."""
    regions, kind = ctx.regions, step.region
    found = ", ".join(f"{len(regions.of(k))} {k}" for k in KINDS if regions.of(k)) or "no region"
    near = regions.nearest_miss(kind)
    text = f"no {kind} in the {stage} graph (found {found})"
    if regions.of(kind):
        where = ", ".join(path_globs(region.path or "(model)" for region in regions.of(kind)))
        text = f"{len(regions.of(kind))} {kind} found ({where}), none fits the step's target filters"
        if recipe is not None and recipe.protect is not None and recipe.protect.paths:
            text += " and is outside of protect.paths"
    if near is not None:
        place = ", ".join(p for p in (near.path, near.source) if p)
        text += f"; nearest miss: {near.reason} [node {near.node.name}{', ' + place if place else ''}]"
    elif others := [k for k in get_pass(step.pass_).also if step.target.region is None and regions.of(k)]:
        text += f"; say target: {{region: {others[0]}}} to act there"
    elif kind == "merge_point":
        text += f"; {_no_merge(ctx)}"
    return text


def _no_merge(ctx: Context) -> str:
    """What keeps image features out of the sequence of tokens, by what the call was given."""
    given = [str(node.meta.get("argument", "")).lower() for node in ctx.captured.placeholders]
    given = [name for name in given if not any(word in name for word in ("modules_", "parameters_", "buffers_"))]
    crossed = [region for region in ctx.regions.of(AttentionRegion) if region.cross]
    if crossed:
        where = ", ".join(path_globs(region.path or "(model)" for region in crossed))
        return (
            f"images enter this graph by cross-attention alone ({where}), so its sequence holds no visual tokens to "
            "drop; use a recipe for the vision encoder, or one for attention or feed-forward layers"
        )
    if any(word in name for name in given for word in ("pixel", "image")):
        return (
            "the call has an image, but its features do not enter the token sequence as tokens of their own; use a "
            "recipe for the vision encoder"
        )
    if any("inputs_embeds" in name for name in given):
        return (
            "the call has inputs_embeds, and nothing says which of them are of an image: pass visual_mask (bool "
            "[B, S], True for the tokens of images) with the call, or visual_mask= to tokcompile.optimize, or "
            "call the model that merges them with input_ids and pixel_values"
        )
    return "call with an image (pixel_values), or use a recipe for models without images"


class Expectations:
    """Whether each step of a recipe changed what it should have; each is judged once."""

    def __init__(
        self, recipe: Recipe | None, passes: Sequence[tuple[Step, Pass]], report: Report, on_no_match: str
    ) -> None:
        self.recipe, self.passes, self.report, self.on_no_match = recipe, passes, report, on_no_match
        self._judged: set[int] = set()
        self._problems: dict[int, list[str]] = {}  # step -> what the report says of it
        self._covering: set[str] = set()  # globs of protect.paths that cover a region

    def cover(self, regions: Regions) -> None:
        """Note which globs of ``protect.paths`` cover one of ``regions``."""
        if self.recipe is not None and self.recipe.protect is not None:
            self._covering.update(*(self.recipe.protect.covering(region.path) for region in regions.regions))

    def check(self, stage: Stage) -> None:
        """Raise or warn, once for each step, when a step of the recipe changed nothing (or less than it expects).

        Args:
            stage: the stage that was just compiled, or ``WHOLE`` after a whole call: then steps that had no decode
                step to act on are not judged.
        """
        if self.recipe is None:
            return
        self._settle()
        problems, judged, uncaptured = self._unprotected(stage), [], False
        self.note(-1, *problems)
        decoded = any(s.name == "decode" and s.captured for s in self.report.stages)
        for index, ((step, method), entry) in enumerate(zip(self.passes, self.report.steps, strict=True)):
            due = (stage == "decode" or decoded) if method.stage == "decode" else stage != "encoder"
            if index in self._judged or not due or (stage == "decode" and method.stage != "decode"):
                continue
            judged.append(index)
            least, most = step.expect.min_matches, step.expect.max_matches
            if entry.matches < least and entry.status not in _TOLD:
                problems.append(
                    f"step '{step.pass_}' changed {entry.matches} region(s), expected at least {least}: {entry.reason}"
                )
                uncaptured |= entry.status == Status.NOT_CAPTURED or not any(s.captured for s in self.report.stages)
                self.note(index, problems[-1])
            elif most is not None and entry.matches > most:
                problems.append(f"step '{step.pass_}' changed {entry.matches} regions, expected at most {most}")
                self.note(index, problems[-1])
        if problems and self.on_no_match == "error":
            stages = [f"stage '{s.name}' was not captured: {s.reason}" for s in self.report.stages if not s.captured]
            stages = [text for text in stages if not any(text in problem for problem in problems)]
            raise NoMatchError("\n".join([*stages, *problems] if uncaptured else [*problems, *stages]) + WAY_OUT)
        self._judged.update(judged)
        if problems and self.on_no_match == "warn":
            warnings.warn("\n".join(problems), stacklevel=4)

    def note(self, index: int, *problems: str) -> None:
        """Put problems of a step (-1: of the recipe) into the report; they leave it once the step is as expected."""
        self.report.problems += [problem for problem in problems if problem not in self.report.problems]
        self._problems.setdefault(index, []).extend(problems)

    def _settle(self) -> None:
        for index in [i for i in self._problems if i >= 0]:
            if self.report.steps[index].matches >= max(self.passes[index][0].expect.min_matches, 1):
                gone = self._problems.pop(index)
                kept = {text for texts in self._problems.values() for text in texts}
                self.report.problems = [text for text in self.report.problems if text in kept or text not in gone]

    def _unprotected(self, stage: Stage) -> list[str]:
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

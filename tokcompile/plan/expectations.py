"""What a recipe expects: of its passes before anything runs, and of the report once graphs are compiled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from tokcompile.errors import NoMatchError, RecipeError
from tokcompile.kinds import KINDS, LOCAL
from tokcompile.plan.pass_base import Pass
from tokcompile.recipes import Recipe, Step
from tokcompile.regions.model import Regions
from tokcompile.registry import get_pass
from tokcompile.reporting.paths import path_globs
from tokcompile.reporting.report import Report
from tokcompile.reporting.status import Status


def check_supported(recipe: Recipe) -> None:
    """Refuse what a recipe may say and no pass of this version acts on: nothing is ignored silently."""
    problems = []
    for number, step in enumerate(recipe.steps):
        where, method = f"steps[{number}] ({step.pass_})", get_pass(step.pass_)
        if step.region not in (method.regions, *method.also):
            known = " or ".join((method.regions, *method.also))
            problems.append(f"{where}: works on {known}, not on {step.region}; leave target.region out")
        if step.target.layers is not None and method.regions not in LOCAL:
            problems.append(f"{where}: takes no target.layers; its own parameters say at which depth it acts")
        if step.target.modality is not None and method.regions != "merge_point":
            problems.append(f"{where}: images and video are told apart at merge points only; leave target.modality out")
    if (
        recipe.protect is not None
        and recipe.protect.leading_tokens is not None
        and not any(get_pass(step.pass_).protects_leading for step in recipe.steps)
    ):
        problems.append("protect.leading_tokens: no pass of this recipe removes tokens inside an encoder; leave it out")
    if problems:
        raise RecipeError("\n".join(problems))


def miss(regions: Regions, step: Step, recipe: Recipe | None, stage: str) -> str:
    """Why ``step`` has no region in a graph: what there is, and what came nearest."""
    kind = step.region
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
        text += "; call with an image (pixel_values), or use a recipe for models without images"
    return text


class Expectations:
    """Whether each step of a recipe changed what it should have; each is judged once."""

    def __init__(
        self, recipe: Recipe | None, passes: Sequence[tuple[Step, Pass]], report: Report, on_no_match: str
    ) -> None:
        self.recipe, self.passes, self.report, self.on_no_match = recipe, passes, report, on_no_match
        self._judged: set[int] = set()
        self._covering: set[str] = set()  # globs of protect.paths that cover a region

    def cover(self, regions: Regions) -> None:
        """Note which globs of ``protect.paths`` cover one of ``regions``."""
        if self.recipe is not None and self.recipe.protect is not None:
            self._covering.update(*(self.recipe.protect.covering(region.path) for region in regions.regions))

    def check(self, stage: str | None) -> None:
        """Raise or warn, once for each step, when a step of the recipe changed nothing (or less than it expects).

        Args:
            stage: the stage that was just compiled, or None after a whole call: then steps that had no decode step to
                act on are not judged.
        """
        if self.recipe is None:
            return
        problems, judged = self._unprotected(stage), []
        decoded = any(s.name == "decode" for s in self.report.stages)
        for index, ((step, method), entry) in enumerate(zip(self.passes, self.report.steps, strict=True)):
            due = (stage == "decode" or decoded) if method.stage == "decode" else stage != "encoder"
            if index in self._judged or not due or (stage == "decode" and method.stage != "decode"):
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
        self._judged.update(judged)
        if problems and self.on_no_match == "warn":
            warnings.warn("\n".join(problems), stacklevel=4)

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

"""What a recipe asks for: what no pass gives is refused, and a step that changes nothing is told."""

from __future__ import annotations

import threading
import warnings
from typing import TYPE_CHECKING

from tokcompile.errors import NoMatchError, RecipeError
from tokcompile.kinds import KINDS, Stage
from tokcompile.plan.pass_base import Pass
from tokcompile.recipes import Recipe, Step
from tokcompile.registry import get_pass
from tokcompile.reporting.paths import path_globs
from tokcompile.reporting.report import StageReport
from tokcompile.rewrite.context import Context

if TYPE_CHECKING:
    from tokcompile.plan.apply import Matching

#: Region kinds that are rewritten one by one, in place; a step for them can choose layers.
LOCAL = ("attention", "feed_forward", "moe")
#: Region kinds of a sequence that image features enter.
MERGED = ("merge_point", "decoder_stack")
NOT_YET = "no graph was captured yet"
_WAY_OUT = "\nPass on_no_match='warn' or 'ignore' to run the model unchanged."


class Expectations:
    """Says when a step of a recipe changes nothing, or less than it expects: once for each step and reason."""

    def __init__(self, matching: Matching) -> None:
        self.matching, self.on_no_match = matching, matching.on_no_match
        self._checked: set[int] = set()
        self._told: set[tuple[Stage, str]] = set()
        self._problems: dict[int, list[str]] = {}  # step -> what stands of it in the report
        self._lock = threading.RLock()

    def check(self, stage: Stage) -> None:
        """Raise or warn, once for each step, when a step of the recipe changed nothing (or less than it expects).

        Args:
            stage: the stage that was just compiled, or ``WHOLE`` after a whole call: then steps that had no decode step
                to act on are not judged.

        Raises:
            NoMatchError: with ``on_no_match="error"``.
        """
        if self.matching.recipe is None or self.matching.observing:
            return
        report = self.matching.report
        self._settle()
        problems, judged, uncaptured = self._unprotected(stage), [], False
        self._note(-1, *problems)
        decoded = any(s.name == Stage.DECODE and s.captured for s in report.stages)
        for index, ((step, method), entry) in enumerate(zip(self.matching.passes, report.steps, strict=True)):
            due = (stage is Stage.DECODE or decoded) if method.stage == "decode" else stage is not Stage.ENCODER
            if index in self._checked or not due or (stage is Stage.DECODE and method.stage != "decode"):
                continue
            judged.append(index)
            least, most = step.expect.min_matches, step.expect.max_matches
            if entry.matches < least and entry.status != "unprofitable":
                uncaptured |= entry.status == "not_captured" or entry.reason == NOT_YET
                problems.append(
                    f"step '{step.pass_}' changed {entry.matches} region(s), expected at least {least}: {entry.reason}"
                )
                self._note(index, problems[-1])
            elif most is not None and entry.matches > most:
                problems.append(f"step '{step.pass_}' changed {entry.matches} regions, expected at most {most}")
                self._note(index, problems[-1])
        if problems and self.on_no_match == "error":
            stages = [f"stage '{s.name}' was not captured: {s.reason}" for s in report.stages if not s.captured]
            raise NoMatchError("\n".join([*stages, *problems] if uncaptured else [*problems, *stages]) + _WAY_OUT)
        self._checked.update(judged)
        if problems and self.on_no_match == "warn":
            warnings.warn("\n".join(problems), stacklevel=3)

    def fell_back(self, stage: Stage, reason: str) -> None:
        """A call ran this stage uncompiled: count it, and tell of each reason once.

        Raises:
            NoMatchError: a step has changed nothing yet because of it, and ``on_no_match="error"``.
        """
        with self._lock:
            report = self.matching.report
            for noted in report.stages:
                if noted.name == stage and not noted.captured and noted.reason == reason:
                    noted.fell_back += 1
                    break
            else:
                report.stages.append(StageReport(name=stage.value, captured=False, reason=reason, fell_back=1))
            cause = f"stage '{stage}' was not captured: {reason}"
            concerned = [i for i, (_, method) in enumerate(self.matching.passes) if _acts(method, stage)]
            for index in concerned:
                entry = report.steps[index]
                entry.fell_back += 1
                if entry.matches:
                    entry.status = "fell_back"
                elif stage is not Stage.ENCODER and entry.status in ("structure_miss", "not_captured"):
                    entry.status, entry.reason = "not_captured", cause
            if not concerned or self.matching.observing:
                return
            idle = []
            for index in concerned if stage is not Stage.ENCODER else ():
                step, entry = self.matching.passes[index][0], report.steps[index]
                if entry.status == "not_captured" and entry.matches < step.expect.min_matches:
                    idle.append(f"step '{step.pass_}' changed 0 region(s), expected at least {step.expect.min_matches}")
                    self._note(index, cause, idle[-1])
            if idle and self.on_no_match == "error":
                raise NoMatchError("\n".join((cause, *idle)) + _WAY_OUT)
            told = (stage, reason) in self._told
            self._told.add((stage, reason))
        if not told and self.on_no_match != "ignore":
            warnings.warn(
                f"{cause}. This call ran without what the recipe does there; further ones are counted in "
                "tokcompile.report(model)",
                stacklevel=4,
            )

    def served(self, stage: Stage) -> None:
        """A call ran this stage with a graph: steps that fell back are on again."""
        for (_, method), entry in zip(self.matching.passes, self.matching.report.steps, strict=True):
            if entry.status == "fell_back" and _acts(method, stage):
                entry.status = "matched"

    def never_reached(self, what: str, why: str) -> None:
        """A whole call that no graph took part in.

        Raises:
            NoMatchError: with ``on_no_match="error"``.
        """
        if self.matching.recipe is None or self.matching.observing or (Stage.WHOLE, what) in self._told:
            return
        idle = [
            f"step '{step.pass_}'"
            for (step, _), entry in zip(self.matching.passes, self.matching.report.steps, strict=True)
            if entry.matches < step.expect.min_matches and entry.status != "unprofitable"
        ]
        if not idle:
            return
        text = f"{what} ran without {', '.join(idle)}: {why}"
        self._note(-1, text)
        if self.on_no_match == "error":
            raise NoMatchError(text + _WAY_OUT)
        self._told.add((Stage.WHOLE, what))
        if self.on_no_match == "warn":
            warnings.warn(text, stacklevel=4)

    def _note(self, index: int, *problems: str) -> None:
        """Into the report; what is said of a step leaves it once the step does what is expected."""
        noted = self.matching.report.problems
        noted += [problem for problem in problems if problem not in noted]
        self._problems.setdefault(index, []).extend(problems)

    def _settle(self) -> None:
        for index, problems in list(self._problems.items()):
            if index >= 0 and self.matching.report.steps[index].matches >= max(
                self.matching.passes[index][0].expect.min_matches, 1
            ):
                del self._problems[index]
                kept = {text for texts in self._problems.values() for text in texts}
                self.matching.report.problems = [
                    text for text in self.matching.report.problems if text in kept or text not in problems
                ]

    def _unprotected(self, stage: Stage) -> list[str]:
        """What is wrong with ``protect.paths``, once what there is to protect has been seen."""
        recipe, report = self.matching.recipe, self.matching.report
        protect = recipe.protect if recipe else None
        if protect is None or stage is Stage.ENCODER or not all(s.captured for s in report.stages):
            return []
        known = path_globs(dict.fromkeys(region["path"] for region in report.regions if region["path"]))
        return [
            f"protect.paths: {glob!r} covers no region (there are {', '.join(known) or 'none'})"
            for glob in protect.paths
            if glob not in self.matching.covering
        ]


def _acts(method: Pass, stage: Stage) -> bool:
    """Whether a pass may change graphs of a stage."""
    if stage is Stage.ENCODER:
        return method.stage == "any" and (method.regions not in MERGED or method.scores_features)
    if stage is Stage.DECODE:
        return method.stage != "prefill" and method.regions not in MERGED
    return method.stage != "decode"


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


def miss(recipe: Recipe | None, ctx: Context, step: Step, stage: Stage) -> str:
    """Why a step finds no region of its kind in a graph."""
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
    crossed = [r for r in ctx.regions.of("attention") if r.variant.get("cross") == "cross"]
    if any(word in name for name in given for word in ("pixel", "image", "cross_attention")) or (
        crossed and ctx.regions.of("vision_encoder")
    ):
        if crossed:
            where = ", ".join(path_globs(region.path or "(model)" for region in crossed))
            return (
                f"the image enters by cross-attention ({where}), so the sequence holds no visual tokens to drop; "
                "use a recipe for the vision encoder, or one for attention or feed-forward layers"
            )
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

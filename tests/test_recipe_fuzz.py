"""Valid recipes, mutated: the outcome is an error that names something, or a step that did what it says. Nothing else.

Mutations are made on the tree of a recipe and written as text, so that keys can also be there twice. What still parses
is applied to a tiny model; what the report says was done is then checked against the recipe, key by key.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokcompile
from tests.zoo.encoders_for_pruning import ENCODERS
from tests.zoo.vlm import IMAGE, PlainVLM, randomize
from tokcompile.errors import RecipeError, TokcompileError
from tokcompile.recipe.recipe import Recipe
from tokcompile.recipe.steps import Protect
from tokcompile.registry import get_pass
from tokcompile.reporting.report import Report
from tokcompile.runtime.recording import KeptEntry

TEXT_LAYERS, VISION_LAYERS, PATCHES, TEXT = 3, 2, 16, 5
MERGE = {
    "pass": "todre",
    "target": {"region": "merge_point"},
    "expect": {"min_matches": 1, "max_matches": 1},
    "params": {"keep": 0.25, "criterion": "k_center", "drop_layer": 1},
}
VISION = {"pass": "class_attention", "target": {"path": "*"}, "params": {"keep": [0.5], "at": [0.5]}}
SPARSE = {
    "pass": "token_sparse",
    "target": {"layers": [0, "-2--1"]},
    "params": {"keep": 0.5, "window": 2, "least": 1, "pool": 1, "calm": 1.0, "min_length": 0},
}
#: (the model that it is for, the recipe)
VALID: list[tuple[str, dict[str, Any]]] = [
    ("vlm", {"recipe_version": 1, "steps": [MERGE]}),
    ("vlm", {"recipe_version": 1, "description": "Two.", "steps": [MERGE, SPARSE], "protect": {"paths": ["*s.1"]}}),
    ("vlm", {"recipe_version": 1, "steps": [{"pass": "pool", "params": {"keep": 5}}, SPARSE]}),
    ("vlm", {"recipe_version": 1, "extends": "vlm_random_90", "protect": {"paths": ["encoder*"]}}),
    ("vit", {"recipe_version": 1, "steps": [VISION], "protect": {"leading_tokens": 3}}),
    (
        "vit",
        {"recipe_version": 1, "steps": [{"pass": "patch_random", "params": {"keep": [9], "at": [0.5], "seed": 3}}]},
    ),
]


class Pairs(list[tuple[str, Any]]):
    """A mapping whose keys may be there twice."""


def tree(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs((key, tree(entry)) for key, entry in value.items())
    return [tree(entry) for entry in value] if isinstance(value, list) else value


def written(value: Any) -> str:
    """As YAML, in flow style."""
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(entry)}" for key, entry in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return json.dumps(value)


def places(value: Any) -> list[tuple[Any, int]]:
    """(container, index) of everything in a tree."""
    found = []
    for index, entry in enumerate(value):
        inside = entry[1] if isinstance(value, Pairs) else entry
        found.append((value, index))
        if isinstance(inside, list):
            found += places(inside)
    return found


def misspelt(draw: Callable[[Any], Any], key: str) -> str:
    at = draw(st.integers(0, max(len(key) - 1, 0)))
    return draw(st.sampled_from([key[:at] + key[at + 1 :], key[:at] + "x" + key[at:], key.upper(), f" {key}", ""]))


def other(draw: Callable[[Any], Any], value: Any) -> Any:
    """Another value: of another type, out of range, or one that may well be right."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return draw(
            st.sampled_from(
                [
                    0,
                    1,
                    2,
                    3,
                    7,
                    -1,
                    10**12,
                    0.0,
                    0.3,
                    0.75,
                    1.0,
                    1.5,
                    -0.5,
                    1e-9,
                    math.nan,
                    math.inf,
                    "0.5",
                    "50%",
                    None,
                    True,
                    [value],
                    Pairs([("keep", value)]),
                ]
            )
        )
    if isinstance(value, str):
        return draw(st.sampled_from([*ODD_TEXT, value[:-1], value + "s", value.upper(), 3, None, False, [value]]))
    return draw(st.sampled_from([None, True, 0, "all", [], Pairs(), [value], [0], ["0-1"], ["1-0"], [0, 0.5]]))


ODD_TEXT = [
    "",
    "*",
    "layers.1*",
    "layers.*",
    "encoder.*",
    "nowhere.*",
    "[",
    "max_sum",
    "random",
    "pool",
    "attention",
    "merge_point",
    "feed_forward",
    "vision_encoder",
    "0-1",
    "-1--1",
    "5-9",
    "vit_prune_50",
    "a.yaml",
    "image",
]
#: Whole blocks that may be added to the recipe or to a step.
BLOCKS: dict[str, list[Any]] = {
    "target": [
        {"layers": [0]},
        {"layers": ["-1--1"]},
        {"layers": [5]},
        {"path": "layers.1*"},
        {"path": "nowhere"},
        {"modality": "image"},
        {"modality": "video"},
        {"region": "attention"},
        {"region": "decoder_stack"},
    ],
    "expect": [{"min_matches": 2}, {"max_matches": 1}, {"min_matches": 3, "max_matches": 1}, {"min_matches": 0}],
    "protect": [
        {"paths": ["layers.0*"]},
        {"paths": ["encoder*"]},
        {"paths": ["nowhere"]},
        {"paths": []},
        {"paths": ["*"]},
        {"leading_tokens": 3},
        {"leading_tokens": 0},
        {"leading_tokens": 99},
        {},
    ],
    "extends": ["vlm_prune_90", "vit_prune_50", "nothing", 3],
}


@st.composite
def mutated(draw: Callable[[Any], Any]) -> tuple[str, str]:
    model, data = draw(st.sampled_from(VALID))
    root = tree(copy.deepcopy(data))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["value", "value", "remove", "misspell", "repeat", "reorder", "block", "block"]))
        if kind == "block":
            key = draw(st.sampled_from(list(BLOCKS)))
            steps = dict(root).get("steps")
            entries = [step for step in steps if isinstance(step, Pairs)] if isinstance(steps, list) else []
            of_a_step = key in ("target", "expect") and entries
            owner = draw(st.sampled_from(entries)) if of_a_step else root
            if isinstance(owner, Pairs):
                owner[:] = [pair for pair in owner if pair[0] != key]
                owner.append((key, tree(draw(st.sampled_from(BLOCKS[key])))))
            continue
        if not (found := places(root)):
            continue
        owner, index = draw(st.sampled_from(found))
        if kind == "remove":
            del owner[index]
        elif kind == "repeat":
            owner.insert(draw(st.integers(0, len(owner))), copy.deepcopy(owner[index]))
        elif kind == "reorder":
            owner[:] = draw(st.permutations(owner))
        elif isinstance(owner, Pairs):
            key, value = owner[index]
            owner[index] = (misspelt(draw, key), value) if kind == "misspell" else (key, other(draw, value))
        else:
            owner[index] = other(draw, owner[index])
    return model, written(root)


# ------------------------------------------------------------------------------------------------------ the model


Models = dict[str, tuple[nn.Module, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def models() -> Models:
    """Name -> model and inputs: one image of 16 patches among 5 tokens of text; the images behind a class token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vlm = randomize(PlainVLM("index_put", layers=TEXT_LAYERS))
        vit = ENCODERS["vit"]()
        pixels = torch.randn(1, 3, 32, 32)
    ids = torch.cat([torch.tensor([[5, 6]]), torch.full((1, PATCHES), IMAGE), torch.tensor([[7, 8, 9]])], 1)
    return {
        "vlm": (vlm, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}),
        "vit": (vit.model, vit.inputs(1)),
    }


def outcome(model: nn.Module, inputs: dict[str, Tensor], text: str) -> str:
    """What came of a recipe: the name of the error, or "applied"; all that was said is checked here."""
    try:
        recipe = Recipe.parse(text, "r.yaml")
    except RecipeError as error:
        for line in str(error).split("\n"):
            assert re.match(r"[\w.]+\.yaml:\d+:\d+: \S", line), line
        return "RecipeError"
    torch._dynamo.reset()
    refusal = None
    try:
        optimized = tokcompile.optimize(model, recipe, inputs=inputs, lowering="eager")
        with torch.no_grad(), tokcompile.record(optimized) as recording:
            optimized(**inputs)
    except TokcompileError as error:
        refusal = error
    if refusal is None:
        acted_on(recipe, tokcompile.report(optimized), recording.kept)
        return "applied"
    assert not (isinstance(refusal, RecipeError) and refusal.mistakes), "a mistake that reading should have found"
    assert any(name in str(refusal) for name in ["protect.", *(step.pass_ for step in recipe.steps)]), str(refusal)
    return type(refusal).__name__


def acted_on(recipe: Recipe, report: Report, kept: list[KeptEntry]) -> None:
    """Every key of the recipe did what it says."""
    tokens = PATCHES
    protect = recipe.protect or Protect()
    modalities = {
        region["path"]: region["variant"].get("modality")
        for region in report.regions
        if region["kind"] == "merge_point"
    }
    paths = {region["path"] for region in report.regions}
    assert {glob for path in paths for glob in protect.covering(path)} == set(protect.paths)
    for index, (step, entry) in enumerate(zip(recipe.steps, report.steps, strict=True)):
        cuts = [item.indices for item in kept if item.step == index]
        if entry.status != "matched":
            assert entry.status == "unprofitable" or get_pass(step.pass_).stage == "decode", entry
            assert entry.reason, entry
            assert (entry.matches, cuts) == (0, []), entry
            continue
        assert step.expect.min_matches <= entry.matches <= (step.expect.max_matches or entry.matches)
        assert entry.matches == len(entry.regions) > 0
        for path in entry.regions:
            assert step.target.matches_path(path)
            assert not protect.covers(path)
            assert step.target.modality in (None, modalities.get(path))
            if step.target.layers is not None:  # of the stack that the region is in
                stack, number = path.split(".")[:2]
                depth = {"layers": TEXT_LAYERS, "encoder": VISION_LAYERS}[stack]
                assert int(number) in step.target.layer_indices(depth)
        if step.region == "merge_point":
            first = step.params.keep.count(tokens)
            late = getattr(step.params, "drop_layer", None)
            late = int(late * TEXT_LAYERS) if isinstance(late, float) else late
            counts = [first] if late is None or late >= TEXT_LAYERS - 1 else [first, 0]
            assert [cut.shape[1] for cut in cuts] == [count + TEXT for count in counts]
            assert [entry.details["tokens_before"], entry.details["tokens_after"]] == [tokens + TEXT, first + TEXT]
            tokens = counts[-1]
        elif step.region == "vision_encoder":
            front = protect.leading_tokens or 1
            wanted, rest = [], PATCHES + 1 - front
            for keep in step.params.keep:
                wanted.append(front + (rest := keep.count(rest)))
            assert [cut.shape[1] for cut in cuts] == wanted
            assert all(set(range(front)) <= set(row.tolist()) for cut in cuts for row in cut)


# --------------------------------------------------------------------------------------------------------- tests

FUZZ = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize(
    ("model", "recipe"),
    [pytest.param(*case, marks=pytest.mark.slow if index in (0, 2, 5) else ()) for index, case in enumerate(VALID)],
)
def test_the_recipes_that_are_mutated_are_valid(models: Models, model: str, recipe: dict[str, Any]) -> None:
    assert outcome(*models[model], written(tree(recipe))) == "applied"


@FUZZ
@given(case=mutated())
def test_a_mutated_recipe_acts_or_is_refused(models: Models, case: tuple[str, str]) -> None:
    outcome(*models[case[0]], case[1])


@pytest.mark.slow
@settings(FUZZ, max_examples=300, derandomize=False)
@given(case=mutated())
def test_many_mutated_recipes_act_or_are_refused(models: Models, case: tuple[str, str]) -> None:
    outcome(*models[case[0]], case[1])

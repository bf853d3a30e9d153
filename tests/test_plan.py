"""The plan: made before a graph is rewritten, pure, and what happens afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tokcompile
from tests.small_models import demo_vlm
from tokcompile.demo import tiny_llm, tiny_vit
from tokcompile.plan.apply import Matching
from tokcompile.plan.plan import CutPlan, LayerCut, Plan
from tokcompile.registry import get_pass
from tokcompile.rewrite.context import Context

VLM = [{"pass": "todre", "params": {"keep": 0.25, "drop_layer": 0.5}, "target": {"region": "merge_point"}}]
VIT = [{"pass": "class_attention", "params": {"keep": [0.5, 0.5], "at": [0.4, 0.7]}}]
DECODE = [{"pass": "tokenselect", "params": {"budget": 8, "sinks": 1, "dense_below": 10}}]
STEM = [{"pass": "stem", "params": {"convert": 0.5}}]
MOE = [{"pass": "moe_from_dense", "params": {"gate": "off"}}]
SPARSE = [{"pass": "token_sparse", "params": {"keep": 0.5, "window": 4, "least": 0, "min_length": 8}}]


def recipe(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"recipe_version": 1, "steps": steps}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Plan, str, str]]:
    """Every plan that is made, with the graph before and after it was made."""
    made: list[tuple[Plan, str, str]] = []
    original = Matching.plan

    def plan(self: Matching, ctx: Context, stage: str) -> Plan:
        before = str(ctx.captured.graph)
        found = original(self, ctx, stage)
        made.append((found, before, str(ctx.captured.graph)))
        return found

    monkeypatch.setattr(Matching, "plan", plan)
    return made


def _llm() -> tuple[Any, dict[str, Any]]:
    model, _ = tiny_llm()
    return model, {"input_ids": torch.randint(10, 100, (2, 24))}


CASES: dict[str, tuple[Any, list[dict[str, Any]], bool]] = {
    "visual tokens": (demo_vlm, VLM, False),
    "patches": (tiny_vit, VIT, False),
    "keys": (_llm, DECODE, False),
    "prefill": (_llm, SPARSE, False),
    "tables": (_llm, STEM, True),
    "experts": (_llm, MOE, True),
}


@pytest.mark.parametrize("name", list(CASES))
def test_planning_changes_nothing_and_says_what_will_be_changed(name: str, plans: list[Any]) -> None:
    make, steps, calibrated = CASES[name]
    model, inputs = make()
    data = [{"input_ids": torch.randint(10, 100, (2, 24))} for _ in range(3)] if calibrated else None
    report = tokcompile.explain(model, inputs, recipe(steps), calibration=data)
    assert plans
    for _, before, after in plans:
        assert before == after
    (step,) = report.steps
    assert step.status == "matched", step.reason
    planned = {path for plan in report.plans for item in plan["steps"] for path in item["regions"]}
    assert set(step.regions) == planned


def test_cuts_are_those_that_are_made() -> None:
    model, inputs = demo_vlm()
    optimized = tokcompile.optimize(model, recipe(VLM), lowering="eager")
    with tokcompile.record(optimized) as recording, torch.no_grad():
        optimized.generate(**inputs, max_new_tokens=2, do_sample=False)
    (plan,) = [plan for plan in tokcompile.report(optimized).plans if plan["stage"] == "prefill"]
    made = {kept.layer: int(kept.indices.shape[1]) for kept in recording.kept}
    assert {cut["layer"]: cut["tokens"] for cut in plan["cuts"]} == made
    depth = len(model.model.language_model.layers)
    method = get_pass("todre")(get_pass("todre").Params(**VLM[0]["params"]))
    assert method.cut_layers(depth) == sorted(made)


def test_the_predicted_gain_is_near_what_the_rewritten_graph_has() -> None:
    for make, steps in ((demo_vlm, VLM), (tiny_vit, VIT)):
        model, inputs = make()
        report = tokcompile.explain(model, inputs, recipe(steps))
        (step,) = report.steps
        plan = next(plan for plan in report.plans if plan["cuts"])
        assert step.flop_ratio is not None
        assert step.flop_ratio > 1.1
        assert plan["predicted_flop_ratio"] == pytest.approx(step.flop_ratio, rel=0.05)


def test_a_refused_step_has_its_reason_in_the_plan() -> None:
    model, inputs = demo_vlm()
    late = [{"pass": "todre", "params": {"keep": 0.25, "drop_layer": 99}}]
    report = tokcompile.explain(model, inputs, recipe(late))
    plan = next(plan for plan in report.plans if plan["stage"] != "encoder")
    assert "drop_layer 99" in plan["steps"][0]["reason"]
    assert plan["steps"][0]["regions"] == []
    assert plan["cuts"] == []
    assert plan["predicted_flop_ratio"] is None
    assert report.steps[0].status == "condition_failed"


def test_decode_steps_are_explained() -> None:
    model, inputs = _llm()
    report = tokcompile.explain(model, inputs, recipe(DECODE))
    assert {plan["stage"] for plan in report.plans} >= {"prefill", "decode"}
    decode = next(plan for plan in report.plans if plan["stage"] == "decode")
    assert len(decode["steps"][0]["regions"]) == len(model.model.layers)
    assert "decode" in str(report)
    assert "Plan" in str(report)


def test_layers_that_hold_the_same_tokens() -> None:
    plan = CutPlan.of([LayerCut(7), LayerCut(0, 5), LayerCut(7, 2)])
    assert plan.starts == (0, 7)
    assert plan.groups(9) == [[0, 1, 2, 3, 4, 5, 6], [7, 8]]
    assert CutPlan().groups(4) == []

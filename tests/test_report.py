"""The report: plain data for machines, a readable table for people, and no reason lost."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from tokcompile.recipes import Budget
from tokcompile.regions.model import AttentionRegion, DecoderStack, NearMiss, Regions
from tokcompile.reporting.paths import path_glob, path_globs
from tokcompile.reporting.report import STATUSES, Report, StageReport, StepReport

LONG = (
    "the mask [B, H, S, S] is built from a float that depends on data; " * 4 + "[node mul_3, model.layers.7, m.py:12]"
)


def symbolic_size() -> torch.SymInt:
    from torch._dynamo.source import ConstantSource

    env = ShapeEnv()
    return env.create_symintnode(env.create_symbol(9, ConstantSource("n"), dynamic_dim=DimDynamic.DYNAMIC), hint=9)


def regions(queries: Any) -> Regions:
    node = fx.Graph().placeholder("x")
    attention = [
        AttentionRegion(
            path=f"model.layers.{i}.self_attn",
            source="m.py:3",
            query=node,
            key=node,
            value=node,
            output=node,
            batch=2,
            queries=queries,
            keys=12,
            heads=4,
            kv_heads=2,
            head_dim=16,
            grouping="gqa",
            form="sdpa",
            cached=True,
        )
        for i in range(32)
    ]
    stack = DecoderStack(path="model", input=node, output=node, batch=2, tokens=queries, width=64, causal=True)
    steps = tuple("abcdefghij")
    misses = [
        NearMiss("merge_point", "masked_scatter without a mask", node, "model", "m.py:9", steps, steps[:4]),
        NearMiss("merge_point", "nearer [still]", node, "model", "m.py:10", steps, steps[:8]),
        NearMiss("attention", "not shown, there are 32", node, "model", "m.py:11", steps, steps[:9]),
    ]
    return Regions([stack, *attention], misses)


def full() -> Report:
    report = Report.from_regions(regions(symbolic_size()), model="Tiny")
    report.steps = [
        StepReport("todre", "matched", 1, ["model"], "", 1.8349, {"tokens_before": 576, "tokens_after": 58, "seed": 3}),
        StepReport("class_attention", "structure_miss", reason=LONG),
        StepReport("pool", "matched", 2, ["vision.layers.3", "vision.layers.7", "text"], "", float("inf")),
    ]
    report.stages = [
        StageReport("prefill", True, nodes=812, seconds=1.25, compiled="as a whole: no stack of layers loses tokens"),
        StageReport("encoder", False, "guard on a data-dependent size :smile: [x]"),
    ]
    return report


def test_to_dict_is_json():
    report = full()
    report.steps[0].details.update(
        keep=Budget(1, 10), path=("a", {2, 1}), size=symbolic_size(), dtype=torch.float16, nan=float("nan"),
        tensor=torch.tensor([1, 2]), none=None, flag=True,
    )  # fmt: skip
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["model"] == "Tiny"
    assert data["regions"][1] == {
        "kind": "attention",
        "path": "model.layers.0.self_attn",
        "roles": {"query": "x", "key": "x", "value": "x", "output": "x"},
        "shapes": {"B": 2, "S": str(report.regions[0]["shapes"]["S"]), "T": 12, "H": 4, "Hkv": 2, "Dh": 16},
        "variant": {
            "form": "sdpa",
            "mask": "none",
            "softcap": "no",
            "projection": "separate",
            "cross": "self",
            "heads": "gqa",
            "rope": "no",
            "qk_norm": "no",
            "cache": "yes",
        },
        "source": "m.py:3",
    }
    details = data["steps"][0]["details"]
    assert details["keep"] == {"num": 1, "den": 10, "is_count": False}
    assert details["path"] == ["a", [1, 2]]
    assert details["tensor"] == [1, 2]
    assert (details["dtype"], details["nan"], details["none"], details["flag"]) == ("torch.float16", "nan", None, True)
    assert data["steps"][2]["flop_ratio"] == "inf"
    assert data["stages"][0] == {
        "name": "prefill",
        "captured": True,
        "reason": "",
        "nodes": 812,
        "seconds": 1.25,
        "compiled": "as a whole: no stack of layers loses tokens",
    }
    assert [miss["score"] for miss in data["near_misses"]] == [0.9, 0.8, 0.4]


def test_a_size_is_reported_without_a_guard():
    size = symbolic_size()
    Report.from_regions(regions(size)).to_dict()
    assert size.node.shape_env.guards == []


def test_text_holds_kinds_reasons_and_numbers():
    text = str(full())
    for part in (
        "Tiny", "attention", "decoder_stack", "32", "model.layers.{0..31}.self_attn", "form sdpa", "(todre): seed 3",
        "structure_miss", LONG, "576 -> 58", "1.83", "vision.layers.{3,7}", "812", "1.25",
        "stage encoder: guard on a data-dependent size :smile: [x]",
        "nearly a merge_point: nearer [still] [node x, model, m.py:10]",
    ):  # fmt: skip
        assert part in text, part
    assert "there are 32" not in text
    assert "\x1b" not in text
    assert text.index("nearer") < text.index("without a mask")


def test_regions_of_several_stages_are_told_apart():
    report = Report(regions=[{"kind": "moe", "path": "a.0", "stage": stage} for stage in ("prefill", "decode")])
    assert str(report).count("a.0") == 2
    assert "decode" in str(report)


def test_an_empty_report():
    assert str(Report()) == "model\nNo region found."
    assert json.loads(json.dumps(Report().to_dict()))["steps"] == []


def test_status_is_one_of_the_known():
    for status in STATUSES:
        StepReport("todre", status)
        given = StepReport("todre", str(status))
        assert given.status is status
        assert given.status == str(status)
        assert type(Report(steps=[given]).to_dict()["steps"][0]["status"]) is str
    with pytest.raises(ValueError, match="structure_miss"):
        StepReport("todre", "fine")


@pytest.mark.parametrize(
    ("paths", "glob"),
    [
        (["a.b"], "a.b"),
        ([""], ""),
        (["m.3.x"], "m.3.x"),
        ([f"m.{i}.x" for i in (11, 2, 1, 0, 7)], "m.{0..2,7,11}.x"),
        ([f"s.{i}.b.{j}" for i in range(2) for j in range(3)], "s.{0..1}.b.{0..2}"),
    ],
)
def test_path_glob(paths, glob):
    assert path_glob(paths) == glob


def test_path_globs_keep_different_shapes_apart():
    assert path_globs(["v.0", "m.layers.1.a", "v.1", "m.layers.0.a"]) == ["v.{0..1}", "m.layers.{0..1}.a"]


def test_nothing_is_printed(capsys):
    full().to_dict()
    str(full())
    assert capsys.readouterr() == ("", "")

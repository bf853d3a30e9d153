"""What ``target`` and ``protect`` choose: nothing else is touched, and a filter that fits nothing is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokcompile
from tests.members import members
from tests.pruning import close, hidden, optimized
from tests.zoo.encoders_for_pruning import ENCODERS
from tests.zoo.vlm import IMAGE, VIDEO, PlainVLM, randomize
from tokcompile.errors import NoMatchError, RecipeError

RANDOM: dict[str, Any] = {"pass": "random", "params": {"keep": 5}}
PATCHES: dict[str, Any] = {"pass": "class_attention", "params": {"keep": [0.5], "at": [0.5]}}


class ImageAndVideo(nn.Module):
    """One token for each patch of an image and of a frame; each has placeholder tokens of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = PlainVLM("index_put", layers=2)

    def forward(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, pixel_values_videos: Tensor | None = None
    ) -> Tensor:
        x = self.vlm.embed(input_ids)
        for token, pixels in ((IMAGE, pixel_values), (VIDEO, pixel_values_videos)):
            if pixels is not None:
                features = self.vlm.encode(pixels).flatten(0, 1)
                x = x.masked_scatter((input_ids == token)[..., None].expand_as(x), features)
        return self.vlm.decode(x, torch.ones_like(input_ids), torch.arange(input_ids.shape[1])[None])


@pytest.mark.parametrize("kind", members(["image", "video"], ["video"]))
def test_a_modality(kind: str) -> None:
    model = randomize(ImageAndVideo())
    name, token = {"image": ("pixel_values", IMAGE), "video": ("pixel_values_videos", VIDEO)}[kind]
    ids = torch.cat([torch.tensor([[5, 6]]), torch.full((1, 16), token), torch.tensor([[7, 8]])], 1)
    inputs = {"input_ids": ids, name: torch.randn(1, 3, 32, 32)}
    pruned = optimized(model, [RANDOM | {"target": {"modality": kind}}], inputs=inputs)
    assert tokcompile.report(pruned).steps[0].details == {"tokens_before": 20, "tokens_after": 9}
    other = "video" if kind == "image" else "image"
    with pytest.raises(NoMatchError, match=r"1 merge_point found \(\(model\)\), none fits the step's target filters"):
        optimized(model, [RANDOM | {"target": {"modality": other}}], inputs=inputs)


def test_a_modality_of_two_in_one_prompt() -> None:
    model = randomize(ImageAndVideo())
    ids = torch.cat(
        [torch.full((1, 16), IMAGE), torch.tensor([[7, 8]]), torch.full((1, 16), VIDEO), torch.tensor([[7, 8]])], 1
    )
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, 3, 32, 32),
        "pixel_values_videos": torch.randn(1, 3, 32, 32),
    }
    pruned = optimized(model, [RANDOM | {"target": {"modality": "video"}}], inputs=inputs)
    with torch.no_grad(), tokcompile.record(pruned) as recording:
        pruned(**inputs)
    [entry] = recording.kept
    kept = ids[0, entry.indices[0]]
    assert [int((kept == token).sum()) for token in (IMAGE, VIDEO)] == [16, 5]


@pytest.mark.parametrize(("layers", "chosen"), members([([0], [0]), (["-2--1"], [2, 3])], [(["-2--1"], [2, 3])]))
def test_layers_are_those_of_the_model_behind_a_cut(layers: list[Any], chosen: list[int]) -> None:
    """The late drop of the first step divides the decoder in two; its layers keep their numbers."""
    model = randomize(PlainVLM("index_put", layers=4))
    ids = torch.cat([torch.tensor([[5, 6]]), torch.full((1, 16), IMAGE), torch.tensor([[7, 8, 9]])], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 32, 32)}
    sparse = {"keep": 0.5, "window": 2, "least": 1, "pool": 1, "calm": 1.0, "min_length": 0}
    steps = [
        {"pass": "todre", "params": {"keep": 0.5, "drop_layer": 1}},
        {"pass": "token_sparse", "target": {"layers": layers}, "params": sparse},
    ]
    report = tokcompile.report(optimized(model, steps, inputs=inputs))
    assert report.steps[1].regions == [f"layers.{number}" for number in chosen]
    steps[1]["target"] = {"layers": [4]}
    with pytest.raises(RecipeError, match=r"steps\[1\] \(token_sparse\): .*4 is outside a stack of 4 layers"):
        optimized(model, steps, inputs=inputs)


def test_a_modality_where_nothing_tells() -> None:
    with pytest.raises(RecipeError, match=r"images and video are told apart at merge points only"):
        optimized(ENCODERS["vit"]().model, [PATCHES | {"target": {"modality": "image"}}])


@pytest.mark.parametrize("leading", [1, 5])
def test_leading_tokens_stay(leading: int) -> None:
    case = ENCODERS["vit"]()  # a class token and 16 patches
    inputs = case.inputs()
    recipe = {"recipe_version": 1, "steps": [PATCHES], "protect": {"leading_tokens": leading}}
    pruned = tokcompile.optimize(case.model, recipe, lowering="eager")
    with torch.no_grad(), tokcompile.record(pruned) as recording:
        found = case.output(pruned(**inputs))
    [entry] = recording.kept
    assert entry.indices.shape[1] == leading + (17 - leading + 1) // 2
    assert all(row[:leading].tolist() == list(range(leading)) for row in entry.indices)
    wanted = case.oracle(inputs, hidden(recording, case.tokens, len(case.layers)))
    close(found, wanted.gather(1, entry.indices[..., None].expand(-1, -1, wanted.shape[2])))


@pytest.mark.parametrize(
    ("leading", "says"),
    [
        (0, r"leading_tokens is 0, and the 1 class and register tokens in front are always kept; leave it out"),
        (17, r"leading_tokens is 17, of 17 tokens in all; no patch is left to choose from"),
    ],
)
def test_leading_tokens_that_cannot_be(leading: int, says: str) -> None:
    case = ENCODERS["vit"]()
    recipe = {"recipe_version": 1, "steps": [PATCHES], "protect": {"leading_tokens": leading}}
    with pytest.raises(NoMatchError, match=says):
        tokcompile.optimize(case.model, recipe, lowering="eager", inputs=case.inputs())


def test_leading_tokens_need_a_vision_encoder() -> None:
    recipe = {"recipe_version": 1, "steps": [RANDOM], "protect": {"leading_tokens": 2}}
    with pytest.raises(RecipeError, match=r"protect\.leading_tokens: no pass of this recipe removes tokens inside"):
        tokcompile.optimize(nn.Linear(2, 2), recipe)


def test_protected_paths() -> None:
    """A glob covers what is inside a module, too; one that covers nothing is an error, or a problem in the report."""
    case = ENCODERS["vit"]()
    inputs = case.inputs()
    for path in ("layers", "*.mlp", "*attention"):
        recipe = {
            "recipe_version": 1,
            "protect": {"paths": [path]},
            "steps": [{"pass": "moe_from_dense", "params": {"experts": 4, "shared": 1, "active": 1, "gate": "off"}}],
        }
        report = tokcompile.explain(case.model, inputs, recipe)
        assert ("is outside of protect.paths" in report.steps[0].reason) == (path != "*attention")
    recipe = {"recipe_version": 1, "protect": {"paths": ["encoder.*"]}, "steps": [PATCHES]}
    with pytest.raises(NoMatchError, match=r"protect\.paths: 'encoder\.\*' covers no region \(there are "):
        tokcompile.optimize(case.model, recipe, lowering="eager", inputs=inputs)
    report = tokcompile.explain(case.model, inputs, recipe)
    assert [problem.split(" (")[0] for problem in report.problems] == ["protect.paths: 'encoder.*' covers no region"]
    assert report.to_dict()["problems"] == report.problems

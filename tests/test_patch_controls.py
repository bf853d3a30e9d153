"""The controls of patch selection, and that the protocol finds out a selector that is the wrong way round."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import tokcompile
from tokcompile.families.pruning.patches import PatchParams
from tokcompile.families.scores import Scores
from tokcompile.measure.evaluate import Measure, Task, controls, evaluate
from tokcompile.measure.paired import mean_percent
from tokcompile.passes.pruning.class_attention import ClassAttention
from tokcompile.recipes import Recipe
from tokcompile.registry import register

STAGES: dict[str, Any] = {"keep": [0.5, 0.5], "at": [0.25, 0.75]}


@register
class MaybeInverted(ClassAttention):
    """Keep the patches that the class token looks at, or with ``sign`` -1, by a mistake of sign, the others."""

    name = "maybe_inverted_for_tests"

    class Params(PatchParams):
        sign: int = Field(1, description="-1 turns the scores round.")

    def score(
        self, tokens: Tensor, segment: Tensor, budget: Tensor, prefix: int, stage: int, *inputs: Tensor
    ) -> Scores:
        scores = super().score(tokens, segment, budget, prefix, stage, *inputs)
        return Scores(self.params.sign * scores.values)


def recipe(name: str, **params: Any) -> dict[str, Any]:
    return {"recipe_version": 1, "steps": [{"pass": name, "params": params}]}


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=48,
        patch_size=8,
        hidden_dropout_prob=0.0,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that patches matter to each other
    return model


@pytest.mark.parametrize("name", ["patch_random", "patch_pool"])
def test_keeping_all_patches_changes_nothing(vit: nn.Module, name: str) -> None:
    pixels = torch.randn(2, 3, 48, 48)
    model = tokcompile.optimize(vit, recipe(name, keep=[1.0], at=[0.5]), lowering="eager")
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, vit(pixel_values=pixels).last_hidden_state)


def test_random_draws_differ_by_seed_and_keep_the_budget(vit: nn.Module) -> None:
    kept = []
    for seed in (0, 0, 1):
        model = tokcompile.optimize(vit, recipe("patch_random", **STAGES, seed=seed), lowering="eager")
        with torch.no_grad(), tokcompile.record(model) as recording:
            assert model(pixel_values=torch.randn(1, 3, 48, 48)).last_hidden_state.shape[1] == 1 + 9
        assert [len(entry.indices[0]) for entry in recording.kept] == [1 + 18, 1 + 9]
        kept.append(recording.kept[-1].indices[0].tolist())
    assert kept[0] == kept[1] != kept[2]


def test_pooling_averages_neighbours(vit: nn.Module) -> None:
    """Pooling before layer 2 to one token for two patches: the layers below see the means."""
    pixels = torch.randn(1, 3, 48, 48)
    model = tokcompile.optimize(vit, recipe("patch_pool", keep=[0.5], at=[0.5]), lowering="eager")
    with torch.no_grad():
        stream = vit(pixel_values=pixels, output_hidden_states=True).hidden_states[2]
        means = stream[:, 1:].reshape(1, 18, 2, -1).mean(2)
        wanted = torch.cat([stream[:, :1], means], 1)
        for layer in list(vit.layers if hasattr(vit, "layers") else vit.encoder.layer)[2:]:
            wanted = layer(wanted)
            wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        wanted = vit.layernorm(wanted)
        torch.testing.assert_close(model(pixel_values=pixels).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_prune_30", "vit_prune_50", "vit_merge_50"])
def test_controls_of_patch_selection_have_its_stages(name: str) -> None:
    method = Recipe.load(name)
    found = controls(method, seeds=(0, 1, 2))
    assert [c.role for c in found] == ["random"] * 3 + ["pool"]
    assert all(
        c.recipe is not None
        and (c.recipe.steps[0].params.keep, c.recipe.steps[0].params.at)
        == (method.steps[0].params.keep, method.steps[0].params.at)
        for c in found
    )


@pytest.mark.slow
def test_a_selector_with_inverted_scores_is_found_to_be_worse_than_random(vit: nn.Module) -> None:
    """Layers that all look at the same few patches: what keeps those stays near the dense model."""
    model = copy.deepcopy(vit)
    layers = list(model.layers if hasattr(model, "layers") else model.encoder.layer)
    with torch.no_grad():
        for layer in layers:  # every query asks for channel 0, in each of the four heads of width 8
            for name, parameter in layer.named_parameters():
                if "query" in name or "q_proj" in name:
                    parameter.zero_()
                    if name.endswith("bias"):
                        parameter[::8] = 8.0
                elif "key" in name or "k_proj" in name:
                    parameter.zero_()
                    if name.endswith("weight"):
                        parameter[::8, 0] = 1.0
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randn(1, 3, 48, 48, generator=generator) for _ in range(40)]

    def feature(model: Any, pixels: Tensor) -> Tensor:
        return model(pixel_values=pixels).last_hidden_state[0, 0].double()

    def closeness(observed: Any, dense: Any) -> Any:
        return torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in zip(observed, dense, strict=True)])[
            :, None
        ].numpy()

    task = Task("fidelity", pictures, feature, [Measure("closeness", closeness, mean_percent)])
    stage: dict[str, Any] = {"keep": [0.25], "at": [0.25]}
    found = evaluate(
        model,
        [task],
        {
            "right": recipe("maybe_inverted_for_tests", **stage),
            "inverted": recipe("maybe_inverted_for_tests", **stage, sign=-1),
        },
        resamples=500,
    )
    right, inverted = found.find("fidelity", "right"), found.find("fidelity", "inverted")
    assert (right.status, inverted.status) == ("measured", "measured")
    assert inverted.against_random == "worse", str(found)
    assert right.against_random == "better", str(found)
    assert len([row for row in found.rows if row.role == "random"]) == 3  # shared by both
    assert {row.tokens_after for row in found.rows if row.role != "dense"} == {10}

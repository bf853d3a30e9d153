"""Merging patches that are alike: against a plain loop, and inside an encoder against the encoder run by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import tokcompile
from tokcompile.errors import RecipeError
from tokcompile.evaluation import controls
from tokcompile.passes.patch_merge import merged
from tokcompile.recipes import Recipe
from tokcompile.selection import keep_mask


def by_hand(tokens: Tensor, like: Tensor, prefix: int, keep: int) -> tuple[Tensor, list[int]]:
    """One row, in plain loops: ``tokens [S, D]``, ``like [S, E]`` -> (tokens that are left, places that went)."""
    like = nn.functional.normalize(like, dim=-1)
    gives, takes = range(prefix, len(tokens), 2), range(prefix + 1, len(tokens), 2)
    pairs = []
    for a in gives:
        likest = max(takes, key=lambda b: (float(like[a] @ like[b]), -b))
        pairs.append((float(like[a] @ like[likest]), a, likest))
    pairs.sort(key=lambda pair: -pair[0])
    groups = {b: [tokens[b]] for b in takes}
    went = pairs[:len(tokens) - prefix - keep]
    for _, a, b in went:
        groups[b].append(tokens[a])
    gone = sorted(a for _, a, _ in went)
    left = [torch.stack(groups[i]).mean(0) if i in groups else tokens[i] for i in range(len(tokens)) if i not in gone]
    return torch.stack(left), gone


@pytest.mark.parametrize(("prefix", "size", "keep"), [(0, 12, 6), (1, 17, 9), (2, 15, 7), (1, 9, 8)])
def test_the_likest_pairs_become_their_mean(prefix: int, size: int, keep: int) -> None:
    generator = torch.Generator().manual_seed(size)
    tokens, like = torch.randn(3, size, 5, generator=generator), torch.randn(3, size, 4, generator=generator)
    segment = torch.where(torch.arange(size) >= prefix, 0, -1)[None].expand(3, size)
    budget = torch.where(segment >= 0, keep, 0)
    new, scores = merged(tokens, like, segment, budget)
    kept = keep_mask(scores, segment, budget)
    for row in range(3):
        wanted, gone = by_hand(tokens[row], like[row], prefix, keep)
        assert torch.where(~kept[row])[0].tolist() == gone
        torch.testing.assert_close(new[row][kept[row]], wanted)


def test_equal_patches_merge_into_the_first_partner() -> None:
    tokens = torch.arange(6.0)[None, :, None].repeat(1, 1, 2)
    segment, budget = torch.zeros(1, 6, dtype=torch.int64), torch.full((1, 6), 4)
    new, scores = merged(tokens, torch.ones(1, 6, 3), segment, budget)
    kept = keep_mask(scores, segment, budget)[0]
    # all are alike: 0 stays by the order of ties, 2 and 4 go to the first odd patch
    assert kept.tolist() == [True, True, False, True, False, True]
    assert new[0, kept, 0].tolist() == pytest.approx([0, (1 + 2 + 4) / 3, 3, 5])


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
                       image_size=48, patch_size=8, hidden_dropout_prob=0.0)
    return ViTModel(config, add_pooling_layer=False).eval()


def step(**params: object) -> dict[str, object]:
    return {"recipe_version": 1, "steps": [{"pass": "patch_merge", "params": params}]}


def test_an_encoder_with_merged_patches_equals_the_same_by_hand(vit: nn.Module) -> None:
    pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    layers = list(vit.layers if hasattr(vit, "layers") else vit.encoder.layer)
    keys: list[Tensor] = []
    projection = next(m for n, m in layers[0].named_modules() if n.endswith(("k_proj", "key")))
    hook = projection.register_forward_hook(lambda module, given, out: keys.append(out))
    with torch.no_grad():
        stream = vit(pixel_values=pixels, output_hidden_states=True).hidden_states[1]
        hook.remove()
        like = keys[0].reshape(2, 37, 4, 8).mean(2)
        wanted = torch.stack([by_hand(stream[row], like[row], 1, 20)[0] for row in range(2)])
        for layer in layers[1:]:
            wanted = layer(wanted)
            wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        model = tokcompile.optimize(vit, step(keep=[20], at=[0.34]), lowering="eager")
        torch.testing.assert_close(model(pixel_values=pixels).last_hidden_state, vit.layernorm(wanted),
                                   rtol=1e-5, atol=1e-5)


def test_keeping_all_changes_nothing(vit: nn.Module) -> None:
    pixels = torch.randn(2, 3, 48, 48)
    model = tokcompile.optimize(vit, step(keep=[1.0], at=[0.5]), lowering="eager")
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels).last_hidden_state, vit(pixel_values=pixels).last_hidden_state)


def test_less_than_half_in_one_stage_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least half"):
        Recipe.load(step(keep=[0.4], at=[0.5]))


def test_controls_have_its_budget() -> None:
    found = controls(Recipe.load(step(keep=[0.7, 0.6], at=[0.25, 0.5])))
    assert [c.role for c in found] == ["random"] * 3 + ["pool"]
    assert {str(c.recipe.steps[0].params.at) for c in found if c.recipe} == {"[0.25, 0.5]"}

"""Merging patches in diffusion transformers: against the transformer run by hand, with merging in plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tokcompile
from tests.small_dits import HEADS, TEXT, WIDTH, TinyDiT, modulated
from tests.test_patch_merge import by_hand


class Merging(torch.nn.Module):
    """A layer that first merges to ``keep`` tokens, by the keys of the layer before it."""

    def __init__(self, layer: torch.nn.Module, keep: int | None, before: Merging | None) -> None:
        super().__init__()
        self.layer, self.keep, self.before = layer, keep, [before]
        self.like = self.sizes = self.inside = None

    def forward(self, x: Tensor, step: Tensor, text: Tensor | None = None) -> Tensor:
        before = self.before[0]
        if before is None:
            self.sizes = torch.ones(x.shape[:2])
            self.inside = [[[i] for i in range(x.shape[1])] for _ in range(len(x))]
        else:
            self.sizes, self.inside = before.sizes, before.inside
        if self.keep is not None:
            left = [by_hand(x[row], before.like[row], 0, self.keep, self.sizes[row]) for row in range(len(x))]
            x, self.sizes = torch.stack([t for t, _, _ in left]), torch.stack([n for _, _, n in left])
            self.inside = [
                [[patch for i in group for patch in old[i]] for group in groups]
                for old, (_, groups, _) in zip(self.inside, left, strict=True)
            ]
        a, b, *_ = self.layer.mod(step).chunk(6, -1)
        key = self.layer.attn.project(modulated(x, a, b))[1]
        assert key.shape[1:] == (HEADS, x.shape[1], WIDTH // HEADS)
        self.like = key.mean(1)
        return self.layer(x, step, text, self.sizes.log()[:, None, None])


class Restored(torch.nn.Module):
    """The last layer, and each patch given the token it is in."""

    def __init__(self, merging: Merging, patches: int) -> None:
        super().__init__()
        self.merging, self.patches = merging, patches

    def forward(self, x: Tensor, step: Tensor, text: Tensor | None = None) -> Tensor:
        x = self.merging(x, step, text)
        full = x.new_empty(len(x), self.patches, WIDTH)
        for row in range(len(x)):
            for token, patches in enumerate(self.merging.inside[row]):
                full[row, patches] = x[row, token]
        return full


@pytest.mark.parametrize("kind", ["plain", "cross"])
def test_a_transformer_with_merged_patches_is_the_one_by_hand(kind: str) -> None:
    torch.manual_seed(0)
    model = TinyDiT(kind, depth=3).eval()
    inputs = {"latents": torch.randn(2, 4, 12, 16), "timestep": torch.tensor([0.9, 0.2])}
    if kind == "cross":
        inputs["text"] = torch.randn(2, TEXT, 16)
    step = {"pass": "patch_merge", "target": {"region": "vision_encoder"}}
    step["params"] = {"keep": [30, 17], "at": [0.34, 0.67]}
    merged = tokcompile.optimize(model, {"recipe_version": 1, "steps": [step]}, lowering="eager")
    with torch.no_grad():
        found, dense = merged(**inputs), model(**inputs)
        layers: list[Merging] = []
        for number, layer in enumerate(model.layers):
            layers.append(Merging(layer, (None, 30, 17)[number], layers[-1] if layers else None))
        model.layers = torch.nn.ModuleList([*layers[:2], Restored(layers[2], 48)])
        wanted = model(**inputs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert float((found - dense).abs().max()) > 1e-3


def test_the_recipe_halves_the_work_of_the_layers() -> None:
    torch.manual_seed(0)
    model = TinyDiT("cross", depth=12).eval()
    inputs = {"latents": torch.randn(1, 4, 32, 32), "timestep": torch.tensor([0.9]), "text": torch.randn(1, TEXT, 16)}
    merged = tokcompile.optimize(model, "dit_merge_50", inputs=inputs, lowering="eager")
    (step,) = tokcompile.report(merged).steps
    assert step.status == "matched"
    assert step.details["restored_to"] == 256
    left = step.details["tokens_by_layer"]

    def layer(tokens: int, width: int = 1152) -> int:  # multiply-adds of a DiT-XL layer
        return 12 * tokens * width**2 + 2 * tokens**2 * width

    tokens = [256]
    for number in range(1, 12):
        tokens.append(left.get(number, tokens[-1]))
    assert 1 - sum(layer(n) for n in tokens) / (12 * layer(256)) == pytest.approx(0.5, abs=0.02)

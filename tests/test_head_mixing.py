"""Attention that mixes its heads around the softmax (talking heads): explained, kept whole and pruned exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tokcompile
from tests.pruning import close, recipe

HEADS, WIDTH, PATCHES = 4, 32, 16


def by_einsum(scores: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("bhij,hg->bgij", scores, weight)


def by_linear(scores: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.linear(scores.permute(0, 2, 3, 1), weight.T).permute(0, 3, 1, 2)


class Mixing(nn.Module):
    """Scores are mixed over heads before the softmax, weights behind it, or both. ``hidden [B, S]``: keys to hide."""

    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor], before: bool, behind: bool) -> None:
        super().__init__()
        self.mix, self.before, self.behind, self.hidden = mix, before, behind, None
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.weights = nn.ParameterList([torch.randn(HEADS, HEADS) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        if self.before:
            scores = self.mix(scores, self.weights[0])
        if self.hidden is not None:
            scores = scores.masked_fill(self.hidden[:, None, None], float("-inf"))
        weights = scores.softmax(-1)
        if self.behind:
            weights = self.mix(weights, self.weights[1])
        return self.o((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.n1, self.n2, self.attention = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), attention
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        return x + self.mlp(self.n2(x))


class Encoder(nn.Module):
    def __init__(self, *how: object) -> None:
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, WIDTH, 8, 8), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.randn(1, PATCHES + 1, WIDTH))
        self.blocks = nn.ModuleList(Block(Mixing(*how)) for _ in range(3))  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


@pytest.mark.parametrize(
    "how",
    [(by_einsum, True, True), (by_linear, True, False), (by_linear, False, True)],
    ids=["einsum, both", "linear, before", "linear, behind"],
)
def test_kept_whole_or_pruned(how: tuple[object, ...]) -> None:
    torch.manual_seed(0)
    model, image = Encoder(*how).eval(), torch.randn(2, 3, 32, 32)
    regions = tokcompile.explain(model, {"image": image}).regions
    assert sum(region["kind"] == "feed_forward" for region in regions) == 3
    for keep in (1.0, 0.5):
        steps = [{"pass": "patch_random", "params": {"keep": [keep], "at": [0.67]}}]
        fast = tokcompile.optimize(model, recipe(steps), lowering="eager")
        with torch.no_grad(), tokcompile.record(fast) as recording:
            found = fast(image)
        hide(model, recording, len(image))
        with torch.no_grad():
            close(found, model(image))
        hide(model, None, 0)


def hide(model: Encoder, recording: tokcompile.Recording | None, rows: int) -> None:
    """Hide in each layer the keys of the patches that a pruned run dropped above it."""
    gone = torch.zeros(rows, PATCHES + 1, dtype=torch.bool)
    for number, block in enumerate(model.blocks):
        for entry in recording.kept if recording else ():
            if entry.layer == number:
                gone = torch.ones_like(gone).scatter(1, entry.indices, False)
        block.attention.hidden = gone if gone.any() else None

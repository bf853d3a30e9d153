"""Only patches are patches: learned tokens in front and behind stay; shares over positions are not narrowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tokcompile
from tests.members import members
from tests.pruning import close, optimized, recipe
from tests.zoo.vlm import randomize
from tokcompile.errors import NoMatchError, RecipeError

HALF = {"pass": "class_attention", "params": {"keep": [0.5, 0.5], "at": [0.34, 0.67]}}
STEPS: list[dict[str, Any]] = [
    HALF,
    {"pass": "patch_random", "params": {"keep": [0.5], "at": [0.5]}},
    {"pass": "patch_merge", "params": {"keep": [0.6], "at": [0.5]}},
    {"pass": "patch_pool", "params": {"keep": [0.5], "at": [0.5]}},
]


class Block(nn.Module):
    gone: Tensor | None = None  # [batch, tokens]: keys to hide, for the oracle

    def __init__(self, width: int, tokens: int, positions: str) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.o = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.positions, self.places = positions, nn.Parameter(torch.randn(1, 2, tokens, tokens))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (t.view(batch, tokens, 2, -1).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if self.positions == "bias":
            scores = scores + self.places
        if self.gone is not None:
            scores = scores.masked_fill(self.gone[:, None, None], float("-inf"))
        weights = scores.softmax(-1)
        if self.positions == "softmax":
            weights = 0.5 * weights + 0.5 * self.places.softmax(-1)
        elif self.positions == "divided":
            shares = self.places.exp()
            weights = 0.5 * weights + 0.5 * (shares / shares.sum(-1, keepdim=True))
        x = x + self.o((weights @ v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.n2(x))


class Encoder(nn.Module):
    def __init__(self, front: int, behind: int, positions: str = "bias", nested: bool = False) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 8, 8)
        self.front, self.behind = nn.Parameter(torch.randn(1, front, 16)), nn.Parameter(torch.randn(1, behind, 16))
        self.blocks = nn.ModuleList(Block(16, front + 16 + behind, positions) for _ in range(4))
        self.count, self.nested = behind, nested

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        front, behind = (t.expand(x.shape[0], -1, -1) for t in (self.front, self.behind))
        if self.nested:
            x = torch.cat([torch.cat([front, x], 1), behind], 1)
        else:
            x = torch.cat([t for t in (front, x, behind) if t.shape[1]], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, -self.count :] if self.count else x[:, 0]


@pytest.mark.parametrize(
    ("step", "front", "behind", "nested"),
    members(
        [*((step, 1, 5, False) for step in STEPS), (HALF, 1, 3, True), (HALF, 0, 2, False)],
        [*((step, 1, 5, False) for step in STEPS), (HALF, 1, 3, True)],
    ),
)
def test_tokens_behind_the_patches_stay(step: dict[str, Any], front: int, behind: int, nested: bool) -> None:
    model = randomize(Encoder(front, behind, nested=nested))
    image = torch.randn(2, 3, 32, 32)
    fast = optimized(model, [step])
    with torch.no_grad(), tokcompile.record(fast) as record:
        found = fast(image)
    size = front + 16 + behind
    special = {*range(front), *range(front + 16, size)}
    for kept in record.kept:
        assert all(special <= set(row.tolist()) for row in kept.indices)
        assert kept.indices.shape[1] < size
    if step["pass"] in ("class_attention", "patch_random"):  # the others give new tokens
        gone = torch.zeros(2, size, dtype=torch.bool)
        first = {k.layer: k.indices for k in record.kept}
        for number, block in enumerate(model.blocks):
            if number in first:
                gone = torch.ones(2, size, dtype=torch.bool).scatter(1, first[number], False)
            block.gone = gone
        with torch.no_grad():
            close(found, model(image))


@pytest.mark.parametrize(
    "kind",
    members([transformers.YolosForObjectDetection, transformers.YolosModel], [transformers.YolosForObjectDetection]),
)
def test_yolos(kind: Any) -> None:
    config = transformers.YolosConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=5,
        num_labels=3,
        use_mid_position_embeddings=False,
    )
    fast = optimized(randomize(kind(config)), [HALF])
    with torch.no_grad(), tokcompile.record(fast) as record:
        fast(pixel_values=torch.randn(2, 3, 32, 32))
    assert all({0, *range(17, 22)} <= set(row.tolist()) for kept in record.kept for row in kept.indices)


def test_more_may_be_protected() -> None:
    model = randomize(Encoder(1, 2))
    fast = tokcompile.optimize(
        model, {**recipe([HALF]), "protect": {"leading_tokens": 2, "trailing_tokens": 4}}, lowering="eager"
    )
    with torch.no_grad(), tokcompile.record(fast) as record:
        fast(torch.randn(2, 3, 32, 32))
    assert all({0, 1, 15, 16, 17, 18} <= set(row.tolist()) for kept in record.kept for row in kept.indices)
    for trailing, says in ((1, r"trailing_tokens is 1, and the 2 tokens behind"), (18, r"no patch is left")):
        with pytest.raises(NoMatchError, match=says):
            tokcompile.optimize(
                model,
                {**recipe([HALF]), "protect": {"trailing_tokens": trailing}},
                lowering="eager",
                inputs={"image": torch.randn(2, 3, 32, 32)},
            )
    with pytest.raises(RecipeError, match=r"protect\.trailing_tokens: no pass of this recipe removes tokens inside"):
        tokcompile.optimize(
            nn.Linear(2, 2),
            {**recipe([{"pass": "random", "params": {"keep": 0.5}}]), "protect": {"trailing_tokens": 2}},
        )


@pytest.mark.parametrize("positions", ["softmax", "divided"])
def test_shares_over_positions_are_refused(positions: str) -> None:
    model = randomize(Encoder(1, 0, positions))
    with pytest.raises(NoMatchError, match="sum to one over all tokens"):
        optimized(model, [HALF], inputs={"image": torch.randn(2, 3, 32, 32)})

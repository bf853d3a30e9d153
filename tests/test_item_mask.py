"""Tokens of an item that do not see one another: dense attention under the explicit mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokcompile
from tests.test_block_selection import dense
from tests.zoo import encoders
from tokcompile.errors import NoMatchError
from tokcompile.passes.sparse_attention.item_mask import item_attention


def explicit(segments: Tensor, visible: Tensor | None) -> Tensor:
    """The mask of the paper, bool [B, L, L]: earlier tokens, of the same item only oneself, none that is padding."""
    length = segments.shape[1]
    mask = torch.zeros(len(segments), length, length, dtype=torch.bool)
    for b, row in enumerate(segments.tolist()):
        for i in range(length):
            for j in range(i + 1):
                same = row[i] >= 0 and row[i] == row[j]
                mask[b, i, j] = (i == j or not same) and (visible is None or bool(visible[b, j]))
    return mask


def drawn(lengths: list[int], length: int) -> Tensor:
    """Items of these lengths, text of one token where it is 0."""
    row: list[int] = []
    for number, size in enumerate(lengths):
        row += [number] * size if size else [-1]
    return torch.tensor((row + [-1] * length)[:length])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=2, max_size=2),
    st.integers(1, 22),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.booleans(),
    st.sampled_from([0.0, 2.0]),
    st.integers(0, 9),
)
def test_items_are_the_explicit_mask(
    items: list[list[int]], length: int, heads: tuple[int, int], padded: bool, softcap: float, seed: int
) -> None:
    """Items of any length, longer than a block too, at the start and at the end."""
    torch.manual_seed(seed)
    segments = torch.stack([drawn(row, length) for row in items])
    query, key, value = (torch.randn(2, h, length, 8) for h in (heads[0], heads[1], heads[1]))
    visible = None
    if padded:
        visible = torch.arange(length).expand(2, length) >= torch.tensor([[length // 3], [0]])
        value.masked_fill_(~visible[:, None, :, None], math.nan)
    found = item_attention(query, key, value, segments, 0.3, softcap, 4, visible)
    mask = explicit(segments, visible)
    rows = torch.ones(2, length, dtype=torch.bool) if visible is None else visible
    wanted = dense(query, key, value.nan_to_num(0.0), mask[:, None].expand(2, heads[0], length, length), 0.3, softcap)
    for b in range(2):
        torch.testing.assert_close(found[b, :, rows[b]].double(), wanted[b, :, rows[b]], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(found).all()


class Recommender(nn.Module):
    """A decoder that embeds the kind of its tokens; ``masked``: with the explicit mask."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked
        self.embed, self.kind = nn.Embedding(50, 32), nn.Embedding(2, 32)
        self.q, self.kv = (nn.ModuleList(nn.Linear(32, 32) for _ in range(2)) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, ids: Tensor, items: Tensor, there: Tensor | None = None) -> Tensor:
        x = self.embed(ids) + self.kind((items >= 0).long())
        b, s, _ = x.shape
        for q, kv, out in zip(self.q, self.kv, self.out, strict=True):
            query = q(x).view(b, s, 4, 8).transpose(1, 2)
            key, value = kv(x).view(b, s, 2, 2, 8).permute(2, 0, 3, 1, 4)
            mask = None
            if self.masked:
                mask = explicit(items, there)[:, None]
            elif there is not None:
                mask = there[:, None, None, :] & torch.ones(s, s, dtype=torch.bool).tril()
            y = nn.functional.scaled_dot_product_attention(
                query, key, value, mask, is_causal=mask is None, enable_gqa=True
            )
            x = x + out(y.transpose(1, 2).reshape(b, s, 32))
        return x


def recipe(**params: object) -> dict[str, object]:
    step = {"pass": "item_mask", "params": {"segments": "items", "block": 4, **params}}
    return {"recipe_version": 1, "description": "test", "steps": [step]}


def inputs(length: int = 18) -> dict[str, Tensor]:
    torch.manual_seed(1)
    rows = [drawn([0, 0, 3, 3, 0, 5, 2], length), drawn([3, 3, 3, 0, 0, 4], length)]
    return {"ids": torch.randint(0, 50, (2, length)), "items": torch.stack(rows)}


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_is_the_one_with_the_explicit_mask(padded: bool) -> None:
    torch.manual_seed(0)
    model, other = Recommender().eval(), Recommender(masked=True).eval()
    other.load_state_dict(model.state_dict())
    given = inputs()
    rows = torch.ones(2, 18, dtype=torch.bool)
    if padded:
        rows[0, :2] = False
        given["there"] = rows
    optimized = tokcompile.optimize(model, recipe(), lowering="eager")
    with torch.no_grad():
        found, wanted, causal = optimized(**given)[rows], other(**given)[rows], model(**given)[rows]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert float((found - causal).abs().max()) > 1e-2
    assert tokcompile.report(optimized).steps[0].matches == 2


def test_without_items_it_is_the_model_and_reasons_name_what_is_missing() -> None:
    torch.manual_seed(0)
    model, given = Recommender().eval(), inputs()
    given["items"] = torch.full_like(given["items"], -1)
    optimized = tokcompile.optimize(model, recipe(), lowering="eager")
    with torch.no_grad():
        torch.testing.assert_close(optimized(**given), model(**given), atol=1e-5, rtol=1e-4)
    with pytest.raises(NoMatchError, match=r"no tensor argument 'segment_ids'.*takes ids, items"):
        tokcompile.optimize(model, recipe(segments="segment_ids"), inputs=given, lowering="eager")
    encoder, pixels = encoders.hand_written()
    with pytest.raises(NoMatchError, match="hides later tokens"):
        tokcompile.optimize(encoder, recipe(), inputs=pixels, lowering="eager")

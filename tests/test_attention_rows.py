"""Attention of the last queries on all keys equals the rows of the full matrix, and their sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_tools import TOLERANCE, compiled, needs_compiler, needs_cuda, needs_triton, run_interpreted
from tokcompile.kernels.attention_rows import attention_rows, decompose, supports
from tokcompile.kernels.attention_rows.triton import attention_rows_triton, launches


def make(
    batch=2,
    heads=4,
    kv_heads=2,
    queries=3,
    length=20,
    width=8,
    places="none",
    dtype=torch.float32,
    seed=0,
    device="cpu",
):
    """places: none, one (for all heads) or heads: a row of padding in front of each list."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, width, generator=g)
    key = torch.randn(batch, kv_heads, length, width, generator=g)
    position = None
    if places != "none":
        first = torch.randint(0, length, (batch, 1 if places == "one" else kv_heads, 1), generator=g)
        position = torch.where(torch.arange(length) < first, -1, torch.arange(length) * 2).int().to(device)
    return query.to(device, dtype), key.to(device, dtype), position


def visible(query, key, position, causal, window):
    """bool [B, H, Q, L], key by key."""
    (batch, heads, queries, _), length = query.shape, key.shape[2]
    if position is None:
        position = torch.arange(length, device=query.device).expand(batch, 1, length)
    position = position.expand(batch, key.shape[1], length).repeat_interleave(heads // key.shape[1], 1).long()
    mine, theirs = position[..., length - queries :, None], position[:, :, None]
    seen = (theirs >= 0).expand(batch, heads, queries, length).clone()
    if causal:
        seen &= theirs <= mine
    if window:
        seen &= theirs > mine - window
    return seen


def expected(query, key, position, scale=None, causal=True, window=0, softcap=0.0, sums=True):
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    score = query.double() @ keys.transpose(-1, -2) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    weight = torch.nan_to_num(
        torch.where(visible(query, key, position, causal, window), score, -float("inf")).softmax(-1)
    )
    return weight.sum(2) if sums else weight


def same(found, wanted, dtype):
    assert found.isfinite().all()
    error = float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3))
    assert error <= TOLERANCE[dtype], error


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(4, 24),
    st.integers(1, 9),
    st.sampled_from(["none", "one", "heads"]),
    st.booleans(),
    st.sampled_from([0, 3]),
    st.sampled_from([0.0, 1.5]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 10**6),
)
def test_equals_rows_of_the_matrix(
    batch, kv, group, queries, length, width, places, causal, window, cap, sums, dtype, seed
):
    args = make(batch, kv * group, kv, queries, length, width, places, dtype, seed)
    for function in (attention_rows, decompose):
        found = function(*args, 0.4, causal, window, cap, sums)
        same(found, expected(*args, 0.4, causal, window, cap, sums), torch.float32)


def test_no_hidden_key_has_an_influence():
    query, key, _ = make()
    position = torch.where(torch.arange(20) % 3 == 0, -1, torch.arange(20)).expand(2, 1, 20)
    poison = torch.where(position == -1, 1e30, 0.0).transpose(1, 2).unsqueeze(1)
    assert torch.equal(attention_rows(query, key + poison, position), attention_rows(query, key, position))
    assert not attention_rows(query, key, torch.full_like(position, -1)).any()


def test_batch_equals_single_runs():
    query, key, position = make(places="one")
    whole = attention_rows(query, key, position)
    for b in range(2):
        torch.testing.assert_close(whole[b : b + 1], attention_rows(*(t[b : b + 1] for t in (query, key, position))))


def test_opcheck_and_errors():
    query, key, position = make(places="heads")
    for args in ((query, key), (query.bfloat16(), key.bfloat16(), position, 0.3, True, 4, 2.0, False)):
        torch.library.opcheck(torch.ops.tokcompile.attention_rows.default, args)
    for message, args in (
        ("3 query heads cannot share 2", (query[:, :3], key)),
        ("position .* must be", (query, key, position[..., :4])),
        ("more than the 2 positions", (query, key[:, :, :2])),
        ("window must be", (query, key, None, None, True, -1)),
        ("softcap must be", (query, key, None, None, True, 0, -1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            attention_rows(*args)
    ok, reason = supports(query, key)
    assert not ok
    assert reason


def triton_equals_matrix(device):
    for number, (shape, options, parts) in enumerate(
        (
            ({"width": 64, "queries": 40, "length": 200}, (), 3),
            ({"width": 40, "queries": 5, "length": 90, "places": "heads"}, (0.3, True, 9, 2.0), 2),
            ({"places": "one", "queries": 33, "length": 70}, (None, False), 1),
            ({"heads": 3, "kv_heads": 1, "width": 24, "queries": 7, "length": 50}, (None, True, 0, 0.0, False), None),
            ({"batch": 1, "queries": 1, "length": 1, "width": 5}, (), None),
        )
    ):
        # the interpreter multiplies blocks of bf16 as if they were integers
        for dtype in (torch.float32, torch.float16, torch.bfloat16)[: 3 if device == "cuda" else 2]:
            args = make(**shape, dtype=dtype, seed=number, device=device)
            assert supports(*args[:2])[0]
            same(attention_rows_triton(*args, *options, parts=parts), expected(*args, *options), torch.float32)


@needs_triton
def test_triton_interpreted_equals_matrix():
    run_interpreted(__name__, "triton_equals_matrix")


@pytest.mark.gpu
@needs_cuda
def test_triton_on_a_device_equals_matrix():
    triton_equals_matrix("cuda")


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 256])
def test_triton_compiles_for_gpus(capability, dtype, width):
    query = torch.empty(1, 32, 128, width, dtype=dtype, device="meta")
    key = torch.empty(1, 8, 1 << 17, width, dtype=dtype, device="meta")
    position = torch.empty(1, 1, 1 << 17, dtype=torch.int32, device="meta")
    for launch in launches(query, key, position, softcap=30.0)[0]:
        compiled(launch, capability, 224 if dtype == torch.float32 and width > 128 else 0)  # three TF32 products

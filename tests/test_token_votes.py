"""Votes of heads for keys: definition, operation, Triton kernels and ONNX form agree; skipped rows are not read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.triton_tools import compiled, needs_compiler, needs_cuda, needs_triton, run_interpreted
from tokcompile.kernels.token_votes import decompose, supports, token_votes, token_votes_reference
from tokcompile.kernels.token_votes.triton import launches, token_votes_triton

OP = torch.ops.tokcompile.token_votes


def make(batch=2, heads=4, kv_heads=2, length=20, width=8, dtype=torch.float32, seed=0, shared=False, device="cpu"):
    """Query, key, candidates and flags; a row may have no candidate."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, 1, width, generator=g)
    key = torch.randn(batch, kv_heads, length, width, generator=g)
    candidate = torch.rand(1 if shared else batch, length, generator=g) < 0.7
    skip = torch.rand(batch, generator=g) < 0.4
    return query.to(device, dtype), key.to(device, dtype), candidate.to(device), skip.to(device)


def naive(query: Tensor, key: Tensor, candidate: Tensor, skip: Tensor, scale: float, softcap: float = 0.0) -> Tensor:
    """Head by head and key by key, fp64."""
    batch, heads, _, _ = query.shape
    result = torch.zeros(batch, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        seen = [j for j in range(key.shape[2]) if candidate[b if len(candidate) > 1 else 0, j]]
        for h in range(heads if seen and not skip[b] else 0):
            rows = key[b, h // (heads // key.shape[1])]
            logits = [scale * float(query[b, h, 0].double() @ rows[j].double()) for j in seen]
            if softcap:
                logits = [softcap * math.tanh(x / softcap) for x in logits]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            for j, weight in zip(seen, weights, strict=True):
                result[b, j] += weight / sum(weights)
    return result


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3)]),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from([0.0, 2.0]),
    st.integers(0, 1000),
)
def test_all_forms_equal_the_definition(batch, heads, length, shared, softcap, seed):
    args = make(batch, *heads, length, seed=seed, shared=shared)
    expected = naive(*args, 0.5, softcap)
    for form in (token_votes, token_votes_reference, decompose):
        torch.testing.assert_close(form(*args, 0.5, softcap).double(), expected, rtol=1e-5, atol=1e-6)


def test_rows_without_a_candidate_have_no_votes():
    query, key, candidate, skip = make()
    candidate[0] = False
    found = token_votes(query, key, candidate, torch.zeros_like(skip), 1.0)
    assert torch.equal(found[0], torch.zeros(20))
    torch.testing.assert_close(found[1].sum(), torch.tensor(4.0))


@pytest.mark.parametrize("skipped", [[0], [0, 1]])
def test_keys_of_skipped_rows_are_not_read(skipped):
    query, key, candidate, skip = make()
    skip[:] = False
    skip[skipped] = True
    expected = naive(query, key, candidate, skip, 0.5)
    key[skipped] = torch.nan
    torch.testing.assert_close(token_votes(query, key, candidate, skip, 0.5).double(), expected, rtol=1e-5, atol=1e-6)


def test_opcheck():
    torch.library.opcheck(OP.default, (*make(), 0.5, 1.0))


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        token_votes(*make(), 0.5)
    assert counter.get_total_flops() == 2 * 2 * 4 * 20 * 8


def test_errors_say_what_was_found():
    query, key, candidate, skip = make()
    for args, message in (
        ((query[:, :, :, :4], key, candidate, skip), r"query \[B, H, 1, D\]"),
        ((query.double(), key, candidate, skip), "one float type"),
        ((query[:, :3], key, candidate, skip), "3 query heads cannot share 2"),
        ((query, key, candidate[:, :3], skip), "candidate must be bool"),
        ((query, key, candidate, skip.int()), "skip must be bool"),
    ):
        with pytest.raises(ValueError, match=message):
            token_votes(*args, 0.5)
    assert not supports(query.double(), key.double())[0]


def triton_equals_the_definition(device):
    for number, (sizes, parts) in enumerate(
        [((2, 4, 2, 20, 8), None), ((3, 8, 1, 300, 64), 3), ((1, 6, 6, 70, 40), 2), ((2, 4, 2, 513, 16), 5)]
    ):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-5), (torch.bfloat16, 1e-5)):
            if dtype == torch.bfloat16 and device == "cpu":
                continue  # the interpreter multiplies blocks of bf16 as if they were integers
            args = make(*sizes, dtype=dtype, seed=number, shared=number == 1, device=device)
            args[2][-1, :] = number != 3  # one row without a candidate
            softcap = 3.0 if number % 2 else 0.0
            cpu = [t.cpu() for t in args]
            found = token_votes_triton(*args, 0.3, softcap, parts).cpu()
            # inputs are exact, products and sums fp32: no rounding to 16 bits on the way
            torch.testing.assert_close(found.double(), naive(*cpu, 0.3, softcap), rtol=tolerance, atol=tolerance)
            args[1][args[3]] = torch.nan
            assert torch.equal(token_votes_triton(*args, 0.3, softcap, parts).cpu(), found)


@needs_triton
def test_triton_interpreted_equals_the_definition():
    run_interpreted(__name__, "triton_equals_the_definition")


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [64, 128])
def test_triton_compiles_for_gpus(capability, dtype, width):
    args = [t.to("meta") for t in make(2, 32, 8, 4096, width, dtype)]
    for softcap in (0.0, 30.0):
        for launch in launches(*args, 0.1, softcap)[0]:
            compiled(launch, capability)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype):
    triton_equals_the_definition("cuda")
    args = make(2, 32, 8, 5000, 128, dtype, device="cuda")
    assert supports(*args[:2])[0]
    torch.cuda.set_sync_debug_mode("error")  # nothing is copied to the host
    try:
        found = token_votes(*args, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = token_votes_reference(*(t.cpu().double() if t.is_floating_point() else t.cpu() for t in args), 0.1)
    torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=1e-4, atol=1e-5)

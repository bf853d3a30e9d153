"""Attention over listed blocks equals dense attention under the mask that the lists define, in every form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.test_attention_rows import visible as by_position
from tests.triton_tools import close, compiled, dense, needs_compiler, needs_cuda, needs_triton, run_interpreted
from tokcompile.kernels.block_list_attention import block_list_attention, decompose, supports
from tokcompile.kernels.block_list_attention.triton import block_list_attention_triton, launch

OP = torch.ops.tokcompile.block_list_attention


def make(
    batch=2,
    heads=4,
    kv_heads=2,
    queries=20,
    length=20,
    width=8,
    lists=None,
    capacity=3,
    block_q=8,
    block_k=4,
    places="none",
    value_width=None,
    dtype=torch.float32,
    seed=0,
    listed=True,
    counted=True,
    device="cpu",
):
    """Random arguments: lists of distinct blocks, some slots empty, counts from 0 to the capacity."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, width, generator=g)
    key = torch.randn(batch, kv_heads, length, width, generator=g)
    value = torch.randn(batch, kv_heads, length, value_width or width, generator=g)
    index = count = position = None
    if listed:
        blocks, rows = -(-length // block_k), -(-queries // block_q)
        order = torch.rand(batch, lists or heads, rows, max(blocks, capacity), generator=g).argsort(-1)[..., :capacity]
        index = torch.where((order < blocks) & (torch.rand(order.shape, generator=g) > 0.2), order, -1).int().to(device)
        if counted:
            count = torch.randint(0, capacity + 1, index.shape[:3], generator=g).int().to(device)
    if places != "none":
        first = torch.randint(0, length, (batch, 1 if places == "one" else kv_heads, 1), generator=g)
        position = torch.where(torch.arange(length) < first, -1, torch.arange(length) * 2).int().to(device)
    return (*(t.to(device, dtype) for t in (query, key, value)), index, count, position, block_q, block_k)


def visible(query, key, value, index, count, position, block_q, block_k, scale=None, causal=True, window=0, cap=0.0):
    mask = by_position(query, key, position, causal, window)
    if index is None:
        return mask
    listed = torch.zeros_like(mask)
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            m = h // (mask.shape[1] // index.shape[1])
            for row in range(index.shape[2]):
                entries = index[b, m, row].tolist()
                for block in entries if count is None else entries[: int(count[b, m, row])]:
                    if block >= 0:
                        listed[b, h, row * block_q : (row + 1) * block_q, block * block_k : (block + 1) * block_k] = (
                            True
                        )
    return mask & listed


def expected(args, scale=None, causal=True, window=0, softcap=0.0):
    return dense(*args[:3], visible(*args, scale, causal, window), scale, softcap)


@st.composite
def cases(draw):
    kv_heads, sharing, group = (draw(st.integers(1, 2)) for _ in range(3))
    length = draw(st.integers(1, 26))
    args = make(
        draw(st.integers(1, 2)),
        kv_heads * sharing * group,
        kv_heads,
        draw(st.integers(1, length)),
        length,
        draw(st.integers(1, 9)),
        kv_heads * sharing,
        draw(st.integers(1, 4)),
        draw(st.sampled_from([4, 7])),
        draw(st.sampled_from([3, 4])),
        draw(st.sampled_from(["none", "one", "heads"])),
        draw(st.integers(1, 9)),
        draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])),
        draw(st.integers(0, 2**31)),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    options = (
        draw(st.sampled_from([None, 0.3])),
        draw(st.booleans()),
        draw(st.sampled_from([0, 3])),
        draw(st.sampled_from([0.0, 1.5])),
    )
    return args, options


@settings(max_examples=120, deadline=None)
@given(cases())
def test_equals_dense_attention_under_the_mask_of_the_lists(case):
    args, options = case
    for found in (block_list_attention(*args, *options), decompose(*args, *options)):
        for value, wanted in zip(found, expected(args, *options), strict=True):
            close(value, wanted, args[0].dtype)
        assert found[0].dtype == args[0].dtype


@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_is_sdpa(causal):
    query, key, value, *_ = make(queries=300, length=300, width=16)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    everything = torch.arange(5).expand(2, 2, 3, 5)
    for index in (None, everything):
        found = block_list_attention(query, key, value, index, None, None, 128, 64, None, causal)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


def test_no_other_key_has_an_influence():
    args = make(length=40, queries=40, lists=2, places="one")
    before = block_list_attention(*args)
    seen = visible(*args).any(2).view(2, 2, 2, 40).any(2).unsqueeze(-1)
    # blocks that hold a seen key are read as a whole, so what is poisoned is what no list or position names
    listed = visible(*args, causal=False).any(2).view(2, 2, 2, 40).any(2).unsqueeze(-1)
    assert bool((listed | ~seen).all())
    poison = torch.where(listed, 0.0, float("nan"))
    after = block_list_attention(args[0], args[1] + poison, args[2] + poison, *args[3:])
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_queries_without_a_key_give_zero():
    args = make()
    for empty in ((torch.full_like(args[3], -1), None), (args[3], torch.zeros_like(args[4]))):
        output, lse = block_list_attention(*args[:3], *empty, *args[5:])
        assert not output.any()
        assert bool((lse == -float("inf")).all())


def test_batch_equals_single_runs():
    args = make(places="one")
    whole = block_list_attention(*args)
    for b in range(2):
        single = block_list_attention(*(t[b : b + 1] if isinstance(t, torch.Tensor) else t for t in args))
        for x, y in zip(whole, single, strict=True):
            torch.testing.assert_close(x[b : b + 1], y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("places", ["none", "one"])
@pytest.mark.parametrize("listed", [True, False])
def test_gradients(places, softcap, listed):
    args = make(queries=9, length=9, width=3, dtype=torch.float64, seed=3, places=places, block_q=4, listed=listed)
    leaves = [t.requires_grad_() for t in args[:3]]
    output, lse = block_list_attention(*leaves, *args[3:], None, True, 0, softcap)
    wanted, wanted_lse = dense(*leaves, visible(*args), None, softcap)
    weight, weight_lse = torch.randn_like(output), torch.randn_like(lse)
    finite = lse > -float("inf")
    found = torch.autograd.grad((output * weight).sum() + (lse * weight_lse)[finite].sum(), leaves)
    right = torch.autograd.grad((wanted * weight).sum() + (wanted_lse * weight_lse)[finite].sum(), leaves)
    for x, y in zip(found, right, strict=True):
        torch.testing.assert_close(x, torch.nan_to_num(y))


def test_opcheck():
    for dtype, places in ((torch.float32, "none"), (torch.bfloat16, "heads")):
        args = make(dtype=dtype, places=places)
        leaves = [t.requires_grad_() for t in args[:3]]
        torch.library.opcheck(OP.default, (*leaves, *args[3:], 0.5, True, 3, 2.0))
        torch.library.opcheck(OP.default, tuple(leaves))


def test_errors_say_what_was_found():
    query, key, value, index, count, *_ = make()
    for message, args in (
        ("3 query heads cannot share 2", (query[:, :3], key, value)),
        ("3 lists for 4 query heads", (query, key, value, index[:, :3], None, None, 8, 4)),
        (r"must be \[B, M, 3, C\]", (query, key, value, index[:, :, :2], None, None, 8, 4)),
        (r"index must lie in \[-1, 5\)", (query, key, value, torch.full_like(index, 5), None, None, 8, 4)),
        ("count must lie", (query, key, value, index, torch.full_like(count, 4), None, 8, 4)),
        ("count without index", (query, key, value, None, count)),
        ("at least one row", (query, key, value, None, None, None, 0, 4)),
        ("softcap must be", (query, key, value, None, None, None, 8, 4, None, True, 0, -1.0)),
    ):
        with pytest.raises(ValueError, match=message):
            block_list_attention(*args)
    ok, reason = supports(query, key, value)
    assert not ok
    assert reason


class Attend(torch.nn.Module):
    def forward(self, query, key, value, index, count):
        return OP(query, key, value, index, count, None, 8, 4, None, True, 0, 3.0)


def test_onnxruntime_computes_the_same():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    args = make()[:5]
    program = torch.export.export(Attend(), args).run_decompositions({OP.default: decompose})
    model = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = session.run(None, dict(zip((i.name for i in session.get_inputs()), (a.numpy() for a in args), strict=True)))
    for value, wanted in zip(found, Attend()(*args), strict=True):
        close(torch.from_numpy(value), wanted, torch.float32)


def triton_equals_dense(device):
    for number, (shape, options) in enumerate(
        (
            ({"width": 64, "queries": 70, "length": 90, "block_q": 32, "block_k": 16}, ()),
            (
                {"width": 40, "queries": 50, "length": 50, "block_q": 16, "block_k": 32, "places": "heads", "lists": 2},
                (0.4, True, 9, 2.0),
            ),
            (
                {
                    "heads": 3,
                    "kv_heads": 1,
                    "width": 24,
                    "value_width": 17,
                    "queries": 33,
                    "length": 40,
                    "block_q": 16,
                    "block_k": 16,
                },
                (None, False),
            ),
            (
                {
                    "width": 32,
                    "queries": 100,
                    "length": 150,
                    "block_q": 64,
                    "block_k": 64,
                    "listed": False,
                    "places": "one",
                },
                (None, True, 20),
            ),
            ({"width": 128, "queries": 40, "length": 40, "block_q": 16, "block_k": 16, "listed": False}, (None, False)),
            ({"batch": 1, "queries": 1, "length": 1, "width": 5, "block_q": 16, "block_k": 16, "capacity": 1}, ()),
        )
    ):
        # the interpreter multiplies blocks of bf16 as if they were integers
        for dtype in (torch.float32, torch.float16, torch.bfloat16)[: 3 if device == "cuda" else 2]:
            args = make(**shape, dtype=dtype, seed=number, device=device)
            assert supports(*args[:3], *args[6:])[0]
            for found, wanted in zip(
                block_list_attention_triton(*args, *options), expected(args, *options), strict=True
            ):
                close(found, wanted, dtype)


@needs_triton
def test_triton_interpreted_equals_dense():
    run_interpreted(__name__, "triton_equals_dense")


@pytest.mark.gpu
@needs_cuda
def test_triton_on_a_device_equals_dense():
    triton_equals_dense("cuda")


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 128, 256])
def test_triton_compiles_for_gpus(capability, dtype, width):
    query = torch.empty(1, 32, 1 << 17, width, dtype=dtype, device="meta")
    key = torch.empty(1, 8, 1 << 17, width, dtype=dtype, device="meta")
    index = torch.empty(1, 32, 1 << 10, 128, dtype=torch.int32, device="meta")
    position = torch.empty(1, 1, 1 << 17, dtype=torch.int32, device="meta")
    # wide heads in fp32 (three TF32 products) spill a few registers; 16-bit types none
    spilled = 72 if dtype == torch.float32 and width > 64 else 0
    compiled(launch(query, key, key, index, index[..., 0], position, softcap=30.0)[0], capability, spilled)

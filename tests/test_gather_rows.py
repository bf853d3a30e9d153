"""Rows by head, and back to their places."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_tools import compiled, needs_compiler, needs_cuda, needs_triton, run_interpreted
from tokcompile.kernels.gather_rows import decompose_gather, decompose_scatter, gather_rows, scatter_rows
from tokcompile.kernels.gather_rows.triton import gather_rows_triton, launch, scatter_rows_triton


def make(batch=2, heads=2, lists=4, length=9, entries=5, width=6, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    source = torch.randn(batch, heads, length, width, generator=g).to(dtype)
    index = torch.rand(batch, lists, max(length, entries), generator=g).argsort(-1)[..., :entries]
    index = torch.where((index < length) & (torch.rand(index.shape, generator=g) > 0.2), index, -1)
    return source, index.int()


def wanted(source, index):
    out = torch.zeros(*index.shape, source.shape[3], dtype=source.dtype, device=source.device)
    for b, m, k in torch.cartesian_prod(*(torch.arange(n) for n in index.shape)).tolist():
        row = int(index[b, m, k])
        if row >= 0:
            out[b, m, k] = source[b, m // (index.shape[1] // source.shape[1]), row]
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_rows_go_where_the_lists_say(batch, heads, group, length, entries, width, seed):
    source, index = make(batch, heads, heads * group, length, entries, width, seed=seed)
    rows = wanted(source, index)
    for gather in (gather_rows, decompose_gather):
        assert torch.equal(gather(source, index), rows)
    back = torch.zeros(batch, heads * group, length, width)
    for b, m, k in torch.cartesian_prod(*(torch.arange(n) for n in index.shape)).view(-1, 3).tolist():
        if index[b, m, k] >= 0:
            back[b, m, index[b, m, k]] = rows[b, m, k]
    for scatter in (scatter_rows, decompose_scatter):
        assert torch.equal(scatter(rows, index, length), back)


def test_strides_and_poison():
    source, index = make()
    turned = source.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(gather_rows(turned, index), wanted(source, index))
    used = torch.zeros(2, 2, 9, dtype=torch.bool)
    for b, m in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        used[b, m // 2, index[b, m][index[b, m] >= 0].long()] = True
    poisoned = source.masked_fill(~used.unsqueeze(-1), float("nan"))
    assert torch.equal(gather_rows(poisoned, index), wanted(source, index))
    rows = wanted(source, index).masked_fill((index < 0).unsqueeze(-1), float("nan"))
    assert scatter_rows(rows, index, 9).isfinite().all()


def test_gradients_and_opcheck():
    source, index = make(length=5, width=2, dtype=torch.float64)
    index[0, 0] = 3  # read several times, by two lists of one head
    index[0, 1] = 3
    torch.autograd.gradcheck(lambda s: gather_rows(s, index), (source.requires_grad_(),))
    rows = torch.randn(2, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    index = make()[1]
    torch.autograd.gradcheck(lambda r: scatter_rows(r, index, 9), (rows,))
    torch.library.opcheck(torch.ops.tokcompile.gather_rows.default, (source, make(length=5)[1]))
    torch.library.opcheck(torch.ops.tokcompile.scatter_rows.default, (rows, index, 9))


def test_errors_say_what_was_found():
    source, index = make()
    for message, call in (
        ("3 lists cannot share 2 heads", lambda: gather_rows(source, index[:, :3])),
        ("index must be int32 or int64", lambda: gather_rows(source, index.float())),
        ("rows of the batch", lambda: gather_rows(source[:1], index)),
        (r"index must lie in \[-1, 9\)", lambda: gather_rows(source, torch.full_like(index, 9))),
        ("must have the shape of index", lambda: scatter_rows(torch.zeros(2, 4, 3, 6), index, 9)),
        (r"\[-1, 4\)", lambda: scatter_rows(torch.zeros(2, 4, 5, 6), torch.full_like(index, 4), 4)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def triton_equals_definition(device):
    for number, shape in enumerate(
        (
            {},
            {"width": 64, "length": 300, "entries": 150},
            {"width": 80, "lists": 2},
            {"entries": 0},
            {"batch": 1, "heads": 1, "lists": 1, "length": 1, "entries": 1},
        )
    ):
        for dtype in (torch.float32, torch.bfloat16):
            source, index = (t.to(device) for t in make(**shape, dtype=dtype, seed=number))
            rows = wanted(source, index)
            outside = torch.where(index < 0, source.shape[2] + 3, index)
            assert torch.equal(gather_rows_triton(source, outside), rows)
            turned = source.transpose(1, 2).contiguous().transpose(1, 2)
            assert torch.equal(gather_rows_triton(turned, index), rows)
            assert torch.equal(
                scatter_rows_triton(rows, index, source.shape[2]), scatter_rows(rows, index, source.shape[2])
            )


@needs_triton
def test_triton_interpreted_equals_definition():
    run_interpreted(__name__, "triton_equals_definition")


@pytest.mark.gpu
@needs_cuda
def test_triton_on_a_device_equals_definition():
    triton_equals_definition("cuda")


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("scatter", [False, True])
def test_triton_compiles_for_gpus(capability, scatter):
    shape = (1, 32 if scatter else 8, 16384 if scatter else 1 << 17, 128)
    rows = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    index = torch.empty(1, 32, 16384, dtype=torch.int64, device="meta")
    compiled(launch(rows, index, rows, 1 << 17, scatter), capability)

"""A gated product with table rows: definition, host form, Triton kernel, ONNX form and gradients agree."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_tools import compiled, needs_compiler, needs_cuda, needs_triton, run_interpreted
from tokcompile.kernels.activation import ACTIVATIONS, activate
from tokcompile.kernels.embedding_gate import (
    decompose,
    embedding_gate,
    embedding_gate_host,
    embedding_gate_reference,
    supports,
)
from tokcompile.kernels.embedding_gate import triton as kernel

OPERATION = torch.ops.tokcompile.embedding_gate.default


def example(
    sizes,
    width,
    count,
    *,
    activation="silu",
    remap=0,
    fallback="none",
    least=0,
    dtype=torch.float32,
    seed=0,
    device="cpu",
):
    """Arguments of the operation. ``remap``: size of the vocabulary, 0 for none."""
    g = torch.Generator().manual_seed(seed)
    gate, table = torch.randn(*sizes, width, generator=g), torch.randn(count, width, generator=g)
    limit = remap + 2 if remap else count  # ids behind the vocabulary too
    index = torch.randint(least, max(limit, least + 1), sizes, generator=g)
    places = torch.randint(-1, count, (remap,), generator=g).int() if remap else None
    other = {"none": None, "row": torch.randn(width, generator=g), "tokens": torch.randn(*sizes, width, generator=g)}
    moved = [None if t is None else t.to(device, dtype) for t in (gate, table, other[fallback])]
    return (moved[0], moved[1], index.to(device), activation, None if places is None else places.to(device), moved[2])


def naive(gate, table, index, activation, remap=None, fallback=None):
    """Token by token."""
    width = gate.shape[-1]
    rows = []
    for i, number in enumerate(index.reshape(-1).tolist()):
        if remap is not None:
            number = int(remap[number]) if 0 <= number < len(remap) else -1
        if 0 <= number < len(table):
            rows.append(table[number])
        elif fallback is None:
            rows.append(torch.zeros_like(gate.reshape(-1, width)[0]))
        else:
            rows.append(fallback if fallback.ndim == 1 and gate.ndim > 1 else fallback.reshape(-1, width)[i])
    return activate(gate, activation) * torch.stack(rows).view_as(gate)


def wide(arguments):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)


@st.composite
def cases(draw):
    """Ids twice, out of order, unseen, outside the vocabulary; with and without remap and fallback."""
    return {
        "sizes": draw(st.sampled_from([(1,), (7,), (2, 5), (3, 1), (2, 2, 3)])),
        "width": draw(st.integers(1, 9)),
        "count": draw(st.integers(1, 5)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "remap": draw(st.sampled_from([0, 1, 6])),
        "fallback": draw(st.sampled_from(["none", "row", "tokens"])),
        "least": draw(st.sampled_from([0, -2])),
        "seed": draw(st.integers(0, 2**31)),
        "dtype": torch.float64,
    }


@settings(max_examples=150, deadline=None)
@given(cases())
def test_all_forms_equal_the_naive_formula(case):
    arguments = example(**case)
    expected = naive(*arguments)
    for form in (embedding_gate_reference, embedding_gate, decompose):
        torch.testing.assert_close(form(*arguments), expected, rtol=1e-12, atol=1e-12)


def test_a_table_of_exact_up_projections_equals_the_dense_product_bit_for_bit():
    g = torch.Generator().manual_seed(0)
    embedding, weight, up = (torch.randn(*s, generator=g) for s in ((20, 8), (12, 8), (12, 8)))
    index = torch.randint(0, 20, (2, 9), generator=g)
    gate = embedding[index] @ weight.T
    table = embedding @ up.T
    assert torch.equal(embedding_gate(gate, table, index, "silu"), torch.nn.functional.silu(gate) * table[index])


def test_strided_and_empty():
    gate, table, index, *_ = example((6, 4), 8, 5, seed=1)
    expected = naive(gate.transpose(0, 1), table, index.T, "gelu")
    assert torch.equal(embedding_gate(gate.transpose(0, 1), table, index.T, "gelu"), expected)
    assert embedding_gate(gate[:0], table, index[:0], "silu").shape == (0, 4, 8)
    row = torch.randn(8)
    for rows in (table[:0], None):
        remap = torch.empty(0, dtype=torch.int32) if rows is None else None
        found = embedding_gate(gate, table if rows is None else rows, index, "silu", remap, row)
        assert torch.equal(found, activate(gate, "silu") * row)


@pytest.mark.parametrize("fallback", ["none", "row", "tokens"])
@pytest.mark.parametrize("remap", [0, 6])
def test_gradients(remap, fallback):
    gate, table, index, activation, places, other = example(
        (3, 2), 3, 4, remap=remap, fallback=fallback, least=-1, dtype=torch.float64, seed=3
    )
    inputs = [t.requires_grad_() for t in (gate, table, *([] if other is None else [other]))]
    assert torch.autograd.gradcheck(
        lambda gate, table, *rest: embedding_gate(gate, table, index, activation, places, *rest), inputs
    )


def test_gradient_of_the_table_is_summed_before_it_is_rounded():
    """300 equal small terms: bf16 sums stop growing, an fp32 sum does not."""
    gate = torch.full((300, 4), 1.0, dtype=torch.bfloat16)
    table = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    index = torch.full((300,), 1)
    embedding_gate(gate, table, index, "identity").backward(torch.full((300, 4), 2.0**-6, dtype=torch.bfloat16))
    expected = torch.zeros(3, 4)
    expected[1] = 300 * 2.0**-6
    torch.testing.assert_close(table.grad.float(), expected, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("fallback", ["none", "tokens"])
def test_opcheck(fallback):
    arguments = [
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in example((2, 5), 3, 4, remap=6, fallback=fallback)
    ]
    torch.library.opcheck(OPERATION, tuple(arguments if fallback != "none" else arguments[:4]))


def test_leaf_in_a_symbolic_trace():
    from torch.fx.experimental.proxy_tensor import make_fx

    def layer(gate, table, index):
        return OPERATION(gate + 1, table, index, "silu")

    traced = make_fx(layer, tracing_mode="symbolic", pre_dispatch=True)(*example((2, 5), 3, 4)[:3])
    assert [n.target for n in traced.graph.nodes].count(OPERATION) == 1
    other = example((3, 11), 3, 4, seed=9)[:3]
    assert torch.equal(traced(*other), layer(*other))


@pytest.mark.parametrize("fallback", ["none", "row", "tokens"])
def test_onnxruntime_computes_the_same(fallback):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            _, table, _, _, remap, row = example((1,), 8, 5, remap=7, fallback="row")
            self.table, self.row = torch.nn.Parameter(table), torch.nn.Parameter(row)
            self.register_buffer("remap", remap)

        def forward(self, gate, index):
            other = {"none": None, "row": self.row, "tokens": gate * 3}[fallback]
            return OPERATION(gate, self.table, index, "gelu", self.remap, other)

    module, dynamic = Gate(), {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    gate, _, index, *_ = example((2, 5), 8, 5, remap=7)
    program = torch.export.export(module, (gate, index), dynamic_shapes=(dynamic, dynamic))
    program = program.run_decompositions({OPERATION: decompose})
    assert not any("tokcompile" in str(n.target) for n in program.graph.nodes)
    model = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False).model_proto
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for sizes in ((1, 1), (3, 17)):
        gate, _, index, *_ = example(sizes, 8, 5, remap=7, least=-1, seed=5)
        names = (i.name for i in session.get_inputs())
        found = session.run(None, dict(zip(names, (gate.numpy(), index.numpy()), strict=True)))[0]
        torch.testing.assert_close(torch.from_numpy(found), module(gate, index), rtol=1e-5, atol=1e-6)


def test_errors_say_what_was_found():
    gate, table, index, *_ = example((2, 3), 4, 5)
    for change, message in (
        ({"activation": "swish"}, "known: silu"),
        ({"index": index.int()}, r"index must be int64 \(2, 3\)"),
        ({"index": index[0]}, r"index must be int64 \(2, 3\)"),
        ({"table": table[:, :3]}, r"table must be float \[R, 4\]"),
        ({"gate": gate.long()}, "gate must be float"),
        ({"remap": torch.zeros(3)}, "remap must be int32 or int64"),
        ({"fallback": torch.zeros(3)}, r"fallback must be float \[4\] or \(2, 3, 4\)"),
    ):
        given = {"gate": gate, "table": table, "index": index, "activation": "silu"} | change
        with pytest.raises(ValueError, match=message):
            embedding_gate(**given)
    ok, reason = supports(*example((2, 3), 4, 5, dtype=torch.float64))
    assert not ok
    assert reason


def triton_equals_the_naive_formula(device):
    grid = itertools.product([((1,), 5), ((2, 7), 33), ((3, 2, 2), 1100)], [0, 9], ["none", "row", "tokens"])
    for number, ((sizes, width), remap, fallback) in enumerate(grid):
        for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)):
            arguments = example(
                sizes,
                width,
                6,
                remap=remap,
                fallback=fallback,
                least=-2,
                dtype=dtype,
                seed=number,
                activation=ACTIVATIONS[number % len(ACTIVATIONS)],
                device=device,
            )
            assert supports(*arguments)[0]
            found = kernel.embedding_gate_triton(*arguments)
            assert found.dtype == dtype
            torch.testing.assert_close(found.double(), naive(*wide(arguments)), rtol=tolerance, atol=tolerance)


@needs_triton
def test_triton_interpreted_equals_the_naive_formula():
    run_interpreted(__name__, "triton_equals_the_naive_formula")


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_compiles_for_gpus(capability, dtype):
    for activation, remap, fallback in (("silu", 7, "tokens"), ("gelu_tanh", 0, "none"), ("gelu", 7, "row")):
        gate, table, index, _, places, other = (
            a.to("meta") if isinstance(a, torch.Tensor) else a
            for a in example((2, 3), 14336, 8, remap=remap, fallback=fallback, dtype=dtype)
        )
        launch = kernel.launch(gate, table, index, activation, places, other, torch.empty_like(gate))
        assert compiled(launch, capability).shared <= 1024


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fallback", ["none", "row", "tokens"])
def test_on_a_gpu(dtype, fallback):
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    arguments = example((3, 50), 1536, 40, remap=90, fallback=fallback, least=-1, dtype=dtype, device="cuda")
    assert supports(*arguments)[0]
    found, expected = embedding_gate(*arguments), embedding_gate_host(*wide(arguments))
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    table = arguments[1].requires_grad_()
    embedding_gate(arguments[0], table, *arguments[2:]).square().sum().backward()
    exact = wide(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    other = exact[1].requires_grad_()
    embedding_gate_host(exact[0], other, *exact[2:]).square().sum().backward()
    assert float((table.grad.double() - other.grad).norm() / other.grad.norm()) < 5 * tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_where_under_autocast_keeps_the_type_of_its_input(dtype):
    from tokcompile.kernels.linear_where import linear_where

    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(4, 8, generator=g).requires_grad_()
    mask = torch.rand(2, 5, generator=g) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_where(x, weight, None, mask)
    assert found.dtype == dtype
    wanted = (x.float() @ weight.T) * mask.unsqueeze(-1)
    torch.testing.assert_close(found.float(), wanted, rtol=2e-2, atol=2e-2)
    found.float().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(weight.grad, x.detach().float()[mask].sum(0).expand(4, 8), rtol=1e-2, atol=2e-2)

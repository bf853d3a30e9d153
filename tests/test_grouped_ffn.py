"""Routed experts: definition, host form, Triton kernels, ONNX form and gradients agree with the naive formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_tools import compiled, needs_compiler, needs_cuda, needs_triton, run_interpreted
from tokcompile.kernels.activation import ACTIVATIONS, activate, slope
from tokcompile.kernels.grouped_ffn import (
    decompose,
    grouped_ffn,
    grouped_ffn_host,
    grouped_ffn_reference,
    is_gated,
    slots_of_gate,
    supports,
)
from tokcompile.kernels.grouped_ffn import triton as kernel

OPERATION = torch.ops.tokcompile.grouped_ffn.default


def example(
    tokens,
    slots,
    experts,
    width,
    inner,
    *,
    gated=True,
    bias=False,
    activation="silu",
    dtype=torch.float32,
    least=0,
    seed=0,
    device="cpu",
):
    """Arguments of the operation; with ``least=-1`` some slots are empty."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g)
    index = torch.randint(least, max(experts, least + 1), (tokens, slots), generator=g)
    weight = torch.randn(tokens, slots, generator=g)
    gate_up = torch.randn(experts, (2 if gated else 1) * inner, width, generator=g) / width**0.5
    down = torch.randn(experts, width, inner, generator=g) / inner**0.5
    offset = torch.randn(gate_up.shape[:2], generator=g).to(device, dtype) if bias else None
    moved = [t.to(device, dtype) for t in (x, weight, gate_up, down)]
    return moved[0], index.to(device), moved[1], moved[2], moved[3], activation, offset


def naive(x, index, weight, gate_up, down, activation, bias=None):
    """Token by token, slot by slot."""
    gated = gate_up.shape[1] == 2 * down.shape[2]
    result = []
    for i in range(len(x)):
        total = torch.zeros_like(x[i])
        for j in range(index.shape[1]):
            e = int(index[i, j])
            if e < 0:
                continue
            hidden = gate_up[e] @ x[i]
            if bias is not None:
                hidden = hidden + bias[e]
            half = down.shape[2]
            hidden = activate(hidden[:half], activation) * hidden[half:] if gated else activate(hidden, activation)
            total = total + weight[i, j] * (down[e] @ hidden)
        result.append(total)
    return torch.stack(result) if result else x.clone()


def error(found, expected):
    """Relative error by norm."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def wide(arguments):
    return tuple(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments)


@st.composite
def cases(draw):
    """Experts that nobody chose, that several slots of one token chose, empty slots, one token, one expert."""
    return {
        "tokens": draw(st.integers(1, 9)),
        "slots": draw(st.integers(1, 4)),
        "experts": draw(st.integers(1, 6)),
        "width": draw(st.integers(1, 9)),
        "inner": draw(st.integers(1, 7)),
        "gated": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "least": draw(st.sampled_from([0, -1, -3])),
        "seed": draw(st.integers(0, 2**31)),
        "dtype": torch.float64,
    }


@settings(max_examples=120, deadline=None)
@given(cases())
def test_all_forms_equal_the_naive_formula(case):
    arguments = example(**case)
    expected = naive(*arguments)
    for form in (grouped_ffn_reference, grouped_ffn):
        torch.testing.assert_close(form(*arguments), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_the_derivatives(activation):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(activate(x, activation).sum(), x)
    torch.testing.assert_close(slope(x.detach(), activation), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
def test_all_experts_equal_the_dense_layer(dtype, gated):
    """Slices of one layer, all chosen with weight 1: only the order of the sum over neurons differs."""
    g = torch.Generator().manual_seed(1)
    width, inner, experts = 48, 96, 6
    x = torch.randn(33, width, generator=g).to(dtype)
    up, gate = ((torch.randn(inner, width, generator=g) / width**0.5).to(dtype) for _ in range(2))
    down = (torch.randn(width, inner, generator=g) / inner**0.5).to(dtype)
    hidden = torch.nn.functional.silu(x @ gate.T)
    dense = (hidden * (x @ up.T) if gated else hidden) @ down.T
    blocks = [w.view(experts, inner // experts, width) for w in ((gate, up) if gated else (gate,))]
    index = torch.arange(experts).expand(33, experts)
    found = grouped_ffn(
        x,
        index,
        torch.ones(33, experts),
        torch.cat(blocks, dim=1),
        down.view(width, experts, -1).transpose(0, 1).contiguous(),
        "silu",
    )
    # bf16 rounds each of six parts and the dense sum once more: 2 ** -9 each
    assert error(found, dense) < {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def test_slots_that_are_empty_have_no_influence():
    x, index, weight, gate_up, down, activation, _ = example(6, 3, 4, 8, 5, seed=2)
    index = torch.where(torch.tensor([True, False, True]), index % 2, -1)
    poisoned = [t.clone() for t in (weight, gate_up, down)]
    poisoned[0][:, 1], poisoned[1][2:], poisoned[2][2:] = float("nan"), float("nan"), float("inf")
    for form in (grouped_ffn, grouped_ffn_reference, decompose):
        found = form(x, index, poisoned[0], poisoned[1], poisoned[2], activation)
        torch.testing.assert_close(found, naive(x, index, weight, gate_up, down, activation))
    nothing = grouped_ffn(x, torch.full_like(index, -1), weight, gate_up, down, activation)
    assert torch.equal(nothing, torch.zeros_like(x))


def test_work_is_saved_on_the_host():
    """Products of the chosen experts only: counted, not timed."""
    from torch.utils.flop_counter import FlopCounterMode

    arguments = example(40, 2, 16, 32, 24)
    with FlopCounterMode(display=False) as counter:
        grouped_ffn_host(*arguments)
    assert counter.get_total_flops() == 40 * 2 * 6 * 32 * 24


def test_a_dense_gate_is_slots():
    x, _, _, gate_up, down, activation, bias = example(11, 1, 6, 8, 4, bias=True, dtype=torch.float64)
    gate = torch.relu(torch.randn(11, 6, dtype=torch.float64)).requires_grad_()
    index, weight = slots_of_gate(gate)
    found = grouped_ffn(x, index, weight, gate_up, down, activation, bias)
    every = torch.arange(6).expand(11, 6)
    expected = grouped_ffn_reference(x, every, gate, gate_up, down, activation, bias)
    torch.testing.assert_close(found, expected)
    (of_slots,), (of_all,) = (torch.autograd.grad(y.square().sum(), gate) for y in (found, expected))
    torch.testing.assert_close(of_slots, torch.where(gate != 0, of_all, 0))


def test_one_token_by_one_equals_a_batch():
    arguments = example(12, 2, 5, 24, 8, seed=3)
    single = torch.cat([grouped_ffn(*(a[i : i + 1] for a in arguments[:3]), *arguments[3:]) for i in range(12)])
    torch.testing.assert_close(grouped_ffn(*arguments), single, rtol=1e-5, atol=1e-6)


def test_no_tokens():
    arguments = example(0, 2, 3, 8, 4, bias=True)
    assert grouped_ffn(*arguments).shape == (0, 8)
    x = arguments[0].requires_grad_()
    grouped_ffn(*arguments).sum().backward()
    assert x.grad.shape == (0, 8)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients(gated, activation):
    x, index, weight, gate_up, down, _, bias = example(
        5, 2, 4, 3, 2, gated=gated, bias=True, dtype=torch.float64, least=-1, seed=4
    )
    index[0] = 1  # one expert in both slots
    inputs = [t.requires_grad_() for t in (x, weight, gate_up, down, bias)]
    assert torch.autograd.gradcheck(lambda x, w, gu, d, b: grouped_ffn(x, index, w, gu, d, activation, b), inputs)


def test_gradients_that_are_not_wanted_are_not_computed():
    x, index, weight, gate_up, down, activation, _ = example(8, 2, 3, 6, 4)
    weight.requires_grad_()
    grouped_ffn(x, index, weight, gate_up, down, activation).sum().backward()
    other = weight.detach().clone().requires_grad_()
    naive(x, index, other, gate_up, down, activation).sum().backward()
    torch.testing.assert_close(weight.grad, other.grad)
    assert x.grad is None
    assert gate_up.grad is None


def test_gradients_in_bf16_follow_fp32():
    inputs = example(64, 2, 4, 32, 16, dtype=torch.bfloat16, bias=True)
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in inputs]
    gradients = []
    for arguments, form in ((inputs, grouped_ffn), (exact, grouped_ffn_reference)):
        leaves = [arguments[i].requires_grad_() for i in (0, 2, 3, 4, 6)]
        gradients.append(torch.autograd.grad(form(*arguments).double().square().sum(), leaves))
    for found, expected in zip(*gradients, strict=True):
        assert error(found, expected) < 1e-2


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    arguments = [
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in example(6, 2, 4, 5, 3, bias=bias, least=-1)
    ]
    torch.library.opcheck(OPERATION, tuple(arguments if bias else arguments[:-1]))


def test_leaf_in_a_symbolic_trace():
    from torch.fx.experimental.proxy_tensor import make_fx

    def layer(x, index, weight, gate_up, down):
        return OPERATION(x * 2, index, weight, gate_up, down, "silu")

    traced = make_fx(layer, tracing_mode="symbolic", pre_dispatch=True)(*example(6, 2, 4, 5, 3)[:5])
    assert [n.target for n in traced.graph.nodes].count(OPERATION) == 1
    other = example(17, 2, 4, 5, 3, seed=9)[:5]
    assert torch.equal(traced(*other), layer(*other))


def test_onnxruntime_computes_the_same():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Experts(torch.nn.Module):
        def __init__(self, gated, activation):
            super().__init__()
            parts = example(1, 1, 5, 12, 6, gated=gated, bias=True)
            self.gate_up, self.down, self.bias = (torch.nn.Parameter(parts[i]) for i in (3, 4, 6))
            self.activation = activation

        def forward(self, x, index, weight):
            return OPERATION(x, index, weight, self.gate_up, self.down, self.activation, self.bias)

    for gated, activation in ((True, "silu"), (False, "gelu")):
        module = Experts(gated, activation)
        dynamic = {0: torch.export.Dim.DYNAMIC}
        program = torch.export.export(module, example(7, 2, 5, 12, 6)[:3], dynamic_shapes=(dynamic,) * 3)
        program = program.run_decompositions({OPERATION: decompose})
        assert not any("tokcompile" in str(n.target) for n in program.graph.nodes)
        model = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False).model_proto
        assert any(n.op_type == "Loop" for n in model.graph.node)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for tokens, least in ((7, -1), (1, 0), (40, 0), (3, 4)):
            inputs = example(tokens, 2, 5, 12, 6, least=least, seed=tokens)[:3]
            names = (i.name for i in session.get_inputs())
            found = session.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))[0]
            assert error(torch.from_numpy(found), module(*inputs)) < 1e-6


def test_errors_say_what_was_found():
    x, index, weight, gate_up, down, activation, _ = example(3, 2, 4, 6, 5)
    for change, message in (
        ({"activation": "swish"}, "known: silu"),
        ({"index": index.int()}, "index must be int64"),
        ({"index": index + 2}, "index holds expert 5, there are 4"),
        ({"x": x[:, :5]}, "x has width 5, the rows of gate_up 6"),
        ({"x": x[0]}, "x must be float"),
        ({"down": down[:3]}, "gate_up has experts 4, those of down 3"),
        ({"down": down[:, :, :3]}, "twice as high as down is wide"),
        ({"weight": weight[:, :1]}, "index has slots 2, those of weight 1"),
        ({"x": x.double()}, "must have one type"),
        ({"bias": torch.zeros(4, 3)}, "bias must be torch.float32"),
    ):
        given = {
            "x": x,
            "index": torch.full_like(index, 3),
            "weight": weight,
            "gate_up": gate_up,
            "down": down,
            "activation": activation,
            "bias": None,
        } | change
        with pytest.raises(ValueError, match=message):
            grouped_ffn(**given)
    ok, reason = supports(*example(3, 2, 4, 6, 5, dtype=torch.float64))
    assert not ok
    assert reason


def triton_equals_the_naive_formula(device):
    # tokens, slots, experts, width, inner, gated, bias, empty slots, activation
    cases = [
        (70, 3, 5, 70, 40, True, True, -1, "gelu"),
        (40, 8, 8, 33, 17, False, True, 0, "quick_gelu"),
        (90, 1, 3, 16, 16, True, False, 0, "tanh"),
        (40, 2, 64, 32, 16, True, False, -2, "sigmoid"),
        (20, 2, 3, 16, 300, True, False, 0, "relu"),
        (17, 1, 1, 20, 20, False, False, 0, "identity"),
        (1, 2, 5, 300, 70, True, True, 0, "gelu_tanh"),
        (3, 4, 9, 48, 20, False, False, -1, "relu2"),
        (2, 6, 6, 20, 33, True, True, -4, "silu"),
        (8, 2, 4, 520, 40, False, True, 0, "silu"),
    ]
    for number, (n, k, e, d, m, gated, bias, least, activation) in enumerate(cases):
        few = n <= kernel.DECODE_TOKENS or n * k <= kernel.DECODE_SLOTS
        # the interpreter multiplies blocks of bf16 as if they were integers: only kernels without tl.dot run in bf16
        types = ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3))[: 3 if few else 2]
        for dtype, tolerance in types:
            arguments = example(
                n,
                k,
                e,
                d,
                m,
                gated=gated,
                bias=bias,
                least=least,
                activation=activation,
                dtype=dtype,
                seed=number,
                device=device,
            )
            assert supports(*arguments)[0]
            expected = naive(*wide(arguments))
            found = kernel.grouped_ffn_triton(*arguments)
            assert found.dtype == dtype
            assert error(found, expected) < tolerance, (number, dtype, error(found, expected))
        if number == 0:
            kernel.MAX_ENTRIES = 3 * 70 * 20  # chunks of 20 tokens
            assert error(kernel.grouped_ffn_triton(*arguments), found) < tolerance
            kernel.MAX_ENTRIES = 1 << 28
    outside = list(example(40, 2, 4, 16, 16, device=device))
    outside[1][::2] = 4  # no such expert: an empty slot
    assert (
        error(
            kernel.grouped_ffn_triton(*outside),
            naive(outside[0], torch.where(outside[1] < 4, outside[1], -1), *outside[2:]),
        )
        < 1e-6
    )


@needs_triton
def test_triton_interpreted_equals_the_naive_formula():
    run_interpreted(__name__, "triton_equals_the_naive_formula")


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_compiles_for_gpus(capability, dtype):
    """The launches of a 7B layer cut into 8 experts of 1,792 neurons, for prefill, small batch and decode."""
    seen = set()
    for tokens in (4096, 256, 32, 1):
        x, index, weight, gate_up, down, activation, bias = meta(tokens, 2, 8, 4096, 1792, dtype)
        assert is_gated(gate_up, down)
        for launch in kernel.launches(x, index, weight, gate_up, down, activation, bias, torch.empty_like(x)):
            key = (launch.kernel.__name__, tuple(sorted(launch.constants.items())))
            if key not in seen:
                seen.add(key)
                compiled(launch, capability)
    assert {name for name, _ in seen} == {"up_kernel", "down_kernel", "sum_kernel", "few_up_kernel", "few_down_kernel"}


def meta(tokens, slots, experts, width, inner, dtype):
    def empty(*sizes, dtype=dtype):
        return torch.empty(sizes, dtype=dtype, device="meta")

    return (
        empty(tokens, width),
        empty(tokens, slots, dtype=torch.int64),
        empty(tokens, slots, dtype=torch.float32),
        empty(experts, 2 * inner, width),
        empty(experts, width, inner),
        "silu",
        empty(experts, 2 * inner),
    )


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 16, 100, 3000])
def test_on_a_gpu(dtype, tokens):
    arguments = example(tokens, 2, 8, 256, 192, bias=True, dtype=dtype, least=-1, device="cuda")
    assert supports(*arguments)[0]
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    expected = grouped_ffn_reference(*wide(arguments))
    assert error(grouped_ffn(*arguments), expected) < tolerance
    assert torch.equal(grouped_ffn(*arguments), grouped_ffn(*arguments))
    inputs = [arguments[i].requires_grad_() for i in (0, 2, 3, 4, 6)]
    exact = wide(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    others = [exact[i].requires_grad_() for i in (0, 2, 3, 4, 6)]
    found = torch.autograd.grad(grouped_ffn(*arguments).square().sum(), inputs)
    expected = torch.autograd.grad(grouped_ffn_reference(*exact).square().sum(), others)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 5 * tolerance

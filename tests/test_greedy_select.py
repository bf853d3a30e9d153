"""Greedy selection of diverse tokens: definition, host loop, Triton kernel and ONNX form agree to the last bit."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.triton_tools import needs_compiler, needs_triton, run_interpreted
from tokcompile.kernels.greedy_select import (
    CRITERIA,
    decompose,
    greedy_select,
    greedy_select_reference,
    isolation,
    quantise,
)
from tokcompile.kernels.greedy_select import triton as kernel
from tokcompile.kernels.greedy_select.onnx import _quantise, decomposition
from tokcompile.kernels.greedy_select.op import _choose, greedy_select_host, supports
from tokcompile.kernels.greedy_select.reference import NORM, choose, mean_similarity
from tokcompile.rewrite import selection


def brute_force(features, segment, budget, criterion, pivot=None):
    """Greedy selection by sums over Python integers, recomputed at every step."""
    batch, length = segment.shape
    tokens = [[[int(v) for v in token] for token in row] for row in quantise(features).tolist()]
    order = [[length] * length for _ in range(batch)]
    for b in range(batch):
        for number in range(length):
            members = [i for i in range(length) if int(segment[b, i]) == number]
            if not members:
                continue
            steps = min(int(budget[b, members[0]]), len(members))
            chosen = []
            for step in range(steps):
                if step == 0 and pivot is None and criterion != "herding":
                    best = members[(len(members) - 1) // 2]
                elif step == 0 and pivot is not None:
                    best = max(members, key=lambda i: (float(pivot[b, i]), -i))
                else:

                    def value(i, b=b, chosen=chosen, members=members):
                        def cosine(c):
                            return sum(x * y for x, y in zip(tokens[b][i], tokens[b][c], strict=True))

                        cosines = [cosine(c) for c in chosen]
                        if criterion == "herding":
                            mean = sum(cosine(c) for c in members) // len(members)
                            return sum(cosines) - (len(chosen) + 1) * mean
                        return sum(cosines) if criterion == "max_sum" else max(cosines)

                    best = min((i for i in members if i not in chosen), key=lambda i: (value(i), i))
                chosen.append(best)
                order[b][best] = step
    return torch.tensor(order, dtype=torch.int64).reshape(batch, length)


@st.composite
def cases(draw):
    """Rows with several segments or none, few distinct tokens (duplicates, zeros), any budget."""
    batch, length, width = draw(st.integers(1, 3)), draw(st.integers(2, 14)), draw(st.integers(1, 4))
    visual = torch.tensor(
        draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch))
    )
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([1, 2, 1000]))
    features = torch.randint(-levels, levels + 1, (batch, length, width), generator=generator).float()
    segment = selection.segments(visual)
    if draw(st.booleans()):
        budget = selection.budgets(segment, draw(st.integers(0, 4)), 4)
    else:
        budget = selection.budgets_count(segment, draw(st.integers(0, 5)))
    pivot = torch.randint(0, 3, (batch, length), generator=generator).float() if draw(st.booleans()) else None
    return features, segment, budget, draw(st.sampled_from(CRITERIA)), pivot


@settings(max_examples=150, deadline=None)
@given(cases())
def test_all_forms_equal_brute_force(case):
    features, segment, budget, criterion, pivot = case
    expected = brute_force(features, segment, budget, criterion, pivot)
    assert torch.equal(greedy_select_reference(features, segment, budget, criterion, pivot), expected)
    assert torch.equal(greedy_select(features, segment, budget, criterion, pivot), expected)
    steps = max(1, int(budget.max()))
    assert torch.equal(decompose(features, segment, budget, criterion, pivot, steps=steps), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(CRITERIA), st.sampled_from([1, 3, 100]))
def test_guessing_ahead_changes_nothing(seed, criterion, levels):
    generator = torch.Generator().manual_seed(seed)
    tokens = quantise(torch.randint(-levels, levels + 1, (60, 5), generator=generator).float())
    steps = int(torch.randint(1, 61, (1,), generator=generator))
    mean = mean_similarity(tokens).numpy() if criterion == "herding" else None
    plain = _choose(tokens, steps, criterion, 7, mean)
    assert plain == choose(tokens, steps, criterion, 7)
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[_choose.__module__]
        for name, value in (("_SMALL", 0), ("_AHEAD", 5), ("_POOL", 2)):
            patch.setattr(module, name, value)
        assert _choose(tokens, steps, criterion, 7, mean) == plain


def realistic(batch, length, width, seed=0):
    """Clustered tokens with a common mean and one outlier channel."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, width, generator=generator)
    tokens = centres[torch.randint(0, 12, (batch, length), generator=generator)]
    tokens = tokens + 0.6 * torch.randn(batch, length, width, generator=generator)
    tokens = tokens + 0.3 * torch.randn(width, generator=generator)
    tokens[..., 1] += 8
    return tokens


def test_herding_brings_the_mean_of_the_chosen_to_the_mean_of_all():
    tokens = torch.nn.functional.normalize(realistic(1, 256, 64)[0], dim=-1)
    segment, budget = torch.zeros(1, 256, dtype=torch.int64), torch.full((1, 256), 26)

    def distance(kept):
        return float((tokens[kept].mean(0) - tokens.mean(0)).norm())

    found = {c: distance(greedy_select(tokens[None], segment, budget, c)[0] < 26) for c in CRITERIA}
    draws = [distance(torch.randperm(256, generator=torch.Generator().manual_seed(s))[:26]) for s in range(50)]
    assert found["herding"] < 0.5 * min(draws)
    assert found["herding"] < found["max_sum"] < found["k_center"]


@pytest.mark.parametrize("criterion", ["max_sum", "k_center"])
def test_quality_against_unrounded_cosines(criterion):
    """Rounding to integers costs nothing that the criterion can see: the objective is that of fp64 selection."""
    features, count = realistic(1, 300, 256), 30
    segment = torch.zeros(1, 300, dtype=torch.int64)
    order = greedy_select(features, segment, torch.full_like(segment, count), criterion)[0]
    unit = torch.nn.functional.normalize(features[0].double(), dim=-1)
    cosine = unit @ unit.T
    exact = [149]
    score = cosine[149].clone()
    while len(exact) < count:
        score[exact] = 1e9
        best = int(score.argmin())
        exact.append(best)
        score = score + cosine[best] if criterion == "max_sum" else torch.maximum(score, cosine[best])

    def objective(places):
        part = cosine[places][:, places] - 2 * torch.eye(count)
        return float((part.sum() + count) / count**2 if criterion == "max_sum" else part.max())

    assert objective((order < count).nonzero().flatten()) == pytest.approx(objective(torch.tensor(exact)), abs=2e-3)


def test_similarities_are_exact_in_any_order_and_in_tf32():
    tokens = quantise(torch.cat([realistic(1, 50, 777)[0], torch.eye(777)[:3], torch.full((2, 777), 1e20)]))
    assert tokens.abs().max() <= NORM
    exact = tokens.to(torch.int64) @ tokens.to(torch.int64).T
    assert exact.max() < 2**24
    shuffled = torch.randperm(777)
    assert torch.equal((tokens @ tokens.T).to(torch.int64), exact)
    assert torch.equal((tokens[:, shuffled] @ tokens[:, shuffled].T).to(torch.int64), exact)
    assert torch.equal(tokens.to(torch.float16).to(torch.float32), tokens)  # TF32 has the same 11 bits


def test_batch_equals_single_runs():
    features = realistic(4, 70, 33)
    visual = torch.rand(4, 70, generator=torch.Generator().manual_seed(1)) < 0.8
    segment = selection.segments(visual)
    budget = selection.budgets(segment, 1, 3)
    for criterion in CRITERIA:
        whole = greedy_select(features, segment, budget, criterion)
        single = [
            greedy_select(features[i : i + 1], segment[i : i + 1], budget[i : i + 1], criterion) for i in range(4)
        ]
        assert torch.equal(whole, torch.cat(single))
        moved = torch.cat([features.new_zeros(4, 9, 33), features], dim=1)  # left padding
        front = torch.full((4, 9), -1)
        shifted = greedy_select(moved, torch.cat([front, segment], 1), torch.cat([front * 0, budget], 1), criterion)
        assert torch.equal(shifted[:, 9:].clamp(max=70), whole)


def test_odd_tokens():
    features = torch.randn(1, 8, 4)
    features[0, 1], features[0, 2], features[0, 3] = 0.0, float("nan"), float("inf")
    features[0, 4], features[0, 5] = 1e-30, 3e38
    segment, budget = torch.zeros(1, 8, dtype=torch.int64), torch.full((1, 8), 8)
    for criterion in CRITERIA:
        order = greedy_select(features, segment, budget, criterion)
        assert order.sort()[0].tolist() == [list(range(8))]
        assert torch.equal(order, greedy_select_reference(features, segment, budget, criterion))
        assert torch.equal(order, decompose(features, segment, budget, criterion, steps=8))
    assert greedy_select(features[:, :1], segment[:, :1], budget[:, :1], "max_sum").tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_gradients(dtype):
    features = realistic(2, 20, 8).to(dtype).requires_grad_()
    segment, budget = torch.zeros(2, 20, dtype=torch.int64), torch.full((2, 20), 5)
    order = greedy_select(features * 1, segment, budget, "max_sum")
    assert not order.requires_grad
    assert torch.equal(order, greedy_select_reference(features.float(), segment, budget, "max_sum"))
    kept = torch.topk(-order, 5).indices.sort().values
    features.gather(1, kept.unsqueeze(-1).expand(-1, -1, 8)).sum().backward()
    assert features.grad is not None


def test_errors_say_what_was_found():
    features, segment = torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_sum, k_center"):
        greedy_select(features, segment, segment, "maxsum")
    with pytest.raises(ValueError, match="segment must be int64"):
        greedy_select(features, segment.int(), segment, "max_sum")
    with pytest.raises(ValueError, match="features must be float"):
        greedy_select(features[0], segment, segment, "max_sum")
    ok, reason = supports(features, segment, segment, "max_sum")
    assert (ok, bool(reason)) in ((True, False), (False, True))


def test_opcheck():
    segment = selection.segments(torch.rand(2, 12) < 0.7)
    budget = selection.budgets(segment, 1, 2)
    torch.library.opcheck(
        torch.ops.tokcompile.greedy_select.default,
        (torch.randn(2, 12, 3), segment, budget, "k_center", torch.randn(2, 12)),
    )


def select(features, visual):
    segment = selection.segments(visual)
    budget = selection.budgets(segment, 1, 3)
    order = torch.ops.tokcompile.greedy_select(features, segment, budget, "max_sum")
    return selection.keep_mask(-order.to(torch.float32), segment, budget)


def test_leaf_in_a_symbolic_trace():
    from torch.fx.experimental.proxy_tensor import make_fx

    def inputs(batch, length):
        generator = torch.Generator().manual_seed(length)
        return torch.randn(batch, length, 6, generator=generator), torch.rand(batch, length, generator=generator) < 0.7

    traced = make_fx(select, tracing_mode="symbolic", pre_dispatch=True)(*inputs(3, 11))
    assert [n.target for n in traced.graph.nodes].count(torch.ops.tokcompile.greedy_select.default) == 1
    for shape in ((2, 5), (4, 23)):
        assert torch.equal(traced(*inputs(*shape)), select(*inputs(*shape)))


@pytest.mark.inductor
def test_inductor():
    compiled = torch.compile(select, dynamic=True, fullgraph=True)
    for length in (16, 40):
        features, visual = realistic(2, length, 8), torch.rand(2, length) < 0.7
        assert torch.equal(compiled(features, visual), select(features, visual))


@pytest.mark.parametrize("steps", [None, 9])
def test_onnx_decomposition_of_an_exported_program(steps):
    class Select(torch.nn.Module):
        def forward(self, features, visual):
            return select(features, visual)

    features, visual = realistic(2, 12, 8), torch.rand(2, 12) < 0.7
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Select(), (features, visual), dynamic_shapes=(dims, dims))
    program = program.run_decompositions({torch.ops.tokcompile.greedy_select.default: decomposition(steps)})
    assert not any("tokcompile" in str(n.target) for n in program.graph.nodes)
    assert steps or len(program.graph.nodes) < 250
    for shape in ((3, 25), (2, 12)):
        features = realistic(*shape, 8)
        visual = torch.rand(shape) < 0.7
        assert torch.equal(program.module()(features, visual), select(features, visual))


@pytest.mark.slow
def test_onnxruntime_selects_the_same():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Select(torch.nn.Module):
        def forward(self, features, visual):
            segment = selection.segments(visual)
            budget = selection.budgets(segment, 1, 3)
            return [torch.ops.tokcompile.greedy_select(features, segment, budget, c) for c in CRITERIA]

    example = realistic(2, 12, 8), torch.rand(2, 12) < 0.7
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Select(), example, dynamic_shapes=(dims, dims))
    program = program.run_decompositions({torch.ops.tokcompile.greedy_select.default: decomposition()})
    model = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for shape, share in (((1, 7), 0.8), ((3, 40), 0.9), ((1, 90), 1.0), ((2, 12), 0.0)):
        features, visual = realistic(*shape, 8, seed=shape[1]), torch.rand(shape) < share
        features[:, 3] = features[:, 2]
        found = session.run(
            None, dict(zip((i.name for i in session.get_inputs()), (features.numpy(), visual.numpy()), strict=True))
        )
        for value, expected in zip(found, Select()(features, visual), strict=True):
            assert torch.equal(torch.from_numpy(value), expected)


def _converted(model, way, folder):
    """The file as people make it smaller. Features of fp16 precision stay the same in all of them."""
    import onnx

    if way == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        return convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True).SerializeToString()
    from onnxruntime.quantization import quantize_dynamic

    (folder / "whole.onnx").write_bytes(model)
    quantize_dynamic(folder / "whole.onnx", folder / "less.onnx")
    return (folder / "less.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fp16", "dynamic int8"])
def test_converted_files_select_the_same(way, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Select(torch.nn.Module):
        def forward(self, features, visual):
            segment = selection.segments(visual)
            budget = selection.budgets(segment, 1, 3)
            return [torch.ops.tokcompile.greedy_select(features, segment, budget, c) for c in CRITERIA]

    example = realistic(2, 12, 8), torch.rand(2, 12) < 0.7
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Select(), example, dynamic_shapes=(dims, dims))
    program = program.run_decompositions({torch.ops.tokcompile.greedy_select.default: decomposition()})
    model = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(_converted(model, way, tmp_path), providers=["CPUExecutionProvider"])
    for shape, share in (((1, 7), 0.8), ((3, 40), 0.9), ((1, 90), 1.0)):
        features, visual = realistic(*shape, 8, seed=shape[1]).half().float(), torch.rand(shape) < share
        features[:, 3] = features[:, 2]
        found = session.run(
            None, dict(zip((i.name for i in session.get_inputs()), (features.numpy(), visual.numpy()), strict=True))
        )
        for value, expected in zip(found, Select()(features, visual), strict=True):
            assert torch.equal(torch.from_numpy(value), expected)


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14, 3e38])
def test_integers_of_fp64_are_those_of_fp32(scale):
    features = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * scale
    features[0, 0], features[1, 1], features[2] = float("inf"), float("nan"), 0.0
    assert torch.equal(_quantise(features), quantise(features).double())


def triton_equals_reference(device):
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        batch, length, width = 1 + seed % 3, 2 + 5 * seed, 3
        features = torch.randint(-2, 3, (batch, length, width), generator=g).float()
        if seed % 2:
            features = torch.randn(batch, length, width, generator=g)
        segment = selection.segments(torch.rand(batch, length, generator=g) < (0.0 if seed == 3 else 0.85))
        if seed == 4:
            segment = (torch.arange(length) // 7).expand(batch, length)  # neighbours without a gap
        budget = selection.budgets(segment, seed % 4, 3)
        pivot = torch.randint(0, 3, (batch, length), generator=g).float() if seed % 3 else None
        features, segment, budget = (t.to(device) for t in (features, segment, budget))
        pivot = None if pivot is None else pivot.to(device)
        for criterion in CRITERIA:
            assert supports(features, segment, budget, criterion, pivot)[0]
            found = kernel.greedy_select_triton(features, segment, budget, criterion, pivot)
            assert torch.equal(found, greedy_select_reference(features, segment, budget, criterion, pivot)), seed


@needs_triton
def test_triton_interpreted_equals_reference():
    run_interpreted(__name__, "triton_equals_reference")


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("block", [1024, 8192])
def test_triton_compiles_for_gpus(capability, add, block):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        "similarity": "*fp32",
        "segment": "*i64",
        "budget": "*i64",
        "mean": "*i64",
        "first": "*i64",
        "order": "*i64",
        "length": "i32",
        "ADD": "constexpr",
        "BLOCK": "constexpr",
    }
    source = ASTSource(kernel.greedy_kernel, signature, constexprs={"ADD": add, "BLOCK": block})
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernel.warps(block)}
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 48 * 1024


def test_isolation_starts_where_divprune_does():
    features = realistic(2, 40, 16)
    segment = (torch.arange(40) // 20).expand(2, 40).contiguous()
    pivot = isolation(features, segment)
    order = greedy_select(features, segment, torch.full_like(segment, 3), "k_center", pivot)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    for b in range(2):
        for low in (0, 20):
            distance = 1 - unit[b, low : low + 20] @ unit[b, low : low + 20].T + 9 * torch.eye(20)
            assert int(order[b, low : low + 20].argmin()) == int(distance.min(dim=1).values.argmax())


def test_host_form_takes_a_pivot_with_nan():
    features, segment = realistic(1, 6, 4), torch.zeros(1, 6, dtype=torch.int64)
    pivot = torch.tensor([[float("nan"), 1.0, 3.0, 3.0, float("nan"), 0.0]])
    order = greedy_select_host(features, segment, torch.full_like(segment, 2), "max_sum", pivot)
    assert int(order[0, 2]) == 0

"""Selection functions against brute force, their tie rule, and their trace under symbolic sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcompile.rewrite import selection
from tokcompile.rewrite.selection import NO_RANK


@st.composite
def masks(draw, longest=20):
    batch, length = draw(st.integers(1, 4)), draw(st.integers(1, longest))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    return torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))


def runs(row):
    """Contiguous runs of True as lists of positions."""
    found, open_run = [], False
    for place, flag in enumerate(row.tolist()):
        if flag and not open_run:
            found.append([])
        if flag:
            found[-1].append(place)
        open_run = flag
    return found


@settings(max_examples=200, deadline=None)
@given(masks())
def test_segments_sizes_positions(visual):
    segment = selection.segments(visual)
    sizes, positions = selection.segment_sizes(segment), selection.segment_positions(segment)
    for b in range(len(visual)):
        expected = [(-1, 0, 0)] * visual.shape[1]
        for number, run in enumerate(runs(visual[b])):
            for place, at in enumerate(run):
                expected[at] = (number, len(run), place)
        found = zip(segment[b].tolist(), sizes[b].tolist(), positions[b].tolist(), strict=True)
        assert list(found) == expected


def test_neighbouring_segments_without_a_gap():
    segment = torch.tensor([[-1, 0, 0, 1, 1, 1, -1, 2]])
    assert selection.segment_sizes(segment).tolist() == [[0, 2, 2, 3, 3, 3, 0, 1]]
    assert selection.segment_positions(segment).tolist() == [[0, 0, 1, 0, 1, 2, 0, 0]]
    scores = torch.tensor([[9.0, 1, 2, 5, 5, 6, 0, 0]])
    assert selection.rank_in_segment(scores, segment).clamp(max=9).tolist() == [[9, 1, 0, 1, 2, 0, 9, 0]]


@settings(max_examples=200, deadline=None)
@given(masks(), st.integers(0, 10), st.integers(1, 10), st.integers(0, 6))
def test_budgets(visual, num, den, count):
    num = min(num, den)
    segment = selection.segments(visual)
    ratio, absolute = selection.budgets(segment, num, den), selection.budgets_count(segment, count)
    for size, kept, fixed in zip(
        selection.segment_sizes(segment).flatten().tolist(),
        ratio.flatten().tolist(),
        absolute.flatten().tolist(),
        strict=True,
    ):
        assert kept == (max(1, -(-size * num // den)) if size else 0)
        assert fixed == min(size, count)


def test_budget_where_a_float_ratio_is_wrong():
    wrong = [n for n in range(1, 1500) if math.ceil(torch.tensor(0.3) * n) != -(-n * 3 // 10)]
    assert wrong  # fp32, as a runtime computes it
    segment = torch.zeros(1, wrong[0], dtype=torch.int64)
    assert int(selection.budgets(segment, 3, 10)[0, 0]) == -(-wrong[0] * 3 // 10)


scores_of = st.sampled_from(
    [0.0, -0.0, 1.0, 1.0, 2.5, -3.0, 1e-45, -1e-45, 3e38, float("inf"), float("-inf"), float("nan")]
)


@settings(max_examples=300, deadline=None)
@given(st.data(), masks())
def test_rank_is_total_and_ties_go_to_the_lower_index(data, visual):
    row = st.lists(scores_of, min_size=visual.shape[1], max_size=visual.shape[1])
    scores = torch.tensor(data.draw(st.lists(row, min_size=len(visual), max_size=len(visual))))
    rank = selection.rank_in_segment(scores, selection.segments(visual))
    for b in range(len(visual)):
        expected = [NO_RANK] * visual.shape[1]
        for run in runs(visual[b]):

            def key(place, b=b):
                value = float(scores[b, place])
                return (float("inf") if value != value else -value, place)

            for place, at in enumerate(sorted(run, key=key)):
                expected[at] = place
        assert rank[b].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_rank_does_not_depend_on_how_the_sort_leaves_equal_values(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (2, 64), generator=generator).float()
    segment = selection.segments(torch.rand(2, 64, generator=generator) < 0.8)
    expected = selection.rank_in_segment(scores, segment)
    true_sort = torch.sort

    def unstable(values, dim, descending=False):
        shuffle = torch.randperm(values.shape[1], generator=generator)
        ordered, order = true_sort(values[:, shuffle], dim=dim, descending=descending)
        return ordered, shuffle[order]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "sort", unstable)
        assert torch.equal(selection.rank_in_segment(scores, segment), expected)


@settings(max_examples=200, deadline=None)
@given(
    masks(),
    st.integers(0, 5),
    st.integers(1, 5),
    st.integers(0, 4),
    st.booleans(),
    st.integers(0, 3),
    st.integers(0, 2**31),
)
def test_kept_size_equals_what_the_graph_keeps(visual, num, den, count, as_ratio, extra, seed):
    num = min(num, den)
    scores = torch.randint(0, 3, visual.shape, generator=torch.Generator().manual_seed(seed)).float()
    segment = selection.segments(visual)
    budget = selection.budgets(segment, num, den) if as_ratio else selection.budgets_count(segment, count)
    keep = selection.keep_mask(scores, segment, budget)
    assert bool(keep[~visual].all())
    counts = keep.sum(dim=1)
    rows = selection.kept_rows(visual, num, den) if as_ratio else selection.kept_rows(visual, count=count)
    assert torch.equal(rows, counts)
    size, ragged = selection.kept_size(rows)
    assert size == int(counts.max())
    assert ragged == (len(set(counts.tolist())) > 1)
    size += extra
    index = selection.keep_index(keep, size)
    assert index.shape == (len(visual), size)
    for b in range(len(visual)):
        kept = keep[b].nonzero().flatten().tolist()
        assert index[b].tolist() == [-1] * (size - len(kept)) + kept
    if as_ratio and num == den:
        assert bool(keep.all())


def test_keep_index_that_is_too_short_loses_the_front():
    keep = torch.tensor([[True, False, True, True], [False, False, False, True]])
    assert selection.keep_index(keep, 2).tolist() == [[2, 3], [-1, 3]]


def test_kept_rows_want_one_budget():
    with pytest.raises(ValueError, match="either num"):
        selection.kept_rows(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="either num"):
        selection.kept_rows(torch.ones(1, 3, dtype=torch.bool), 1, 2, count=3)


@settings(max_examples=150, deadline=None)
@given(masks(), st.integers(0, 6), st.integers(1, 6))
def test_pooled(visual, num, den):
    num = min(num, den)
    x = torch.randn(*visual.shape, 3)
    segment = selection.segments(visual)
    budget = selection.budgets(segment, num, den)
    pooled, scores, into = selection.pooled(x, segment, budget)
    keep = selection.keep_mask(scores, segment, budget)
    assert torch.equal(keep & visual, scores.bool())
    assert torch.equal(pooled[~visual], x[~visual])
    for b in range(len(visual)):
        for run in runs(visual[b]):
            size, count = len(run), int(budget[b, run[0]])
            groups = [[at for i, at in enumerate(run) if i * count // size == g] for g in range(count)]
            winners = [group[(len(group) - 1) // 2] for group in groups]
            assert [at for at in run if keep[b, at]] == winners
            for group, winner in zip(groups, winners, strict=True):
                torch.testing.assert_close(pooled[b, winner], x[b, group].mean(dim=0))
                assert into[b, group].tolist() == [winner] * len(group)
    assert torch.equal(into[~visual], torch.arange(visual.shape[1]).expand_as(into)[~visual])
    if num == den:
        assert torch.equal(pooled, x)


def test_pooled_keeps_the_type():
    x = torch.randn(1, 9, 4).bfloat16()
    segment = torch.zeros(1, 9, dtype=torch.int64)
    assert selection.pooled(x, segment, selection.budgets(segment, 1, 3))[0].dtype == torch.bfloat16


def test_random_scores():
    visual = torch.ones(1, 4001, dtype=torch.bool)
    visual[0, 2000] = False
    segment = selection.segments(visual)
    scores = selection.random_scores(segment, 3)
    values = scores[visual]
    assert bool(((values >= 0) & (values < 1)).all())
    assert float(scores[0, 2000]) == 0.0
    assert abs(float(values.mean()) - 0.5) < 0.02
    assert (torch.histc(values, 10, 0, 1) - 400).abs().max() < 100
    halves = scores[0, :2000], scores[0, 2001:]
    assert abs(float(torch.corrcoef(torch.stack(halves))[0, 1])) < 0.1  # segments differ
    neighbours = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.05
    other = selection.random_scores(segment, 4)[visual]
    assert abs(float(torch.corrcoef(torch.stack([values, other]))[0, 1])) < 0.05
    # the same whatever stands around the segment, and as computed with Python integers
    shifted = torch.cat([torch.zeros(1, 5, dtype=torch.bool), visual], dim=1)
    assert torch.equal(selection.random_scores(selection.segments(shifted), 3)[:, 5:], scores)
    assert float(scores[0, 17]) == python_hash(3, 0, 17)
    assert float(scores[0, 2001 + 40]) == python_hash(3, 1, 40)
    assert float(selection.random_scores(segment, 2**40)[0, 9]) == python_hash(2**40, 0, 9)


def python_hash(seed, number, place):
    prime = 2**31 - 1
    state = (number * 1_000_003 + (seed * 48_271 + 11) % prime) % prime
    state = (pow(state, 5, prime) + place * 69_621) % prime
    for factor, shift in ((16_807, 1_013_904_223), (1_103_515_245, 12_345), (630_360_016, 907_633_385)):
        state = (pow(state, 5, prime) * factor + shift) % prime
    return (state // 128) / 2**24


def test_row_attention_equals_dense_attention():
    query, key = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 9, 8)
    repeated = key.repeat_interleave(3, dim=1)
    logits = query @ repeated.transpose(-1, -2) * 0.3
    rows = torch.tensor([2, 5, 8])
    torch.testing.assert_close(selection.row_attention(query[:, :, rows], key, 0.3), logits.softmax(-1)[:, :, rows])
    capped = 5 * torch.tanh(logits / 5)
    causal = torch.ones(9, 9).tril().bool()
    expected = capped.masked_fill(~causal, float("-inf")).softmax(-1)[:, :, rows]
    mask = causal[rows][None, None]
    torch.testing.assert_close(selection.row_attention(query[:, :, rows], key, 0.3, mask, 5.0), expected)
    for low in (float("-inf"), torch.finfo(torch.float32).min):
        additive = torch.zeros(mask.shape).masked_fill(~mask, low)
        torch.testing.assert_close(selection.row_attention(query[:, :, rows], key, 0.3, additive, 5.0), expected)
    half = torch.zeros(mask.shape, dtype=torch.float16).masked_fill(~mask, torch.finfo(torch.float16).min)
    torch.testing.assert_close(selection.row_attention(query[:, :, rows], key, 0.3, half, 5.0), expected)


@pytest.mark.parametrize("additive", [False, True])
def test_row_that_may_attend_to_nothing_is_zero(additive):
    mask = torch.tensor([[True, False], [False, False]])[None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    found = selection.row_attention(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), 1.0, mask)
    assert found.tolist() == [[[[1.0, 0.0], [0.0, 0.0]]]]


def test_row_attention_in_half_precision_works_in_fp32():
    query, key = torch.randn(1, 2, 1, 8).bfloat16(), torch.randn(1, 2, 5, 8).bfloat16()
    found = selection.row_attention(query, key, 0.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (query.float() @ key.float().transpose(-1, -2) * 0.5).softmax(-1))


@pytest.mark.parametrize("prefix", [1, 5])
def test_class_attention_scores(prefix):
    query, key, value = torch.randn(2, 4, 11, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 8)
    keys, values = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    attention = (query @ keys.transpose(-1, -2) * 0.4).softmax(-1)
    context = attention @ values
    norm = context[:, :, prefix:].norm(dim=-1)
    expected = (attention[:, :, 0, prefix:] * norm / norm.sum(1, keepdim=True)).sum(1)
    torch.testing.assert_close(selection.class_attention_scores(query, key, context, 0.4, prefix), expected)


def everything(visual, scores, x, query, key, size):
    segment = selection.segments(visual)
    budget = selection.budgets(segment, 3, 10)
    keep = selection.keep_mask(scores, segment, budget)
    return (
        keep,
        selection.keep_index(keep, size),
        selection.random_scores(segment, 7),
        *selection.pooled(x, segment, budget),
        selection.budgets_count(segment, 3),
        selection.class_attention_scores(query, key, query, 0.3, 1),
        selection.row_attention(query[:, :, :2], key, 0.2, visual[:, None, None], 30.0),
    )


def example(batch, length):
    generator = torch.Generator().manual_seed(batch * length)
    visual = torch.rand(batch, length, generator=generator) < 0.6
    return (
        visual,
        torch.randint(0, 5, visual.shape, generator=generator).float(),
        torch.randn(batch, length, 8, generator=generator),
        torch.randn(batch, 4, length, 8, generator=generator),
        torch.randn(batch, 2, length, 8, generator=generator),
    )


def test_trace_with_symbolic_sizes():
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    sizes = {
        hint: env.create_symintnode(
            env.create_symbol(hint, ConstantSource(f"n{hint}"), dynamic_dim=DimDynamic.DYNAMIC), hint=hint
        )
        for hint in (3, 17, 13)
    }
    with mode:
        fakes = [torch.empty([sizes.get(d, d) for d in value.shape], dtype=value.dtype) for value in example(3, 17)]
        traced = make_fx(everything, pre_dispatch=True, tracing_mode="real")(*fakes, sizes[13])
    for batch, length in ((3, 17), (2, 9), (5, 31)):
        values = example(batch, length)
        size = selection.kept_size(selection.kept_rows(values[0], 3, 10))[0]
        for found, expected in zip(traced(*values, size), everything(*values, size), strict=True):
            assert torch.equal(found, expected)
    banned = ("aten.item", "_local_scalar", "nonzero", "kthvalue", "searchsorted", "cummax", "stable")
    assert not [n for n in traced.graph.nodes if any(word in str(n.target) for word in banned)]


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor():
    compiled = torch.compile(everything, dynamic=True, fullgraph=True)
    for batch, length in ((3, 17), (2, 40)):
        values = example(batch, length)
        size = selection.kept_size(selection.kept_rows(values[0], 3, 10))[0]
        for found, expected in zip(compiled(*values, size), everything(*values, size), strict=True):
            torch.testing.assert_close(found, expected)


def test_onnxruntime_keeps_the_same_tokens():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Module(torch.nn.Module):
        def forward(self, *values):
            return everything(*values, 30)

    dims = tuple({0: torch.export.Dim.DYNAMIC, 1 if i < 3 else 2: torch.export.Dim.DYNAMIC} for i in range(5))
    program = torch.export.export(Module(), example(3, 17), dynamic_shapes=(dims,))
    model = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for batch, length in ((3, 17), (1, 9), (2, 40)):
        values = example(batch, length)
        found = session.run(None, {i.name: v.numpy() for i, v in zip(session.get_inputs(), values, strict=True)})
        for value, expected in zip(found, everything(*values, 30), strict=True):
            torch.testing.assert_close(torch.from_numpy(value), expected, rtol=1e-5, atol=1e-6)

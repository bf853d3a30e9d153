"""Sparse attention in decode steps: against dense attention under the mask that the choice of keys defines."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tokcompile
from tests.members import members
from tests.oracle import _eager
from tests.zoo import decoders
from tokcompile.errors import CalibrationError, NarrowError, NoMatchError, RecipeError
from tokcompile.families.sparse_attention.decode import form as sparse_decode
from tokcompile.families.sparse_attention.decode.lists import ends, least_length, listed
from tokcompile.kernels.token_list_attention import op as kernel
from tokcompile.passes.sparse_attention.tokenselect import TokenSelect
from tokcompile.recipe.budget import Budget

PROMPT, STEPS, BUDGET = 24, 16, 14
SHARED = {"sinks": 2, "recent": 3, "dense_below": 1}
PASSES: dict[str, dict[str, Any]] = {"tokenselect": {}, "fasa": {"planes": 3}, "decode_control": {"choose": "window"}}


def gemma2() -> nn.Module:
    torch.manual_seed(0)
    return tr.Gemma2ForCausalLM(
        tr.Gemma2Config(**decoders.GROUPED, head_dim=16, sliding_window=20, attn_implementation="eager")
    ).eval()


MODELS = {"gemma2": gemma2} | {
    name: lambda name=name: getattr(decoders, name)()[0]
    for name in ("llama", "qwen3", "gpt2", "mixtral", "gptj", "gpt_oss", "bloom")
}


def recipe(name: str, target: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    values = {"budget": BUDGET, **SHARED, **PASSES[name], **params}
    return {
        "recipe_version": 1,
        "description": "test",
        "steps": [{"pass": name, "target": target or {}, "params": values}],
    }


def prompt(padding: int = 5, rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(4, 120, (rows, PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def calibration(name: str) -> list[dict[str, Tensor]] | None:
    return [prompt()] if name == "fasa" else None


def optimized(model: nn.Module, name: str, target: dict[str, Any] | None = None, **params: Any) -> nn.Module:
    return tokcompile.optimize(model, recipe(name, target, **params), lowering="eager", calibration=calibration(name))


def generate(model: nn.Module, inputs: dict[str, Tensor], steps: int = STEPS, **more: Any) -> Any:
    return model.generate(
        **inputs,
        min_new_tokens=steps,
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )


def assert_same(one: Any, other: Any, tolerance: float = 2e-5) -> None:
    assert torch.equal(one.sequences, other.sequences)
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# .. the choice itself, one key at a time


def reference_list(scores: list[float], visible: list[bool], count: int, sinks: int, recent: int) -> set[int]:
    seen = [i for i, v in enumerate(visible) if v]
    late = seen[max(0, len(seen) - recent) :]
    rest = seen[: len(seen) - len(late)]
    early, middle = rest[:sinks], rest[sinks:]
    best = sorted(middle, key=lambda i: (-scores[i], i))[: count - sinks - recent]
    return {*early, *best, *late}


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_list_holds_ends_and_best(data: st.DataObject) -> None:
    sinks, recent = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    length = data.draw(st.integers(sinks + recent + 1, 16))
    count = data.draw(st.integers(sinks + recent + 1, length))
    rows, lists = 2, data.draw(st.integers(1, 2))
    masked = data.draw(st.booleans())
    visible = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows))
    )
    scores = torch.stack([torch.randperm(length).float() for _ in range(rows * lists)]).view(rows, lists, length)
    found = ends(visible if masked else None, length, sinks, recent, scores.device)
    index = listed(scores, *found, count)
    assert index.shape == (rows, lists, count)
    for row in range(rows):
        seen = visible[row].tolist() if masked else [True] * length
        for number in range(lists):
            keys = [int(i) for i in index[row, number] if i >= 0]
            assert len(keys) == len(set(keys))
            assert set(keys) == reference_list(scores[row, number].tolist(), seen, count, sinks, recent)


def test_the_shortest_cache_that_a_budget_fits() -> None:
    for budget in (Budget.of(0.1), Budget.of(0.37), Budget.of(1.0), Budget.of(20)):
        least = least_length(budget, 4, 2)
        assert budget.count(least) > 6
        assert budget.is_count or budget.count(least - 1) <= 6


# .. whole models: the original one, its decode attention under an explicit mask


class Masked:
    """An attention function of transformers that hides all keys that a method does not choose, in decode steps."""

    def __init__(self, name: str, state: dict[str, Tensor], least: int = BUDGET, first: int = 0) -> None:
        self.name, self.state, self.least, self.first = name, state, least, first

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        mask = attention_mask
        if query.shape[2] == 1 and key.shape[2] >= self.least and module.layer_idx >= self.first:
            batch, length = query.shape[0], key.shape[2]
            seen = (
                torch.ones(batch, 1, 1, length, dtype=torch.bool)
                if mask is None
                else (mask if mask.dtype == torch.bool else mask > -1e4).expand(batch, 1, 1, length)
            )
            scores = self.scores(module, query, key, seen, kwargs)
            groups = query.shape[1] // key.shape[1]
            allowed = torch.zeros(batch, query.shape[1], 1, length, dtype=torch.bool)
            for row in range(batch):
                for head in range(query.shape[1]):
                    which = scores[row, head // groups].tolist()
                    keys = reference_list(which, seen[row, 0, 0].tolist(), BUDGET, SHARED["sinks"], SHARED["recent"])
                    allowed[row, head, 0, list(keys)] = True
            mask = allowed if self.bool(module) else torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)
        if self.bool(module):
            return sdpa_attention_forward(module, query, key, value, mask, *args, **kwargs)
        return _eager(module, query, key, value, mask, *args, **kwargs)

    @staticmethod
    def bool(module: nn.Module) -> bool:
        return "eager" not in module.config._attn_implementation

    def scores(self, module: nn.Module, query: Tensor, key: Tensor, seen: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """[B, Hkv, T]."""
        batch, kv_heads, length, width = key.shape
        if self.name == "decode_control":
            return torch.arange(length).float().expand(batch, kv_heads, length)
        groups = query.shape[1] // kv_heads
        if self.name == "fasa":
            (mask,) = (v for k, v in self.state.items() if "fasa" in k and f".{module.layer_idx}." in k)
            parts = torch.einsum(
                "bhd,bhtd->bht", query[:, :, 0] * mask.repeat_interleave(groups, 0), key.repeat_interleave(groups, 1)
            )
            return parts.unflatten(1, (kv_heads, groups)).sum(2)
        logits = torch.einsum("bhd,bhtd->bht", query[:, :, 0], key.repeat_interleave(groups, 1))
        logits = logits * (kwargs.get("scaling") or width**-0.5)
        if kwargs.get("softcap"):
            logits = torch.tanh(logits / kwargs["softcap"]) * kwargs["softcap"]
        votes = torch.zeros(batch, length)
        for row in range(batch):
            places = [i for i in range(length) if seen[row, 0, 0, i]]
            places = places[SHARED["sinks"] : len(places) - SHARED["recent"]]
            votes[row, places] = logits[row][:, places].softmax(-1).sum(0)
        return votes.unsqueeze(1).expand(batch, kv_heads, length)


@contextlib.contextmanager
def masked(model: nn.Module, function: Masked) -> Iterator[None]:
    before = model.config._attn_implementation
    name = f"masked_decode_{before}"
    ALL_ATTENTION_FUNCTIONS.register(name, function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, int]]:
    """Every list that was attended to with the length of the cache; keys and values outside of it are NaN."""
    seen: list[tuple[Tensor, int]] = []
    real = kernel.token_list_attention_reference

    def poisoned(query: Tensor, key: Tensor, value: Tensor, index: Tensor, *more: Any) -> tuple[Tensor, Tensor]:
        seen.append((index.clone(), key.shape[2]))
        inside = torch.zeros(key.shape[:3], dtype=torch.bool)
        inside.scatter_(2, index.clamp(min=0), index >= 0)
        # an empty slot points at key 0: it counts as listed only if it is
        inside[:, :, 0] = (index == 0).any(2)
        outside = ~inside.unsqueeze(-1)
        output, lse = real(
            query, key.masked_fill(outside, torch.nan), value.masked_fill(outside, torch.nan), index, *more
        )
        assert not output.isnan().any()
        return output, lse

    monkeypatch.setattr(kernel, "token_list_attention_reference", poisoned)
    return seen


KEPT = [("llama", "decode_control"), ("qwen3", "fasa"), ("gpt2", "tokenselect")]
OTHERS = [(name, "tokenselect") for name in ("llama", "gemma2")]
OTHERS += [(name, "fasa") for name in ("llama", "gemma2", "mixtral", "gptj")]


@pytest.mark.parametrize(("family", "name"), members([*KEPT, *OTHERS], KEPT))
def test_equals_dense_attention_under_the_mask_of_the_choice(family: str, name: str, lists: Any) -> None:
    """Also: keys and values outside the lists are NaN, padding is in no list, a list has the budget's length."""
    model, inputs = MODELS[family](), prompt()
    fast = optimized(model, name)
    result = generate(fast, inputs)
    if family == "gptj":  # has no attention functions of transformers: see the masked twin below
        assert tokcompile.report(fast).steps[0].details["pairing"] == "interleaved"
    else:
        with masked(model, Masked(name, dict(fast.state_dict()))):
            expected = generate(model, inputs)
        assert_same(result, expected)
    assert len(lists) == 2 * (STEPS - 1)
    for number, (index, length) in enumerate(lists):
        assert index.shape[2] == BUDGET
        forgotten = PROMPT + 1 + number // 2 - length  # keys that left a sliding cache
        for row, padding in ((0, 5), (1, 0)):
            first = max(padding - forgotten, 0)
            assert int(index[row][index[row] >= 0].min()) >= first
            keys = index[row, 0][index[row, 0] >= 0]
            assert len(keys.unique()) == len(keys) == min(BUDGET, length - first)
    step = tokcompile.report(fast).steps[0]
    assert (step.status, step.matches) == ("matched", 2)
    assert step.details["budget"] == str(BUDGET)


@pytest.mark.parametrize(
    ("family", "name"),
    members(
        [
            ("llama", "fasa"),
            ("qwen3", "tokenselect"),
            ("gemma2", "tokenselect"),
            ("gpt_oss", "fasa"),
            ("gpt2", "tokenselect"),
        ],
        [("llama", "fasa")],
    ),
)
def test_a_full_budget_is_the_original(family: str, name: str) -> None:
    model, inputs = MODELS[family](), prompt()
    fast = optimized(model, name, budget=1.0)
    assert_same(generate(fast, inputs), generate(model, inputs), 1e-5)
    assert tokcompile.report(fast).steps[0].status == "matched"


def test_a_batch_is_its_rows() -> None:
    model, inputs = MODELS["llama"](), prompt(padding=7, rows=3)
    fast = optimized(model, "fasa")
    together = generate(fast, inputs)
    for row in range(3):
        first = int((inputs["attention_mask"][row] == 0).sum())
        alone = generate(fast, {k: v[row : row + 1, first:] for k, v in inputs.items()})
        assert torch.equal(together.sequences[row, PROMPT:], alone.sequences[0, PROMPT - first :])
        for a, b in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_random_keys_are_drawn_anew_and_the_same_for_the_same_seed(lists: Any) -> None:
    model, inputs = MODELS["llama"](), prompt()
    runs = []
    for seed in (0, 0, 1):
        lists.clear()
        generate(optimized(model, "decode_control", choose="random", seed=seed), inputs, 4)
        runs.append([index.sort(2).values for index, _ in lists])
    assert len(runs[0]) == 6
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))
    assert not torch.equal(runs[0][0], runs[0][1])  # two layers
    assert not torch.equal(runs[0][0], runs[0][2])  # two steps


# .. the length decides


def test_short_caches_are_dense_and_the_report_says_so() -> None:
    model, inputs = MODELS["llama"](), prompt(padding=0)
    fast = optimized(model, "tokenselect", dense_below=PROMPT + 8)
    result = generate(fast, inputs)
    session = fast._tokcompile_session
    stages = [stage.name for stage in tokcompile.report(fast).stages]
    assert stages.count("decode") == 2  # one graph for each side of the length, and no other
    step = tokcompile.report(fast).steps[0]
    assert step.status == "matched"
    assert step.details["dense_below"] == PROMPT + 8
    with masked(model, Masked("tokenselect", {}, least=PROMPT + 8)):
        assert_same(result, generate(model, inputs))
    count = session.compilations
    generate(fast, inputs)
    assert session.compilations == count

    dense = optimized(model, "tokenselect", dense_below="auto")
    torch.testing.assert_close(generate(dense, inputs, 4).logits, generate(model, inputs, 4).logits)
    step = tokcompile.report(dense).steps[0]
    assert step.status == "unprofitable"
    assert "the dense attention serves caches of less than" in step.reason


def test_a_budget_that_cannot_pay_is_said_so() -> None:
    fast = optimized(MODELS["llama"](), "tokenselect", dense_below="auto", budget=0.9)
    generate(fast, prompt(), 3)
    step = tokcompile.report(fast).steps[0]
    assert step.status == "unprofitable"
    assert "at any length" in step.reason


@pytest.mark.slow
def test_layers_can_be_left_dense() -> None:
    model, inputs = MODELS["llama"](), prompt()
    fast = optimized(model, "fasa", {"layers": ["1--1"]})
    result = generate(fast, inputs)
    assert tokcompile.report(fast).steps[0].regions == ["model.layers.1.self_attn"]
    with masked(model, Masked("fasa", dict(fast.state_dict()), first=1)):
        assert_same(result, generate(model, inputs))


def test_a_static_cache() -> None:
    model, inputs = MODELS["llama"](), prompt()
    fast = optimized(model, "tokenselect")
    result = generate(fast, inputs, cache_implementation="static")
    assert tokcompile.report(fast).steps[0].status == "matched"
    with masked(model, Masked("tokenselect", {})):
        assert_same(result, generate(model, inputs))


@pytest.mark.inductor
def test_inductor() -> None:
    model, inputs = MODELS["llama"](), prompt()
    fast = tokcompile.optimize(model, recipe("fasa"), calibration=calibration("fasa"))
    with masked(model, Masked("fasa", dict(fast.state_dict()))):
        expected = generate(model, inputs)
    assert_same(generate(fast, inputs), expected)


# .. reuse of a choice


class Cached(Masked):
    """Algorithm 1 of TokenSelect, row by row: a list is taken again while the query resembles the one it was for."""

    def __init__(self, reuse: float) -> None:
        super().__init__("tokenselect", {})
        self.reuse, self.kept, self.reused = reuse, {}, []

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if query.shape[2] > 1:
            self.kept.clear()
        self.query = query
        return super().__call__(module, query, key, value, attention_mask, *args, **kwargs)

    def scores(self, module: nn.Module, query: Tensor, key: Tensor, seen: Tensor, kwargs: dict[str, Any]) -> Tensor:
        votes = super().scores(module, query, key, seen, kwargs).clone()
        rows = []
        for row in range(query.shape[0]):
            now, place = query[row].flatten(), (module.layer_idx, row)
            before, keys = self.kept.get(place, (None, None))
            rows.append(before is not None and float(F.cosine_similarity(now, before, 0)) >= self.reuse)
            if not rows[-1]:
                places = [i for i in range(key.shape[2]) if seen[row, 0, 0, i]]
                middle = places[SHARED["sinks"] : len(places) - SHARED["recent"]]
                order = sorted(middle, key=lambda i: (-float(votes[row, 0, i]), i))
                keys = order[: BUDGET - SHARED["sinks"] - SHARED["recent"]]
                self.kept[place] = now.clone(), keys
            hidden = torch.ones(key.shape[2], dtype=torch.bool)
            hidden[keys] = False
            votes[row, :, hidden] = -1.0
        self.reused.append(rows)
        return votes


def reused(recording: Any) -> list[list[bool]]:
    return [entry.rows.tolist() for entry in recording.reused]


@pytest.mark.parametrize(
    ("family", "cache"),
    members(
        [("llama", None), ("llama", "static"), ("gpt2", None), ("qwen3", None)], [("llama", None), ("llama", "static")]
    ),
)
def test_reuse_follows_the_algorithm(family: str, cache: str | None) -> None:
    model, inputs = MODELS[family](), prompt()
    fast, more = optimized(model, "tokenselect", reuse=0.5), {"cache_implementation": cache} if cache else {}
    with tokcompile.record(fast) as recording:
        result = generate(fast, inputs, **more)
    function = Cached(0.5)
    with masked(model, function), torch.no_grad():
        expected = generate(model, inputs, **more)
    assert reused(recording) == function.reused
    flags = [flag for rows in function.reused for flag in rows]
    assert 0.1 < sum(flags) / len(flags) < 0.9  # both branches
    assert any(rows[0] != rows[1] for rows in function.reused)  # each row decides for itself
    assert_same(result, expected)
    entry = recording.reused[1]
    assert (entry.step, entry.name, entry.layer) == (0, "tokenselect", 1)
    step = tokcompile.report(fast).steps[0]
    assert (step.status, step.matches, step.details["reuse"]) == ("matched", 2, 0.5)


@pytest.mark.slow
def test_reuse_at_its_ends() -> None:
    model, inputs = MODELS["llama"](), prompt()
    off = generate(optimized(model, "tokenselect"), inputs)
    never = optimized(model, "tokenselect", reuse=1.5)
    with tokcompile.record(never) as recording:
        found = generate(never, inputs)
    assert torch.equal(found.sequences, off.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, off.logits, strict=True))
    assert not any(flag for rows in reused(recording) for flag in rows)
    always = optimized(model, "tokenselect", reuse=-1.0)
    for _ in range(2):  # a new prompt chooses anew
        with tokcompile.record(always) as recording:
            generate(always, inputs)
        rows = reused(recording)
        assert rows[:2] == [[False, False]] * 2
        assert rows[2:] == [[True, True]] * (2 * (STEPS - 2))


@torch.no_grad()
def test_a_cache_that_was_changed_has_no_lists() -> None:
    model = MODELS["llama"]()
    fast = optimized(model, "tokenselect", reuse=-1.0)
    token = torch.full((2, 1), 7)

    def step(cache: Any) -> list[list[bool]]:
        with tokcompile.record(fast) as recording:
            rows = cache.layers[0].keys.shape[0]
            fast(input_ids=token[:1].expand(rows, 1), past_key_values=cache, use_cache=True)
        return reused(recording)

    def started(rows: int = 2) -> Any:
        cache = fast(**prompt(0, rows), use_cache=True).past_key_values
        assert step(cache) == [[False] * rows] * 2
        assert step(cache) == [[True] * rows] * 2
        return cache

    cache = started()
    for change in (
        lambda c: c.reorder_cache(torch.tensor([1, 0])),
        lambda c: c.crop(-2),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([0, 3])),
        lambda c: fast(input_ids=token.expand(2, 3), past_key_values=c),
        lambda c: [layer.keys.mul_(2) for layer in c.layers],
    ):
        change(cache)
        rows = cache.layers[0].keys.shape[0]
        assert step(cache) == [[False] * rows] * 2
        assert step(cache) == [[True] * rows] * 2
    other = started(3)  # each cache has lists of its own
    assert step(cache) == [[True] * 2] * 2
    assert step(other) == [[True] * 3] * 2
    remembered = fast._tokcompile_session.remembered._of
    gc.collect()
    assert len(remembered) == 4  # two layers of each, and nothing of earlier steps
    del cache, other
    gc.collect()
    assert len(remembered) == 0


def test_a_kept_list_never_shows_a_hidden_key() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 1, 8, generator=g), torch.randn(2, 2, 12, 8, generator=g)
    method = TokenSelect(TokenSelect.Params(budget=8, sinks=2, recent=1, reuse=0.9))
    before, kept = query.flatten(1).clone(), torch.tensor([[3, 5, 7, 4, -1], [2, 3, 4, 5, 6]])
    candidate = torch.ones(2, 12, dtype=torch.bool)
    candidate[0, [5, 4]] = False
    candidate[1, 6] = False
    key[:] = torch.nan  # and no key is read
    best, *_, rows = method.select(query, key, candidate, 1.0, 0.0, before, kept)
    assert rows.tolist() == [True, True]
    assert best.tolist() == [[[3, -1, 7, -1, -1]], [[2, 3, 4, 5, -1]]]


def test_reuse_says_where_it_does_not_hold() -> None:
    model, inputs = MODELS["gemma2"](), prompt()
    fast = optimized(model, "tokenselect", reuse=-1.0)
    with tokcompile.record(fast) as recording:
        result = generate(fast, inputs, 4)
    assert {entry.layer for entry in recording.reused} == {1}  # layer 0 has a window, its cache forgets
    details = tokcompile.report(fast).steps[0].details["reuse"]
    assert details["model.layers.1.self_attn"] == -1.0
    assert "sliding window" in details["model.layers.0.self_attn"]
    assert result.sequences.shape[1] == PROMPT + 4
    for params, message in (({"reuse": 0.9, "budget": 0.5}, "budget as a number of keys"), ({"reuse": -2}, "reuse")):
        with pytest.raises(RecipeError, match=message):
            optimized(model, "tokenselect", **params)


@pytest.mark.slow
@torch.no_grad()
def test_reuse_under_inference_mode() -> None:
    model, inputs = MODELS["llama"](), prompt()
    expected = generate(optimized(model, "tokenselect", reuse=0.5), inputs)
    fast = optimized(model, "tokenselect", reuse=0.5)
    with torch.inference_mode():
        assert_same(generate(fast, inputs), expected)


@pytest.mark.slow
@pytest.mark.inductor
def test_reuse_with_inductor() -> None:
    model, inputs = MODELS["llama"](), prompt()
    expected = generate(optimized(model, "tokenselect", reuse=0.5), inputs)
    fast = tokcompile.optimize(model, recipe("tokenselect", reuse=0.5))
    with tokcompile.record(fast) as recording:
        assert_same(generate(fast, inputs), expected)
    assert any(flag for rows in reused(recording) for flag in rows)


# .. a decoder of no library


class Handwritten(nn.Module):
    """Two layers, interleaved RoPE as complex numbers, a cache of plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(96, 32)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(32),
                    "q": nn.Linear(32, 32),
                    "k": nn.Linear(32, 16),
                    "v": nn.Linear(32, 16),
                    "o": nn.Linear(32, 32),
                    "up": nn.Linear(32, 64),
                    "down": nn.Linear(64, 32),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(32, 96)
        self.allowed: Any = None

    def rotate(self, x: Tensor, start: int) -> Tensor:
        position = torch.arange(start, start + x.shape[2])[:, None]
        angle = position * 0.5 ** torch.arange(4)[None]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], 4, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(3)

    def forward(self, ids: Tensor, past: list[tuple[Tensor, Tensor]] | None = None) -> Any:
        x, caches = self.embed(ids), []
        start = 0 if past is None else past[0][0].shape[2]
        for number, layer in enumerate(self.layers):
            h = layer["norm"](x)
            q, k, v = (layer[n](h).unflatten(2, (-1, 8)).transpose(1, 2) for n in "qkv")
            q, k = self.rotate(q, start), self.rotate(k, start)
            if past is not None:
                k, v = torch.cat([past[number][0], k], 2), torch.cat([past[number][1], v], 2)
            caches.append((k, v))
            mask = None if self.allowed is None else self.allowed(number, q, k)
            a = F.scaled_dot_product_attention(q, k, v, mask, is_causal=past is None, enable_gqa=True)
            x = x + layer["o"](a.transpose(1, 2).flatten(2))
            x = x + layer["down"](F.gelu(layer["up"](x)))
        return self.head(x), caches


@pytest.mark.parametrize("name", ["fasa", "tokenselect"])
def test_a_handwritten_decoder(name: str) -> None:
    model = Handwritten().eval()
    ids = torch.randint(96, (2, PROMPT), generator=torch.Generator().manual_seed(2))
    fast = tokcompile.optimize(
        model, recipe(name), lowering="eager", calibration=[{"ids": ids}] if name == "fasa" else None
    )
    state = dict(fast.state_dict())
    twin, chooser = Handwritten().eval(), Masked(name, state)

    def allowed(number: int, query: Tensor, key: Tensor) -> Tensor | None:
        if query.shape[2] > 1:
            return None
        place = nn.Module()
        place.layer_idx = number
        seen = torch.ones(2, 1, 1, key.shape[2], dtype=torch.bool)
        if name == "fasa":
            keys = sorted((k for k in state if "fasa" in k), key=lambda k: "#" in k)  # the first has no number
            chooser.state = {f"fasa.{number}.": state[keys[number]]}
        scores = chooser.scores(place, query, key, seen, {})
        mask = torch.zeros(2, 4, 1, key.shape[2], dtype=torch.bool)
        for row in range(2):
            for head in range(4):
                mask[
                    row,
                    head,
                    0,
                    list(
                        reference_list(
                            scores[row, head // 2].tolist(),
                            [True] * key.shape[2],
                            BUDGET,
                            SHARED["sinks"],
                            SHARED["recent"],
                        )
                    ),
                ] = True
        return mask

    twin.allowed = allowed
    with torch.no_grad():
        (one, past), (other, twin_past) = fast(ids), twin(ids)
        for _ in range(6):
            token = one[:, -1:].argmax(-1)
            one, past = fast(token, past)
            other, twin_past = twin(token, twin_past)
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    step = tokcompile.report(fast).steps[0]
    assert (step.status, step.matches) == ("matched", 2)
    if name == "fasa":
        assert step.details["pairing"] == "interleaved"


# .. refusals


def test_no_rope_is_refused_with_the_node() -> None:
    model = MODELS["gpt2"]()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"(?s)no rotary position embedding is recognised.*node .*gpt2.*py:\d+"):
        optimized(model, "fasa")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_biases_are_refused_with_the_node() -> None:
    with pytest.raises(NoMatchError, match=r"(?s)adds a bias to the scores.*node .*bloom.*py:\d+"):
        generate(optimized(MODELS["bloom"](), "tokenselect"), prompt(padding=0), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0}, "a count of tokens should be at least 1"),
        ({"budget": 5}, "leaves nothing to choose beside 2 sinks and 3 recent keys"),
        ({"recent": 0}, "recent"),
        ({"dense_below": "never"}, "dense_below"),
        ({"planes": 0}, "planes"),
    ],
)
def test_bad_parameters(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tokcompile.Recipe.load(recipe("fasa", **change))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs calibration"),
        ([], "is empty"),
        ([{"pixels": torch.zeros(1)}], r"item 0 has the keys"),
        ([{"input_ids": torch.ones(1, 3, dtype=torch.long)}], "has 4 tokens or more"),
    ],
)
def test_bad_calibration(data: Any, message: str) -> None:
    model = MODELS["llama"]()
    with pytest.raises(CalibrationError, match=message):
        tokcompile.optimize(model, recipe("fasa"), calibration=data, lowering="eager")
    assert not hasattr(model, "tokcompile")


def test_more_planes_than_a_head_has() -> None:
    with pytest.raises(CalibrationError, match="planes is 9, and a head of 16 components has 8"):
        optimized(MODELS["llama"](), "fasa", planes=9)


def test_calibration_of_another_model() -> None:
    state = tokcompile.calibrate(MODELS["llama"](), recipe("fasa"), [prompt()])
    torch.manual_seed(0)
    other = tr.LlamaForCausalLM(tr.LlamaConfig(**decoders.SMALL | {"num_key_value_heads": 4})).eval()
    with pytest.raises(NoMatchError, match="made for 2 key heads of 16 components, this attention has 4 of 16"):
        generate(tokcompile.optimize(other, recipe("fasa"), calibration=state, lowering="eager"), prompt(), 3)


def test_heads_that_do_not_divide_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    region: Any = SimpleNamespace(output=None, queries=1, cached=True, cross=False)
    context: Any = SimpleNamespace(refuse=lambda node, reason: NarrowError(reason))
    monkeypatch.setattr(sparse_decode, "read_attention", lambda ctx, region: SimpleNamespace(heads=(3, 2)))
    with pytest.raises(NarrowError, match="3 query heads cannot share 2 key heads"):
        sparse_decode.decode_form(context, region)


def test_bf16_within_its_rounding() -> None:
    """Against dense attention under the same mask, both in bf16. Keys by place, so that both choose the same ones.

    2 % of the norm of the logits: two layers round weights of the softmax and outputs to 8 bits at different points.
    """
    model, inputs = MODELS["llama"]().bfloat16(), prompt()
    fast = optimized(model, "decode_control")
    found = generate(fast, inputs)
    with masked(model, Masked("decode_control", {})):
        wanted = generate(model, inputs)
    compared = 0
    for step, (one, other) in enumerate(zip(found.logits, wanted.logits, strict=True)):
        if not torch.equal(found.sequences[:, : PROMPT + step], wanted.sequences[:, : PROMPT + step]):
            break  # rounding chose another token: from here on the texts differ
        assert float((one - other).norm() / other.norm()) < 2e-2
        compared += 1
    assert compared >= 4

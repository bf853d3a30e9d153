"""Token sparse attention in whole models: with everything kept it is the model, else the model under its own mask."""

from __future__ import annotations

import contextlib
import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import tokcompile
from tests.test_attention_form import Written
from tests.zoo import decoders, encoders
from tests.zoo.vlm import VLMS
from tokcompile.errors import NoMatchError
from tokcompile.kernels.token_sparse_attention import op as sparse_prefill
from tokcompile.kernels.token_sparse_attention.reference import compute

LENGTH = 40


def padded(family, dtype=torch.float32):
    model, _ = family()
    inputs = decoders.text(length=LENGTH)
    inputs["attention_mask"][0, :7] = 0
    return model.to(dtype), inputs


def by_hand(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(Written("flag"), nn.Linear(64, 64), Written("tril")).eval()
    return model.to(dtype), {"input": torch.randn(2, LENGTH, 64).to(dtype)}


MODELS = {
    "llama": functools.partial(padded, decoders.llama),
    "qwen3": functools.partial(padded, decoders.qwen3),
    "gemma2": functools.partial(padded, decoders.gemma2),
    "gpt2": functools.partial(padded, decoders.gpt2),
    "bloom": functools.partial(padded, decoders.bloom),
    "by_hand": by_hand,
}


def steps(**params):
    return {
        "recipe_version": 1,
        "steps": [
            {
                "pass": "token_sparse",
                "params": {"keep": 0.4, "window": 6, "least": 4, "calm": 1.0, "min_length": 0, **params},
            }
        ],
    }


def call(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    found = found if isinstance(found, torch.Tensor) else found.logits
    if "attention_mask" not in inputs:
        return found
    return found[inputs["attention_mask"][:, -found.shape[1] :].bool()]


def difference(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@contextlib.contextmanager
def recorded(monkeypatch):
    chosen, original = [], sparse_prefill.select

    def select(*args, **kwargs):
        chosen.append(original(*args, **kwargs))
        return chosen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(sparse_prefill, "select", select)
        yield chosen


@contextlib.contextmanager
def masked(monkeypatch, chosen):
    """The model's own attention, with the scores of what was not chosen hidden."""
    left = list(chosen)

    def softmax(scores, dim=-1, dtype=None):
        return torch.softmax(scores, dim, dtype=dtype)

    def outside(scores):
        index, length = left.pop(0), scores.shape[-1]
        there = torch.zeros(*scores.shape[:2], length + 1, dtype=torch.bool)
        there.scatter_(2, torch.where(index < 0, length, index), True)
        there = there[..., :length]
        return ~(there[..., None] & there[..., None, :])

    def hiding(scores, dim=-1, dtype=None):
        if scores.dim() != 4:
            return softmax(scores, dim=dim, dtype=dtype)
        low = scores.masked_fill(scores < -1e8, -math.inf).masked_fill(outside(scores), -math.inf)
        return softmax(low, dim=dim, dtype=dtype).nan_to_num(0.0)

    def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        group = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(group, 1).float() for t in (key, value))
        scores = query.float() @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~attn_mask, -math.inf).masked_fill(outside(scores), -math.inf)
        return (softmax(scores, dim=-1).nan_to_num(0.0) @ value).to(query.dtype)

    def tensor_softmax(self, dim=-1, dtype=None):
        return hiding(self, dim, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(functional, "softmax", hiding)
        patch.setattr(functional, "scaled_dot_product_attention", sdpa)
        patch.setattr(torch.Tensor, "softmax", tensor_softmax)
        yield
    assert not left


@pytest.mark.parametrize("name", MODELS)
def test_everything_kept_is_the_model(name):
    model, inputs = MODELS[name]()
    sparse = tokcompile.optimize(model, steps(keep=1.0), lowering="eager")
    assert difference(call(sparse, inputs), call(model, inputs)) < 1e-5
    (step,) = tokcompile.report(sparse).steps
    assert (step.status, step.matches) == ("matched", 2)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in MODELS if name != "bloom"),
        ("llama", torch.bfloat16),
        ("gemma2", torch.bfloat16),
    ],
)
def test_sparse_is_dense_under_the_mask_that_was_chosen(name, dtype, monkeypatch):
    model, inputs = MODELS[name](dtype)
    sparse = tokcompile.optimize(model, steps(), lowering="eager")
    with recorded(monkeypatch) as chosen:
        found = call(sparse, inputs)
    assert [i.shape[2] for i in chosen] == [20, 20]  # 0.4 of 34, and the window
    torch._dynamo.reset()
    with masked(monkeypatch, chosen):
        wanted = call(model, inputs)
    # bf16: every layer rounds its results to 8 bits, 2 ** -9 each; some dozens of roundings
    assert difference(found, wanted) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert difference(found, call(model, inputs)) > 1e-3  # something was left out


def test_coverage_drops_what_holds_little_attention(monkeypatch):
    model, inputs = MODELS["llama"]()
    sparse = tokcompile.optimize(model, steps(keep=None, coverage=0.3, pool=1), lowering="eager")
    with recorded(monkeypatch) as chosen:
        call(sparse, inputs)
    assert all(index is not None and 10 < index.shape[2] < LENGTH for index in chosen)


def test_generation_is_sparse_in_the_prefill_and_dense_after(monkeypatch):
    model, inputs = MODELS["llama"]()
    inputs = {**inputs, "use_cache": True, "max_new_tokens": 4, "do_sample": False}
    whole = tokcompile.optimize(model, steps(keep=1.0), lowering="eager")
    assert torch.equal(whole.generate(**inputs), model.generate(**inputs))
    sparse = tokcompile.optimize(model, steps(), lowering="eager")
    with recorded(monkeypatch) as chosen:
        result = sparse.generate(**inputs)
    assert result.shape == (2, LENGTH + 4)
    assert len(chosen) == 2  # one choice in each layer: none in a decode step
    assert {s.name for s in tokcompile.report(sparse).stages} == {"prefill", "decode"}


def test_short_inputs_run_dense_and_the_report_says_so():
    model, inputs = MODELS["llama"]()
    sparse = tokcompile.optimize(model, steps(min_length=None, least=1024), lowering="eager", inputs=inputs)
    (step,) = tokcompile.report(sparse).steps
    assert step.status == "unprofitable"
    assert "run dense" in step.reason
    assert torch.equal(call(sparse, inputs), call(model, inputs))


def test_one_model_serves_lengths_on_both_sides_of_the_gate(monkeypatch):
    model, _ = decoders.llama()
    sparse = tokcompile.optimize(model, steps(min_length=30), lowering="eager")
    for length, choices in ((20, 0), (24, 0), (40, 2), (22, 0), (36, 2)):
        inputs = decoders.text(length=length)
        with recorded(monkeypatch) as chosen:
            found = call(sparse, inputs)
        assert len(chosen) == choices
        assert (difference(found, call(model, inputs)) < 1e-6) == (choices == 0)


@pytest.mark.slow
def test_chance_as_a_baseline_has_the_same_budget(monkeypatch):
    model, inputs = MODELS["llama"]()
    kept = []
    for select in ("attention", "random", "random"):
        sparse = tokcompile.optimize(model, steps(select=select), lowering="eager")
        with recorded(monkeypatch) as chosen:
            call(sparse, inputs)
        kept.append(chosen[0])
    assert kept[0].shape == kept[1].shape
    assert not torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], kept[2])


def test_calibration_takes_the_calm_layers():
    model, inputs = padded(functools.partial(decoders.llama, 4))
    with torch.no_grad():
        for factor, layer in zip((0.0, 3.0, 0.1, 3.0), model.model.layers, strict=True):
            layer.mlp.down_proj.weight.mul_(factor)
            layer.self_attn.o_proj.weight.mul_(factor)
    recipe = steps(calm=0.5)
    sparse = tokcompile.optimize(model, recipe, calibration=[inputs], inputs=inputs, lowering="eager")
    (step,) = tokcompile.report(sparse).steps
    assert [".0." in r or ".2." in r for r in step.regions] == [True, True]
    upper = tokcompile.optimize(model, recipe, inputs=inputs, lowering="eager")
    assert [r.split(".")[2] for r in tokcompile.report(upper).steps[0].regions] == ["2", "3"]


def test_a_bidirectional_model_is_refused_and_left_alone():
    model, inputs = encoders.hand_written()
    with pytest.raises(NoMatchError, match="bidirectional"):
        tokcompile.optimize(model, steps(), inputs=inputs, lowering="eager")


def test_gradients_go_to_what_was_chosen():
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, h, 12, 3, generator=generator, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1)]
    keys = torch.ones(1, 12, dtype=torch.bool)
    keys[0, 1] = False
    settings = (None, None, 2.0, 0, 0.0, 0.5, 2, 3, 1)
    index = sparse_prefill.select(
        leaves[0], leaves[1], sparse_prefill._position(leaves[0], keys), *settings[:1], *settings[1:], -1
    )
    op = torch.ops.tokcompile.token_sparse_attention
    output = op(*leaves, keys, *settings)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    found = torch.autograd.grad((output * weight).sum(), leaves)
    wanted = torch.autograd.grad(
        (compute(*leaves, index, sparse_prefill._position(leaves[0], keys), None, None, 2.0, 0) * weight).sum(), leaves
    )
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)
    torch.library.opcheck(op.default, (*leaves, keys, *settings))


@pytest.mark.inductor
def test_inductor_equals_eager():
    model, inputs = MODELS["llama"]()
    one, other = (tokcompile.optimize(model, steps(), lowering=lowering) for lowering in ("eager", "inductor"))
    assert difference(call(one, inputs), call(other, inputs)) < 1e-5


def test_pruned_images_and_sparse_attention_together():
    from tests.zoo import vlm

    case = vlm.llava()
    inputs = case.inputs(batch=2, left_padding=3)
    recipe = {
        "recipe_version": 1,
        "steps": [
            {"pass": "todre", "params": {"keep": 0.5, "criterion": "max_sum"}},
            {"pass": "token_sparse", "params": {"keep": 1.0, "window": 2, "least": 2, "calm": 1.0, "min_length": 0}},
        ],
    }
    both = tokcompile.optimize(case.model, recipe, lowering="eager", inputs=inputs)
    pruned = tokcompile.optimize(case.model, {**recipe, "steps": recipe["steps"][:1]}, lowering="eager", inputs=inputs)
    assert [s.status for s in tokcompile.report(both).steps] == ["matched", "matched"]
    with torch.no_grad():
        found, wanted = both(**inputs).logits[:, -1], pruned(**inputs).logits[:, -1]
    assert difference(found, wanted) < 1e-5


SLOW = pytest.mark.slow


@pytest.mark.parametrize("way", ["assistant", pytest.param("padded", marks=SLOW), pytest.param("images", marks=SLOW)])
def test_drafted_tokens_do_not_choose(way):
    """With a draft behind the prompt, the first call takes what the prompt alone takes."""
    more = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    if way == "images":
        case = VLMS["llava"]()
        model, inputs = case.model, case.inputs(text_len=20)
    else:
        model, inputs = MODELS["llama"]()
        inputs = {name: value[-1:] for name, value in inputs.items() if name != "use_cache"}
    if way == "padded":
        inputs["attention_mask"][:, :7] = 0
    helper = {"prompt_lookup_num_tokens": 3}
    if way == "assistant":
        helper = {"assistant_model": decoders.llama()[0]}
    else:
        inputs["input_ids"][:, -4:-2] = inputs["input_ids"][:, -2:]  # there is something to look up
    sparse = tokcompile.optimize(model, steps(window=4, keep=0.3), lowering="eager")
    helped = sparse.generate(**inputs, **helper, **more)
    assert torch.equal(helped, sparse.generate(**inputs, **more))

"""Cuts between the layers of a decoder equal the dense model with the dropped keys hidden from each cut on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import tokcompile
import tokcompile.registry
from tests import oracle
from tests.members import members
from tests.pruning import check, error, optimized, run
from tests.zoo.vlm import VARIANTS, VLMS, shallow
from tokcompile.errors import NoMatchError

CASES = {**VLMS, **VARIANTS}
PASSES = ["staged_random", "fastv", "pyramiddrop", "transprune"]
PADDING = 3
MODELS = ["qwen2_5_vl", "qwen3_vl", "internvl", "gemma3", "gemma3_window", "smolvlm", "plain_cat", "plain_index_put"]


def steps(name: str, keep: list[Any], at: list[Any], **params: Any) -> list[dict[str, Any]]:
    return [{"pass": name, "params": {"keep": keep, "at": at, **params}}]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *((name, "llava") for name in PASSES),
        *members((("transprune", model) for model in MODELS), []),
    ],
)
def test_pruned_equals_masked_dense(name: str, model: str) -> None:
    """Three rows, one with padding in front, one with two images: prefill and each decode step."""
    case = shallow(CASES[model](), 3)
    images = 1 if case.uniform_images else [2, 1, 1]
    inputs = case.inputs(batch=3, left_padding=3, images_per_row=images)
    pruned = optimized(case.model, steps(name, [0.5, 0.25], [1, 2]))
    recording = check(pruned, case, inputs)
    assert [(entry.name, entry.layer) for entry in recording.kept] == [(name, 1), (name, 2)]
    visual = case.visual_mask(inputs)
    for entry, share in zip(recording.kept, (2, 4), strict=True):  # ratios are of all that an image had
        left = [int(visual[row][kept[kept >= 0]].sum()) for row, kept in enumerate(entry.indices)]
        assert left == [int(n) // share for n in visual.sum(1)]


@pytest.mark.parametrize("name", PASSES)
def test_keeping_everything_changes_nothing(name: str) -> None:
    case = shallow(CASES["llava"](), 3)
    inputs = case.inputs(batch=2, left_padding=3)
    found, _ = run(optimized(case.model, steps(name, [1.0, 1.0], [1, 2])), case, inputs, 3)
    wanted = oracle.run(case, inputs, 3)
    assert torch.equal(found.logits[0], wanted.logits[0])
    assert max(error(a, b) for a, b in zip(found.logits, wanted.logits, strict=True)) <= 1e-5


def reference(case: Any, inputs: dict[str, Any], padding: int, **asked: bool) -> Any:
    """The dense model in double precision, on the rows without the padding in front of them."""
    short = {name: value[:, padding:] for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    pixels = {"pixel_values": inputs["pixel_values"].double()}
    with torch.no_grad():
        return case.model.double()(**{**inputs, **short, **pixels}, **asked)


def chosen(score: torch.Tensor, visual: torch.Tensor, count: int, padding: int) -> list[int]:
    """The ``count`` visual tokens of largest score ``[S]``, and all text; places of the padded row."""
    best = score.masked_fill(~visual[padding:], -math.inf).topk(count).indices + padding
    return sorted({*best.tolist(), *(~visual).nonzero().flatten().tolist()})


def kept_by(
    name: str, keep: list[Any], at: list[Any], **params: Any
) -> tuple[Any, dict[str, Any], list[list[list[int]]]]:
    """A small LLaVA, its inputs with padding in front, and for each cut what each row keeps: places of the row."""
    case = CASES["llava"]("eager")  # type: ignore[call-arg]
    inputs = case.inputs(batch=2, left_padding=PADDING)
    pruned = optimized(case.model, steps(name, keep, at, **params))
    with torch.no_grad(), tokcompile.record(pruned) as recording:
        pruned(**inputs, use_cache=False)
    return case, inputs, [[[i for i in row if i >= 0] for row in e.indices.tolist()] for e in recording.kept]


def test_fastv_keeps_what_the_last_token_attends_to() -> None:
    """By the rows of a model in double precision that gives its attention weights."""
    case, inputs, [kept] = kept_by("fastv", [0.25], [2])
    weights = reference(case, inputs, PADDING, output_attentions=True).attentions
    visual = case.visual_mask(inputs)
    for row, found in enumerate(kept):
        score = weights[1][row, :, -1].mean(0)  # of the last layer above the cut
        assert found == chosen(score, visual[row], int(visual[row].sum()) // 4, PADDING)


def test_pyramiddrop_keeps_what_the_last_token_would_attend_to_in_the_next_layer() -> None:
    case, inputs, [kept] = kept_by("pyramiddrop", [0.5], [2])
    weights = reference(case, inputs, PADDING, output_attentions=True).attentions
    visual = case.visual_mask(inputs)
    for row, found in enumerate(kept):
        score = weights[2][row, :, -1].mean(0)  # of the first layer below it
        assert found == chosen(score, visual[row], int(visual[row].sum()) // 2, PADDING)


@pytest.mark.parametrize("form", ["paper", "code"])
def test_transprune_keeps_what_changes_and_is_looked_at(form: str) -> None:
    """Changes of all layers from the second on, over a first cut that keeps all; the question reads the layer below."""
    case, inputs, [_, kept] = kept_by("transprune", [1.0, 0.25], [2, 3], first_layer=0.25, form=form, alpha=0.3)
    moves: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def note(layer: int) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            moves.append((layer, x, output[0] if isinstance(output, tuple) else output))

        return hook

    for number, layer in enumerate(case.model.model.language_model.layers):
        for module in (layer.self_attn, layer.mlp):
            module.register_forward_hook(note(number), with_kwargs=True)
    weights = reference(case, inputs, PADDING, output_attentions=True).attentions
    visual = case.visual_mask(inputs)
    for row, found in enumerate(kept):
        image = visual[row, PADDING:]
        change = torch.zeros(len(image), dtype=torch.float64)
        for layer, xs, ys in moves:
            if layer not in (1, 2):  # behind first_layer, above the cut
                continue
            x, y = xs[row], ys[row]
            cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
            if form == "paper":
                weight = torch.zeros_like(change)
                weight[image] = (1 - cosine.abs())[image].softmax(0)
            else:  # over the row; padding in front takes its part, the same of every token
                weight = (1 - cosine).softmax(0)
            change += weight * y.norm(dim=-1) / x.norm(dim=-1)
        question = int(image.nonzero().max()) + 1
        looked = weights[3][row, :, question:].mean((0, 1))
        score = 0.3 * change / change[image].sum() + 0.7 * looked / looked[image].sum()
        assert found == chosen(score, visual[row], int(image.sum()) // 4, PADDING)


@pytest.mark.parametrize("name", members(["fastv", "pyramiddrop", "transprune"], ["fastv"]))
def test_drafted_tokens_do_not_choose(name: str) -> None:
    """A lookup in the prompt puts a draft behind it; the choice is that of the prompt alone."""
    case = shallow(CASES["llava"](), 3)
    inputs = case.inputs(batch=1, text_len=20)
    inputs["input_ids"][:, -4:-2] = inputs["input_ids"][:, -2:]  # there is something to look up
    pruned = optimized(case.model, steps(name, [0.5], [1]))
    alone, first = run(pruned, case, inputs, 6)
    with torch.no_grad(), tokcompile.record(pruned) as recording:
        helped = pruned.generate(**inputs, max_new_tokens=6, prompt_lookup_num_tokens=3, do_sample=False)
    assert torch.equal(recording.kept[0].indices, first.kept[0].indices)
    assert torch.equal(helped[:, inputs["input_ids"].shape[1] :], alone.tokens)


def test_tokens_that_are_gone_do_not_come_back() -> None:
    with pytest.raises(tokcompile.RecipeError, match="keep cannot grow"):
        optimized(torch.nn.Linear(2, 2), steps("fastv", [0.25, 0.75], [1, 2]))


def test_stages_that_do_not_fit_are_refused_before_anything_is_changed() -> None:
    case = CASES["llava"]()
    inputs = case.inputs(batch=1)
    for at, says in (([1, 9], "do not fit into 4 layers"), ([0.24, 0.26], "need to ascend")):
        with pytest.raises(NoMatchError, match=says):
            optimized(case.model, steps("transprune", [0.5, 0.25], at), inputs=inputs)
    twice = [{"pass": "random", "params": {"keep": 0.5}}, *steps("fastv", [0.25], [2])]
    model = optimized(case.model, twice, on_no_match="ignore")
    check(model, case, inputs, 2)
    assert "an earlier step has removed visual tokens" in tokcompile.report(model).steps[1].reason


def layer_macs(tokens: int, width: int, inner: int) -> int:
    """Multiply-adds of a gated layer: four projections, attention, three of the feed-forward part."""
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * inner


def test_flops_of_transprune_by_hand() -> None:
    """LLaVA-1.5-7B, 576 visual tokens: the figures of the paper, from the depths and ratios of the defaults."""
    method = tokcompile.registry.get_pass("transprune")
    params = method.Params()
    starts = method(params).cut_layers(32)
    assert starts == [7, 9, 12]
    left = [576, *(keep.count(576) for keep in params.keep)]
    assert left == [576, 504, 360, 72]
    layers = [b - a for a, b in zip([0, *starts], [*starts, 32], strict=True)]
    total = sum(n * layer_macs(tokens, 4096, 11008) for n, tokens in zip(layers, left, strict=True))
    assert round(32 * layer_macs(576, 4096, 11008) / 1e12, 3) == 3.817
    assert round(total / 1e12, 3) == 1.557


@pytest.mark.slow
def test_the_report_predicts_the_flops_that_a_hand_counts() -> None:
    """32 layers and 576 visual tokens as LLaVA-1.5-7B has them, of a small width, with two text tokens."""
    sizes = {"num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 172}
    vision = CLIPVisionConfig(**sizes | {"hidden_size": 16}, num_hidden_layers=2, image_size=336, patch_size=14)
    text = LlamaConfig(**sizes, num_hidden_layers=32, vocab_size=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=120, image_seq_length=576)
    ids = torch.tensor([[5, *[120] * 576, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 336, 336)}
    report = tokcompile.explain(LlavaForConditionalGeneration(config).eval(), inputs, "vlm_transprune_75")
    [plan] = [plan for plan in report.plans if plan["cuts"]]
    assert [(cut["layer"], cut["tokens"]) for cut in plan["cuts"]] == [(7, 506), (9, 362), (12, 74)]
    layers = [(7, 578), (2, 506), (3, 362), (20, 74)]
    after = sum(n * layer_macs(tokens, 64, 172) for n, tokens in layers)
    assert plan["predicted_flop_ratio"] == pytest.approx(32 * layer_macs(578, 64, 172) / after, rel=0.01)

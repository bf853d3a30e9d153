"""Recovery: losses and choices of positions, training through rewritten graphs, checkpoints, refusals."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import tokcompile
from tokcompile.errors import RecoveryError
from tokcompile.prepare.calibrate import calibrate
from tokcompile.recovery.data import Stream, shared_positions
from tokcompile.recovery.losses import (
    SsToken,
    Tip,
    best_of_rows,
    sstoken_scores,
    tip_measures,
    tip_scores,
    token_losses,
)
from tokcompile.recovery.prompt_attention import PromptAttention, prompt_mass
from tokcompile.recovery.recover import recover
from tokcompile.recovery.step import Run

from .members import members
from .test_training import class_pruning, random_pruning
from .zoo import decoders, vlm

STEM = {"recipe_version": 1, "description": "tables", "steps": [{"pass": "stem"}]}
VOCAB = 64


def llama(seed: int = 0, **settings: Any) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(**decoders.GROUPED | {"vocab_size": VOCAB, "num_hidden_layers": 2} | settings)
    return vlm.randomize(LlamaForCausalLM(config), seed)


def batches(count: int = 4, rows: int = 2, length: int = 12, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, VOCAB, (rows, length), generator=generator)} for _ in range(count)]


@functools.cache
def shared() -> nn.Module:
    """For tests that leave the dense model as it is: its tables are made once."""
    return llama()


@functools.cache
def _prepared(dense: nn.Module) -> Any:
    return calibrate(dense, STEM, batches(2))


def stem(dense: nn.Module) -> nn.Module:
    """A fresh student with the same tables each time."""
    return tokcompile.optimize(dense, STEM, lowering="eager", calibration=copy.deepcopy(_prepared(dense)))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(v, second[n]) for n, v in first.items())


# .. losses and choices


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_are_divergences(kind: Any, temperature: float) -> None:
    student, teacher = torch.randn(700, 11, requires_grad=True), torch.randn(700, 11)
    losses = token_losses(student, teacher, kind, temperature)
    ours, theirs = (F.log_softmax(z / temperature, -1) for z in (student, teacher))
    a, b = (ours, theirs) if kind == "forward_kl" else (theirs, ours)
    expected = F.kl_div(a, b, log_target=True, reduction="none").sum(-1) * temperature**2
    torch.testing.assert_close(losses, expected)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(grad, wanted)


def test_gradient_of_the_reverse_divergence_has_its_closed_form() -> None:
    student, teacher = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7)
    losses = token_losses(student, teacher, "reverse_kl")
    (grad,) = torch.autograd.grad(losses.sum(), student)
    difference = F.log_softmax(student, -1) - F.log_softmax(teacher.double(), -1)
    torch.testing.assert_close(
        grad.float(), (F.softmax(student, -1) * (difference - losses[:, None].double())).float(), rtol=1e-4, atol=1e-6
    )


def test_tip_prefers_the_unsure_and_the_wrong() -> None:
    sure, wrong, unsure = torch.tensor([9.0, 0, 0]), torch.tensor([0.0, 9, 0]), torch.tensor([1.0, 1, 1])
    student, teacher = torch.stack([sure, wrong, unsure, sure]), torch.stack([sure, sure, unsure, sure])
    measures = tip_measures(student, teacher)
    rows = torch.zeros(4, dtype=torch.int64)

    def best(rule: Any, ratio: float) -> list[int]:
        scores = tip_scores(measures, measures, Tip(rule=rule, clip=1.0))
        return best_of_rows(scores, rows, ratio, up=False).nonzero()[:, 0].tolist()

    assert best("soft_or", 0.5) == [1, 2]
    assert best("entropy", 0.25) == [2]
    assert best("confident", 0.25) == [1]
    scores = tip_scores(measures, measures, Tip(clip=1.0))
    assert bool(((scores >= 0) & (scores <= 1)).all())


def test_equal_scores_give_no_nan() -> None:
    measures = tip_measures(torch.zeros(4, 3), torch.zeros(4, 3))
    scores = tip_scores(measures, measures, Tip())
    assert torch.equal(scores, torch.zeros(4))
    rows = torch.tensor([0, 0, 0, 1])
    assert best_of_rows(scores, rows, 0.5, up=False).tolist() == [True, False, False, True]
    assert best_of_rows(scores, rows, 0.5, up=True).tolist() == [True, True, False, True]


def test_sstoken_without_improvement_follows_the_attention() -> None:
    before, attention = torch.rand(6), torch.rand(6)
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    assert torch.equal(sstoken_scores(before, before, attention, rows, 0.5), attention * 0.5)
    better = before.clone()
    better[2] -= 1
    scores = sstoken_scores(before, better, None, rows, 1.0)
    assert scores.argmax() == 2
    assert float(scores.max()) == pytest.approx(1.0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_on_the_prompt(attention: str) -> None:
    dense = llama(attn_implementation=attention)
    ids = batches(1)[0]["input_ids"]
    prompt = torch.zeros_like(ids, dtype=torch.bool)
    prompt[0, :4], prompt[1, :7] = True, True
    output, mass = prompt_mass(PromptAttention(dense), prompt, {"input_ids": ids, "use_cache": False})
    eager = llama(attn_implementation="eager")
    last = eager(input_ids=ids, output_attentions=True).attentions[-1]
    torch.testing.assert_close(mass, (last * prompt[:, None, None]).sum(-1).mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, dense(input_ids=ids).logits)


# .. training


def test_tables_recover_and_nothing_else_changes() -> None:
    dense = shared()
    original, model = weights(dense), stem(dense)
    start = weights(model)
    report = recover(model, dense, batches(), steps=30, lr=3e-2, warmup=0.0)
    assert report.steps == len(report.losses) == 30
    assert sum(report.losses[-4:]) < 0.5 * sum(report.losses[:4])
    assert report.tokens == 30 * 2 * 12
    assert set(report.trained) == {n for n in start if n.startswith("tokcompile.")}
    assert all(n.endswith(".mean") for n in report.unused)
    assert "30 steps on 720 positions" in str(report)
    assert same(weights(dense), original)
    now = weights(model)
    changed = {n for n in start if not torch.equal(now[n], start[n])}
    assert changed == set(report.trained) - set(report.unused)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_training_everything_leaves_the_teacher_alone() -> None:
    dense = llama(tie_word_embeddings=True)
    original, model = weights(dense), stem(dense)
    dense.train()
    recover(model, dense, batches(), steps=2, trainable="all", lr=1e-2, warmup=0.0)
    assert dense.training
    assert same(weights(dense), original)
    assert not torch.equal(model.model.norm.weight, dense.model.norm.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_choices_of_parameters() -> None:
    dense = shared()
    report = recover(stem(dense), dense, batches(), steps=1, trainable=["norms", "*layers.1*.down_proj.weight"])
    assert sorted(report.trained) == sorted(
        [n for n, _ in dense.named_parameters() if "norm" in n] + ["model.layers.1.mlp.down_proj.weight"]
    )


def test_hidden_states_are_part_of_the_loss() -> None:
    dense = shared()
    plain = recover(stem(dense), dense, batches(), steps=1).losses[0]
    model = stem(dense)
    both = recover(model, dense, batches(), steps=12, hidden_weight=1.0, lr=3e-2, warmup=0.0)
    assert both.losses[0] > plain
    assert both.losses[-1] < both.losses[0]


def test_a_pruned_model_is_compared_at_the_text_that_both_have() -> None:
    case = vlm.shallow(vlm.llava())
    inputs = case.inputs(batch=2, images_per_row=[1, 2], left_padding=2)
    model = tokcompile.optimize(case.model, random_pruning(0.25), lowering="eager")
    run = Run(
        model,
        case.model,
        {},
        _accelerator(),
        loss="forward_kl",
        temperature=1.0,
        hidden_weight=1.0,
        choice=None,
        accumulation=1,
        max_grad_norm=0.0,
    )
    batch = run.compare({**inputs, "use_cache": False})
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    text = mask & (ids != vlm.IMAGE) & (F.pad(ids, (0, 1))[:, 1:] != vlm.IMAGE)
    assert torch.equal(torch.stack([batch.rows, batch.positions]), torch.stack(text.nonzero(as_tuple=True)))
    full = case.model(**inputs, output_hidden_states=True)
    assert torch.equal(batch.teacher, full.logits[text])
    with tokcompile.record(model) as record:
        logits = model(**inputs, use_cache=False).logits
    slots = (record.kept[-1].indices[batch.rows] == batch.positions[:, None]).int().argmax(1)
    assert torch.equal(batch.student, logits[batch.rows, slots])
    assert all(a.shape == b.shape == (len(batch.rows), 64) for a, b in batch.hidden)
    assert all(torch.equal(b, h[text]) for (_, b), h in zip(batch.hidden, full.hidden_states, strict=True))


def test_a_pruned_model_recovers() -> None:
    case = vlm.shallow(vlm.llava())
    inputs = case.inputs(batch=2)
    model = tokcompile.optimize(case.model, random_pruning(0.25), lowering="eager")
    report = recover(model, case.model, [inputs], steps=12, trainable="norms", lr=2e-2, warmup=0.0)
    assert report.losses[-1] < 0.8 * report.losses[0]
    keep = tokcompile.optimize(case.model, random_pruning(1.0), lowering="eager")
    assert recover(keep, case.model, [inputs], steps=1, trainable="norms").losses == [0.0]


def test_a_classifier_recovers() -> None:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    torch.manual_seed(0)
    dense = vlm.randomize(ViTForImageClassification(config))
    model = tokcompile.optimize(dense, class_pruning(0.5), lowering="eager")
    data = [{"pixel_values": torch.randn(4, 3, 32, 32), "labels": torch.zeros(4, dtype=torch.int64)}]
    report = recover(model, dense, data, steps=15, trainable="all", lr=3e-3, warmup=0.0)
    assert report.tokens == 15 * 4
    assert report.losses[-1] < 0.5 * report.losses[0]


def test_only_answers_are_trained_on() -> None:
    dense = shared()
    (item,) = batches(1)
    labels = item["input_ids"].clone()
    labels[:, :8] = -100
    report = recover(stem(dense), dense, [{**item, "labels": labels}], steps=1)
    assert report.tokens == 2 * 4


@pytest.mark.parametrize("tokens", members(["all", Tip(0.5)], [Tip(0.5)]), ids=str)
def test_how_a_batch_is_split_makes_no_difference(tokens: Any) -> None:
    dense = shared()
    (whole,) = batches(1, rows=4)
    parts = [{"input_ids": whole["input_ids"][:2]}, {"input_ids": whole["input_ids"][2:]}]
    one, two = stem(dense), stem(dense)
    first = recover(one, dense, [whole], steps=3, tokens=tokens, lr=1e-2, warmup=0.0)
    second = recover(two, dense, parts, steps=3, tokens=tokens, lr=1e-2, warmup=0.0, accumulation=2)
    assert first.tokens == second.tokens
    assert first.losses == pytest.approx(second.losses, rel=1e-5)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, weights(two)[name], rtol=1e-4, atol=1e-5)


def test_tip_at_ratio_one_is_the_plain_loss() -> None:
    dense = shared()
    plain = recover(stem(dense), dense, batches(), steps=2, loss="reverse_kl")
    tip = recover(stem(dense), dense, batches(), steps=2, loss="reverse_kl", tokens=Tip(1.0))
    assert tip.losses == plain.losses
    half = recover(stem(dense), dense, batches(), steps=2, loss="reverse_kl", tokens="tip")
    assert half.tokens == plain.tokens / 2
    assert half.losses[0] > plain.losses[0]


@pytest.mark.parametrize("gamma", members([0.5, 1.0], [0.5]))
def test_sstoken_trains(gamma: float) -> None:
    dense = shared()
    data = []
    for item in batches():
        labels = item["input_ids"].clone()
        labels[:, :4] = -100
        data.append({**item, "labels": labels})
    model = stem(dense)

    @torch.no_grad()
    def divergence() -> float:
        logits = [m(**data[0]).logits[:, 3:-1].flatten(0, 1) for m in (model, dense)]
        return float(token_losses(*logits).mean())

    before = divergence()
    report = recover(model, dense, data[:1], steps=10, tokens=SsToken(0.5, gamma, warmup=2), lr=1e-2, warmup=0.0)
    assert report.tokens == (10 * 2 * 4 if gamma < 1 else 2 * 8 + 9 * 2 * 4)
    assert divergence() < 0.9 * before


# .. data, checkpoints, processes


class Broken(Sequence[Any]):
    """Fails at the n-th access, once."""

    def __init__(self, items: list[Any], after: int) -> None:
        self.items, self.left = items, after

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return self.items[index]


@pytest.mark.parametrize("tokens", members(["tip", SsToken(0.5, 1.0)], ["tip"]))
def test_a_run_that_goes_on_equals_one_that_was_not_broken_off(tmp_path: Path, tokens: Any) -> None:
    settings: dict[str, Any] = {
        "steps": 7,
        "tokens": tokens,
        "lr": 1e-2,
        "trainable": ["prepared", "norms"],
        "save_every": 2,
    }
    dense = llama(attention_dropout=0.1)  # random numbers go on, too
    whole = stem(dense).train()
    expected = recover(whole, dense, batches(), **settings)
    torch.rand(3)
    with pytest.raises(KeyboardInterrupt):
        recover(stem(dense).train(), dense, Broken(batches(), 5), checkpoints=tmp_path, **settings)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000004"]
    torch.rand(5)
    again = stem(dense).train()
    report = recover(again, dense, batches(), checkpoints=tmp_path, **settings)
    assert report.losses == expected.losses
    assert (report.steps, report.tokens, report.rates) == (7, expected.tokens, expected.rates)
    assert same(weights(again), weights(whole))
    done = stem(dense).train()
    assert recover(done, dense, batches(), checkpoints=tmp_path, **settings).losses == expected.losses
    assert same(weights(done), weights(whole))
    with pytest.raises(RecoveryError, match=r"another lr: 0\.01 there, 0\.02 here"):
        recover(stem(dense), dense, batches(), checkpoints=tmp_path, **{**settings, "lr": 2e-2})
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"}
    assert json.loads(next(tmp_path.rglob("state.json")).read_text())["step"] == 7


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    dense = shared()
    model = stem(dense).train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    recover(model, dense, batches(), steps=1)
    assert torch.equal(torch.rand(2), expected)


def test_items_come_in_a_new_order_each_epoch() -> None:
    stream = Stream(list("abcdef"), seed=1)
    epochs = [[stream.item(6 * e + i) for i in range(6)] for e in range(3)]
    assert all(sorted(e) == list("abcdef") for e in epochs)
    assert epochs[0] != epochs[1]
    again = Stream(list("abcdef"), seed=1)
    assert [again.item(n) for n in (7, 9, 13)] == [epochs[1][1], epochs[1][3], epochs[2][1]]
    assert stream.steps(epochs=2, group=4) == 3


def test_iterables_come_in_their_order() -> None:
    class Fresh:
        def __iter__(self) -> Iterator[str]:
            return iter("abc")

    stream = Stream(Fresh(), 0)  # type: ignore[arg-type]
    assert [stream.item(n) for n in (0, 2, 3, 7)] == ["a", "c", "a", "b"]
    with pytest.raises(RecoveryError, match="ran out after 2 items"):
        Stream((x for x in "ab"), 0).item(2)  # type: ignore[misc]
    with pytest.raises(RecoveryError, match="steps="):
        Stream(Fresh(), 0).steps(1, 1)  # type: ignore[arg-type]


SCRIPT = """
import json, sys
import torch
from tests.test_recover import batches, llama, recover, stem, weights
torch.set_num_threads(1)
dense = llama()
model = stem(dense)
report = recover(model, dense, batches(), steps=3, tokens="tip", lr=1e-2, warmup=0.0, checkpoints=sys.argv[1])
print("losses", json.dumps(report.losses))
"""


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_twice_the_accumulation(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "0",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "localhost:0",
            str(script),
            str(tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": "."},
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [json.loads(line.partition(" ")[2]) for line in found.stdout.splitlines() if line.startswith("losses")]
    assert len(lines) == 2
    assert lines[0] == lines[1]
    dense = llama()
    report = recover(stem(dense), dense, batches(), steps=3, tokens="tip", lr=1e-2, warmup=0.0, accumulation=2)
    assert report.losses == pytest.approx(lines[0], rel=1e-5)
    assert sorted(p.name for p in (tmp_path / "run" / "step-00000003").iterdir()) == [
        "random-0.safetensors",
        "random-1.safetensors",
        "state.json",
        "tensors.safetensors",
    ]


# .. refusals


def _accelerator() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def _wrong_label_shape(dense: nn.Module) -> Any:
    item = batches(1)[0]
    return recover(stem(dense), dense, [{**item, "labels": item["input_ids"][:, :3]}])


REFUSALS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "empty data": (lambda d: recover(stem(d), d, []), "the data is empty"),
    "used generator": (lambda d: recover(stem(d), d, iter(()), steps=1), "the data is empty"),
    "no length": (lambda d: recover(stem(d), d, iter(batches())), "steps="),
    "one mapping": (lambda d: recover(stem(d), d, batches()[0]), "data is a dict"),
    "wrong keys": (
        lambda d: recover(stem(d), d, [{"text": torch.zeros(1, 2)}]),
        r"data item 0 has the keys \['text'\]",
    ),
    "wrong item": (lambda d: recover(stem(d), d, [[1, 2]]), "data item 0 is a list"),
    "vocabulary": (
        lambda d: recover(stem(d), llama(vocab_size=VOCAB + 8), batches()),
        f"vocabulary mismatch: the model gives {VOCAB} logits for each position, the teacher {VOCAB + 8}",
    ),
    "teacher is the model": (lambda d: recover(m := stem(d), m, batches()), "one object"),
    "nothing prepared": (lambda d: recover(copy.deepcopy(d), d, batches()), "no pass of this recipe prepared"),
    "unknown parameter": (
        lambda d: recover(stem(d), d, batches(), trainable="*.gate_prj.weight"),
        "near are .*gate_proj",
    ),
    "no gradient": (lambda d: recover(stem(d), d, batches(), trainable="tokcompile.*.mean"), "none of the chosen"),
    "loss": (lambda d: recover(stem(d), d, batches(), loss="mse"), "choose one of forward_kl, reverse_kl"),
    "tokens": (lambda d: recover(stem(d), d, batches(), tokens="some"), "choose all, tip, sstoken"),
    "schedule": (lambda d: recover(stem(d), d, batches(), schedule="zigzag"), "zigzag"),
    "steps": (lambda d: recover(stem(d), d, batches(), steps=0), "steps=0"),
    "temperature": (lambda d: recover(stem(d), d, batches(), temperature=0), "temperature=0"),
    "labels": (_wrong_label_shape, r"labels are \(2, 3\)"),
    "no labels": (
        lambda d: recover(stem(d), d, [{**b, "labels": torch.full_like(b["input_ids"], -100)} for b in batches()]),
        "no position to compare",
    ),
    "mixed precision": (
        lambda d: recover(stem(d), d, batches(), accelerator=SimpleNamespace(mixed_precision="bf16")),
        "mixed_precision='bf16'",
    ),
    "no prompt": (lambda d: recover(stem(d), d, batches(), tokens="sstoken"), r"SsToken\(gamma=1\)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_leave_both_models_as_they_were(name: str) -> None:
    dense = shared()
    before = weights(dense)
    call, message = REFUSALS[name]
    with pytest.raises(RecoveryError, match=message):
        call(dense)
    assert same(weights(dense), before)
    assert all(p.requires_grad for p in dense.parameters())


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    dense = shared()
    model = stem(dense)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.endswith(".table")).fill_(float("nan"))
    before = weights(model)
    with pytest.raises(RecoveryError, match="not finite"):
        recover(model, dense, batches(), steps=2, trainable="norms")
    assert torch.equal(model.model.norm.weight, before["model.norm.weight"])


def test_numbers_out_of_range() -> None:
    for call in (lambda: Tip(0.0), lambda: Tip(rule="best"), lambda: SsToken(1.5), lambda: SsToken(gamma=2)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"ratio|rule|gamma"):
            call()


def test_positions_need_a_cut_that_explains_them() -> None:
    with pytest.raises(RecoveryError, match="logits for 3 positions, the teacher for 5"):
        shared_positions(torch.zeros(1, 3, 2), 5, [])

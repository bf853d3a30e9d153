"""Calls from several threads give what single calls give, cold and warm; failing calls cost nothing that stays."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

import tokcompile
from tests.small_models import vit, vlm
from tokcompile.runtime.gate import Gate, Missing

HALF = {"recipe_version": 1, "steps": [{"pass": "random", "params": {"keep": 0.5}}]}
PATCHES = {"recipe_version": 1, "steps": [{"pass": "class_attention", "params": {"keep": [0.5], "at": [0.5]}}]}


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """Each in a thread of its own, started at once; what they return or raise."""
    found: list[Any] = [None] * len(works)
    ready = threading.Barrier(len(works))

    def run(i: int) -> None:
        ready.wait()
        try:
            with torch.no_grad():
                found[i] = works[i]()
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads), "threads wait for each other"
    return found


def requests(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Mixed calls of generate: an image and text, other lengths, two rows, no image."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    longer = torch.cat([ids, ids[:, -3:]], 1)
    text = ids[:, -6:]
    return [
        inputs,
        {**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)},
        {name: torch.cat([value, value]) for name, value in inputs.items()} | {"attention_mask": torch.cat([mask] * 2)},
        {"input_ids": text, "attention_mask": torch.ones_like(text)},
    ]


def answer(model: nn.Module, request: dict[str, Any]) -> torch.Tensor:
    tokens: torch.Tensor = model.generate(**request, max_new_tokens=3, min_new_tokens=3, do_sample=False)  # type: ignore[operator]
    return tokens


def check_stress(threads: int, count: int) -> None:
    model, inputs = vlm()
    mixed = requests(inputs)
    alone = tokcompile.optimize(model, HALF, lowering="eager")
    with torch.no_grad():
        want = [answer(alone, request) for request in mixed]
    fast = tokcompile.optimize(model, HALF, lowering="eager")

    def work(number: int) -> Callable[[], list[bool]]:
        order = [(number + i) % len(mixed) for i in range(count)]
        return lambda: [torch.equal(answer(fast, mixed[i]), want[i]) for i in order if i != 3 or step.matches]

    step = tokcompile.report(fast).steps[0]
    for found in together([work(number) for number in range(threads)]):
        assert not isinstance(found, BaseException), found
        assert all(found)
    assert step.status == "matched"
    assert step.fell_back == 0


@pytest.mark.slow
def test_cold_threads_with_mixed_requests() -> None:
    check_stress(4, 4)


@pytest.mark.slow
def test_eight_cold_threads_with_fifty_requests_each() -> None:
    check_stress(8, 50)


def test_first_calls_of_one_vision_model() -> None:
    model, pixels = vit()
    with torch.no_grad():
        want = tokcompile.optimize(model, PATCHES, lowering="eager")(pixel_values=pixels).last_hidden_state
    fast = tokcompile.optimize(model, PATCHES, lowering="eager")
    for found in together([lambda: fast(pixel_values=pixels).last_hidden_state] * 4):
        assert isinstance(found, torch.Tensor), found
        torch.testing.assert_close(found, want)
    assert tokcompile.report(fast).steps[0].fell_back == 0


def test_first_calls_of_two_models() -> None:
    """What tracing changes is the process's, not the model's."""
    model, pixels = vit()
    with torch.no_grad():
        want = tokcompile.optimize(model, PATCHES, lowering="eager")(pixel_values=pixels).last_hidden_state
    pair = [tokcompile.optimize(model, PATCHES, lowering="eager") for _ in range(2)]
    for found in together([lambda fast=fast: fast(pixel_values=pixels).last_hidden_state for fast in pair]):
        assert isinstance(found, torch.Tensor), found
        torch.testing.assert_close(found, want)


def test_a_gate_lets_many_run_and_one_alone() -> None:
    gate, inside, seen = Gate(), [0], []

    def shared() -> None:
        for _ in range(50):
            with gate.shared():
                inside[0] += 1
                seen.append(inside[0] >= 0)
                inside[0] -= 1

    def alone() -> None:
        for _ in range(20):
            with gate.alone(), gate.alone(), gate.shared():  # of one thread, any order within
                assert gate.may_compile
                seen.append(inside[0] == 0)

    assert together([shared, alone, shared, alone]) == [None] * 4
    assert all(seen)
    with gate.shared(), pytest.raises(Missing), gate.alone():
        pass
    with gate.alone():
        pass


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


class Moody(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: torch.Tensor, mood: int = 0) -> torch.Tensor:
        hidden: torch.Tensor = self.inner(pixel_values=pixel_values).last_hidden_state
        if mood:
            torch._dynamo.graph_break()
        return hidden


def check_soak(calls: int, warm: int) -> None:
    model, pixels = vit()
    fast = tokcompile.optimize(Moody(model).eval(), PATCHES, lowering="eager")
    held = 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = fast(pixels)
        for number in range(calls):
            if number == warm:
                gc.collect()
                held = resident()
            if number % 5 == 3:
                fast(pixels, mood=1)
            elif number % 5 == 4:
                with pytest.raises(ValueError, match="channel"):
                    fast(pixels[:, :2])
            else:
                fast(pixels)
        torch.testing.assert_close(fast(pixels), want)
    gc.collect()
    assert resident() < 1.05 * held
    step = tokcompile.report(fast).steps[0]
    assert step.status == "matched"
    assert step.fell_back == sum(number % 5 == 3 for number in range(calls))
    assert len([s for s in tokcompile.report(fast).stages if not s.captured]) < 6


def test_failing_calls_in_between_leave_nothing_behind() -> None:
    check_soak(80, 30)


@pytest.mark.slow
def test_five_hundred_calls_with_failing_ones_in_between() -> None:
    check_soak(500, 100)


class Heard(BaseStreamer):  # type: ignore[misc,no-any-unimported]
    """What a streamer was given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_in_a_thread() -> None:
    """A server generates in a thread and reads what comes: the tokens of a call without it, cold and warm."""
    model, inputs = vlm()
    alone = tokcompile.optimize(model, HALF, lowering="eager")
    with torch.no_grad():
        want = answer(alone, inputs)[0].tolist()
    fast = tokcompile.optimize(model, HALF, lowering="eager")
    for _ in range(2):
        heard = Heard()
        (found,) = together([lambda heard=heard: answer(fast, {**inputs, "streamer": heard})])
        assert found[0].tolist() == want
        assert heard.ended
        assert heard.tokens[-3:] == want[-3:]

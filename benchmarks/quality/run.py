"""Measure recipes on real weights and write ``benchmarks/results/quality.csv``, its plots and ``docs/quality.md``.

    python benchmarks/quality/run.py                 # the short version, 8 minutes of an idle core
    python benchmarks/quality/run.py --full          # everything, hours
    python benchmarks/quality/run.py --only vit,vlm  # some groups
    python benchmarks/quality/run.py --page          # only the plots and the page, from the CSV

A run that was cut off goes on where it stopped (``quality.local.jsonl`` beside the CSV). A group whose weights or data
are not installed is skipped, and the page says what is missing. The short version has every group, each with fewer
items, budgets and recipes and one random control; it shows that all of it runs, and too few items to judge by.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402

from quality import embedding, language, page, retrieval, speech, vision, vlm  # noqa: E402
from quality.sources import MissingError  # noqa: E402
from tokcompile.measure.evaluate import evaluate  # noqa: E402
from tokcompile.measure.quality_results import EvalRow  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quality.csv"
SHORT = (
    "Short version: each group with few items, budgets and recipes, one random control. --full has all of "
    "it, docs/quality.md the results."
)
VIT_50 = ("vit_prune_50", "vit_merge_50")
VIT = ("vit_prune_30", *VIT_50)


class Run:
    """One run: how much of it, and where the results go."""

    def __init__(self, full: bool, results: Path) -> None:
        self.full, self.results = full, results
        self.skipped: dict[str, str] = {}

    def measure(self, model: Any, label: str, tasks: Sequence[Any], candidates: Any) -> list[EvalRow]:
        """Evaluate with progress on standard error."""
        found = evaluate(
            model,
            tasks,
            candidates,
            label=label,
            results=self.results,
            progress=_progress,
            seeds=(0, 1, 2) if self.full else (0,),
            resamples=2000 if self.full else 500,
        )
        print(f"\r{' ' * 100}\r{found}", flush=True)
        return found.rows


def vit(run: Run) -> None:
    """ViT-S/14: stamps, saliency, Fashion-MNIST."""
    model = vision.load()
    tasks = [vision.stamps_task(None if run.full else 110), vision.saliency_task(60 if run.full else 12)]
    if run.full:
        tasks.append(vision.fashion_task())
    run.measure(model, "ViT-S/14", tasks, VIT if run.full else VIT_50)


def small_vlm(run: Run) -> None:
    """The small VLM: naming and collages."""
    model, processor = vlm.load()
    budgets = (0.5, 0.25, 0.1) if run.full else (0.1,)
    tasks = [vlm.naming_task(processor, "stamps", limit=None if run.full else 20)]
    if run.full:
        tasks += [vlm.naming_task(processor, "fashion", limit=100), vlm.collage_task(processor)]
    run.measure(model, "small VLM", tasks, vlm.budget_recipes(budgets))


def shapes(run: Run) -> None:
    """The small VLM trained on coloured shapes: easy-vqa and collages of four of its pictures."""
    model, processor = vlm.load(shapes=True)
    tasks = [vlm.easy_vqa_task(processor, 1000 if run.full else 40)]
    if run.full:
        tasks.append(vlm.shape_collage_task(processor))
    recipes = vlm.shape_recipes((0.25, 0.1)) if run.full else {"herding 10%": vlm.shape_recipes((0.1,))["herding 10%"]}
    run.measure(model, "small VLM (shapes)", tasks, recipes)


def text(run: Run) -> None:
    """SmolLM2-135M: perplexity and capitals, with the recipes that change feed-forward layers."""
    model, tokenizer = language.load()
    if run.full:
        tasks = list(language.tasks(tokenizer))
    else:
        short = language.perplexity_task(tokenizer, slice(0, 4), context=256)
        tasks = [replace(short, calibration=language.calibration(tokenizer, sequences=8, length=128))]
    run.measure(model, "SmolLM2-135M", tasks, language.recipes())


def minilm(run: Run) -> None:
    """MiniLM: similarity of documents and words."""
    model, tokenizer = embedding.load()
    run.measure(model, "MiniLM-L6", embedding.tasks(tokenizer), embedding.recipes())


def long_text(run: Run) -> None:
    """SmolLM2-135M at 2K to 8K tokens: needles, and keys among others; sparse decode steps and sparse prefill."""
    model, tokenizer = language.load()
    for task, candidates in retrieval.measured(model, tokenizer, run.full):
        run.measure(model, "SmolLM2-135M", [task], candidates)


def whisper(run: Run) -> None:
    """Whisper tiny.en: word error rate."""
    model, tokenizer, features = speech.load()
    run.measure(
        model,
        "Whisper tiny.en",
        speech.tasks(tokenizer, features, run.full),
        speech.recipes(tuple(speech.BUDGETS) if run.full else ("50 %",)),
    )


GROUPS: dict[str, Callable[[Run], None]] = {
    "vit": vit,
    "vlm": small_vlm,
    "shapes": shapes,
    "text": text,
    "minilm": minilm,
    "long": long_text,
    "whisper": whisper,
}


def _progress(title: str, done: int, total: int) -> None:
    if sys.stderr.isatty() or done % 20 == 0 or done == total:
        print(f"\r{title}: {done}/{total}", end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all items, budgets and tasks")
    parser.add_argument("--only", default=",".join(GROUPS), help="comma-separated: " + ", ".join(GROUPS))
    parser.add_argument("--page", action="store_true", help="write the plots and the page only")
    parser.add_argument(
        "--results",
        type=Path,
        default=None,
        help="CSV file (default: quality.csv; without --full, quality_short.local.csv)",
    )
    options = parser.parse_args(argv)
    results = options.results or (
        RESULTS if options.full or options.page else RESULTS.with_name("quality_short.local.csv")
    )
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(GROUPS)):
        parser.error(f"unknown group {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    run = Run(options.full, results)
    if not options.page:
        if not run.full:
            print(SHORT, flush=True)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
        for name in names:
            started = time.time()
            try:
                GROUPS[name](run)
            except (MissingError, ImportError) as error:
                run.skipped[name] = str(error)
                print(f"{name}: skipped: {error}", flush=True)
                continue
            print(f"{name}: {time.time() - started:.0f} s\n", flush=True)
            torch._dynamo.reset()
            gc.collect()
    if results.exists():
        page.write(results, ROOT / "docs" / "quality.md" if results == RESULTS else None, run.skipped)
    print(results)
    if not options.page and not run.full:
        print(SHORT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""SmolLM2-135M with tables or experts, before and after a short recovery: KL to the dense model, perplexity, capitals.

    python benchmarks/recover.py [--only stem_ffn,moe_from_dense_75] [--steps 200] [--tune] [--page]

Four parts of gensim's Wikipedia pages, by article: the first stretches of those that ``benchmarks/language.py``
evaluates (0 to 11), those on which a learning rate is chosen (``--tune``: 12 to 15), those trained on (16 and up), and
among these the ones that calibrate (40 and up). What is trained towards is the dense model as it is, so no fit to the
text can show as recovery of KL. Writes ``benchmarks/results/recover.csv`` as it goes, ``recover.png`` and the table of
``docs/recover.md``.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from language import ffn_task, quiz_task  # noqa: E402
from quality import language  # noqa: E402
from quality.text_data import articles  # noqa: E402

import tokcompile  # noqa: E402
from tokcompile.recipes import Recipe  # noqa: E402
from tokcompile.recovery.losses import SsToken, TokenChoice, token_losses  # noqa: E402
from tokcompile.state import NAMESPACE  # noqa: E402

RESULTS = HERE / "results" / "recover.csv"
DOCS = HERE.parent / "docs" / "recover.md"
MARKER = "<!-- below: written by benchmarks/recover.py from benchmarks/results/recover.csv -->"
TUNED, TRAINED = slice(12, 16), slice(16, None)
LENGTH = 128
"""Tokens of a step; 256 are evaluated at a time, and calibrate."""
Items = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Run:
    """A recipe, what of it is trained, how fast, at which positions, and towards what (the dense model, or as a control
    the tokens of the text alone). ``params`` replaces those of its only step."""

    recipe: str
    lr: float
    params: dict[str, Any] = field(default_factory=dict)
    trainable: tuple[str, ...] = ("prepared",)
    tokens: str | TokenChoice = "all"
    labels: bool = False


_TABLES = ("prepared", "converted gate_proj", "converted down_proj")
_EXPERTS = {"gate": "off"}  # eager experts of a small model are slower than its dense layers, which would then stay
_CMOE = {**_EXPERTS, "split": "activity", "choice": "analytic", "rounds": 1}
RUNS = {
    "stem_ffn": Run("stem_ffn", 3e-4, {}, _TABLES),
    "stem_ffn 0.25": Run("stem_ffn", 3e-4, {"convert": 0.25}, _TABLES),
    "moe_from_dense_75": Run("moe_from_dense_75", 2e-4, _EXPERTS),
    "moe_from_dense_75 cmoe": Run("moe_from_dense_75", 2e-4, _CMOE),
    "moe_from_dense_75 tip": Run("moe_from_dense_75", 2e-4, _EXPERTS, tokens="tip"),
    "moe_from_dense_75 sstoken": Run("moe_from_dense_75", 2e-4, _EXPERTS, tokens=SsToken(gamma=1)),
    "moe_from_dense_75 labels": Run("moe_from_dense_75", 2e-4, _EXPERTS, labels=True),
    "moe_from_dense_50": Run("moe_from_dense_75", 2e-4, {**_EXPERTS, "active": 1}),
    "moe_from_dense_75 random router": Run("moe_from_dense_75", 2e-4, {**_EXPERTS, "choice": "random"}),
    "moe_from_dense_50 random router": Run("moe_from_dense_75", 2e-4, {**_EXPERTS, "active": 1, "choice": "random"}),
}


@dataclass
class Point:
    """A row of the CSV. ``kl`` and ``perplexity``: 8 stretches of 256 tokens that nothing was trained on; ``better``:
    on how many of them the KL is below that of step 0; ``loss``: mean loss on the training text since the row before
    (KL; cross-entropy where labels train). Times are wall time of a step with all else that ran (``load``)."""

    run: str
    trained: str
    values: int
    lr: float
    step: int
    tokens: int
    loss: float | None
    kl: float
    better: int | None
    perplexity: float
    dense_perplexity: float
    capitals: float | None
    dense_capitals: float | None
    seconds: float | None
    load: float
    torch: str
    tokcompile: str


def stretches(tokenizer: Any, which: slice, each: int) -> Items:
    """``input_ids [1, 128]``: the first ``each`` full stretches of every article."""
    found = []
    for _, text in articles()[which]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        found += [
            {"input_ids": torch.tensor([ids[at : at + LENGTH]])}
            for at in range(0, min(len(ids) - LENGTH + 1, each * LENGTH), LENGTH)
        ]
    return found


class Reading:
    """What a model makes of some texts, beside the dense model."""

    def __init__(self, dense: Any, items: Items) -> None:
        self.items = items
        self.theirs = [self._logits(dense, item) for item in items]

    @staticmethod
    @torch.no_grad()
    def _logits(model: Any, item: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = model(**item, use_cache=False).logits[0, :-1].float()
        return found

    def of(self, model: Any) -> tuple[list[float], float]:
        """KL(dense | model) of each text, mean over positions, and the perplexity of all."""
        divergences, total, count = [], 0.0, 0
        for item, theirs in zip(self.items, self.theirs, strict=True):
            ours, wanted = self._logits(model, item), item["input_ids"][0, 1:]
            with torch.no_grad():
                divergences.append(float(token_losses(ours, theirs).mean()))
                total += float(torch.nn.functional.cross_entropy(ours, wanted, reduction="sum"))
            count += len(wanted)
        return divergences, math.exp(total / count)


def compressed(dense: Any, run: Run, data: Items) -> Any:
    """The model that ``optimize`` makes of the recipe."""
    recipe = Recipe.load(run.recipe)
    document = {
        "recipe_version": 1,
        "description": recipe.description,
        "steps": [s.model_dump(by_alias=True, exclude_none=True) for s in recipe.steps],
    }
    document["steps"][0]["params"] = {**document["steps"][0].get("params", {}), **run.params}
    return tokcompile.optimize(dense, document, calibration=data, lowering="eager")


def patterns(model: Any, trainable: Sequence[str]) -> list[str]:
    """``converted NAME``: the projection of this name in the layers that have a table."""
    tables = [name for name, _ in model.named_parameters() if name.startswith(NAMESPACE) and name.endswith(".table")]
    layers = [name.split(".", 2)[2].rpartition(".")[0] for name in tables]
    found: list[str] = []
    for wish in trainable:
        kind, _, name = wish.partition(" ")
        found += [f"*{layer}.{name}.weight" for layer in layers] if kind == "converted" else [wish]
    return found


class Labels(torch.nn.Module):
    """A teacher that is sure of the tokens of the text: the divergence from it is the cross-entropy."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """Logits [B, L, V]: of position i, the token i + 1."""
        following = torch.nn.functional.pad(input_ids[:, 1:], (0, 1))
        return SimpleNamespace(logits=1e4 * torch.nn.functional.one_hot(following, self.vocabulary).float())


def train(model: Any, dense: Any, run: Run, texts: Items, steps: int, look: Any = None, every: int = 0) -> Any:
    """One call of ``recover``; ``look(step)`` before every n-th step: its data are asked for one step at a time."""

    def feed() -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
        for step in range(steps):
            if look is not None and step and step % every == 0:
                look(step)
            item = texts[order[step % len(order)]]
            yield {**item, "labels": item["input_ids"]} if run.labels else item  # no token follows the last position

    teacher = Labels(dense.config.vocab_size) if run.labels else dense
    return tokcompile.recover(
        model, teacher, feed(), steps=steps, trainable=patterns(model, run.trainable), lr=run.lr, tokens=run.tokens
    )


def tune(dense: Any, tokenizer: Any, name: str, rates: Sequence[float], steps: int) -> None:
    """KL on articles that are neither trained on nor evaluated, for each learning rate."""
    run, reading = RUNS[name], Reading(dense, stretches(tokenizer, TUNED, 2))
    model = compressed(dense, run, language.calibration(tokenizer, 16, 256))
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    before = reading.of(model)[0]
    print(f"{name}: KL {sum(before) / len(before):.4f} before", flush=True)
    for rate in rates:
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.data = start[n]  # recover trains a copy of it
        report = train(model, dense, replace(run, lr=rate), stretches(tokenizer, TRAINED, 4), steps)
        after = reading.of(model)[0]
        print(
            f"{name}: lr {rate:g}: KL {sum(after) / len(after):.4f} after {steps} steps, "
            f"{report.seconds / steps:.1f} s a step",
            flush=True,
        )


def measure(dense: Any, tokenizer: Any, name: str, steps: int, every: int, results: Path) -> None:
    """The rows of one run."""
    run, quiz = RUNS[name], quiz_task(dense, tokenizer)
    evaluated = Reading(dense, [{"input_ids": ids} for ids, _ in ffn_task(dense, tokenizer).items])
    reference = evaluated.of(dense)[1]

    def capitals(model: Any) -> float:
        with torch.no_grad():
            return 100 * sum(quiz.observe(model, item) for item in quiz.items) / len(quiz.items)

    known = next((p.dense_capitals for p in read(results) if p.dense_capitals is not None), None)
    dense_capitals = capitals(dense) if known is None else known
    model = compressed(dense, run, language.calibration(tokenizer, 16, 256))
    wanted = patterns(model, run.trainable)
    points: list[Point] = []
    first: list[float] = []

    def look(step: int, losses: Sequence[float] = (), values: int = 0, seconds: float | None = None) -> None:
        kls, perplexity = evaluated.of(model)
        first[:] = first or kls
        points.append(
            Point(
                name,
                " ".join(run.trainable),
                values,
                run.lr,
                step,
                step * LENGTH,
                None,
                sum(kls) / len(kls),
                sum(a < b for a, b in zip(kls, first, strict=True)) if step else None,
                perplexity,
                reference,
                capitals(model) if step in (0, steps) else None,
                dense_capitals,
                seconds,
                os.getloadavg()[0],
                torch.__version__,
                tokcompile.__version__,
            )
        )
        for number, point in enumerate(points):
            since = points[number - 1].step if number else 0
            if losses[since : point.step]:
                point.loss = sum(losses[since : point.step]) / (point.step - since)
            point.values = values or point.values
        write(results, name, points)
        print(
            f"{name}, step {step}: KL {points[-1].kl:.4f}, perplexity {perplexity:.2f} (dense {reference:.2f}), "
            f"capitals {points[-1].capitals}",
            flush=True,
        )

    look(0)
    started = time.perf_counter()
    report = train(model, dense, run, stretches(tokenizer, TRAINED, 4), steps, look, every)
    look(steps, report.losses, sum(report.trained.values()), (time.perf_counter() - started) / steps)
    print(f"{name}: trained {', '.join(wanted)}; {len(report.unused)} parameters not used by the loss", flush=True)


# -------------------------------------------------------------------------------------------------------------- page


def read(path: Path) -> list[Point]:
    """The rows of the CSV; none where there is no file."""
    if not path.exists():
        return []
    kinds = {f.name: str(f.type).split(" | ") for f in fields(Point)}

    def value(name: str, text: str) -> Any:
        if not text and "None" in kinds[name]:
            return None
        return {"int": int, "float": float, "str": str}[kinds[name][0]](text)

    with path.open(newline="") as file:
        return [Point(**{k: value(k, v) for k, v in row.items()}) for row in csv.DictReader(file)]


def write(path: Path, name: str, points: Sequence[Point]) -> None:
    """Rows of other runs stay; runs in the order of ``RUNS``."""
    rows = [p for p in read(path) if p.run != name] + list(points)
    order = list(RUNS)
    rows.sort(key=lambda p: (order.index(p.run) if p.run in order else len(order), p.step))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Point)])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(p).items()} for p in rows)


def plot(path: Path, rows: Sequence[Point]) -> None:
    """KL and perplexity over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for name in dict.fromkeys(p.run for p in rows):
        mine = [p for p in rows if p.run == name]
        left.plot([p.step for p in mine], [p.kl / mine[0].kl for p in mine], marker="o", markersize=4, label=name)
        right.plot([p.step for p in mine], [p.perplexity for p in mine], marker="o", markersize=4, label=name)
    right.axhline(rows[0].dense_perplexity, color="0.5", linestyle=":", label="dense")
    left.set(
        xlabel="steps of 128 tokens",
        ylabel="KL(dense | model) over that at step 0",
        title="text that nothing was trained on",
        ylim=(0, None),
    )
    right.set(xlabel="steps of 128 tokens", ylabel="perplexity (log)", yscale="log", title="the same text")
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def markdown(rows: Sequence[Point]) -> str:
    """One line for each run: its first and its last row."""
    lines = ["| recipe | trained | lr | steps | KL | perplexity | capitals |", "|---|---|--:|--:|--:|--:|--:|"]
    for name in dict.fromkeys(p.run for p in rows):
        mine = [p for p in rows if p.run == name]
        a, b = mine[0], mine[-1]
        quiz = "" if a.capitals is None else f"{a.capitals:.1f} %"
        if quiz and b.step and b.capitals is not None:
            quiz += f" → {b.capitals:.1f} %"
        trained = b.trained.replace("prepared", "tables" if "stem" in name else "experts, routers").replace(
            " converted ", ", "
        )
        lines.append(
            f"| {name} | {trained} ({b.values / 1e6:.1f} M) | {b.lr:g} | {b.step} | {a.kl:.3f} → {b.kl:.3f} | "
            f"{a.perplexity:.2f} → {b.perplexity:.2f} | {quiz} |"
        )
    known = "" if rows[0].dense_capitals is None else f"{rows[0].dense_capitals:.1f} %"
    lines.append(f"| dense | | | | 0 | {rows[0].dense_perplexity:.2f} | {known} |")
    return "\n".join(lines)


def page(results: Path, docs: Path | None) -> None:
    """Plot and table from the CSV."""
    rows = read(results)
    plot(results.with_suffix(".png"), rows)
    if docs is not None:
        head = docs.read_text().split(MARKER)[0]
        docs.write_text(
            f"{head}{MARKER}\n\n{markdown(rows)}\n\n![curves](../benchmarks/results/recover.png)\n\n"
            f"torch {rows[0].torch}, tokcompile {rows[0].tokcompile}; fp32.\n"
        )


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(RUNS), help="separated by commas: " + ", ".join(RUNS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=40, help="steps between two rows of the CSV")
    parser.add_argument("--tune", type=float, nargs="+", metavar="LR", help="compare learning rates, write nothing")
    parser.add_argument("--page", action="store_true", help="write the plot and the table only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    names = [name.strip() for name in options.only.split(",")]
    if unknown := sorted(set(names) - set(RUNS)):
        parser.error(f"unknown run {', '.join(unknown)}; choose from {', '.join(RUNS)}")
    if not options.page:
        dense, tokenizer = language.load()
        for name in names:
            if options.tune:
                tune(dense, tokenizer, name, options.tune, options.steps)
            else:
                measure(dense, tokenizer, name, options.steps, options.every, options.results)
    if not options.tune:
        page(options.results, DOCS if options.results == RESULTS else None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

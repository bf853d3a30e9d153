"""Quality of SmolLM2-135M over the budget: sparse prefill, sparse decoding, experts, tables, and their controls.

    python benchmarks/language.py [--only prefill,decode,ffn,quiz] [--page]

The passes' own functions run in place of the model's (``quality/in_place.py``), uncompiled. Calibration text comes from
other articles. Writes ``benchmarks/results/language.csv`` and ``language.png``, and the tables of
``docs/language.md``. A run that was cut off goes on where it stopped (a journal beside the CSV).

=======  ==============================================================================================================
prefill  1024 tokens in one call with token_sparse, then the likelihood of the next 128 (which attend densely)
decode   464 tokens in one dense call, then 47 tokens one after the other, each attending to a budget of cached keys
ffn      perplexity of 8 stretches of 256 tokens with converted feed-forward layers
quiz     capitals of countries, three shots, greedy, every kind at one or more budgets; every fourth country
=======  ==============================================================================================================
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from quality import in_place, language  # noqa: E402
from quality.text_data import articles  # noqa: E402

from tokcompile.measure.evaluate import Measure, Task, evaluate  # noqa: E402
from tokcompile.measure.paired import (  # noqa: E402
    compare,
    mean_percent,
    perplexity,
)
from tokcompile.measure.quality_results import EvalRow, Journal, difference_text, journal_path, read_rows, write_rows  # noqa: E402  # noqa: E402
from tokcompile.passes.moe.moe_from_dense import MoeFromDense  # noqa: E402
from tokcompile.passes.sparse_attention.decode_control import DecodeControl  # noqa: E402
from tokcompile.passes.sparse_attention.fasa import Fasa  # noqa: E402
from tokcompile.passes.sparse_attention.token_sparse import TokenSparse  # noqa: E402
from tokcompile.passes.sparse_attention.tokenselect import TokenSelect  # noqa: E402
from tokcompile.passes.stem.stem import Stem  # noqa: E402

RESULTS = HERE / "results" / "language.csv"
DOCS = HERE.parent / "docs" / "language.md"
MARKER = "<!-- below: written by benchmarks/language.py from benchmarks/results/language.csv -->"
MODEL = "SmolLM2-135M"
Calibration = list[dict[str, torch.Tensor]]
Candidates = Iterator[tuple[str, Callable[[], torch.nn.Module]]]
"""Name, and what makes the model: splits and tables take longer to make than to ask."""
Item = tuple[torch.Tensor, int]
"""Token ids [1, n] and how many of them are given; the others are predicted."""


# ------------------------------------------------------------------------------------------------------------ tasks


def stretches(tokenizer: Any, number: int, length: int, given: int) -> list[Item]:
    """The first ``length`` tokens of each of the first ``number`` articles that have as many."""
    encoded = (tokenizer.encode(text, add_special_tokens=False) for _, text in articles()[:40])
    found = [(torch.tensor([ids[:length]]), given) for ids in encoded if len(ids) >= length]
    return found[:number]


def continuation_after(dense: Any) -> Callable[[Any, Item], tuple[float, int]]:
    """(model, item) -> negative log-likelihood of the predicted tokens and their number: the model reads the given
    ones, ``dense`` those behind them, in one call over the model's cache (that part is dense in a sparse prefill)."""

    def observe(model: Any, item: Item) -> tuple[float, int]:
        ids, given = item
        first = model(input_ids=ids[:, :given], use_cache=True, logits_to_keep=1)
        rest = dense(input_ids=ids[:, given:-1], past_key_values=first.past_key_values, use_cache=True)
        return _loss(torch.cat([first.logits[0, -1:], rest.logits[0]]).float(), ids[0, given:])

    return observe


def steps_after(dense: Any) -> Callable[[Any, Item], tuple[float, int]]:
    """As :func:`continuation_after`: ``dense`` reads the given tokens, the model decodes behind them token by token."""
    caches: dict[int, Any] = {}

    def observe(model: Any, item: Item) -> tuple[float, int]:
        ids, given = item
        if id(ids) not in caches:
            caches[id(ids)] = dense(input_ids=ids[:, :given], use_cache=True, logits_to_keep=1).past_key_values
        cache, rows = copy.deepcopy(caches[id(ids)]), []
        for place in range(given, ids.shape[1] - 1):
            found = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            rows.append(found.logits[0, -1])
        return _loss(torch.stack(rows).float(), ids[0, given + 1 :])

    return observe


def _loss(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[float, int]:
    return float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")), len(wanted)


def whole(model: Any, item: Item) -> tuple[float, int]:
    """Likelihood of all tokens but the first."""
    return language._likelihood(model, item[0])


_PERPLEXITY = [Measure("perplexity", score=perplexity, unit="", higher_is_better=False)]


def prefill_task(model: Any, tokenizer: Any) -> Task:
    return Task("after sparse prefill", stretches(tokenizer, 8, 1152, 1024), continuation_after(model), _PERPLEXITY)


def decode_task(model: Any, tokenizer: Any) -> Task:
    return Task("sparse decoding", stretches(tokenizer, 6, 512, 464), steps_after(model), _PERPLEXITY)


def ffn_task(model: Any, tokenizer: Any) -> Task:
    return Task("feed-forward", stretches(tokenizer, 8, 256, 0), whole, _PERPLEXITY)


def quiz_task(model: Any, tokenizer: Any) -> Task:
    """The quiz of :mod:`quality.language` on every fourth country."""
    items = language.quiz_items(tokenizer)[::4]

    def right(model: Any, item: tuple[torch.Tensor, str]) -> float:
        ids, capital = item
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            stop_strings=["\n"],
            tokenizer=tokenizer,
        )
        return float(language._same(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), capital))

    return Task("capitals", items, right, [Measure("accuracy", score=mean_percent)])


# ------------------------------------------------------------------------------------------------------- candidates


def prefill_candidates(model: Any, data: Calibration, shares: Sequence[float] = (0.5, 0.25, 0.1)) -> Candidates:
    """The upper half of the layers at each share of the tokens, chosen and random; and by coverage."""
    common = {"window": 64, "least": 0}
    for share in shares:
        for select in ("attention", "random"):
            params = TokenSparse.Params(keep=share, select=select, **common)
            yield f"token_sparse {select} keep={share}", partial(in_place.sparse_prefill_of, model, params)
    for coverage in (0.005, 0.02, 0.1):
        yield (
            f"token_sparse coverage={coverage}",
            partial(in_place.sparse_prefill_of, model, TokenSparse.Params(coverage=coverage, **common)),
        )


def decode_candidates(model: Any, data: Calibration, budgets: Sequence[int] = (64, 128, 32)) -> Candidates:
    """All layers but the first at each budget: two methods, random keys, the latest keys."""
    for budget in budgets:
        fasa = Fasa(Fasa.Params(budget=budget, planes=8))
        yield f"fasa budget={budget}", partial(_fasa, model, fasa, data)
        yield (
            f"tokenselect budget={budget}",
            partial(in_place.sparse_decode_of, model, TokenSelect(TokenSelect.Params(budget=budget))),
        )
        if budget >= 32:
            variants: dict[str, dict[str, Any]] = {"reuse": {"reuse": 0.9}}
            if budget >= 64:
                variants |= {"latest": {"recent": 16}, "latest reuse": {"recent": 16, "reuse": 0.9}}
            for name, more in variants.items():
                yield (
                    f"tokenselect {name} budget={budget}",
                    partial(in_place.sparse_decode_of, model, TokenSelect(TokenSelect.Params(budget=budget, **more))),
                )
        for choose in ("random", "window"):
            yield (
                f"{choose} budget={budget}",
                partial(
                    in_place.sparse_decode_of, model, DecodeControl(DecodeControl.Params(budget=budget, choose=choose))
                ),
            )


def _fasa(model: Any, method: Fasa, data: Calibration) -> torch.nn.Module:
    return in_place.sparse_decode_of(model, method, 1, in_place.fasa_planes(model, method, data))


def ffn_candidates(model: Any, data: Calibration) -> Candidates:
    """Tables for several shares of the layers; experts at several shares of the neurons; controls of both."""
    seen = in_place.observed(model, data, MoeFromDense.Params(), Stem.Params())
    yield from stem_candidates(model, seen)
    yield from moe_candidates(model, seen)


def stem_candidates(model: Any, seen: Any, shares: Sequence[float] = (0.1, 0.25, 0.5, 1.0)) -> Candidates:
    """Controls: as many layers drawn at random, and rows that belong to other ids. And what the first token costs."""
    for share in shares:
        make = partial(in_place.tables_of, model, Stem.Params(convert=share), seen)
        yield f"stem layers={share}", make
        if share <= 0.25:
            yield f"random layers stem layers={share}", partial(make, random_layers=0)
            yield f"random rows stem layers={share}", partial(make, random_rows=0)
        yield (
            f"first token too stem layers={share}",
            partial(in_place.tables_of, model, Stem.Params(convert=share, dense_first=0), seen),
        )


def moe_candidates(
    model: Any, seen: Any, budgets: Sequence[tuple[float, int]] = ((0.875, 4), (0.75, 3), (0.5, 1))
) -> Candidates:
    """Routers at each share of the neurons; CMoE's split and router; controls: a random router on either split, a
    random split with one, and the neurons of most energy for all tokens."""
    cmoe = {"split": "activity", "choice": "analytic", "rounds": 1}
    kinds: dict[str, dict[str, Any]] = {
        "top_k": {},
        "relu": {"router": "relu"},
        "random router": {"choice": "random"},
        "cmoe top_k": cmoe,
        "cmoe relu": {**cmoe, "router": "relu"},
        "cmoe random router": {**cmoe, "choice": "random"},
        "cmoe split fitted router": {**cmoe, "choice": "fitted"},
        "random split and router": {"choice": "random", "split": "random"},
    }
    for share, active in budgets:
        for name, more in kinds.items():
            params = MoeFromDense.Params(experts=8, shared=3, active=active, gate="off", **more)
            yield f"moe {name} {share}", partial(in_place.experts_of, model, params, seen)
        yield f"moe fixed neurons {share}", partial(in_place.fixed_neurons_of, model, share, seen)


def quiz_candidates(model: Any, data: Calibration) -> Candidates:
    """Every kind at two or more budgets, small ones: a prompt has some 60 tokens."""
    seen = in_place.observed(model, data, MoeFromDense.Params(), Stem.Params())
    for name, one in moe_candidates(model, seen):
        if name.startswith(("moe top_k", "moe relu", "moe random router", "moe cmoe top_k", "moe fixed")):
            yield name, one
    for name, one in stem_candidates(model, seen, (0.1, 0.25)):
        if "rows" not in name:
            yield name, one
    for share in (0.25, 0.5):
        for select in ("attention", "random"):
            params = TokenSparse.Params(keep=share, select=select, window=8, least=0)
            yield f"token_sparse {select} keep={share}", partial(in_place.sparse_prefill_of, model, params)
    yield from decode_candidates(model, data[:4], (16, 32))


GROUPS: dict[str, tuple[Callable[[Any, Any], Task], Callable[[Any, Calibration], Candidates], tuple[int, int]]] = {
    "prefill": (prefill_task, prefill_candidates, (0, 0)),
    "decode": (decode_task, decode_candidates, (4, 384)),
    "ffn": (ffn_task, ffn_candidates, (16, 256)),
    "quiz": (quiz_task, quiz_candidates, (16, 256)),
}
"""Name -> task, candidates, and how many sequences of which length calibrate."""


CONTROLS = {
    "token_sparse attention ": "token_sparse random ",
    "fasa ": "random ",
    "tokenselect b": "random b",
    "stem ": "random layers stem ",
    "moe top_k ": "moe random router ",
    "moe cmoe top_k ": "moe cmoe random router ",
}
"""How the name of a candidate begins -> how that of its random control at the same budget does. None for router relu,
which uses more neurons than its name says."""


def against_random(results: Path) -> None:
    """Fill in the paired difference between each candidate and its random control, from the journal.

    Rows that were measured elsewhere (the journal is not kept with the CSV) stay as they are."""
    journal = Journal(journal_path(results))
    keys = {
        (journal.names[key], len(next(iter(measured.stats.values()), ()))): key
        for key, measured in journal.entries.items()
    }
    rows = read_rows(results)
    scores = {"perplexity": perplexity, "accuracy": mean_percent}
    for row in rows:
        start = next((start for start in CONTROLS if row.candidate.startswith(start)), None)
        if start is None or row.model != MODEL:
            continue
        names = [row.candidate, CONTROLS[start] + row.candidate.removeprefix(start)]
        found = [keys.get((f"{row.model}/{row.task}/{name}", row.items)) for name in names]
        if found[0] is None or found[1] is None:
            continue
        mine, other = (journal.entries[key].stats[row.metric] for key in found if key)
        difference = compare(scores[row.metric], mine, [other])
        row.random = row.random_min = row.random_max = scores[row.metric](other)
        row.minus_random = difference.value
        row.minus_random_low, row.minus_random_high = difference.low, difference.high
        row.against_random = difference.verdict(row.higher_is_better)
    write_rows(results, rows)


# ------------------------------------------------------------------------------------------------------------- page


def curves(rows: Sequence[EvalRow], task: str) -> dict[str, list[tuple[float, EvalRow]]]:
    """Rows of a task by kind, with the budget that the name of a candidate ends in (or holds)."""
    found: dict[str, list[tuple[float, EvalRow]]] = {}
    for row in rows:
        if row.task != task or row.value is None or row.role == "dense":
            continue
        words = row.candidate.replace("=", " = ").split()
        number = next((i for i, w in enumerate(words) if w.replace(".", "", 1).isdigit() and w != "8"), None)
        if number is None:
            continue
        kind = " ".join(w for i, w in enumerate(words) if i != number and w != "=")
        found.setdefault(kind, []).append((float(words[number]), row))
    return {kind: sorted(points, key=lambda p: p[0]) for kind, points in found.items()}


def plot(path: Path, rows: Sequence[EvalRow]) -> None:
    """Perplexity over the budget, one panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        (task, kinds, label)
        for task, kinds, label in (
            ("after sparse prefill", "", "share of the tokens that a head keeps (coverage: what it may lose)"),
            ("sparse decoding", "", "keys of a query"),
            ("feed-forward", "moe", "share of the neurons that are active"),
            ("feed-forward", "stem", "share of the layers with a table"),
        )
        if curves(rows, task)
    ]
    figure, axes = pyplot.subplots(
        1, max(1, len(panels)), figsize=(4.4 * max(1, len(panels)), 3.8), squeeze=False, layout="constrained"
    )
    for ax, (task, kinds, label) in zip(axes[0], panels, strict=False):
        for kind, points in curves(rows, task).items():
            if kinds not in kind:
                continue
            xs, ys = [p[0] for p in points], [p[1].value or 0.0 for p in points]
            ax.plot(xs, ys, marker="o", markersize=4, label=kind, linestyle="--" if "random" in kind else "-")
        dense = next((r.value for r in rows if r.task == task and r.role == "dense"), None)
        if dense:
            ax.axhline(dense, color="0.5", linestyle=":", label="dense")
        ax.set(ylabel="perplexity (log)", yscale="log", title=task)
        ax.set_xlabel(label, fontsize=8)
        if task == "sparse decoding":
            ax.set_xscale("log", base=2)
        ax.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def markdown(rows: Sequence[EvalRow]) -> str:
    """A table for each task: figure, its interval, and the paired difference to dense."""
    parts = []
    for task in dict.fromkeys(r.task for r in rows):
        mine = [r for r in rows if r.task == task]
        lines = [
            f"## {task}",
            "",
            f"{mine[0].items} items, {mine[0].metric}.",
            "",
            "| candidate | value [95 %] | minus dense [95 %] | minus random [95 %] |",
            "|---|--:|--:|--:|",
        ]
        for r in mine:
            if r.value is None:
                lines.append(f"| {r.candidate} | {r.status}: {r.reason} | | |")
                continue
            lines.append(
                f"| {r.candidate} | {r.value:.4g} [{r.low:.4g}, {r.high:.4g}] | "
                f"{difference_text(r.minus_dense, r.minus_dense_low, r.minus_dense_high)} | "
                f"{difference_text(r.minus_random, r.minus_random_low, r.minus_random_high)} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def page(results: Path, docs: Path | None) -> None:
    """Plot and tables from the CSV."""
    against_random(results)
    rows = [r for r in read_rows(results) if r.model == MODEL]
    plot(results.with_suffix(".png"), rows)
    if docs is not None:
        head = docs.read_text().split(MARKER)[0]
        origin = f"torch {rows[0].torch}, transformers {rows[0].transformers}, tokcompile {rows[0].tokcompile}; fp32."
        docs.write_text(
            f"{head}{MARKER}\n\n![curves](../benchmarks/results/language.png)\n\n{markdown(rows)}\n\n{origin}\n"
        )


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), help="comma-separated: " + ", ".join(GROUPS))
    parser.add_argument("--missing", action="store_true", help="only candidates without a row in the CSV")
    parser.add_argument("--page", action="store_true", help="write the plot and the tables only")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(GROUPS)):
        parser.error(f"unknown group {', '.join(unknown)}; choose from {', '.join(GROUPS)}")
    if not options.page:
        model, tokenizer = language.load()
        for name in names:
            make, candidates, (sequences, length) = GROUPS[name]
            task = make(model, tokenizer)
            data = language.calibration(tokenizer, sequences, length) if sequences else []
            known = (
                {r.candidate for r in read_rows(options.results) if r.task == task.name and r.model == MODEL}
                if options.missing and options.results.exists()
                else ()
            )
            for title, made in candidates(model, data):  # one by one: tables and experts of many would fill the memory
                if title in known:
                    continue
                changed = made()
                evaluate(
                    model,
                    [task],
                    {title: changed},
                    label=MODEL,
                    with_controls=False,
                    results=options.results,
                    progress=_progress,
                )
                if reused := getattr(changed, "reused", None):
                    print(f"{title}: {sum(reused) / len(reused):.1%} of the lists were reused", file=sys.stderr)
    page(options.results, DOCS if options.results == RESULTS else None)
    print(options.results)
    return 0


def _progress(title: str, done: int, total: int) -> None:
    if done == total:
        print(f"{title}: {total} items", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

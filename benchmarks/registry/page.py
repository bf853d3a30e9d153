"""The page of supported models, from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Result

_HEAD = """# Supported models

tokcompile keeps no list of models: it finds attention, feed-forward blocks, image encoders and the place where image
features enter a language model by the dataflow of the captured graph. This page is what became of the families that
transformers registers, each as a tiny random model, without any change for one of them. It is written by
`benchmarks/registry/run.py`.
"""
_LANGUAGE = """
## Language models

*Right*: one attention region for each call of an attention module, and one stack of layers, whose depths recipes can
name.
*Refused*: something was not found, and the report says what and where. Families whose configuration could not be cut
down to a tiny model are left out ({left_out} of {all_}).

| outcome | families |
|---|---|
"""
_VISION = """
## Vision-language models

Half of the visual tokens are dropped where they enter the language model. *Right*: the logits of a forward and of four
generated tokens equal those of the dense model in which the keys of the dropped tokens are hidden (relative error up to
1e-5). An encoder that was captured serves methods that choose by its attention, and merging inside it. Left out:
{left_out} of {all_}.

| family | pruned | largest error | image encoder | why |
|---|---|--:|---|---|
"""


def write(results: Sequence[Result], path: Path) -> None:
    """Write the page."""
    path.write_text(_HEAD + _language(results) + _vision(results) + _made(results), encoding="utf-8")


def _of(results: Sequence[Result], task: str) -> tuple[list[Result], int]:
    """The families of a task that were tried, by name, and how many there are."""
    found = sorted((r for r in results if r.task == task), key=lambda r: r.family)
    return [r for r in found if r.outcome != "not tried"], len(found)


def _language(results: Sequence[Result]) -> str:
    tried, count = _of(results, "language")
    lines = []
    for outcome in ("right", "refused", "wrong"):
        these = [r for r in tried if r.outcome == outcome]
        names = ", ".join(f"`{r.family}`{_counts(r) if outcome != 'right' else ''}" for r in these)
        lines.append(f"| {outcome} ({len(these)}) | {names} |")
    return _LANGUAGE.format(left_out=count - len(tried), all_=count) + "\n".join(lines) + "\n"


def _counts(result: Result) -> str:
    if result.attention == result.modules:
        return f" ({result.stacks} stacks)"
    return f" ({result.attention} of {result.modules} attentions)"


def _vision(results: Sequence[Result]) -> str:
    tried, count = _of(results, "vision-language")
    rows = []
    for r in tried:
        errors = [value for value in (r.prefill, r.generated) if value is not None]
        largest = f"{max(errors):.0e}" if errors else ""
        encoder = "captured" if r.encoders else "not found"
        rows.append(f"| `{r.family}` | {r.outcome} | {largest} | {encoder} | {r.reason.replace('|', ',')[:160]} |")
    return _VISION.format(left_out=count - len(tried), all_=count) + "\n".join(rows) + "\n"


def _made(results: Sequence[Result]) -> str:
    versions = sorted({(r.transformers, r.torch.split("+")[0]) for r in results})
    dates = sorted(r.date for r in results)
    text = ", ".join(f"transformers {one} with torch {other}" for one, other in versions)
    return f"\nMeasured {dates[0]} to {dates[-1]}, {text}.\n" if dates else ""

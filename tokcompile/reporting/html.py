"""A report as one page: no script, no link to anything outside, readable offline and on paper."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokcompile.errors import TokcompileError
from tokcompile.reporting.paths import path_globs
from tokcompile.reporting.verdict import verdict
from tokcompile.version import __version__

if TYPE_CHECKING:
    from tokcompile.reporting.bench_result import BenchResult, BenchRow

_STYLE = """
:root{--ink:#1c2733;--dim:#5f6b7a;--line:#d9dfe6;--card:#fff;--page:#f5f7f9;--blue:#2f6fb0;--soft:#dbe7f3;
--good:#1a7f4b;--bad:#b42318;--warn:#a15c07;--ceiling:#c2410c;--grey:#c3ccd6}
@media (prefers-color-scheme:dark){:root{--ink:#e6ebf0;--dim:#9aa7b5;--line:#324050;--card:#1b2530;--page:#121a22;
--blue:#6aa8e6;--soft:#26405a;--good:#5ccb93;--bad:#ff8a7d;--warn:#f0b45b;--ceiling:#ff9a5c;--grey:#4a5968}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 20px 60px}h1{font-size:26px;margin:0 0 4px}
h2{font-size:18px;margin:34px 0 10px}h3{font-size:15px;margin:18px 0 6px}.dim{color:var(--dim)}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px 16px;margin:10px 0;
overflow-x:auto}.mono,code{font:13px/1.45 ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.badge{display:inline-block;border-radius:10px;padding:0 9px;font-size:13px;border:1px solid currentColor}
.matched{color:var(--good)}.structure_miss,.condition_failed,.rewrite_failed,.not_captured,.fell_back{color:var(--bad)}
.unprofitable{color:var(--warn)}.unmet{border-color:var(--bad);overflow-wrap:anywhere}.unmet strong{color:var(--bad)}
table{border-collapse:collapse;width:100%}
th{font-weight:600;text-align:left;vertical-align:bottom;color:var(--dim);font-size:13px}
td,th{padding:4px 10px 4px 0;vertical-align:top;
border-bottom:1px solid var(--line)}tr:last-child td{border-bottom:0}th.num,.num{text-align:right;white-space:nowrap}
.facts{display:flex;flex-wrap:wrap;gap:6px 26px;margin:6px 0 0;padding:0;list-style:none}
.reason{margin:8px 0 0;overflow-wrap:anywhere}.layer{display:grid;align-items:center;gap:8px;padding:2px 0;
grid-template-columns:2.2em minmax(90px,150px) minmax(90px,150px) 1fr 8.5em}
.box{border:1px solid var(--line);border-radius:5px;padding:0 7px;font-size:13px;white-space:nowrap;overflow:hidden;
text-overflow:ellipsis}.box.changed{background:var(--soft);border-color:var(--blue)}.box.none{border-style:dashed;
color:var(--dim)}.track{position:relative;height:14px;background:var(--grey);border-radius:3px;min-width:40px}
.fill{position:absolute;inset:0 auto 0 0;background:var(--blue);border-radius:3px}

.fill.dense{background:var(--dim)}.card h3:first-child{margin-top:2px}
.tick{position:absolute;top:-3px;bottom:-3px;width:3px;background:var(--ceiling)}.plain{background:transparent}
.bar{display:grid;grid-template-columns:11em 1fr 17em;gap:10px;align-items:center;padding:3px 0}
figure{margin:10px 0}figure img{max-width:100%;height:auto;border:1px solid var(--line);border-radius:6px}
summary{cursor:pointer;color:var(--dim)}@media (max-width:700px){.layer{grid-template-columns:2em 1fr 1fr}
.layer .track,.layer .tokens{grid-column:2/4}.bar{grid-template-columns:1fr}}
"""

_WORDS = {
    "matched": "changed",
    "structure_miss": "no such region",
    "condition_failed": "a region that cannot be rewritten",
    "rewrite_failed": "the rewrite failed",
    "not_captured": "there was no graph",
    "unprofitable": "would not pay",
    "fell_back": "the last call ran without a graph",
}


class Raw(str):
    """Markup that is escaped already."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Raw:
    """An element; text in it is escaped. ``class_`` is ``class``; attributes that are None are left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "meta"):
        return Raw(f"<{name}{given}>")
    return Raw(f"<{name}{given}>{_join(children)}</{name}>")


def _join(children: Iterable[Any]) -> str:
    parts = []
    for child in children:
        if isinstance(child, Raw):
            parts.append(str(child))
        elif isinstance(child, list | tuple):
            parts.append(_join(child))
        elif child is not None:
            parts.append(html.escape(str(child)))
    return "".join(parts)


def page(
    report: Mapping[str, Any], *, bench: BenchResult | None = None, pictures: Mapping[str, Any] | None = None
) -> str:
    """The page as text.

    Args:
        report: what ``Report.to_dict`` gives.
        bench: measured times; the row of the recipe is shown beside the dense ones.
        pictures: caption -> PNG or JPEG: a path, bytes, or a PIL image.
    """
    title = f"{report['model'] or 'model'} - tokcompile report"
    body = [
        tag("h1", report["model"] or "model"),
        tag(
            "p",
            f"tokcompile {__version__}" + (f", recipe {report['recipe']}" if report["recipe"] else ""),
            class_="dim",
        ),
        _verdict(report, bench),
        _recipe(report),
        _steps(report),
        _times(bench),
        _pictures(pictures or {}),
        _layers(report),
        _regions(report),
        _misses(report),
        _stages(report),
    ]
    return (
        "<!DOCTYPE html>\n"
        + tag(
            "html",
            tag(
                "head",
                tag("meta", charset="utf-8"),
                tag("meta", name="viewport", content="width=device-width,initial-scale=1"),
                tag("title", title),
                tag("style", Raw(_STYLE)),
            ),
            tag("body", tag("main", *body)),
            lang="en",
        )
        + "\n"
    )


def fragment(report: Mapping[str, Any]) -> str:
    """The page in a frame of its own, for notebooks: its style leaves theirs alone."""
    return tag("iframe", srcdoc=page(report), width="100%", height="480", style="border:0")


def write(report: Mapping[str, Any], path: str | os.PathLike[str], **given: Any) -> None:
    """:func:`page`, into a file."""
    Path(path).write_text(page(report, **given), encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- sections


def _verdict(report: Mapping[str, Any], bench: BenchResult | None) -> Raw | None:
    lines = verdict(report, bench)
    if not lines:
        return None
    rows = [tag("tr", tag("th", question), tag("td", answer)) for question, answer in lines.items()]
    return tag("section", tag("div", tag("table", *rows), class_="card"))


def _recipe(report: Mapping[str, Any]) -> Raw | None:
    """Each step with all its parameters."""
    steps = report.get("recipe_data", {}).get("steps", [])
    if not steps:
        return None
    rows = []
    for step in steps:
        target = ", ".join(f"{key} {value}" for key, value in step.get("target", {}).items())
        params = ", ".join(f"{key}: {json.dumps(value)}" for key, value in step["params"].items())
        rows.append(tag("tr", tag("td", step["pass"]), tag("td", target), tag("td", params, class_="mono")))
    head = tag("tr", *(tag("th", name) for name in ("pass", "target", "parameters")))
    return tag("section", tag("h2", "The recipe"), tag("div", tag("table", head, *rows), class_="card"))


def _steps(report: Mapping[str, Any]) -> Raw | None:
    if not report["steps"]:
        return None
    cards = [tag("div", *_step(number, step), class_="card") for number, step in enumerate(report["steps"], 1)]
    unmet = (
        tag(
            "div",
            tag("strong", "The recipe and the model do not fit"),
            tag("ul", *(tag("li", problem) for problem in report["problems"])),
            class_="card unmet",
        )
        if report["problems"]
        else None
    )
    return tag("section", tag("h2", "What each step did"), unmet, *cards)


def _step(number: int, step: Mapping[str, Any]) -> list[Any]:
    before, after = step["details"].get("tokens_before"), step["details"].get("tokens_after")
    facts = [f"{step['matches']} region{'s' * (step['matches'] != 1)} changed"]
    if before is not None and after is not None:
        facts.append(f"{before} → {after} tokens")
    if step["flop_ratio"] is not None:
        facts.append(f"FLOPs before / after {step['flop_ratio']:.2f}")
    rest = {k: v for k, v in step["details"].items() if k not in ("tokens_before", "tokens_after")}
    facts += [f"{key.replace('_', ' ')} {value}" for key, value in rest.items()]
    parts: list[Any] = [
        tag("strong", f"{number}. {step['pass_name']} "),
        tag("span", step["status"], class_=f"badge {step['status']}"),
        tag("span", f" {_WORDS[step['status']]}", class_="dim"),
        tag("ul", *(tag("li", fact) for fact in facts), class_="facts"),
    ]
    if step["regions"]:
        parts.append(tag("div", ", ".join(path_globs(step["regions"])), class_="mono dim"))
    if step["reason"]:
        parts.append(tag("p", step["reason"], class_="reason"))
    return parts


def _miss(miss: Mapping[str, Any]) -> Raw:
    place = ", ".join(part for part in (f"node {miss['node']}", miss["path"], miss["source"]) if part)
    return tag("span", f"nearly a {miss['kind']}: {miss['reason']} ", tag("span", f"[{place}]", class_="mono dim"))


def _times(bench: BenchResult | None) -> Raw | None:
    if bench is None:
        return None
    from tokcompile.reporting.bench_result import PARTS

    base = bench.row(bench.baseline)
    blocks = []
    for part in PARTS:
        shown = [row for row in bench.rows if getattr(row, part) is not None]
        if not shown:
            continue
        longest = max(getattr(row, part).p80 for row in shown)
        blocks.append(tag("h3", bench.title(part)))
        blocks += [_bar(row, part, base, longest) for row in shown]
    memory = ", ".join(f"{row.name} {row.peak_bytes / 2**20:.1f} MiB" for row in bench.rows if row.peak_bytes)
    return tag(
        "section",
        tag("h2", "Measured, and the ceiling"),
        tag(
            "div",
            *blocks,
            tag("p", f"Peak memory beyond weights and inputs: {memory}.") if memory else None,
            tag(
                "p",
                "Orange: the least time that the FLOPs allow (Amdahl: only the part that the recipe changes gets "
                "faster). ",
                bench.note(),
                class_="dim",
            ),
            class_="card",
        ),
    )


def _bar(row: BenchRow, part: str, base: BenchRow, longest: float) -> Raw:
    timing = getattr(row, part)
    bound = {"ttft": row.ceiling, "prefill": row.flop_ratio}.get(part)
    text = str(timing)
    kind = "fill dense" if row.flop_ratio is None else "fill"
    inside = [tag("span", class_=kind, style=f"width:{100 * timing.median / longest:.2f}%")]
    if part in row.speedup:
        text += f", {row.speedup[part]:.2f}×"
    if bound and getattr(base, part) is not None:
        predicted = getattr(base, part).median / bound
        inside.append(
            tag(
                "span",
                class_="tick",
                style=f"left:{min(100, 100 * predicted / longest):.2f}%",
                title=f"predicted by FLOPs: {predicted:.1f} ms",
            )
        )
        text += f"; at most {bound:.2f}× ({predicted:.1f} ms)"
    return tag(
        "div",
        tag("span", row.name),
        tag("div", *inside, class_="track plain"),
        tag("span", text, class_="dim"),
        class_="bar",
    )


def _layers(report: Mapping[str, Any]) -> Raw | None:
    if not report["layers"]:
        return None
    changed = {path for step in report["steps"] for path in step["regions"]}
    blocks: list[Raw] = []
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for layer in report["layers"]:
        groups.setdefault((layer["stage"], layer["stack"], layer["stack_path"]), []).append(layer)
    for (stage, kind, path), layers in groups.items():
        most = max((max(layer["tokens_before"], layer["tokens_after"]) for layer in layers), default=1) or 1
        rows = [_layer(layer, most, changed) for layer in layers]
        blocks.append(
            tag(
                "div",
                tag("h3", f"{stage}: {kind.replace('_', ' ')} "),
                tag("p", path or "(model)", class_="mono dim"),
                *rows,
                class_="card",
            )
        )
    return tag(
        "section",
        tag("h2", "Layer by layer"),
        tag(
            "p",
            "Bar: tokens that the layer computes, of those that it would without the recipe. Blue frame: "
            "changed by a step.",
            class_="dim",
        ),
        *blocks,
    )


def _layer(layer: Mapping[str, Any], most: int, changed: set[str]) -> Raw:
    def box(key: str, label: str) -> Raw:
        path = layer.get(key)
        if path is None:
            return tag("span", f"no {label}", class_="box none")
        return tag(
            "span",
            layer.get(f"{key}_kind", label).replace("_", " "),
            title=path,
            class_="box changed" if path in changed else "box",
        )

    before, after = layer["tokens_before"], layer["tokens_after"]
    text = f"{after} of {before}" if after != before else f"{before}"
    return tag(
        "div",
        tag("span", layer["index"], class_="dim num"),
        box("attention", "attention"),
        box("feed_forward", "feed-forward"),
        tag(
            "div",
            tag("span", class_="fill", style=f"width:{100 * after / most:.2f}%"),
            class_="track",
            style=f"width:{100 * before / most:.2f}%" if before != most else None,
        ),
        tag("span", text, class_="num tokens"),
        class_="layer",
        title=layer["path"],
    )


def _regions(report: Mapping[str, Any]) -> Raw:
    if not report["regions"]:
        return tag("section", tag("h2", "Regions"), tag("p", "No region found."))
    rows = []
    for region in report["regions"]:
        variant = ", ".join(f"{key} {value}" for key, value in region.get("variant", {}).items())
        shapes = ", ".join(f"{key}={value}" for key, value in region.get("shapes", {}).items())
        rows.append(
            tag(
                "tr",
                tag("td", region.get("stage", "")),
                tag("td", region["kind"]),
                tag("td", region["path"] or "(model)", class_="mono"),
                tag("td", variant),
                tag("td", shapes, class_="mono"),
                tag("td", region.get("source", ""), class_="mono"),
            )
        )
    head = tag("tr", *(tag("th", name) for name in ("stage", "kind", "where", "form", "sizes", "source")))
    return tag(
        "section",
        tag("h2", "Regions"),
        tag(
            "div",
            tag("details", tag("summary", f"{len(report['regions'])} regions"), tag("table", head, *rows)),
            class_="card",
        ),
    )


def _misses(report: Mapping[str, Any]) -> Raw | None:
    if not report["near_misses"]:
        return None
    items = [tag("li", _miss(miss)) for miss in sorted(report["near_misses"], key=lambda miss: -miss["score"])]
    return tag(
        "section",
        tag("h2", "Nearly a region"),
        tag(
            "div",
            tag("details", tag("summary", f"{len(items)} near misses, the nearest first"), tag("ul", *items)),
            class_="card",
        ),
    )


def _stages(report: Mapping[str, Any]) -> Raw | None:
    if not report["stages"]:
        return None
    rows = [
        tag(
            "tr",
            tag("td", stage["name"]),
            tag("td", "yes" if stage["captured"] else "no"),
            tag("td", stage["nodes"] if stage["captured"] else "", class_="num"),
            tag("td", f"{stage['seconds']:.2f}" if stage["captured"] else "", class_="num"),
            tag("td", stage["compiled"] if stage["captured"] else stage["reason"]),
        )
        for stage in report["stages"]
    ]
    head = tag(
        "tr",
        *(
            tag("th", name, class_="num" if name in ("nodes", "seconds") else None)
            for name in ("stage", "captured", "nodes", "seconds", "compiled, or why not")
        ),
    )
    return tag("section", tag("h2", "Graphs"), tag("div", tag("table", head, *rows), class_="card"))


def _pictures(pictures: Mapping[str, Any]) -> Raw | None:
    if not pictures:
        return None
    figures = [
        tag("figure", tag("img", src=_data(caption, picture), alt=caption), tag("figcaption", caption, class_="dim"))
        for caption, picture in pictures.items()
    ]
    return tag("section", tag("h2", "Kept patches"), *figures)


def _data(caption: str, picture: Any) -> str:
    """A picture as a data URL."""
    if isinstance(picture, str | os.PathLike):
        data = Path(picture).read_bytes()
    elif isinstance(picture, bytes | bytearray):
        data = bytes(picture)
    elif hasattr(picture, "save"):  # PIL
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        data = stream.getvalue()
    else:
        raise TokcompileError(
            f"picture {caption!r}: should be a path, bytes or a PIL image, found {type(picture).__name__}"
        )
    kinds: Sequence[tuple[bytes, str]] = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"))
    kind = next((name for magic, name in kinds if data.startswith(magic)), None)
    if kind is None:
        raise TokcompileError(f"picture {caption!r}: neither PNG nor JPEG")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

"""The report as a page: complete, escaped, without anything from outside, and laid out right in a real browser."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from torch import fx

import tokcompile
from tokcompile.demo import tiny_vit, tiny_vlm
from tokcompile.errors import TokcompileError
from tokcompile.plan.layer_tokens import LayerTokens
from tokcompile.regions.model import DecoderStack, Layer, Regions
from tokcompile.reporting.bench_result import BenchResult, BenchRow, Timing
from tokcompile.reporting.html import page, tag
from tokcompile.reporting.report import Report, StageReport, StepReport

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
EVIL = '<script>alert("x")</script>&"\''


class Checker(HTMLParser):
    """Every element is closed in order; text and attributes are collected."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def measured() -> BenchResult:
    def timing(ms: float) -> Timing:
        return Timing(ms, 0.9 * ms, 1.1 * ms, 5)

    rows = [
        BenchRow("dense eager", timing(100), timing(80), timing(9), 4 << 20),
        BenchRow(
            "vlm_prune_90",
            timing(50),
            timing(30),
            timing(8.5),
            1 << 20,
            3.0,
            5.0,
            2.77,
            {"ttft": 2.0, "prefill": 2.67, "decode": 1.06},
        ),
    ]
    versions = {"torch": "2", "transformers": "5", "tokcompile": "0", "cpu": "a cpu", "threads": 1}
    return BenchResult("Tiny", "cpu", 1, 8, "dense eager", rows, versions, 0.5)


def test_it_opens_with_a_verdict_and_the_recipe() -> None:
    """What changed, how much faster, how good, against what; then every parameter of every step."""
    model, inputs = tiny_vlm()
    report = tokcompile.explain(model, inputs, "vlm_prune_90")
    text = Checker(page(report.to_dict(), bench=measured())).text
    order = ["What changed", "todre: 1 region, 72 → 15 tokens", "How much faster", "first token 2.00×", "How good"]
    order += [
        "Measured on",
        "Against what",
        "dense eager, in the same run, on cpu",
        "The recipe pass target",
        "criterion: ",
    ]
    order += ['"max_sum"', "What each step did"]
    places = [text.find(part) for part in order]
    assert -1 not in places, [part for part, place in zip(order, places, strict=True) if place < 0]
    assert places == sorted(places)
    alone = Checker(page(report.to_dict())).text
    assert "Not measured here (tokcompile bench measures it). The FLOPs allow " in alone
    assert "What changed" not in Checker(page(Report(model="LLaVA").to_dict())).text


def picture() -> bytes:
    image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    stream = io.BytesIO()
    image.new("RGB", (64, 32), (200, 80, 40)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def report() -> Report:
    """A real one: a model with images, two cuts."""
    model, inputs = tiny_vlm()
    return tokcompile.explain(model, inputs, "vlm_prune_90")


def test_tokens_of_each_layer(report: Report) -> None:
    stack = [layer for layer in report.layers if layer["stack"] == "decoder_stack" and layer["stage"] == "prefill"]
    assert [layer["index"] for layer in stack] == list(range(10))
    assert [layer["tokens_before"] for layer in stack] == [72] * 10
    # 7 of 64 visual tokens and 8 of text; none but text behind 7/8 of the depth
    assert [layer["tokens_after"] for layer in stack] == [15] * 9 + [8]
    encoder = [layer for layer in report.layers if layer["stack"] == "vision_encoder"]
    assert [(layer["tokens_before"], layer["tokens_after"]) for layer in encoder] == [(65, 65)] * 3
    assert stack[3]["attention"] == "model.language_model.layers.3.self_attn"
    model, inputs = tiny_vit()
    cut = tokcompile.explain(model, inputs, "vit_prune_50").layers
    assert [layer["tokens_after"] for layer in cut] == [65, 65, 37, 37, 22, 22, 13, 13]


def test_layers_without_attention_or_shapes() -> None:
    node = fx.Graph().placeholder("x")
    region = DecoderStack(
        path="m",
        input=node,
        output=node,
        batch=1,
        tokens=1,
        width=1,
        causal=False,
        layers=[Layer("m.0", 0, node, node)],
    )
    [entry] = LayerTokens(Regions([region]), "forward").after()
    assert (entry["attention"], entry["feed_forward"], entry["tokens_before"], entry["tokens_after"]) == (
        None,
        None,
        0,
        0,
    )
    assert "no attention" in page(Report(layers=[entry]).to_dict())


def test_everything_is_on_the_page(report: Report) -> None:
    found = Checker(page(report.to_dict(), bench=measured(), pictures={"a cat": picture()}))
    for part in (
        "LlavaForConditionalGeneration",
        "recipe vlm_prune_90",
        "1. todre",
        "matched",
        "72 → 15 tokens",
        "late layer 9",
        "15 of 72",
        "8 of 72",
        "model.language_model.layers",
        "2.00×",
        "at most 2.77×",
        "at most 5.00×",
        "1.0 MiB",
        "a cat",
        "masked_scatter",
        "prefill",
    ):
        assert part in found.text, part
    for step in report.steps:
        assert f"FLOPs before / after {step.flop_ratio:.2f}" in found.text


def test_why_not_is_on_the_page() -> None:
    model, inputs = tiny_vit()
    report = tokcompile.explain(model, inputs, "vlm_prune_90")
    report.stages.append(StageReport("encoder", False, "guard on a size"))
    report.near_misses = [
        {
            "kind": "merge_point",
            "reason": "scatter without mask",
            "node": "n",
            "path": "p",
            "source": "f.py:3",
            "score": 0.5,
        }
    ]
    text = Checker(page(report.to_dict())).text
    for part in (
        "structure_miss",
        "no such region",
        report.steps[0].reason,
        "guard on a size",
        "nearly a merge_point: scatter without mask [node n, p, f.py:3]",
    ):
        assert part in text, part
    assert "No region found." in Checker(page(Report().to_dict())).text


def test_text_is_escaped_and_nothing_comes_from_outside(report: Report) -> None:
    evil = Report(
        EVIL,
        steps=[StepReport("p", "condition_failed", reason=EVIL, details={EVIL: EVIL}, regions=[EVIL])],
        regions=[{"kind": EVIL, "path": EVIL, "shapes": {EVIL: EVIL}, "variant": {EVIL: EVIL}}],
        stages=[StageReport(EVIL, False, EVIL)],
        recipe=EVIL,
    )
    text = page(evil.to_dict(), pictures={EVIL: picture()})
    found = Checker(text)
    assert not any(tag == "script" for tag, _ in found.tags)
    assert found.text.count('alert("x")') >= 8
    for one in (text, page(report.to_dict(), bench=measured())):
        assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|<script|<iframe", one)
        for _, attributes in Checker(one).tags:
            assert not {"href", "srcset", "onclick", "onload"} & set(attributes)
            assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/")
    assert tag("p", "a<b", title='"', class_="c", data_x=None) == '<p title="&quot;" class="c">a&lt;b</p>'


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    assert "image/png" in page(Report().to_dict(), pictures={"a": tmp_path / "a.png"})
    assert "image/jpeg" in page(Report().to_dict(), pictures={"a": b"\xff\xd8\xff\xe0"})
    for wrong, message in ((b"GIF89a", "neither PNG nor JPEG"), (3, "found int")):
        with pytest.raises(TokcompileError, match=message):
            page(Report().to_dict(), pictures={"a": wrong})


# --------------------------------------------------------------------------------------------------- in a browser

PROBE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1 &&
    !e.closest(".card")).map(e => e.className || e.tagName);
  const fill = [...document.querySelectorAll(".layer .fill")].map(e =>
    e.getBoundingClientRect().width / e.parentElement.getBoundingClientRect().width);
  const tick = [...document.querySelectorAll(".tick")].map(e => e.getBoundingClientRect().width);
  document.title = JSON.stringify({scroll: document.documentElement.scrollWidth, inner: innerWidth, wide,
    image: document.images.length ? document.images[0].naturalWidth : 0, fill, tick,
    height: document.documentElement.scrollHeight});
});</script>"""


def browse(path: Path, work: Path, width: int, *options: str) -> str:
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        f"--user-data-dir={work / 'profile'}",
        f"--window-size={width},900",
        *options,
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
@pytest.mark.parametrize("width", [1200, 600])
def test_in_a_browser(report: Report, tmp_path: Path, width: int) -> None:
    """Nothing sticks out, the picture loads from the page itself, and the bars are as long as they should be."""
    import json

    path = tmp_path / "report.html"
    report.to_html(path, bench=measured(), pictures={"a cat": picture()})
    probed = tmp_path / "probed.html"
    probed.write_text(path.read_text("utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", browse(probed, tmp_path, width, "--dump-dom"))
    assert title is not None
    seen = json.loads(title[1].replace("&quot;", '"').replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert seen["scroll"] <= seen["inner"]
    assert seen["wide"] == []
    assert seen["image"] == 64
    wanted = [layer["tokens_after"] / layer["tokens_before"] for layer in report.layers]
    assert seen["fill"] == pytest.approx(wanted, abs=0.02)
    assert seen["tick"] == pytest.approx([3, 3])
    assert seen["height"] > 900

    shot = tmp_path / "shot.png"
    browse(path, tmp_path, width, f"--screenshot={shot}")
    from PIL import Image

    with Image.open(shot) as image:
        colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert (47, 111, 176) in colours  # a bar
    assert (245, 247, 249) in colours  # the page

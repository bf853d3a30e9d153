"""Pictures with labels from Debian packages: stamps of twelve kinds, and ten kinds of clothing.

* ``tuxpaint-stamps-default``: small cut-out photographs and drawings, most with a one-line English caption, in category
  folders. Twelve folders are the classes of a naming test. Mirror twins and byte-identical copies are left out, so that
  no picture lies on both sides of the split.
* ``dataset-fashion-mnist``: grey 28 x 28 pictures of ten kinds of clothing. The small VLM is not trained on them.

They are read at run time and never copied into the repository::

    apt-get install tuxpaint-stamps-default dataset-fashion-mnist
"""

from __future__ import annotations

import gzip
import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

STAMPS = Path("/usr/share/tuxpaint/stamps")
FASHION = Path("/usr/share/datasets/fashion-mnist")

CLASS_FOLDERS = {
    "animals/mammals": "mammal",
    "animals/birds": "bird",
    "animals/fish": "fish",
    "animals/insects": "insect",
    "food/fruit": "fruit",
    "food/vegetables": "vegetable",
    "plants/flowers": "flower",
    "town/houses": "house",
    "town/roadsigns": "sign",
    "vehicles": "vehicle",
    "clothes": "clothing",
    "household/tools": "tool",
}
FASHION_NAMES = (
    "T-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
CAPTION_QUESTION = "What is in the picture?"
CLASS_QUESTION = "What kind of thing is it?"
FASHION_QUESTION = "What piece of clothing is it?"


@dataclass
class Item:
    """One picture, the part of the split that it is in, and its rows where somebody keeps features of its views."""

    source: str  # "stamps" or "fashion"
    key: str  # path under STAMPS, or index in Fashion-MNIST
    label: str | None  # class name
    caption: str | None  # "A badger."
    split: str = ""  # "train", "val" or "test"
    rows: list[int] = field(default_factory=list)

    def questions(self) -> list[tuple[str, str]]:
        """Question and answer pairs."""
        pairs = []
        if self.caption:
            pairs.append((CAPTION_QUESTION, self.caption))
        if self.label:
            pairs.append((FASHION_QUESTION if self.source == "fashion" else CLASS_QUESTION, self.label))
        return pairs


def _short_caption(text: str) -> str | None:
    """The first sentence where it simply names a thing ("A badger."), else None."""
    first = re.sub(r"\s*\(.*?\)", "", re.split(r"(?<=[.!])\s", text.strip())[0]).replace("’", "'")
    if not re.match(r"(A|An|Some|Two|The)\s", first) or len(first.split()) > 8:
        return None
    return first.rstrip(".!") + "."


def read_stamps() -> list[Item]:
    """Every captioned or classed stamp except letters, digits, money and other symbols."""
    items, seen = [], set()
    for path in sorted(STAMPS.rglob("*.png")):
        key = path.relative_to(STAMPS).as_posix()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if key.startswith("symbols/") or path.stem.endswith("_mirror") or digest in seen:
            continue
        seen.add(digest)
        text = path.with_suffix(".txt")
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.exists() else []
        caption = _short_caption(lines[0]) if lines else None
        label = next((name for folder, name in CLASS_FOLDERS.items() if key.startswith(folder + "/")), None)
        if caption or label:
            items.append(Item("stamps", key, label, caption))
    return items


def read_fashion(count: int) -> list[Item]:
    """The first ``count`` pictures of Fashion-MNIST's training file."""
    with gzip.open(FASHION / "train-labels-idx1-ubyte.gz") as file:
        labels = file.read(8 + count)[8:]
    return [Item("fashion", str(i), FASHION_NAMES[label], None) for i, label in enumerate(labels)]


def assign_split(items: Sequence[Item], seed: int, test: float = 0.25, val: float = 0.07) -> None:
    """Sets ``split`` picture by picture, the same share in every class."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(f"{item.source}/{item.label}", []).append(item)
    generator = random.Random(seed)
    for name in sorted(groups):
        group = groups[name]
        generator.shuffle(group)
        held, tuned = round(len(group) * test), round(len(group) * val)
        for position, item in enumerate(group):
            item.split = "test" if position < held else "val" if position < held + tuned else "train"


def split_items() -> list[Item]:
    """Every stamp and the first 1,500 pictures of clothing, with the split that everything here shares."""
    items = [*read_stamps(), *read_fashion(1500)]
    assign_split(items, seed=0)
    return items


def cut_out(key: str) -> Image.Image:
    """A stamp without its transparent edge, RGBA."""
    with Image.open(STAMPS / key) as image:
        image = image.convert("RGBA")
    return image.crop(image.getbbox()) if image.getbbox() else image


def plain_view(key: str) -> Image.Image:
    """The stamp whole, centred on a white square, with a small margin."""
    stamp = cut_out(key)
    side = round(max(stamp.size) * 1.06)
    page = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    page.alpha_composite(stamp, ((side - stamp.width) // 2, (side - stamp.height) // 2))
    return page.convert("RGB")

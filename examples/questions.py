"""Pictures with questions and answers for the small VLM: coloured shapes, stamps, and collages of both.

* ``easy-vqa`` (PyPI, MIT licence): 4,000 + 1,000 pictures of one coloured shape, with questions about its shape, its
  colour, and yes/no. Its test pictures and questions are for measuring only.
* ``tuxpaint-stamps-default`` (Debian): see ``stamps.py`` for what is taken and how it is split.
* Collages: four pictures in the quarters of a square, and questions such as "what is in the upper left?".

    pip install --no-deps easy-vqa
    apt-get install tuxpaint-stamps-default dataset-fashion-mnist
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import small_vlm
import stamps
from pictures import IMAGE_SIZE, square_view
from PIL import Image

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
PLACES = ("upper left", "upper right", "lower left", "lower right")

# the templates of easy-vqa: about a thing that is there or not ("shape": without a colour), and the two attributes
ASK_PRESENT = ("is a {} present?", "is there a {}?", "does the image contain a {}?", "is there a {} in the image?")
ASK_ABSENT = (
    "is no {} present?",
    "is there not a {}?",
    "does the image not contain a {}?",
    "is there not a {} in the image?",
)
ASK_COLOUR = ("what color is the {}?", "what is the color of the {}?")
ASK_SHAPE = ("what shape is in the image?", "what shape does the image contain?", "what shape is present?")

KIND_QUESTION = stamps.CLASS_QUESTION
CAPTION_QUESTION = stamps.CAPTION_QUESTION
PLACE_KIND = "What kind of thing is in the {}?"
PLACE_WHAT = "what is in the {}?"
PLACE_COLOUR = "what color is the shape in the {}?"
PLACE_SHAPE = "what shape is in the {}?"

Pair = tuple[str, str]


@dataclass(frozen=True)
class Shape:
    """A picture of easy-vqa and what is in it."""

    path: Path
    shape: str
    colour: str

    def picture(self) -> Image.Image:
        with Image.open(self.path) as image:
            return image.convert("RGB")

    def words(self) -> list[str]:
        return [self.colour, self.shape]


@dataclass(frozen=True)
class Stamp:
    """A stamp, its kind and, where there is one, its caption."""

    key: str
    kind: str
    caption: str | None

    def picture(self, generator: random.Random | None = None) -> Image.Image:
        """The plain view, or a varied one where a generator is given."""
        page, stamp = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (255, 255, 255)), _cut_out(self.key)
        if generator is None:
            scale, mirrored = 1 / 1.06, False
        else:
            scale, mirrored = generator.uniform(0.7, 1.0), generator.random() < 0.5
            if generator.random() < 0.5:
                page.paste(tuple(generator.randrange(120, 256) for _ in range(3)), (0, 0, *page.size))
        side = scale * IMAGE_SIZE / max(stamp.size)
        stamp = stamp.resize(tuple(max(1, round(side * n)) for n in stamp.size), Image.Resampling.BICUBIC)
        if mirrored:
            stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        room = [IMAGE_SIZE - n for n in stamp.size]
        corner = tuple(n // 2 if generator is None else generator.randint(0, n) for n in room)
        page.paste(stamp, corner, stamp)
        return page

    def words(self) -> list[str]:
        return [self.kind]


@functools.cache
def _cut_out(key: str) -> Image.Image:
    """A stamp without its transparent edge, RGBA, at most as large as what the model sees."""
    image = stamps.cut_out(key)
    image.thumbnail((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def easy_vqa(split: str) -> list[tuple[Path, str, str]]:
    """Every (picture, question, answer) of a split ("train" or "test") of easy-vqa, in the order of its file.

    Raises:
        WeightsNotFoundError: the ``easy-vqa`` wheel is not installed.
    """
    file = small_vlm._package_file("easy_vqa", f"data/{split}/questions.json", "easy-vqa")
    rows = json.loads(file.read_text())
    return [(file.parent / f"images/{number}.png", question, answer) for question, answer, number in rows]


def shapes(split: str) -> list[Shape]:
    """The pictures of a split of easy-vqa whose questions say both the shape and the colour."""
    known: dict[Path, dict[str, str]] = {}
    for path, question, answer in easy_vqa(split):
        facts = known.setdefault(path, {})
        named = {word for word in re.findall(r"[a-z]+", question) if word in SHAPES + COLOURS}
        holds = answer == ("no" if re.search(r"\b(no|not)\b", question) else "yes")
        for word in {answer} | (named if answer not in ("yes", "no") or holds else set()):
            if word in SHAPES:
                facts["shape"] = word
            elif word in COLOURS:
                facts["colour"] = word
    return [Shape(path, **facts) for path, facts in known.items() if len(facts) == 2]


def named_stamps(split: str) -> list[Stamp]:
    """Stamps of the twelve kinds, of one part ("train", "val" or "test") of the split that everything here shares."""
    items = stamps.split_items()
    return [
        Stamp(item.key, item.label, item.caption)
        for item in items
        if (item.source, item.split) == ("stamps", split) and item.label
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures with questions
# ---------------------------------------------------------------------------------------------------------------------


def ask_shape(item: Shape, count: int, generator: random.Random) -> list[Pair]:
    """Questions in the templates of easy-vqa: one about the colour, one about the shape, the others yes/no.

    Of the yes/no questions half ask whether a thing is not there; "yes" and "no" are equally frequent.
    """
    thing = generator.choice(("shape", item.shape))
    pairs = [(generator.choice(ASK_COLOUR).format(thing), item.colour)]
    if generator.random() < 0.25:
        pairs.append((f"what is the {item.colour} shape?", item.shape))
    else:
        pairs.append((generator.choice(ASK_SHAPE), item.shape))
    while len(pairs) < count:
        by_colour = generator.random() < 0.65
        truth, names = (item.colour, COLOURS) if by_colour else (item.shape, SHAPES)
        name = truth if generator.random() < 0.5 else generator.choice([n for n in names if n != truth])
        absent = generator.random() < 0.5
        question = generator.choice(ASK_ABSENT if absent else ASK_PRESENT)
        pairs.append(
            (question.format(f"{name} shape" if by_colour else name), "yes" if (name == truth) != absent else "no")
        )
    return pairs


def ask_stamp(item: Stamp) -> list[Pair]:
    return [(KIND_QUESTION, item.kind)] + ([(CAPTION_QUESTION, item.caption)] if item.caption else [])


def ask_collage(items: Sequence[Shape | Stamp], count: int, generator: random.Random) -> list[Pair]:
    """At least one question about each quarter of a collage."""
    pairs: list[Pair] = []
    more: list[Pair] = []
    for place, item in zip(PLACES, items, strict=True):
        if isinstance(item, Stamp):
            pairs.append((PLACE_KIND.format(place), item.kind))
            continue
        three = [
            (PLACE_WHAT.format(place), f"{item.colour} {item.shape}"),
            (PLACE_COLOUR.format(place), item.colour),
            (PLACE_SHAPE.format(place), item.shape),
        ]
        generator.shuffle(three)
        pairs.append(three[0])
        more += three[1:]
    generator.shuffle(more)
    return (pairs + more)[:count]


def collage(pictures: Sequence[Image.Image]) -> Image.Image:
    """Four pictures in the quarters of a square: upper left, upper right, lower left, lower right."""
    half = IMAGE_SIZE // 2
    page = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), (255, 255, 255))
    for place, picture in enumerate(pictures):
        quarter = picture.resize((half, half), Image.Resampling.BICUBIC)
        page.paste(quarter, (place % 2 * half, place // 2 * half))
    return page


@dataclass(frozen=True)
class Scene:
    """One training picture with its questions, and the words that describe each quarter (or the whole)."""

    picture: Image.Image
    pairs: list[Pair]
    words: list[list[str]]  # one entry: the whole picture; four: its quarters


class Mixture:
    """Draws training scenes. What scene ``n`` is depends on the seed and ``n`` alone, so training can be resumed.

    Args:
        questions: about one picture, at most.
        kinds: the names of :meth:`scene`'s kinds, taken in turn.
    """

    def __init__(
        self, seed: int, questions: int, kinds: Sequence[str], shape_pool: Sequence[Shape], stamp_pool: Sequence[Stamp]
    ) -> None:
        self.seed, self.questions, self.kinds = seed, questions, kinds
        self.shapes, self.stamps = shape_pool, stamp_pool
        by_kind: dict[str, list[Stamp]] = {}
        for stamp in stamp_pool:
            by_kind.setdefault(stamp.kind, []).append(stamp)
        self.by_kind = [by_kind[name] for name in sorted(by_kind)]

    def stamp(self, generator: random.Random) -> Stamp:
        """A stamp, half of the time of a kind drawn first, so that small kinds are seen often enough."""
        pool = generator.choice(self.by_kind) if generator.random() < 0.5 else self.stamps
        return generator.choice(pool)

    def scene(self, number: int) -> Scene:
        """Scene ``number``: "shape", "stamp", or a collage of "shapes", "stamps" or "both"."""
        generator = random.Random(f"{self.seed}/{number}")
        kind = self.kinds[number % len(self.kinds)]
        if kind == "shape":
            shape = generator.choice(self.shapes)
            return Scene(shape.picture(), ask_shape(shape, self.questions, generator), [shape.words()])
        if kind == "stamp":
            stamp = self.stamp(generator)
            return Scene(stamp.picture(generator), ask_stamp(stamp), [stamp.words()])
        chance = {"shapes": 0.0, "stamps": 1.0, "both": 0.4}[kind]
        items = [
            self.stamp(generator) if generator.random() < chance else generator.choice(self.shapes) for _ in range(4)
        ]
        views = [item.picture(generator) if isinstance(item, Stamp) else item.picture() for item in items]
        pairs = ask_collage(items, self.questions, generator)
        return Scene(collage(views), pairs, [item.words() for item in items])


def pixels(scenes: Sequence[Scene]) -> object:
    """``[N, 3, 224, 224]``: what the vision tower takes."""
    return small_vlm.to_pixels([square_view(scene.picture) for scene in scenes])

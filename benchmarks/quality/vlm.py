"""Tasks for the small vision-language model of the examples: questions about coloured shapes, collages, naming."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tokcompile.measure.evaluate import Measure, Task
from tokcompile.measure.paired import Array
from tokcompile.runtime.install import SESSION

from .sources import MissingError, debian_path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COLLAGE_QUESTION = "What kind of thing is in the upper left?"


@functools.cache
def examples() -> tuple[Any, Any]:
    """The modules ``small_vlm`` and ``questions`` of ``examples/``.

    Raises:
        MissingError: what they import is not installed.
    """
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    try:
        import questions
        import small_vlm
    except ImportError as error:
        raise MissingError(f"{error}; the extra tokcompile[demo] brings it") from None
    return small_vlm, questions


def load(shapes: bool = False) -> tuple[Any, Any]:
    """The VLM in fp32 and its processor; ``shapes``: with what was trained on coloured shapes. Raises MissingError."""
    small_vlm, _ = examples()
    try:
        return small_vlm.load_vlm(small_vlm.TRAINED_FILE if shapes else small_vlm.PROJECTOR_FILE)  # type: ignore[no-any-return]
    except small_vlm.WeightsNotFoundError as error:
        raise MissingError(str(error)) from None


@functools.cache
def _items() -> tuple[Any, ...]:
    """Stamps and clothing with the split that the model was trained with (on stamps alone)."""
    _, questions = examples()
    stamps = questions.stamps
    debian_path(str(stamps.STAMPS), "tuxpaint-stamps-default")
    debian_path(str(stamps.FASHION), "dataset-fashion-mnist")
    return tuple(stamps.split_items())


def held(source: str, split: str) -> list[tuple[Any, str]]:
    """(key, class name) of labelled pictures of one split, in a seeded order."""
    found = [(item.key, item.label) for item in _items() if (item.source, item.split) == (source, split) and item.label]
    random.Random(0).shuffle(found)
    return found


def view(source: str, key: str) -> Image.Image:
    """What the VLM sees of a picture, before it is cut to size."""
    _, questions = examples()
    if source == "stamps":
        return questions.stamps.plain_view(key)  # type: ignore[no-any-return]
    from .vision import fashion_train_picture

    return fashion_train_picture(int(key))


def _features() -> Any:
    """(model, key, pixel values) -> image features as llava takes them ready-made.

    They are kept by ``key`` and used by every model whose encoder is the dense one: only a method that scores patches
    inside the encoder (``vtc_cls``) encodes a picture again. The time of an item is without the encoder where the
    features were kept.
    """
    encoded: dict[Any, Any] = {}

    def features(model: Any, key: Any, pixel_values: Any) -> Any:
        passes = [p for _, p in model.__dict__[SESSION].passes] if SESSION in model.__dict__ else []
        if any(p.regions == "vision_encoder" or getattr(p, "scores_features", False) for p in passes):
            return model.get_image_features(pixel_values=pixel_values)
        if key not in encoded:
            encoded[key] = model.get_image_features(pixel_values=pixel_values)
        return encoded[key]

    return features


def _chooser(processor: Any, question: str, names: Sequence[str]) -> Any:
    """(model, key, picture, names allowed) -> the name that greedy decoding gives when only these may be said."""
    text = processor.tokenizer
    spelled = {name: text.encode(name, add_special_tokens=False) for name in names}
    features = _features()

    def choose(model: Any, key: Any, picture: Image.Image, allowed: Sequence[str] = names) -> str:
        inputs = processor.prepare([picture], [question])
        inputs["mm_encoder_outputs"] = {"image": features(model, key, inputs.pop("pixel_values"))}
        start = inputs["input_ids"].shape[1]

        def matching(said: Sequence[int]) -> list[str]:
            return [name for name in allowed if spelled[name][: len(said)] == list(said)]

        def following(row: int, ids: Any) -> list[int]:
            said = ids[start:].tolist()
            left = matching(said)
            return [text.eos_token_id] if len(left) == 1 else sorted({spelled[name][len(said)] for name in left})

        # as many tokens as it takes to tell the names apart
        steps = next(n for n in range(1, 9) if len({tuple(spelled[name][:n]) for name in allowed}) == len(allowed))
        out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, prefix_allowed_tokens_fn=following)
        said = [token for token in out[0, start:].tolist() if token != text.eos_token_id]
        return matching(said)[0]

    return choose


def naming_task(processor: Any, source: str = "stamps", split: str = "test", limit: int | None = None) -> Task:
    """Kind of a picture that the projector was not trained on, greedy decoding among the names of all kinds.

    Raises:
        MissingError: pictures are not installed.
    """
    _, questions = examples()
    stamps = questions.stamps
    names = list(stamps.CLASS_FOLDERS.values()) if source == "stamps" else list(stamps.FASHION_NAMES)
    choose = _chooser(processor, stamps.CLASS_QUESTION if source == "stamps" else stamps.FASHION_QUESTION, names)
    items = held(source, split)[:limit]

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        return np.array([[float(name == label)] for name, (_, label) in zip(observed, items, strict=True)])

    def agree(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        return np.array([[float(a == b)] for a, b in zip(observed, dense, strict=True)])

    name = f"naming {source}" if split == "test" else f"naming {source} ({split})"
    return Task(
        name,
        items,
        lambda model, item: choose(model, item[0], view(source, item[0])),
        [Measure("accuracy", judge), Measure("same answer as dense", agree)],
        version=f"2/{len(items)}",
        note=f"{len(items)} pictures",
    )


def collage(keys: Sequence[str]) -> Image.Image:
    """Four stamps in the quarters of a white square: upper left, upper right, lower left, lower right."""
    page = Image.new("RGB", (224, 224), (255, 255, 255))
    for place, key in enumerate(keys):
        stamp = view("stamps", key).resize((112, 112), Image.Resampling.BICUBIC)
        page.paste(stamp, (place % 2 * 112, place // 2 * 112))
    return page


def collage_task(processor: Any, split: str = "test", count: int = 84) -> Task:
    """Which of the four kinds in a collage is in the upper left: 25 % by chance. Each test stamp is there once."""
    _, questions = examples()
    stamps = questions.stamps
    names = list(stamps.CLASS_FOLDERS.values())
    pictures = held("stamps", split)
    generator = random.Random(1)
    items = []
    for key, label in pictures[:count]:
        others: list[tuple[str, str]] = []
        while len(others) < 3:
            other = generator.choice(pictures)
            if other[1] not in {label, *(name for _, name in others)}:
                others.append(other)
        items.append(((key, label), *others))
    choose = _chooser(processor, COLLAGE_QUESTION, names)

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        return np.array([[float(name == item[0][1])] for name, item in zip(observed, items, strict=True)])

    def observe(model: Any, item: Any) -> str:
        keys = tuple(key for key, _ in item)
        return str(choose(model, keys, collage(keys), [name for _, name in item]))

    return Task(
        "collage",
        items,
        observe,
        [Measure("accuracy", judge)],
        version=f"2/{len(items)}",
        note="four kinds to choose from, 25 % by chance",
    )


def _answering_task(processor: Any, name: str, items: Sequence[tuple[Any, str, str]], draw: Any, note: str) -> Task:
    """Open questions, greedy decoding; right is exactly the answer.

    Args:
        items: (key of the picture, question, answer), one for each picture.
        draw: key -> picture.
    """
    features = _features()

    def observe(model: Any, item: tuple[Any, str, str]) -> str:
        key, question, _ = item
        inputs = processor.prepare([draw(key)], [question])
        inputs["mm_encoder_outputs"] = {"image": features(model, key, inputs.pop("pixel_values"))}
        return str(processor.decode_answers(model.generate(**inputs, max_new_tokens=5, do_sample=False), inputs)[0])

    def judge(observed: Sequence[Any], dense: Sequence[Any]) -> Array:
        return np.array([[float(said == item[2])] for said, item in zip(observed, items, strict=True)])

    return Task(name, items, observe, [Measure("accuracy", judge)], version=f"1/{len(items)}", note=note)


def easy_vqa_task(processor: Any, count: int = 1000) -> Task:
    """easy-vqa, one question about each test picture: shape, colour, or yes/no (about three of four).

    Raises:
        MissingError: the wheel is not installed.
    """
    small_vlm, questions = examples()
    try:
        rows = questions.easy_vqa("test")
    except small_vlm.WeightsNotFoundError as error:
        raise MissingError(str(error)) from None
    random.Random(0).shuffle(rows)
    one = {path: (path, question, answer) for path, question, answer in rows}
    return _answering_task(processor, "easy-vqa", list(one.values())[:count], Image.open, f"{count} test pictures")


def shape_collage_task(processor: Any, count: int = 500) -> Task:
    """Four test pictures of easy-vqa in the quarters of a square: what is in one of them, its colour or its shape.

    Raises:
        MissingError: the wheel is not installed.
    """
    small_vlm, questions = examples()
    try:
        pool = questions.shapes("test")
    except small_vlm.WeightsNotFoundError as error:
        raise MissingError(str(error)) from None
    generator = random.Random(1)
    items = []
    for _ in range(count):
        shapes = tuple(generator.sample(pool, 4))
        question, answer = generator.choice(questions.ask_collage(shapes, 12, generator))
        items.append((shapes, question, answer))
    return _answering_task(
        processor,
        "shape collage",
        items,
        lambda shapes: questions.collage([s.picture() for s in shapes]),
        f"{count} collages",
    )


def _one_step(name: str, **params: Any) -> dict[str, Any]:
    return {"recipe_version": 1, "steps": [{"pass": name, "params": params}]}


def budget_recipes(budgets: Sequence[float] = (0.5, 0.25, 0.1)) -> dict[str, Any]:
    """name -> recipe: diversity with and without the late drop, herding with and without gaps, class attention."""
    found: dict[str, Any] = {}
    for keep in budgets:
        found[f"todre {keep:.0%}"] = _one_step("todre", keep=keep)
        found[f"herding {keep:.0%}"] = _one_step("todre", keep=keep, criterion="herding")
        found[f"herding {keep:.0%}, compact"] = _one_step("todre", keep=keep, criterion="herding", positions="compact")
        found[f"todre {keep:.0%}, no late drop"] = _one_step("todre", keep=keep, drop_layer=None)
        found[f"vtc_cls {keep:.0%}"] = _one_step("vtc_cls", keep=keep)
    return found


def shape_recipes(budgets: Sequence[float]) -> dict[str, Any]:
    """name -> recipe: the choices by features in front of the decoder, and FastV behind its second layer."""
    found: dict[str, Any] = {}
    for keep in budgets:
        plain = {"keep": keep, "drop_layer": None}
        found[f"herding {keep:.0%}"] = _one_step("todre", **plain, criterion="herding")
        found[f"herding {keep:.0%}, compact"] = _one_step("todre", **plain, criterion="herding", positions="compact")
        found[f"diversity {keep:.0%}"] = _one_step("todre", **plain)
        found[f"FastV {keep:.0%}"] = _one_step("fastv", keep=[keep], at=[2])
    return found

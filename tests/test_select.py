"""``tokcompile.select`` gives the choice that the graph makes, from the features alone, or says why it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import tokcompile
from tests.pruning import recipe
from tests.zoo.vlm import IMAGE, PlainVLM, randomize
from tokcompile.errors import NoMatchError, RecipeError
from tokcompile.families.pruning.select import chosen, selection
from tokcompile.families.pruning.visual import VisualSelection
from tokcompile.recipes import Recipe, shipped
from tokcompile.registry import get_pass

WIDTH = 64


class Merging(PlainVLM):
    """Takes image features ``[N, D]`` as they are, so that a test knows them."""

    def encode(self, pixel_values: Tensor) -> Tensor:
        return pixel_values[None]


def plain(name: str) -> Recipe:
    """A shipped recipe without its cut inside the decoder."""
    found = Recipe.load(name)
    steps = [step for step in found.to_dict()["steps"] if step["pass"] != "token_sparse"]
    if "drop_layer" in steps[0]["params"]:
        steps[0]["params"]["drop_layer"] = None
    return Recipe.load(recipe(steps))


def by_features(name: str) -> bool:
    """Whether a shipped recipe chooses visual tokens by their features, once."""
    first = Recipe.load(name).steps[0]
    if first.region != "merge_point" or not issubclass(get_pass(first.pass_), VisualSelection):
        return False
    return not selection(plain(name)).scores_features


RECIPES = [name for name in shipped() if by_features(name)]


def prompts(dtype: torch.dtype = torch.float32) -> tuple[list[list[Tensor]], dict[str, Tensor]]:
    """Two prompts with images of 40 and 24, and of 31 and 12 tokens; the second is padded on the left."""
    torch.manual_seed(0)
    images = [[torch.randn(n, WIDTH).to(dtype) for n in row] for row in ((40, 24), (31, 12))]
    rows = []
    for row in images:
        ids = [5, 6]
        for image in row:
            ids += [IMAGE] * len(image) + [7]
        rows.append([*ids, 8, 9])
    longest = max(map(len, rows))
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    features = torch.cat([image for row in images for image in row])
    return images, {"input_ids": ids, "pixel_values": features, "attention_mask": mask}


def in_graph(steps: Any, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> list[list[list[int]]]:
    """For each prompt, for each image: which of its tokens the graph keeps."""
    torch.manual_seed(0)
    model = randomize(Merging("index_put")).to(dtype)
    pruned = tokcompile.optimize(model, steps, lowering="eager")
    with torch.no_grad(), tokcompile.record(pruned) as recording:
        pruned(**inputs)
    (entry,) = recording.kept
    found = []
    for ids, kept in zip(inputs["input_ids"], entry.indices, strict=True):
        visual = [place for place, token in enumerate(ids.tolist()) if token == IMAGE]
        images: list[list[int]] = []
        for place in visual:
            if place - 1 not in visual:
                images.append([])
            images[-1].append(place)
        left = set(kept[kept >= 0].tolist())
        found.append([[i for i, place in enumerate(image) if place in left] for image in images])
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_the_choice_of_the_graph(name: str) -> None:
    images, inputs = prompts()
    found = [[kept.tolist() for kept in tokcompile.select(row, plain(name))] for row in images]
    assert found == in_graph(plain(name), inputs)
    assert all(kept == sorted(kept) for row in found for kept in row)


def test_half_precision() -> None:
    images, inputs = prompts(torch.bfloat16)
    steps = recipe([{"pass": "todre", "params": {"keep": 0.25, "criterion": "herding", "drop_layer": None}}])
    found = [[kept.tolist() for kept in tokcompile.select(row, steps)] for row in images]
    assert found == in_graph(steps, inputs, torch.bfloat16)


@pytest.mark.parametrize("keep", [1.0, 1000, 5])
def test_budgets(keep: float) -> None:
    images, _ = prompts()
    steps = recipe([{"pass": "random", "params": {"keep": keep}}])
    for image, kept in zip(images[0], tokcompile.select(images[0], steps), strict=True):
        assert len(kept) == (5 if keep == 5 else len(image))
        assert kept.dtype == torch.int64


def test_forms_of_features() -> None:
    image = torch.randn(2, 16, 8)
    steps = recipe([{"pass": "todre", "params": {"keep": 4, "drop_layer": None}}])
    one = tokcompile.select(image[0], steps)
    both = tokcompile.select(image, steps)
    assert isinstance(one, Tensor)
    assert one.tolist() == both[0].tolist() == tokcompile.select([image[0]], steps)[0].tolist()
    assert [len(kept) for kept in tokcompile.select([image[0], image[1][:3], image[0][:0]], steps)] == [4, 3, 0]


def test_scores_of_the_encoder() -> None:
    scores = torch.tensor([0.1, 0.5, 0.2, 0.9])
    steps = recipe([{"pass": "vtc_cls", "params": {"keep": 2}}])
    assert tokcompile.select(torch.randn(4, 8), steps, scores=scores).tolist() == [1, 3]
    with pytest.raises(NoMatchError, match="give it as scores, or use todre"):
        tokcompile.select(torch.randn(4, 8), steps)
    with pytest.raises(ValueError, match=r"scores for \[3\] features, found \[4\]"):
        tokcompile.select(torch.randn(4, 8), steps, scores=scores[:3])


def test_tokens_that_a_method_changes() -> None:
    image = torch.randn(8, 4)
    steps = recipe([{"pass": "pool", "params": {"keep": 2}}])
    ((tokens, kept),) = chosen([image], selection(steps))
    assert torch.allclose(tokens[kept], torch.stack([image[:4].mean(0), image[4:].mean(0)]))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("vlm_herd_90", r"steps\[0\] \(todre\): drops tokens inside the decoder too \(drop_layer: 0.875\).*to null"),
        ("vit_prune_50", "works on vision_encoder, part of the model"),
        ("llm_sparse_decode", "works on attention, part of the model"),
        ("vlm_fastv_75", r"steps\[0\] \(fastv\): chooses inside the decoder"),
        ("vlm_transprune_75", r"steps\[0\] \(transprune\): chooses inside the decoder"),
        ([{"pass": "random", "params": {"keep": 0.5}}] * 2, "2 steps choose visual tokens"),
        ([{"pass": "random", "params": {"keep": 0.5}, "target": {"path": "a*"}}], "name places in a graph"),
    ],
)
def test_what_is_refused(steps: Any, words: str) -> None:
    with pytest.raises(NoMatchError, match=words):
        tokcompile.select(torch.randn(4, 8), steps if isinstance(steps, str) else recipe(steps))


def test_mistakes() -> None:
    with pytest.raises(RecipeError, match="unknown recipe"):
        tokcompile.select(torch.randn(4, 8), "nothing_90")
    with pytest.raises(ValueError, match=r"expected \[n, D\]"):
        tokcompile.select([torch.randn(4)], "vlm_random_90")


def test_a_score_that_reads_the_graph() -> None:
    from tokcompile.families.pruning.visual import VisualParams, VisualSelection

    class Reading(VisualSelection):
        """Reads one more value."""

        name = "reading"

        def score(self, tokens: Tensor, segment: Tensor, budget: Tensor, keys: Tensor) -> Tensor:  # type: ignore[override]
            return keys

    with pytest.raises(NoMatchError, match="reading: its score reads more than the features"):
        chosen([torch.randn(4, 8)], Reading(VisualParams(keep=2)))

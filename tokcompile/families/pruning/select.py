"""The choice of visual tokens without a graph, for engines that run the model themselves: :func:`select`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import NoMatchError
from tokcompile.families.pruning.visual import VisualSelection
from tokcompile.recipes import Recipe
from tokcompile.registry import get_pass

_DEPTH = 1 << 16  # of a decoder in which every cut that a recipe names exists


def select(
    features: Tensor | Sequence[Tensor],
    recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe,
    *,
    grid: Tensor | None = None,
    text: Tensor | None = None,
    scores: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """Which visual tokens a recipe keeps, from the image features alone: the same choice as in the graph.

    For engines that run the model themselves. The score and the choice are those that the graph runs.

    Args:
        features: ``[n, D]``, one image, as its tokens enter the language model (behind the projector); ``[B, n, D]``,
            or a list of ``[n_i, D]``: the images of one prompt, in their order.
        recipe: a recipe of one step that chooses where image features enter the language model.
        grid: int64 ``[images, 3]``, frames, rows and columns of each image, for a method that asks for it.
        text: ``[t, D]``, embeddings of the prompt's text, likewise.
        scores: one number for each feature (``[n]``, ``[B, n]``, or a list), for a method that is given them by the
            image encoder.

    Returns:
        int64 indices of the kept features, ascending: ``[k]`` for one image, else a list with one for each image.

    Raises:
        NoMatchError: the recipe chooses by something that is not in the features, or does more than that; says which
            step, why, and what to do.
        RecipeError: the recipe is not valid.
        ValueError: features or scores of another shape.
    """
    images, one = _images(features, 2)
    given = None
    if scores is not None:
        given, _ = _images(scores, 1)
        if [len(s) for s in given] != [len(f) for f in images]:
            raise ValueError(
                f"scores for {[len(s) for s in given]} features, found {[len(f) for f in images]} features"
            )
    found = [kept for _, kept in chosen(images, selection(recipe), grid=grid, text=text, scores=given)]
    return found[0] if one else found


def selection(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> VisualSelection:
    """The choice that a recipe makes where image features enter the language model, if that is all that it does.

    Raises:
        NoMatchError, RecipeError: see :func:`select`.
    """
    recipe = Recipe.load(recipe)
    if recipe.protect is not None and recipe.protect.paths:
        raise NoMatchError("protect.paths: an engine has no module paths to leave alone; leave it out")
    passes: list[VisualSelection] = []
    for number, step in enumerate(recipe.steps):
        where = f"steps[{number}] ({step.pass_})"
        method = get_pass(step.pass_)
        if not issubclass(method, VisualSelection) or step.region != "merge_point":
            place = "chooses inside the decoder" if step.region == "merge_point" else f"works on {step.region}"
            raise NoMatchError(
                f"{where}: {place}, part of the model, which an engine runs by itself; only a choice of "
                "visual tokens where they enter the language model can be made outside: leave the step out"
            )
        if step.target.path is not None or step.target.layers is not None:
            raise NoMatchError(f"{where}: target.path and target.layers name places in a graph; leave them out")
        made = method(step.params)
        if any(layer > 0 for layer in made.cut_layers(_DEPTH)):
            raise NoMatchError(
                f"{where}: drops tokens inside the decoder too{_which(step.params)}, and an engine has one length for "
                f"all layers; {_without(number, step.params)}"
            )
        passes.append(made)
    if len(passes) != 1:
        raise NoMatchError(f"{len(passes)} steps choose visual tokens one after the other; an engine makes one choice")
    return passes[0]


def chosen(
    images: Sequence[Tensor],
    method: VisualSelection,
    *,
    grid: Tensor | None = None,
    text: Tensor | None = None,
    scores: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """For each image ``[n, D]``: its features as the method leaves them ``[n, D]``, and the indices that are kept.

    Raises:
        NoMatchError: see :func:`select`.
    """
    sizes = [len(image) for image in images]
    if sum(sizes) == 0:
        return [(image, torch.arange(0, device=image.device)) for image in images]
    tokens = torch.cat(list(images))[None]
    number = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(tokens.device)[None]
    row = None if scores is None else torch.cat(list(scores)).to(tokens.device)[None]
    inputs = method.outside(tokens, grid, text, row)
    try:
        inspect.signature(method.score).bind(tokens, number, number, *inputs)
    except TypeError as error:
        raise NoMatchError(
            f"{method.name}: its score reads more than the features, from a graph that is not here ({error})"
        ) from None
    with torch.no_grad():
        tokens, kept = method.choose(tokens, number, *inputs)
    return [(t, k.nonzero()[:, 0]) for t, k in zip(tokens[0].split(sizes), kept[0].split(sizes), strict=True)]


def _images(values: Tensor | Sequence[Tensor], rank: int) -> tuple[list[Tensor], bool]:
    """The images of a batch, and whether there was one without a batch."""
    if isinstance(values, Tensor) and values.dim() == rank:
        return [values], True
    found = list(values)
    if any(not isinstance(value, Tensor) or value.dim() != rank for value in found):
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for value in found]
        wanted = "[n, D], [B, n, D] or a list of [n, D]" if rank == 2 else "[n], [B, n] or a list of [n]"
        raise ValueError(f"expected {wanted}, found {shapes[:4]}")
    return found, False


def _which(params: Any) -> str:
    return f" (drop_layer: {params.drop_layer})" if hasattr(params, "drop_layer") else ""


def _without(number: int, params: Any) -> str:
    if hasattr(params, "drop_layer"):
        return f"set steps[{number}].params.drop_layer to null, which keeps the chosen tokens to the end"
    return "use a method that chooses once, such as todre with drop_layer: null"

"""Marker operators: they let a traced model say where pruned tokens enter and leave a graph.

``held``     which positions of the unpruned sequence a cache layer holds after this call. Left alone it returns its
             second argument; narrowing the token axis narrows it like every other value.
``logical``  the keys (or values) of a cache layer that lost tokens, seen at their unpruned length. The model's own
             code, which knows nothing of pruning, then computes positions and masks that are right. Rewriting
             replaces it by the shorter tensor; run as it is, it raises.
``restored`` tokens that leave a stack of layers which will lose some, and that are to be as many as before.
``feature_scores``, ``visual_scores``  where scores of image features leave the graph of the image encoder, and where
             they enter that of the language model. In between they travel as one more column of the features.
"""

from __future__ import annotations

import torch

from tokcompile.errors import CacheError


@torch.library.custom_op("tokcompile::held", mutates_args=())
def held(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Positions ``[B, T]`` (int64, -1: an empty slot) that ``keys [B, H, T, Dh]`` stand for."""
    return positions.clone()


@held.register_fake
def _(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(positions, memory_format=torch.contiguous_format)


@torch.library.custom_op("tokcompile::logical", mutates_args=())
def logical(states: torch.Tensor, held: torch.Tensor, length: int, ragged: bool) -> torch.Tensor:
    """``states [B, H, K, Dh]`` at their unpruned length: ``[B, H, length, Dh]``."""
    raise CacheError(
        "a cache with pruned tokens was read by a stage that tokcompile could not compile; see "
        "tokcompile.report(model) for the reason, and start from a fresh cache"
    )


@logical.register_fake
def _(states: torch.Tensor, held: torch.Tensor, length: int, ragged: bool) -> torch.Tensor:
    return states.new_empty(states.shape[0], states.shape[1], length, states.shape[3])


@torch.library.custom_op("tokcompile::feature_scores", mutates_args=())
def feature_scores(features: torch.Tensor) -> torch.Tensor:
    """A score ``[R]`` for each row of image features ``[R, D]``; zeros until a pass puts its own in place."""
    return features.new_zeros(features.shape[0], dtype=torch.float32)


@feature_scores.register_fake
def _(features: torch.Tensor) -> torch.Tensor:
    return features.new_empty(features.shape[0], dtype=torch.float32)


@torch.library.custom_op("tokcompile::visual_scores", mutates_args=())
def visual_scores(scores: torch.Tensor) -> torch.Tensor:
    """Marks scores ``[R]`` that came with the image features of a call, in the order of the features."""
    return scores.clone()


@visual_scores.register_fake
def _(scores: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.custom_op("tokcompile::restored", mutates_args=())
def restored(tokens: torch.Tensor) -> torch.Tensor:
    """``tokens [B, S, D]``; stands for them while the layers above are narrowed."""
    return tokens.clone()


@restored.register_fake
def _(tokens: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tokens)


#: The overloads, as they stand in a graph.
HELD = torch.ops.tokcompile.held.default
LOGICAL = torch.ops.tokcompile.logical.default
FEATURE_SCORES = torch.ops.tokcompile.feature_scores.default
VISUAL_SCORES = torch.ops.tokcompile.visual_scores.default
RESTORED = torch.ops.tokcompile.restored.default

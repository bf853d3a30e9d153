"""Marker operators: they let a traced model say where pruned tokens enter and leave a graph.

``held``     which positions of the unpruned sequence a cache layer holds after this call. Left alone it returns its
             second argument; narrowing the token axis narrows it like every other value.
``logical``  the keys (or values) of a cache layer that lost tokens, seen at their unpruned length. The model's own
             code, which knows nothing of pruning, then computes positions and masks that are right. Rewriting
             replaces it by the shorter tensor; run as it is, it raises.
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
    raise CacheError("a cache with pruned tokens was read by a stage that tokcompile could not compile; see "
                     "tokcompile.report(model) for the reason, and start from a fresh cache")


@logical.register_fake
def _(states: torch.Tensor, held: torch.Tensor, length: int, ragged: bool) -> torch.Tensor:
    return states.new_empty(states.shape[0], states.shape[1], length, states.shape[3])

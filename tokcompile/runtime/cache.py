"""A key/value cache whose layers may hold fewer tokens than the sequence has.

The cache object itself carries what was kept: :class:`Held` says, for a group of layers that were pruned alike,
which positions of the unpruned sequence they hold. ``get_seq_length`` goes on counting unpruned tokens, so positions
and masks that the model computes are those of the unpruned model; the compiled graph takes the columns that a layer
still holds. Beam search, row selection and cropping treat keys and positions alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tokcompile.capture import markers as _ops  # noqa: F401  registers the marker operators
from tokcompile.errors import CacheError


class Held:
    """Positions ``[B, K]`` (int64, ascending, -1: empty slot) that a group of cache layers holds.

    Attributes:
        length: how many tokens the unpruned sequence has.
        ragged: whether some slots are empty.
        owner: the one layer of the group that updates the positions when rows move.
    """

    def __init__(self, positions: torch.Tensor, length: int, owner: PrunedLayer, *, ragged: bool | None = None) -> None:
        self.positions, self.length, self.owner = positions, length, owner
        self.ragged = bool((positions < 0).any()) if ragged is None else ragged

    def append(self, count: int) -> None:
        new = torch.arange(self.length, self.length + count, device=self.positions.device)
        self.positions = torch.cat([self.positions, new[None].expand(self.positions.shape[0], count)], 1)
        self.length += count


class PrunedLayer(DynamicLayer):
    """One layer of a dynamic cache; ``held`` is None as long as it holds every token.

    A layer of a sliding-window model keeps all its tokens too: the window is a matter of positions, and the mask
    that the model makes from them enforces it.
    """

    keys: Any  # None until the first update
    values: Any

    def __init__(self, is_sliding: bool = False) -> None:
        super().__init__()
        self.is_sliding = is_sliding
        self.held: Held | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            # contiguous as after every later step: another layout would compile the decode step a second time
            self.keys, self.values = key_states.contiguous(), value_states.contiguous()
            return self.keys, self.values
        keys, values = self.keys, self.values
        if self.held is not None:
            held = self.held
            keys = torch.ops.tokcompile.logical(keys, held.positions, held.length, held.ragged)
            values = torch.ops.tokcompile.logical(values, held.positions, held.length, held.ragged)
        self.keys = torch.cat([keys, key_states], dim=-2)
        self.values = torch.cat([values, value_states], dim=-2)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        if not self.is_initialized:
            return 0
        return self.held.length if self.held is not None else self.keys.shape[-2]

    def reset(self) -> None:
        super().reset()
        self.held = None

    def _rows(self, change: Any) -> None:
        if self.held is not None and self.held.owner is self:
            self.held.positions = change(self.held.positions)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda p: p.index_select(0, beam_idx.to(p.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda p: p.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda p: p[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        count = -tokens_to_remove
        if self.held is not None and count > 0:
            held = self.held
            if held.owner is self:
                tail = torch.arange(held.length - count, held.length, device=held.positions.device)
                if count > held.positions.shape[1] or not bool((held.positions[:, -count:] == tail).all()):
                    raise CacheError(f"cannot crop {count} tokens: some of them were pruned; start from a fresh cache")
                held.positions = held.positions[:, :-count]
                held.length -= count
            self.keys, self.values = self.keys[..., :-count, :], self.values[..., :-count, :]
            return
        super().crop(tokens_to_remove)


def cache_argument(parameters: Mapping[str, Parameter]) -> str | None:
    """The parameter of a forward that takes the cache: ``cache`` from transformers 5.24 on, ``past_key_values`` before.

    None where there is none. Another ``cache``, in a model of one's own, is not annotated as a ``Cache``.
    """
    if "past_key_values" in parameters:
        return "past_key_values"
    return "cache" if "cache" in parameters and "Cache" in str(parameters["cache"].annotation) else None


def adopt(cache: Cache) -> None:
    """Give ``cache`` layers that can be pruned, in place.

    Raises:
        CacheError: a cache that cannot lose tokens: static (every layer has one preallocated length), offloaded,
            quantized, or a sliding window that has already dropped tokens.
    """
    if not isinstance(cache, DynamicCache):
        raise CacheError(
            f"{type(cache).__name__} cannot hold fewer tokens in some rows or layers (its layers have one "
            "preallocated length); use the default dynamic cache: drop cache_implementation, or pass "
            "a DynamicCache(config=model.config)"
        )
    if cache.offloading:
        raise CacheError(
            "an offloaded cache moves layers between devices inside the compiled graph; use the default "
            "dynamic cache: drop cache_implementation='offloaded'"
        )
    layers: list[Any] = cache.layers
    for i, layer in enumerate(layers):
        if isinstance(layer, PrunedLayer):
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise CacheError(
                f"cache layer {i} is a {type(layer).__name__}, which cannot hold fewer tokens; use a "
                "plain dynamic cache or, where the model itself keeps such layers, a recipe that does not drop "
                "tokens of the prompt"
            )
        new = PrunedLayer(is_sliding=bool(layer.is_sliding))
        if layer.is_initialized and layer.get_seq_length() > 0:
            if layer.keys.shape[-2] != layer.get_seq_length():
                raise CacheError(
                    f"cache layer {i} has already dropped tokens that left its sliding window; start from a fresh cache"
                )
            new.update(layer.keys, layer.values)
        layers[i] = new
    if cache.layer_class_to_replicate is not None:
        cache.layer_class_to_replicate = PrunedLayer


def layers_of(cache: Any) -> list[PrunedLayer]:
    """The layers of ``cache`` that hold something."""
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, PrunedLayer) and layer.is_initialized]


def note_held(layers: Sequence[PrunedLayer], held: Sequence[torch.Tensor], length: int) -> None:
    """After a prefill: remember what each layer holds. Layers that hold the same share one :class:`Held`."""
    groups: list[Held] = []
    for layer, positions in zip(layers, held, strict=True):
        layer.held = None
        if positions.shape[1] == length and not bool((positions < 0).any()):
            continue
        for group in groups:
            if torch.equal(group.positions, positions):
                layer.held = group
                break
        else:
            layer.held = Held(positions, length, layer)
            groups.append(layer.held)


def append_held(layers: Sequence[PrunedLayer], count: int) -> None:
    """After ``count`` more tokens were added to every layer."""
    for group in {id(layer.held): layer.held for layer in layers if layer.held is not None}.values():
        group.append(count)

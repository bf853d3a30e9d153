"""A model of vLLM whose image features are chosen by a recipe, and whose positions follow the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import TokcompileError
from tokcompile.families.pruning.select import chosen
from tokcompile.vllm.layout import AXES, Layout, Placed, read_columns, whole_prompt, write_columns
from tokcompile.vllm.processor import FIELD
from tokcompile.vllm.settings import Settings


@dataclass
class _Request:
    """What :meth:`PrunedPositions.recompute_mrope_positions` has to know of a prompt.

    Attributes:
        places: int64 ``[p]``: where the prompt's placeholders are, ascending.
        order: int64 ``[p]``: which placeholder of its item each is.
        anchors: int64 ``[axes, p]``: position of the first token of its item.
        delta: what is added to the length of the prompt for the position of the next token.
    """

    places: Tensor
    order: Tensor
    anchors: Tensor
    delta: int


class PrunedModel:
    """Goes in front of a model class of vLLM that has ``embed_multimodal``."""

    tokcompile: Settings
    tokcompile_width: int

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.tokcompile_width = int(vllm_config.model_config.get_inputs_embeds_size())

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Features of each item, the kept ones: ``[k, D]``.

        Raises:
            TokcompileError: they cannot be pruned as the prompt was; nothing goes on dense in silence.
        """
        tables = kwargs.pop(FIELD, None)
        found = super().embed_multimodal(**kwargs)  # type: ignore[misc]
        if tables is None:
            if any(str(name).startswith(("pixel_values", "image", "video")) for name in kwargs):
                raise TokcompileError(
                    f"tokcompile: features of {type(self).__name__} come without a layout of their placeholders"
                )
            return found
        items = list(found)
        if len(items) != len(tables):
            raise TokcompileError(f"tokcompile: the model gives features of {len(items)} items for {len(tables)}")
        return tuple(self._pruned(item, table) for item, table in zip(items, tables, strict=True))

    def _pruned(self, features: Tensor, table: Tensor) -> Tensor:
        """``[n, D]`` -> ``[k, D]``; with positions of several axes ``[k, D + columns]``."""
        runs = Layout.read(table).runs()
        if features.dim() != 2 or len(features) != sum(runs):
            raise TokcompileError(
                f"tokcompile: the model gives features of the form {tuple(features.shape)} for an image with "
                f"{sum(runs)} placeholders; this model cannot be pruned"
            )
        kept, values, start = [], [], 0
        # what follows the width of the language model is for its further layers, and goes with the token
        shown = features[:, : self.tokcompile_width]
        for (changed, indices), length in zip(chosen(shown.split(runs), self.tokcompile.method), runs, strict=True):
            values.append(changed[indices])
            kept.append(indices + start)
            start += length
        indices = torch.cat(kept) if kept else torch.arange(0)
        left = torch.cat([torch.cat(values), features[indices, self.tokcompile_width :]], 1) if kept else features
        return self._marked(left, indices, table)

    def _marked(self, features: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        return features


class PrunedPositions(PrunedModel):
    """The same for a model with rotary positions of several axes: a kept token has the position that it had."""

    supports_multimodal_pruning = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        _ask_for_positions()

    def _marked(self, features: Tensor, indices: Tensor, table: Tensor) -> Tensor:
        """Behind each feature: which of its item it is, and its position relative to the first."""
        visual = table[1].nonzero()[:, 0]
        relative = table[2:, visual[indices.to(table.device)]].T
        order = torch.arange(len(features), device=relative.device)[:, None]
        return write_columns(features, torch.cat([order, relative], 1))

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions of the whole prompt, at the tokens that are left; those of placeholders follow the choice later."""
        pruned = [f for f in mm_features if f.data is not None and FIELD in f.data]
        items = [
            Placed(f.mm_position.offset, f.mm_position.length, Layout.read(f.data[FIELD].data))
            for f in sorted(pruned, key=lambda f: f.mm_position.offset)
        ]
        whole, places, starts = whole_prompt(input_tokens, items, self.tokcompile.keep)
        start_of = {item.offset: (start, item.layout) for item, start in zip(items, starts, strict=True)}
        dense = [self._as_it_was(f, start_of, places) for f in mm_features]
        positions, delta = super().get_mrope_input_positions(whole, dense)  # type: ignore[misc]
        if len(positions) > AXES:
            raise TokcompileError(f"tokcompile: positions of {len(positions)} axes, at most {AXES} are served")
        for feature in pruned:
            start, layout = start_of[feature.mm_position.offset]
            first = start + layout.visual.index(True)
            table = feature.data[FIELD].data.clone()
            stretch = positions[:, start : start + len(layout.ids)]
            table[2 : 2 + len(positions)] = stretch - positions[:, first : first + 1]
            feature.data[FIELD].data = table  # read again when the item is encoded
        left = positions[:, torch.tensor(places, dtype=torch.int64)].clone()
        delta = int(delta) + len(whole) - len(input_tokens)
        left.tokcompile = self._request(items, starts, positions, delta)
        return left, delta

    def _request(self, items: Sequence[Placed], starts: Sequence[int], positions: Tensor, delta: int) -> _Request:
        where: list[int] = []
        order: list[int] = []
        first: list[int] = []
        for item, start in zip(items, starts, strict=True):
            flags = [item.layout.visual[place] for place in item.layout.pruned(self.tokcompile.keep)]
            own = [item.offset + place for place, flag in enumerate(flags) if flag]
            where += own
            order += range(len(own))
            first += [start + item.layout.visual.index(True)] * len(own)
        anchors = positions[:, torch.tensor(first, dtype=torch.int64)]
        return _Request(torch.tensor(where, dtype=torch.int64), torch.tensor(order, dtype=torch.int64), anchors, delta)

    def _as_it_was(self, feature: Any, start_of: dict[int, tuple[int, Layout]], places: Sequence[int]) -> Any:
        """An item of the pruned prompt, where it is in the whole one."""
        position = feature.mm_position
        if feature.data is None or FIELD not in feature.data:
            return replace(feature, mm_position=replace(position, offset=places[position.offset]))
        start, layout = start_of[position.offset]
        mask = None if all(layout.visual) else torch.tensor(layout.visual)
        return replace(feature, mm_position=replace(position, offset=start, length=len(layout.ids), is_embed=mask))

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Take the marks off features, and put the placeholders that they are for where the chosen tokens stood."""
        request: _Request | None = getattr(mrope_positions, "tokcompile", None)
        if request is None:
            raise TokcompileError("tokcompile: positions of a request that this plugin has not seen")
        features = []
        at = int((request.places < num_computed_tokens).sum())
        for marked in multimodal_embeddings:
            plain, numbers = read_columns(marked)
            features.append(plain)
            numbers = numbers.to("cpu")
            count = len(numbers)
            if count == 0:
                continue
            while at < len(request.order) and not torch.equal(request.order[at : at + count], numbers[:, 0]):
                at += 1
            if at + count > len(request.order):
                raise TokcompileError("tokcompile: features that belong to no placeholder of this prompt")
            relative = numbers[:, 1 : 1 + len(mrope_positions)].T
            places = request.places[at : at + count].to(mrope_positions.device)
            mrope_positions[:, places] = (request.anchors[:, at : at + count] + relative).to(mrope_positions)
            at += count
        return features, mrope_positions, request.delta


def prune_model(cls: Any, settings: Settings, several_axes: bool) -> Any:
    """A subclass of a model class of vLLM that keeps the features that ``settings`` choose.

    Raises:
        TokcompileError: the class does not have the interfaces for it.
    """
    name = cls.__name__
    if getattr(cls, "supports_multimodal_raw_input_only", False):
        raise TokcompileError(f"tokcompile cannot prune {name}: it takes images raw, and embeds them with its text")
    if getattr(cls, "embed_multimodal", None) is None:
        raise TokcompileError(f"tokcompile cannot prune {name}: it has no embed_multimodal")
    base = PrunedPositions if several_axes else PrunedModel
    space = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(name, (base, cls), {**space, "tokcompile": settings})


def _ask_for_positions() -> None:
    """Have the runner of this process hand features of pruned models back before it uses their positions.

    It asks its configuration whether a model prunes video on its own, which would turn on that model's own pruning; so
    the answer is given for our models alone.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    name = "is_multimodal_pruning_enabled"
    if isinstance(GPUModelRunner.__dict__.get(name), property):
        return

    def enabled(runner: Any) -> bool:
        model = runner.__dict__.get("model")
        model = model.unwrap() if hasattr(model, "unwrap") else model
        return isinstance(model, PrunedPositions) or bool(runner.__dict__.get(name, False))

    def enable(runner: Any, value: bool) -> None:
        runner.__dict__[name] = value

    setattr(GPUModelRunner, name, property(enabled, enable))

"""Models that generate: a decoder with its keys and values as inputs and outputs, and for images the encoder before it.

::

    vision_encoder   pixel_values, ... -> image_features [, image_scores]
    embed_tokens     input_ids -> inputs_embeds
    decoder          input_ids | inputs_embeds, attention_mask, position_ids, past_key_values.N.key/.value
                     -> logits, present.N.key/.value

One decoder file serves prefill, further turns and decode steps; an empty past has length 0. Where a recipe removes
tokens, layers hold fewer tokens than the sequence has. Layers that are cut alike form a group with a length of its own,
and ``past_positions.G [B, length]`` says which positions of the unpruned sequence a group holds (-1: an empty slot);
``attention_mask`` and ``position_ids`` go on counting unpruned tokens. The choice of tokens needs to know where image
features go, so a pruned decoder merges them itself and takes ``visual_mask`` and ``image_features`` (none in a decode
step) beside the embeddings of the text.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokcompile.errors import ExportError
from tokcompile.onnx_export.lowering import Stage
from tokcompile.runtime.cache import Held, PrunedLayer, cache_argument

BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


class _WholeBatch(TorchFunctionMode):
    """Taking a batch apart into a Python list would fix its size: it stays one element, rows in the same order."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.Tensor.unbind, torch.unbind) and isinstance(args[0].shape[0], torch.SymInt):
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if dim == 0:
                return (args[0],)
        if function is torch.Tensor.__len__ and isinstance(args[0].shape[0], torch.SymInt):
            return 1
        return function(*args, **kwargs)


class VisionEncoder(nn.Module):
    """``get_image_features`` of a vision-language model."""

    def __init__(self, model: nn.Module, scores: bool) -> None:
        super().__init__()
        self.model, self.scores = model, scores

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with _WholeBatch():
            result = self.model.base_model.get_image_features(**inputs)  # type: ignore[union-attr, operator]
        features = getattr(result, "pooler_output", result)
        if not isinstance(features, Tensor):
            parts = list(features)
            alike = all(f.shape == parts[0].shape for f in parts)
            features = (
                parts[0]
                if len(parts) == 1
                else torch.stack(parts)
                if alike
                else torch.cat([f.reshape(-1, f.shape[-1]) for f in parts])
            )
        outputs = {"image_features": features}
        if self.scores:
            rows = features.reshape(-1, features.shape[-1])
            outputs["image_scores"] = torch.ops.tokcompile.feature_scores(rows)
        return outputs


class Embedding(nn.Module):
    """The token embedding of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"inputs_embeds": self.model.get_input_embeddings()(inputs["input_ids"])}  # type: ignore[operator]


class Decoder(nn.Module):
    """A language model with explicit keys and values.

    Args:
        layers: number of cache layers.
        groups: for each group of layers that are cut alike, their indices.
        last: logits of the last position only, ``[B, 1, V]``.
        cached: with keys and values; without them this is a prefill alone, to see what a recipe does.
    """

    def __init__(
        self, model: nn.Module, layers: int, groups: Sequence[Sequence[int]], *, last: bool, cached: bool = True
    ) -> None:
        super().__init__()
        self.model, self.layers, self.groups, self.last, self.cached = model, layers, groups, last, cached
        parameters = inspect.signature(type(model).forward).parameters
        self.cache_name = cache_argument(parameters) or ""
        self.takes_positions = "position_ids" in parameters
        self.takes_count = "logits_to_keep" in parameters

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers import DynamicCache

        outputs: dict[str, Tensor] = {}
        arguments: dict[str, Any] = {}
        if "input_ids" in inputs:
            arguments["input_ids"] = tokens = inputs["input_ids"]
        else:
            tokens = inputs["inputs_embeds"]
            if "image_scores" in inputs:
                # a mark for the passes; nobody reads it, so it is returned
                outputs["_scores"] = torch.ops.tokcompile.visual_scores(inputs["image_scores"])
            if "visual_mask" in inputs:
                tokens = tokens.masked_scatter(inputs["visual_mask"].unsqueeze(-1), inputs["image_features"])
            arguments["inputs_embeds"] = tokens
        if self.takes_positions:
            arguments["position_ids"] = inputs["position_ids"]
        if self.takes_count and self.last:
            arguments["logits_to_keep"] = 1
        cache = None
        if self.cached:
            cache = DynamicCache()
            cache.layers = self._layers(inputs, inputs["attention_mask"].shape[1] - tokens.shape[1])
        arguments[self.cache_name] = cache
        result = self.model(
            **arguments, attention_mask=inputs["attention_mask"], use_cache=self.cached, return_dict=True
        )
        outputs["logits"] = result.logits[:, -1:] if self.last else result.logits
        held: list[Any] = cache.layers if cache is not None else []
        for i, layer in enumerate(held):
            outputs[f"present.{i}.key"], outputs[f"present.{i}.value"] = layer.keys, layer.values
        for number, group in enumerate(self.groups if cache is not None else ()):
            keys = held[group[0]].keys
            positions = torch.arange(keys.shape[2], device=keys.device)[None].expand(keys.shape[0], keys.shape[2])
            outputs[f"present_positions.{number}"] = torch.ops.tokcompile.held(keys, positions)
        return outputs

    def _layers(self, inputs: dict[str, Tensor], length: Any) -> list[Any]:
        sliding = _sliding(self.model, self.layers)
        layers = []
        for i in range(self.layers):
            layer = PrunedLayer(is_sliding=sliding[i])
            layer.keys, layer.values = inputs[f"past_key_values.{i}.key"], inputs[f"past_key_values.{i}.value"]
            layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
            layers.append(layer)
        for number, group in enumerate(self.groups):
            held = Held(inputs[f"past_positions.{number}"], length, layers[group[0]], ragged=True)
            for i in group:
                layers[i].held = held
        return layers


def _sliding(model: nn.Module, layers: int) -> list[bool]:
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        return [getattr(text, "sliding_window", None) is not None] * layers
    return [kind == "sliding_attention" for kind in kinds]


def generates(model: nn.Module) -> bool:
    """Whether ``model`` is a causal language model (with or without images) of transformers."""
    can = getattr(model, "can_generate", None)
    return (
        bool(can is not None and can())
        and cache_argument(inspect.signature(type(model).forward).parameters) is not None
    )


def check_kind(model: nn.Module) -> None:
    """Refuse generative models whose state or positions no file of these can carry.

    Raises:
        ExportError: names what blocks it.
    """
    config: Any = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"{name}: an encoder-decoder; only decoder-only models and vision-language models with one "
            "decoder are exported. Export its encoder alone: export_onnx(model.get_encoder(), ...)"
        )
    base: Any = model.base_model
    if hasattr(base, "get_rope_index"):
        line = inspect.getsourcelines(type(base).get_rope_index)
        file = inspect.getsourcefile(type(base)) or ""
        raise ExportError(
            f"{name}: its rotary positions have three axes that {type(base).__name__}.get_rope_index "
            f"[{file}:{line[1]}] works out in Python from the values of image_grid_thw, for each image; no graph and "
            "no input of the exported decoder carries them. Export model.model.language_model with inputs_embeds and "
            "position_ids as a model of one graph, or use tokcompile.optimize"
        )


def batch_inputs(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """``input_ids``, ``attention_mask`` and the arguments of the image encoder.

    Raises:
        ExportError: no ``input_ids``.
    """
    if not isinstance(inputs.get("input_ids"), Tensor):
        raise ExportError("inputs of a generative model need input_ids [B, S] (and attention_mask, pixel_values, ...)")
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    rest = {n: v for n, v in inputs.items() if n not in ("input_ids", "attention_mask") and isinstance(v, Tensor)}
    return ids, torch.ones_like(ids) if mask is None else mask, rest


def image_arguments(model: nn.Module, rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that the image encoder takes; others are refused."""
    known = inspect.signature(type(model.base_model).get_image_features).parameters  # type: ignore[union-attr]
    unknown = sorted(set(rest) - set(known))
    if unknown:
        raise ExportError(
            f"inputs {', '.join(unknown)}: neither the image encoder nor the decoder of an export takes "
            f"them (the encoder takes {', '.join(k for k in known if k not in ('self', 'kwargs'))})"
        )
    return dict(rest)


def vision_stage(model: nn.Module, images: dict[str, Tensor], scores: bool) -> Stage:
    """The image encoder."""
    axes: dict[str, dict[int, str]] = {}
    for name, value in images.items():
        axes[name] = {0: "num_images" if value.dim() != 5 else BATCH}
        if (
            name.startswith("pixel_")
            and value.dim() == (5 if name == "pixel_values" else 4)
            and any(v.dim() == 5 for v in images.values())
        ):
            axes[name] = {0: BATCH, 1: "num_images"}
    return Stage("vision_encoder", VisionEncoder(model, scores), images, axes)


def embed_stage(model: nn.Module, ids: Tensor) -> Stage:
    return Stage("embed_tokens", Embedding(model), {"input_ids": ids}, {"input_ids": {0: BATCH, 1: SEQUENCE}})


def positions_of(mask: Tensor) -> Tensor:
    """Position of each token: padding does not count."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def decoder_stage(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    *,
    groups: Sequence[Sequence[int]],
    last: bool,
    features: Tensor | None = None,
    scores: Tensor | None = None,
    merges: bool = False,
    images: bool = False,
    cached: bool = True,
    token: int | None = None,
) -> Stage:
    """The decoder on example tokens, with an example past in front.

    Args:
        images: takes embeddings instead of ids. merges: and puts the image features into them.
        features, scores: of the example, for ``merges``.
    """
    shapes = kv_shapes(model)
    module = Decoder(model, len(shapes), groups, last=last, cached=cached)
    batch = ids.shape[0]
    past = 6 if cached else 0
    inputs: dict[str, Tensor] = {}
    axes: dict[str, dict[int, str]] = {}
    out: dict[str, dict[int, str]] = {"logits": {0: BATCH} if last else {0: BATCH, 1: SEQUENCE}}
    rows = {0: BATCH, 1: SEQUENCE}
    if images:
        inputs["inputs_embeds"], axes["inputs_embeds"] = model.get_input_embeddings()(ids), rows  # type: ignore[operator]
    else:
        inputs["input_ids"], axes["input_ids"] = ids, rows
    full = torch.cat([mask.new_ones(batch, past), mask], 1)
    inputs["attention_mask"], axes["attention_mask"] = full, {0: BATCH, 1: TOTAL if cached else SEQUENCE}
    if module.takes_positions:
        inputs["position_ids"], axes["position_ids"] = positions_of(full)[:, past:], rows
    if merges:
        assert features is not None
        inputs["visual_mask"], axes["visual_mask"] = ids.eq(token), rows  # type: ignore[arg-type]
        inputs["image_features"], axes["image_features"] = features, {0: "image_tokens"}
        if scores is not None:
            inputs["image_scores"], axes["image_scores"] = scores, {0: "image_tokens"}
    if not cached:
        return Stage("decoder", module, inputs, axes, out)
    group_of = {layer: number for number, group in enumerate(groups) for layer in group}
    dtype = next(model.parameters()).dtype
    for i, (heads, width) in enumerate(shapes):
        number = group_of.get(i)
        length, name = (past, PAST) if number is None else (past - 1 - number, f"past_length_{number}")
        for part in ("key", "value"):
            inputs[f"past_key_values.{i}.{part}"] = torch.randn(batch, heads, length, width).to(dtype)
            axes[f"past_key_values.{i}.{part}"] = {0: BATCH, 2: name}
            out[f"present.{i}.{part}"] = {
                0: BATCH,
                2: "total_sequence_length" if number is None else f"present_length_{number}",
            }
    for number in range(len(groups)):
        length = past - 1 - number
        inputs[f"past_positions.{number}"] = torch.arange(length)[None].expand(batch, length).contiguous()
        axes[f"past_positions.{number}"] = {0: BATCH, 1: f"past_length_{number}"}
        out[f"present_positions.{number}"] = {0: BATCH, 1: f"present_length_{number}"}
    return Stage("decoder", module, inputs, axes, out, {TOTAL: (PAST, SEQUENCE)})


def kv_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(key heads, head width) of each cache layer, read off a real cache."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    cache = DynamicCache(config=model.config)  # type: ignore[arg-type]
    with torch.no_grad(), _evaluating(model):
        name = cache_argument(inspect.signature(type(model).forward).parameters) or ""
        model(input_ids=torch.ones(1, 2, dtype=torch.int64, device=device), **{name: cache}, use_cache=True)
    shapes = []
    found: list[Any] = cache.layers
    for i, layer in enumerate(found):
        keys = getattr(layer, "keys", None)
        if keys is None or keys.dim() != 4 or keys.shape != layer.values.shape:
            raise ExportError(
                f"cache layer {i} is a {type(layer).__name__} that does not hold keys and values "
                "[B, H, S, Dh] of one shape; only attention with such a cache is exported"
            )
        shapes.append((keys.shape[1], keys.shape[3]))
    return shapes


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

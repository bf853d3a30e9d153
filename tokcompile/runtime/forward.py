"""The forward of an optimized model: image encoder first, then the captured graph; the cache is told what it holds."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tokcompile.errors import TokcompileError
from tokcompile.runtime.cache import adopt, append_held, cache_argument, layers_of, note_held
from tokcompile.runtime.compiled_call import CAPTURE_FAILURES, by_name, compile_stage
from tokcompile.runtime.encoders import detach_scores
from tokcompile.runtime.session import Session


class Forward:
    """The forward of an optimized model. A copy of the model (or a pickle) gets one of its own, bound to the copy."""

    def __init__(self, owner: nn.Module, stages: Stages) -> None:
        self.owner, self.stages = owner, stages
        functools.update_wrapper(self, types.MethodType(stages.original, owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stages(self.owner, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (self.owner, self.stages)


class Stages:
    """Runs one call: image encoder first, then the captured forward, with the cache told what it holds."""

    def __init__(self, kind: type[nn.Module], session: Session) -> None:
        self.kind, self.session = kind, session
        self.original = original = kind.forward
        parameters = inspect.signature(original).parameters
        self.takes_features, self.cache_name = "mm_encoder_outputs" in parameters, cache_argument(parameters) or ""
        cache_name = self.cache_name
        session.tracks_cache = bool(cache_name) and any(
            method.regions in ("merge_point", "decoder_stack") for _, method in session.passes
        )

        def plain(model: nn.Module, kwargs: dict[str, Any]) -> Any:
            return original(model, **kwargs)

        def tracked(model: nn.Module, kwargs: dict[str, Any], scores: torch.Tensor | None) -> Any:
            # first, so that the scores are in front of whatever uses them
            marked = None if scores is None else torch.ops.tokcompile.visual_scores(scores)
            result = original(model, **kwargs)
            held = []
            for layer in kwargs[cache_name].layers:
                if layer.is_initialized:
                    rows, length = layer.keys.shape[0], layer.keys.shape[-2]
                    positions = torch.arange(length, device=layer.keys.device)[None].expand(rows, length)
                    held.append(torch.ops.tokcompile.held(layer.keys, positions))
            return result, held, marked

        def uncached(model: nn.Module, kwargs: dict[str, Any], scores: torch.Tensor | None) -> Any:
            marked = None if scores is None else torch.ops.tokcompile.visual_scores(scores)
            return original(model, **kwargs), None, marked

        self.plain = compile_stage(plain, session)
        self.decode = compile_stage(plain, session, dynamic=True)  # no two decode steps have one length
        self.tracked = compile_stage(tracked, session)
        self.uncached = compile_stage(uncached, session)
        self.failed: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return Stages, (self.kind, self.session)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.session.check_sources(model)
        kwargs = by_name(self.original, model, args, kwargs)
        if self.cache_name == "cache" and "past_key_values" in kwargs:  # its older name
            kwargs = {**kwargs, "cache": kwargs["past_key_values"]}
            del kwargs["past_key_values"]
        if self.takes_features and kwargs.get("mm_encoder_outputs") is None:
            kwargs = _encode_first(model, kwargs, self.cache_name)
        if self.session.tracks_cache:
            return self._with_cache(model, kwargs)
        name, function = "forward", self.plain
        if self.cache_name:
            name = "prefill"
            cache = kwargs.get(self.cache_name)
            if cache is not None and cache.get_seq_length() > 0 and _tokens(kwargs).shape[1] == 1:
                name, function = "decode", self.decode
        return self._stage(name, function, model, kwargs)

    def _with_cache(self, model: nn.Module, kwargs: dict[str, Any]) -> Any:
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            config: Any = getattr(model, "config", None)
            text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
            use_cache = bool(getattr(text, "use_cache", True))
        if kwargs.get(self.cache_name) is None:
            if not use_cache:
                return self._stage("prefill", self.uncached, model, kwargs).result
            from transformers import DynamicCache

            kwargs = {**kwargs, self.cache_name: DynamicCache(config=model.config)}  # type: ignore[arg-type]
        cache = kwargs[self.cache_name]
        adopt(cache)
        count = _tokens(kwargs).shape[1]
        if count == 1:
            result = self._stage("decode", self.decode, model, kwargs)
            append_held(layers_of(cache), 1)
            return result
        past = cache.get_seq_length()
        found = self._stage("prefill", self.tracked, model, kwargs)
        if found.held is not None:
            note_held(layers_of(cache), found.held, past + count)
        return found.result

    def _stage(self, name: str, compiled: Callable[..., Any], model: nn.Module, kwargs: dict[str, Any]) -> Any:
        """Run a stage compiled, or as it is where it cannot be captured; tracked prefills give a :class:`_Prefill`."""
        prefill = name == "prefill" and self.session.tracks_cache
        scores: tuple[Any, ...] = (None,) if prefill else ()
        if prefill and self.session.scored_features and kwargs.get("mm_encoder_outputs"):
            outputs, rows = detach_scores(kwargs["mm_encoder_outputs"])
            kwargs, scores = {**kwargs, "mm_encoder_outputs": outputs}, (rows,)
        if name not in self.failed:
            try:
                with self.session.at_stage(name):
                    result = compiled(model, kwargs, *scores)
                return _Prefill(result[0], result[1]) if prefill else result
            except CAPTURE_FAILURES as error:
                self.failed.add(name)
                self.session.note_uncaptured(name, error)
                self.session.check_matches(name)
        result = self.original(model, **kwargs)
        return _Prefill(result, None) if prefill else result


def _encode_first(model: Any, kwargs: dict[str, Any], cache_name: str) -> dict[str, Any]:
    """The arguments of ``forward`` with images encoded, as ``generate()`` hands them to its first forward.

    Arguments of the encoders leave the call. Some models read their positions off these (the grids of patches of
    three-dimensional RoPE), so such positions are made here, as ``generate()`` does, or they would be lost.
    """
    from transformers import GenerationMixin

    encoded = model._prepare_multimodal_encoder_kwargs_for_generation(dict(kwargs))
    if not encoded.get("mm_encoder_outputs"):
        return kwargs
    positions = type(model)._prepare_position_ids_for_generation
    own = positions is not GenerationMixin._prepare_position_ids_for_generation
    cache = kwargs.get(cache_name)
    fresh = cache is None or cache.get_seq_length() == 0  # later ones follow from the positions of the first call
    if own and fresh and kwargs.get("position_ids") is None:
        encoded["position_ids"] = positions(model, _tokens(kwargs), kwargs)
    return encoded


def _tokens(kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What is ``[B, S, ...]`` among the arguments of a decoder: ids, or embeddings."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    found = next((kwargs[name] for name in names if kwargs.get(name) is not None), None)
    if found is None:
        raise TokcompileError("forward got neither input_ids nor inputs_embeds")
    return found


class _Prefill:
    def __init__(self, result: Any, held: list[torch.Tensor] | None) -> None:
        self.result, self.held = result, held

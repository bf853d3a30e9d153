"""The forward of an optimized model: image encoder first, then the captured graph; the cache is told what it holds."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokcompile.capture.failures import explain_failure
from tokcompile.errors import CacheError, TokcompileError
from tokcompile.kinds import MERGED, Stage
from tokcompile.runtime.cache import adopt, append_held, cache_argument, layers_of, note_held
from tokcompile.runtime.calls import Call
from tokcompile.runtime.compiled_call import CAPTURE_FAILURES, CompiledStage, by_name, captured_only
from tokcompile.runtime.drafts import in_two
from tokcompile.runtime.encoders import detach_scores
from tokcompile.runtime.everyday import settle
from tokcompile.runtime.fallback import Failures
from tokcompile.runtime.gate import apart, captures
from tokcompile.runtime.session import Session

VISUAL_MASK = "visual_mask"


class Forward:
    """The forward of an optimized model. A copy of the model (or a pickle) gets one of its own, bound to the copy."""

    def __init__(self, owner: nn.Module, stages: Stages) -> None:
        self._tokcompile_owner, self.stages, self.settled = owner, stages, False
        functools.update_wrapper(self, types.MethodType(stages.original, owner))
        self.__code__ = getattr(stages.original, "__code__", None)  # torch.export reads it before it calls
        if stages.takes_embeddings:
            self.__signature__ = _with_visual_mask(inspect.signature(types.MethodType(stages.original, owner)))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # a part of the graph of a model around this one
            if not captures():
                return apart(self, args, kwargs)
            return self.stages.original(self._tokcompile_owner, *args, **kwargs)
        _refuse_tracers()
        if not self.settled:
            settle(self._tokcompile_owner)
            self.settled = True
        return self.stages(self._tokcompile_owner, args, kwargs)

    @property
    def owner(self) -> nn.Module:
        """The model that this is the forward of."""
        return self._tokcompile_owner

    def __reduce__(self) -> tuple[Any, ...]:
        return Forward, (self._tokcompile_owner, self.stages)


def _refuse_tracers() -> None:
    """Raise where something else than Dynamo takes the model apart: it would find the dense one, or nothing."""
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    who = "torch.export" if torch.compiler.is_exporting() else "torch.jit.trace" if traced else ""
    if who:
        raise TokcompileError(
            f"{who} cannot take an optimized model: its graphs are made when it is called. For files, "
            "tokcompile.export_onnx(model, inputs, folder, recipe=...) exports the original model with the recipe; "
            "tokcompile.save_pretrained keeps the optimized one"
        )


def _with_visual_mask(signature: inspect.Signature) -> inspect.Signature:
    """``generate()`` hands on what the signature of ``forward`` names."""
    new = inspect.Parameter(VISUAL_MASK, inspect.Parameter.KEYWORD_ONLY, default=None)
    known = list(signature.parameters.values())
    last = len(known) - any(p.kind is p.VAR_KEYWORD for p in known)
    return signature.replace(parameters=[*known[:last], new, *known[last:]])


class Stages:
    """Runs one call: image encoder first, then the captured forward, with the cache told what it holds."""

    def __init__(self, kind: type[nn.Module], session: Session) -> None:
        self.kind, self.session, self.failures = kind, session, Failures()
        self.original = original = kind.forward
        self.parameters = parameters = inspect.signature(original).parameters
        self.takes_features, self.cache_name = "mm_encoder_outputs" in parameters, cache_argument(parameters) or ""
        cache_name = self.cache_name
        merges = any(method.regions in MERGED for _, method in session.passes)
        self.tracks_cache = bool(cache_name) and merges
        self.takes_embeddings = "inputs_embeds" in parameters and merges

        def plain(model: nn.Module, kwargs: dict[str, Any]) -> Any:
            captured_only()
            return original(model, **_merged(kwargs))

        def tracked(model: nn.Module, kwargs: dict[str, Any], scores: torch.Tensor | None) -> Any:
            captured_only()
            # first, so that the scores are in front of whatever uses them
            marked = None if scores is None else torch.ops.tokcompile.visual_scores(scores)
            result = original(model, **_merged(kwargs))
            held = []
            for layer in kwargs[cache_name].layers:
                if layer.is_initialized:
                    rows, length = layer.keys.shape[0], layer.keys.shape[-2]
                    positions = torch.arange(length, device=layer.keys.device)[None].expand(rows, length)
                    held.append(torch.ops.tokcompile.held(layer.keys, positions))
            return result, held, marked

        def uncached(model: nn.Module, kwargs: dict[str, Any], scores: torch.Tensor | None) -> Any:
            captured_only()
            marked = None if scores is None else torch.ops.tokcompile.visual_scores(scores)
            return original(model, **_merged(kwargs)), None, marked

        self.forward = CompiledStage(plain, session, Stage.FORWARD, by_values=not self.cache_name)
        self.prefill = CompiledStage(plain, session, Stage.PREFILL)
        self.decode = CompiledStage(plain, session, Stage.DECODE, dynamic=True)  # no two steps have one length
        self.tracked = CompiledStage(tracked, session, Stage.PREFILL)
        self.uncached = CompiledStage(uncached, session, Stage.PREFILL)

    def __reduce__(self) -> tuple[Any, ...]:
        return Stages, (self.kind, self.session)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.session.calls.enter()
        self.session.check_sources(model)
        kwargs = by_name(self.original, model, args, kwargs)
        if self.cache_name == "cache" and "past_key_values" in kwargs:  # its older name
            kwargs = {**kwargs, "cache": kwargs["past_key_values"]}
            del kwargs["past_key_values"]
        prompt, cache = self.session.calls.prompt_length, kwargs.get(self.cache_name)
        if prompt is not None and cache is not None and cache.get_seq_length() == 0:
            total = _tokens(kwargs).shape[1]
            if total > prompt:
                return in_two(functools.partial(self._run, model), kwargs, prompt, total)
        return self._run(model, kwargs)

    def _run(self, model: nn.Module, kwargs: dict[str, Any]) -> Any:
        if self.takes_embeddings:
            kwargs = self._with_images(kwargs)
        if self.takes_features and kwargs.get("mm_encoder_outputs") is None:
            kwargs = _encode_first(model, kwargs, self.cache_name, self.parameters)
        if self.tracks_cache:
            return self._with_cache(model, kwargs)
        compiled = self.forward
        if self.cache_name:
            cache = kwargs.get(self.cache_name)
            one = cache is not None and cache.get_seq_length() > 0 and _tokens(kwargs).shape[1] == 1
            compiled = self.decode if one else self.prefill
        return self._stage(compiled, model, kwargs)

    def _with_images(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Embeddings that were merged with image features before this call, taken apart by their visual mask.

        Raises:
            TokcompileError: a mask of another form, or one without embeddings.
        """
        given, embeddings = kwargs.get(VISUAL_MASK), kwargs.get("inputs_embeds")
        kwargs = {name: value for name, value in kwargs.items() if name != VISUAL_MASK}
        cache = kwargs.get(self.cache_name) if self.cache_name else None
        later = cache is not None and cache.get_seq_length() > 0
        if embeddings is None:
            if given is not None and not later:
                raise TokcompileError(
                    "visual_mask says which of inputs_embeds are of images, and this call has none; "
                    "leave it out, or pass inputs_embeds"
                )
            return kwargs
        mask = given
        if mask is None and self.session.visual_mask is not None:
            mask = self.session.visual_mask(kwargs)
        if mask is None:
            mask = self.session.calls.visual_mask
            if mask is None or mask.shape[1] != embeddings.shape[1] or len(embeddings) % len(mask):
                return kwargs
            mask = mask.repeat_interleave(len(embeddings) // len(mask), 0)  # beams, and several answers to a prompt
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
            raise TokcompileError(
                "visual_mask is a bool tensor [B, S], True for the tokens of images, not "
                + (f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__)
            )
        if mask.shape != embeddings.shape[:2]:
            if later:
                return kwargs
            raise TokcompileError(
                f"visual_mask is {list(mask.shape)}, inputs_embeds are {list(embeddings.shape[:2])} tokens"
            )
        if not bool(mask.any()):
            return kwargs
        mask = mask.to(embeddings.device)
        return {**kwargs, VISUAL_MASK: mask, _FEATURES: embeddings[mask]}

    def _with_cache(self, model: nn.Module, kwargs: dict[str, Any]) -> Any:
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            config: Any = getattr(model, "config", None)
            text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
            use_cache = bool(getattr(text, "use_cache", True))
        if kwargs.get(self.cache_name) is None:
            if not use_cache:
                return self._stage(self.uncached, model, kwargs).result
            from transformers import DynamicCache

            kwargs = {**kwargs, self.cache_name: DynamicCache(config=model.config)}  # type: ignore[arg-type]
        cache = kwargs[self.cache_name]
        count = _tokens(kwargs).shape[1]
        if hasattr(cache, "cross_attention_cache"):  # of a decoder that reads an encoder: nothing tracks what it keeps
            one = count == 1 and cache.get_seq_length() > 0
            found = self._stage(self.decode if one else self.uncached, model, kwargs)
            return found.result if isinstance(found, _Prefill) else found
        adopt(cache)
        if count == 1:
            result = self._stage(self.decode, model, kwargs)
            append_held(layers_of(cache), 1)
            return result
        past = cache.get_seq_length()
        found = self._stage(self.tracked, model, kwargs)
        if found.held is not None:
            note_held(layers_of(cache), found.held, past + count)
        return found.result

    def _stage(self, compiled: CompiledStage, model: nn.Module, kwargs: dict[str, Any]) -> Any:
        """Run a stage compiled, or as it is where it cannot be captured; tracked prefills give a :class:`_Prefill`.

        Raises:
            CacheError: it cannot be captured, and the cache has lost tokens.
            NoMatchError: see :meth:`Session.fell_back`.
        """
        stage, prefill = compiled.stage, compiled in (self.tracked, self.uncached)
        scores: tuple[Any, ...] = (None,) if prefill else ()
        if prefill and self.session.scored_features and kwargs.get("mm_encoder_outputs"):
            outputs, rows = detach_scores(kwargs["mm_encoder_outputs"])
            kwargs, scores = {**kwargs, "mm_encoder_outputs": outputs}, (rows,)
        reason = self.failures.known(stage, kwargs)
        if reason is None:
            try:
                result = compiled(model, kwargs, *scores)
            except CAPTURE_FAILURES as error:
                reason = explain_failure(error)
                self.failures.note(stage, kwargs, reason)
            else:
                self.session.served(stage)
                return _Prefill(result[0], result[1]) if prefill else result
        self._check_cache(kwargs, stage, reason)
        with self.session.calls.open(Call()) as call:
            result = self.original(model, **_merged(kwargs))  # a mistake of the caller is told by the model itself
        if not call.reached:
            self.session.fell_back(stage, reason)
        return _Prefill(result, None) if prefill else result

    def _check_cache(self, kwargs: dict[str, Any], stage: Stage, reason: str) -> None:
        cache = kwargs.get(self.cache_name) if self.cache_name else None
        if any(layer.held is not None for layer in layers_of(cache)):
            raise CacheError(
                f"this call cannot be captured as a graph ({reason}), and its cache has lost tokens, "
                f"which the uncompiled {stage} cannot make up for; make the call as the others that work "
                "(without output_attentions, say), or start from a fresh cache"
            )


_FEATURES = "visual_features"


def _merged(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model. Image features go back to where they were, by an operation that shows it."""
    if _FEATURES not in kwargs:
        return kwargs
    kwargs = dict(kwargs)
    embeddings, mask, features = kwargs["inputs_embeds"], kwargs.pop(VISUAL_MASK), kwargs.pop(_FEATURES)
    kwargs["inputs_embeds"] = embeddings.masked_scatter(mask[..., None].expand_as(embeddings), features)
    return kwargs


def _encode_first(
    model: Any, kwargs: dict[str, Any], cache_name: str, parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """The arguments of ``forward`` with images encoded, as ``generate()`` hands them to its first forward.

    Arguments of the encoders leave the call; those that forward cannot do without become None. Some models read their
    positions off these (the grids of patches of three-dimensional RoPE), so such positions are made here, as
    ``generate()`` does, or they would be lost.
    """
    from transformers import GenerationMixin

    encoded = model._prepare_multimodal_encoder_kwargs_for_generation(dict(kwargs))
    if not encoded.get("mm_encoder_outputs"):
        return kwargs
    for name in kwargs:
        if name not in encoded and name in parameters and parameters[name].default is inspect.Parameter.empty:
            encoded[name] = None
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

"""The forward of an optimized model: image encoder first, then the captured graph; the cache is told what it holds."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from tokcompile.cache import adopt, append_held, cache_argument, layers_of, note_held
from tokcompile.capture import DYNAMO_CONFIG
from tokcompile.errors import TokcompileError
from tokcompile.session import Session
from tokcompile.state import NAMESPACE

Model = TypeVar("Model", bound=nn.Module)

#: What Dynamo raises when it cannot capture a stage as one graph.
_CAPTURE_FAILURES = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.InternalTorchDynamoError,
                     torch._dynamo.exc.FailOnRecompileLimitHit,
                     torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode)

_CHECKS = "TRANSFORMERS_DISABLE_TORCH_CHECK"
_LOSES_CHECKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 12)

#: Attribute of an optimized model that holds its session.
SESSION = "_tokcompile_session"


def share(model: Model) -> Model:
    """A copy of the module tree over the memory of the same parameters and buffers.

    Parameters are objects of their own, so ``.to()``, ``.requires_grad_()`` and ``.grad`` of the one leave the other
    alone; what is written into them in place (an optimizer step, ``load_state_dict``) shows in both.
    """
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:  # others (quantised ones) know best what they are
            alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            alias.__dict__.update(parameter.__dict__)
            memo[id(parameter)] = alias
    return copy.deepcopy(model, memo)


def run(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """One call of ``generate`` where ``inputs`` has arguments that only it takes, else of ``forward``."""
    known = inspect.signature(model.forward).parameters
    if hasattr(model, "generate") and any(k not in known for k in inputs):
        model.generate(**inputs)  # type: ignore[operator]
    else:
        model(**inputs)


def run_once(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """As :func:`run`, without gradients and for two new tokens at most."""
    limited = dict(inputs)
    if "max_new_tokens" in inputs:
        limited["max_new_tokens"] = min(int(inputs["max_new_tokens"]), 2)
    elif hasattr(model, "generate") and any(k not in inspect.signature(model.forward).parameters for k in inputs):
        limited["max_new_tokens"] = 2
    with torch.no_grad():
        run(model, limited)


def install(model: nn.Module, session: Session) -> None:
    """Give ``model`` a forward that captures, rewrites and runs the original one."""
    stages = _Stages(type(model), session)
    model.forward = _Forward(model, stages)
    if session.prepared is not None:
        model.add_module(NAMESPACE, session.prepared)
    object.__setattr__(model, SESSION, session)
    _settle(model)
    encoder = _own_encoder(model)
    if encoder is not None:
        object.__setattr__(encoder, "forward", _SequenceEncoder(model, type(encoder).forward, session))
    base = getattr(model, "base_model", None)
    if stages.takes_features and base is not None:
        for name in ("get_image_features", "get_video_features"):
            if getattr(base, name, None) is not None:
                object.__setattr__(base, name, _Encoder(base, name, session))


def _own_encoder(model: Any) -> nn.Module | None:
    """The encoder of an encoder-decoder model: ``generate()`` calls it by itself, ahead of every forward."""
    if "encoder_outputs" not in inspect.signature(type(model).forward).parameters or not hasattr(model, "get_encoder"):
        return None
    encoder = model.get_encoder()
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def _settle(model: nn.Module) -> None:
    """Do now what transformers does under a lock at the first call; Dynamo cannot trace a lock."""
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:
        return
    flag = "_output_capturing_hooks_installed"
    for module in model.modules():
        function: Any = type(module).forward
        captures = False
        while function is not None and not captures:
            captures = "capture_outputs" in getattr(getattr(function, "__code__", None), "co_qualname", "")
            function = getattr(function, "__wrapped__", None)
        # a model installs the hooks of the models inside it, and a second set would record everything twice
        if captures and not any(getattr(inner, flag, False) for inner in module.modules()):
            maybe_install_capturing_hooks(module)  # type: ignore[arg-type]


def uninstall(model: nn.Module) -> None:
    encoder = _own_encoder(model)
    if encoder is not None:
        encoder.__dict__.pop("forward", None)
    for owner in (model, getattr(model, "base_model", None)):
        for name in ("forward", "get_image_features", "get_video_features", SESSION):
            if owner is not None:
                owner.__dict__.pop(name, None)
    model._modules.pop(NAMESPACE, None)


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy with a code object of its own: Dynamo counts recompilations for each code object."""
    code = function.__code__.replace(co_name=function.__name__)
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__,
                              function.__closure__)


def _compiled(function: Callable[..., Any], session: Session, *, dynamic: bool = False) -> Callable[..., Any]:
    """``function`` captured as one graph.

    Args:
        dynamic: sizes are symbolic from the start; else, as in ``torch.compile``, from the second size on. What
            cannot be captured with static sizes is tried once more with symbolic ones.
    """

    def compiled(dynamic: bool | None) -> Callable[..., Any]:
        return torch.compile(_fresh(function), backend=session.backend, dynamic=dynamic, fullgraph=True)

    inner = compiled(True if dynamic else None)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal inner, dynamic
        with torch._dynamo.config.patch(**DYNAMO_CONFIG), _open_forms():
            try:
                return inner(*args, **kwargs)
            except _CAPTURE_FAILURES:
                if dynamic:
                    raise
                inner, dynamic = compiled(True), True
                return inner(*args, **kwargs)

    return call


@contextlib.contextmanager
def _open_forms() -> Iterator[None]:
    """Ask for forms that can be captured.

    nn.TransformerEncoder's inference fast path is one opaque operation. torch before 2.12 loses track of the checks
    that transformers makes on tensors while it compiles (PendingUnbackedSymbolNotFound); they have a switch.
    """
    fastpath, checks = torch.backends.mha.get_fastpath_enabled(), os.environ.get(_CHECKS)
    torch.backends.mha.set_fastpath_enabled(False)
    if _LOSES_CHECKS:
        os.environ[_CHECKS] = "1"
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        if _LOSES_CHECKS:
            os.environ.pop(_CHECKS, None)
            os.environ |= {} if checks is None else {_CHECKS: checks}


class _Forward:
    """The forward of an optimized model. A copy of the model (or a pickle) gets one of its own, bound to the copy."""

    def __init__(self, owner: nn.Module, stages: _Stages) -> None:
        self.owner, self.stages = owner, stages
        functools.update_wrapper(self, types.MethodType(stages.original, owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stages(self.owner, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Forward, (self.owner, self.stages)


class _EncoderStage:
    """An encoder as a stage of its own; runs uncompiled where it cannot be captured."""

    session: Session
    compiled: Callable[..., Any] | None

    def captured(self, *args: Any) -> Any:
        """What the captured encoder gives; None where there is none."""
        if self.compiled is None:
            return None
        try:
            with self.session.at_stage("encoder"):
                return self.compiled(*args)
        except _CAPTURE_FAILURES as error:
            self.session.note_uncaptured("encoder", error)
            self.compiled = None
            return None


class _Encoder(_EncoderStage):
    """The image encoder ``base.<name>``."""

    def __init__(self, base: nn.Module, name: str, session: Session) -> None:
        self.base, self.name, self.session = base, name, session
        self.original = original = getattr(type(base), name)
        functools.update_wrapper(self, types.MethodType(original, base))

        def encode(base: nn.Module, kwargs: dict[str, Any]) -> Any:
            return original(base, **kwargs), None

        def encode_and_score(base: nn.Module, kwargs: dict[str, Any]) -> Any:
            result = original(base, **kwargs)
            rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in result.pooler_output])
            return result, torch.ops.tokcompile.feature_scores(rows)

        self.compiled = _compiled(encode_and_score if session.wants_scores else encode, session)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = _by_name(self.original, self.base, args, kwargs)
        found = self.captured(self.base, kwargs)
        if found is None:
            return self.original(self.base, **kwargs)
        result, scores = found
        if self.session.scored_features:
            _attach(result, scores)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _Encoder, (self.base, self.name, self.session)


class _SequenceEncoder(_EncoderStage):
    """The encoder of an encoder-decoder model, called by itself; inside a forward it is a part of that graph."""

    def __init__(self, model: Any, original: Callable[..., Any], session: Session) -> None:
        self.model, self.original, self.session = model, original, session
        functools.update_wrapper(self, types.MethodType(original, model))  # for the signature

        def encode(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return original(model.get_encoder(), *args, **kwargs)

        self.compiled = _compiled(encode, session)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = None if torch.compiler.is_compiling() else self.captured(self.model, args, kwargs)
        return self.original(self.model.get_encoder(), *args, **kwargs) if found is None else found

    def __reduce__(self) -> tuple[Any, ...]:
        return _SequenceEncoder, (self.model, self.original, self.session)


def _attach(result: Any, scores: torch.Tensor) -> None:
    """Let scores travel with the image features, as their last column: whatever reorders features reorders both."""
    parts, start = [], 0
    for features in result.pooler_output:
        count = features.numel() // features.shape[-1]
        column = scores[start: start + count].reshape(*features.shape[:-1], 1).to(features.dtype)
        parts.append(torch.cat([features, column], -1))
        start += count
    whole = isinstance(result.pooler_output, torch.Tensor)
    result.pooler_output = torch.stack(parts) if whole else type(result.pooler_output)(parts)


def _detach(outputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Undo :func:`_attach`: the features as the model knows them, and the scores of all rows."""
    plain, scores = {}, []
    for name, output in outputs.items():
        new = copy.copy(output)
        pooled = output.pooler_output
        scores += [f[..., -1].reshape(-1) for f in pooled]
        stripped = [f[..., :-1].contiguous() for f in pooled]
        new.pooler_output = torch.stack(stripped) if isinstance(pooled, torch.Tensor) else type(pooled)(stripped)
        plain[name] = new
    return plain, torch.cat(scores)


def _by_name(function: Callable[..., Any], owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name, without those left at their default."""
    if not args:
        return kwargs
    signature = inspect.signature(function)
    bound = signature.bind(owner, *args, **kwargs).arguments
    named = dict(list(bound.items())[1:])
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD and parameter.name in named:
            named.update(named.pop(parameter.name))
        if parameter.kind is parameter.VAR_POSITIONAL and named.get(parameter.name):
            raise TokcompileError(f"forward with *{parameter.name} cannot be captured; pass arguments by name")
    return named


class _Stages:
    """Runs one call: image encoder first, then the captured forward, with the cache told what it holds."""

    def __init__(self, kind: type[nn.Module], session: Session) -> None:
        self.kind, self.session = kind, session
        self.original = original = kind.forward
        parameters = inspect.signature(original).parameters
        self.takes_features, self.cache_name = "mm_encoder_outputs" in parameters, cache_argument(parameters) or ""
        cache_name = self.cache_name
        session.tracks_cache = bool(cache_name) and any(
            method.regions in ("merge_point", "decoder_stack") for _, method in session.passes)

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

        self.plain = _compiled(plain, session)
        self.decode = _compiled(plain, session, dynamic=True)  # no two decode steps have one length
        self.tracked = _compiled(tracked, session)
        self.uncached = _compiled(uncached, session)
        self.failed: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Stages, (self.kind, self.session)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = _by_name(self.original, model, args, kwargs)
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
            outputs, rows = _detach(kwargs["mm_encoder_outputs"])
            kwargs, scores = {**kwargs, "mm_encoder_outputs": outputs}, (rows,)
        if name not in self.failed:
            try:
                with self.session.at_stage(name):
                    result = compiled(model, kwargs, *scores)
                return _Prefill(result[0], result[1]) if prefill else result
            except _CAPTURE_FAILURES as error:
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

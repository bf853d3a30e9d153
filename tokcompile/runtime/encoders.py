"""Encoders as stages of their own."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokcompile.capture.failures import explain_failure
from tokcompile.kinds import Stage
from tokcompile.runtime.compiled_call import CAPTURE_FAILURES, CompiledStage, by_name, captured_only
from tokcompile.runtime.fallback import Failures
from tokcompile.runtime.gate import apart, captures
from tokcompile.runtime.session import Session


class _EncoderStage:
    """An encoder as a stage of its own; a call that cannot be captured runs uncompiled."""

    session: Session
    compiled: CompiledStage
    failures: Failures

    def run(self, given: Any, original: Callable[[], Any], *args: Any) -> tuple[Any, bool]:
        """What the captured encoder gives for ``args``, else what ``original()`` does; and whether it was captured.

        Args:
            given: the arguments of the call.
        """
        stage = self.compiled.stage
        reason = self.failures.known(stage, given)
        if reason is None:
            try:
                found = self.compiled(*args)
            except CAPTURE_FAILURES as error:
                reason = explain_failure(error)
                self.failures.note(stage, given, reason)
            else:
                self.session.served(stage)
                return found, True
        found = original()
        self.session.fell_back(stage, reason)
        return found, False


class Encoder(_EncoderStage):
    """The image encoder ``base.<name>``."""

    def __init__(self, base: nn.Module, name: str, session: Session) -> None:
        self.base, self.name, self.session, self.failures = base, name, session, Failures()
        self.original = original = getattr(type(base), name)
        functools.update_wrapper(self, types.MethodType(original, base))

        def encode(base: nn.Module, kwargs: dict[str, Any]) -> Any:
            captured_only()
            return original(base, **kwargs), None

        def encode_and_score(base: nn.Module, kwargs: dict[str, Any]) -> Any:
            captured_only()
            result = original(base, **kwargs)
            rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in result.pooler_output])
            return result, torch.ops.tokcompile.feature_scores(rows)

        self.compiled = CompiledStage(
            encode_and_score if session.wants_scores else encode, session, Stage.ENCODER, merges=False, by_values=True
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if not captures():
                return apart(self, args, kwargs)
            return self.original(self.base, *args, **kwargs)
        kwargs = by_name(self.original, self.base, args, kwargs)
        found, captured = self.run(kwargs, lambda: self.original(self.base, **kwargs), self.base, kwargs)
        if not captured:
            return found
        result, scores = found
        if self.session.scored_features:
            attach_scores(result, scores)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.base, self.name, self.session)


class SequenceEncoder(_EncoderStage):
    """The encoder of an encoder-decoder model, called by itself; inside a forward it is a part of that graph."""

    def __init__(self, model: Any, original: Callable[..., Any], session: Session) -> None:
        self.model, self.original, self.session, self.failures = model, original, session, Failures()
        functools.update_wrapper(self, types.MethodType(original, model))  # for the signature

        def encode(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            captured_only()
            return original(model.get_encoder(), *args, **kwargs)

        self.compiled = CompiledStage(encode, session, Stage.ENCODER)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if not captures():
                return apart(self, args, kwargs)
            return self.original(self.model.get_encoder(), *args, **kwargs)
        return self.run(
            (args, kwargs),
            lambda: self.original(self.model.get_encoder(), *args, **kwargs),
            self.model,
            args,
            kwargs,
        )[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return SequenceEncoder, (self.model, self.original, self.session)


class Part(_EncoderStage):
    """A module inside a model, or a method of it, that some method other than ``forward`` calls by itself."""

    def __init__(self, owner: nn.Module, name: str, session: Session, stage: Stage = Stage.ENCODER) -> None:
        self._tokcompile_owner, self.name, self.session, self.stage, self.failures = (
            owner,
            name,
            session,
            stage,
            Failures(),
        )
        self.original = original = getattr(type(owner), name)
        functools.update_wrapper(self, types.MethodType(original, owner))

        def part(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            captured_only()
            return original(owner, *args, **kwargs)

        self.compiled = CompiledStage(part, session, stage, merges=stage is not Stage.ENCODER)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if not captures():
                return apart(self, args, kwargs)
            return self.original(self._tokcompile_owner, *args, **kwargs)
        if not any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
            return self.original(self._tokcompile_owner, *args, **kwargs)
        original = functools.partial(self.original, self._tokcompile_owner, *args, **kwargs)
        return self.run((args, kwargs), original, self._tokcompile_owner, args, kwargs)[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return Part, (self._tokcompile_owner, self.name, self.session, self.stage)


def attach_scores(result: Any, scores: torch.Tensor) -> None:
    """Let scores travel with the image features, as their last column: whatever reorders features reorders both."""
    parts, start = [], 0
    for features in result.pooler_output:
        count = features.numel() // features.shape[-1]
        column = scores[start : start + count].reshape(*features.shape[:-1], 1).to(features.dtype)
        parts.append(torch.cat([features, column], -1))
        start += count
    whole = isinstance(result.pooler_output, torch.Tensor)
    result.pooler_output = torch.stack(parts) if whole else type(result.pooler_output)(parts)


def detach_scores(outputs: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """Undo :func:`attach_scores`: the features as the model knows them, and the scores of all rows."""
    plain, scores = {}, []
    for name, output in outputs.items():
        new = copy.copy(output)
        pooled = output.pooler_output
        scores += [f[..., -1].reshape(-1) for f in pooled]
        stripped = [f[..., :-1].contiguous() for f in pooled]
        new.pooler_output = torch.stack(stripped) if isinstance(pooled, torch.Tensor) else type(pooled)(stripped)
        plain[name] = new
    return plain, torch.cat(scores)

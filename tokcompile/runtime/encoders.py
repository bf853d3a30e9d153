"""Encoders as stages of their own."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokcompile.runtime.compiled_call import CAPTURE_FAILURES, by_name, compile_stage
from tokcompile.runtime.session import Session


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
        except CAPTURE_FAILURES as error:
            self.session.note_uncaptured("encoder", error)
            self.compiled = None
            return None


class Encoder(_EncoderStage):
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

        self.compiled = compile_stage(encode_and_score if session.wants_scores else encode, session, by_values=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = by_name(self.original, self.base, args, kwargs)
        found = self.captured(self.base, kwargs)
        if found is None:
            return self.original(self.base, **kwargs)
        result, scores = found
        if self.session.scored_features:
            attach_scores(result, scores)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.base, self.name, self.session)


class SequenceEncoder(_EncoderStage):
    """The encoder of an encoder-decoder model, called by itself; inside a forward it is a part of that graph."""

    def __init__(self, model: Any, original: Callable[..., Any], session: Session) -> None:
        self.model, self.original, self.session = model, original, session
        functools.update_wrapper(self, types.MethodType(original, model))  # for the signature

        def encode(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return original(model.get_encoder(), *args, **kwargs)

        self.compiled = compile_stage(encode, session)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = None if torch.compiler.is_compiling() else self.captured(self.model, args, kwargs)
        return self.original(self.model.get_encoder(), *args, **kwargs) if found is None else found

    def __reduce__(self) -> tuple[Any, ...]:
        return SequenceEncoder, (self.model, self.original, self.session)


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

"""Assisted decoding: the first call has drafted tokens behind the prompt, and these must not choose for it.

``generate()`` with an assistant (or with a lookup in the prompt) hands the prompt and the first draft to ``forward`` at
once. A pass whose last tokens choose would take other tokens than without a draft. So such a call is made in two: the
prompt, then the draft on the cache of the prompt.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tokcompile.runtime.calls import Call
from tokcompile.runtime.session import Session


class PromptLength:
    """``generate()``, which notes how long the prompt is."""

    def __init__(self, owner: nn.Module, session: Session) -> None:
        self._tokcompile_owner, self.session = owner, session
        functools.update_wrapper(self, types.MethodType(type(owner).generate, owner))  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = (kwargs[name] for name in ("input_ids", "inputs") if kwargs.get(name) is not None)
        prompt = next(named, args[0] if args else None)
        length = prompt.shape[1] if isinstance(prompt, torch.Tensor) and prompt.dim() == 2 else None
        original = type(self._tokcompile_owner).generate  # type: ignore[attr-defined]
        with self.session.calls.open(Call(prompt_length=length)):
            return original(self._tokcompile_owner, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return PromptLength, (self._tokcompile_owner, self.session)


def in_two(call: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any], prompt: int, total: int) -> Any:
    """What ``call(kwargs)`` gives for ``total`` tokens, made of a call for the first ``prompt`` and one for the rest.

    Args:
        kwargs: the arguments of a forward, with a cache that is empty.
    """
    first, rest = dict(kwargs), dict(kwargs)
    for name, value in kwargs.items():
        numbers = isinstance(value, torch.Tensor) and (name == "attention_mask" or not value.is_floating_point())
        if numbers and value.dim() in (2, 3) and value.shape[-1] == total:
            first[name] = value[..., :prompt]
            rest[name] = value if name == "attention_mask" else value[..., prompt:]
        elif name == "mm_encoder_outputs" or (isinstance(value, torch.Tensor) and value.is_floating_point()):
            rest[name] = None  # images are in the prompt
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, int) and keep:
        first["logits_to_keep"], rest["logits_to_keep"] = max(keep - (total - prompt), 1), min(keep, total - prompt)
    one, other = call(first), call(rest)
    logits = torch.cat([one.logits, other.logits], 1)
    other.logits = logits[:, -keep:] if isinstance(keep, int) and keep else logits
    states = [getattr(result, "hidden_states", None) for result in (one, other)]
    if all(isinstance(state, tuple) for state in states):
        other.hidden_states = tuple(torch.cat(pair, 1) for pair in zip(*states, strict=True))
    return other


def drafts(model: nn.Module) -> bool:
    """Whether ``generate()`` of a model can hand drafted tokens to its forward."""
    known = inspect.signature(type(model).forward).parameters
    return hasattr(type(model), "_assisted_decoding") and "encoder_outputs" not in known

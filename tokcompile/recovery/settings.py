"""The settings of one training run: checked, told apart, and the learning rate over the steps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokcompile.errors import RecoveryError
from tokcompile.recovery.losses import LOSSES, SsToken, Tip, TokenChoice


def check_arguments(
    loss: str,
    tokens: str | TokenChoice,
    temperature: float,
    accumulation: int,
    steps: int | None,
    epochs: int,
    save_every: int,
) -> TokenChoice | None:
    for name, value in (
        ("accumulation", accumulation),
        ("steps", 1 if steps is None else steps),
        ("epochs", epochs),
        ("save_every", save_every),
    ):
        if value < 1:
            raise RecoveryError(f"{name}={value}: expected at least 1")
    if temperature <= 0:
        raise RecoveryError(f"temperature={temperature}: expected a number above 0")
    if loss not in LOSSES:
        raise RecoveryError(f"loss={loss!r}: choose one of {', '.join(LOSSES)}")
    if isinstance(tokens, (Tip, SsToken)):
        return tokens
    choices: dict[str, TokenChoice | None] = {"all": None, "tip": Tip(), "sstoken": SsToken()}
    if tokens not in choices:
        raise RecoveryError(f"tokens={tokens!r}: choose all, tip, sstoken, or a Tip or SsToken object")
    return choices[tokens]


def lr_schedule(name: str, optimizer: torch.optim.Optimizer, warmup: float, steps: int) -> Any:
    from transformers import get_scheduler

    try:
        return get_scheduler(name, optimizer, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
    except ValueError as error:
        raise RecoveryError(f"schedule={name!r}: {error}") from error


def run_digest(parameters: Mapping[str, nn.Parameter]) -> str:
    text = ";".join(f"{n}{tuple(p.shape)}{p.dtype}" for n, p in parameters.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]

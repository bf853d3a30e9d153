"""Recovery: train a compressed model to give the logits of the dense one again: :func:`recover`. Needs accelerate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from os import PathLike
from typing import Any

import torch
from torch import nn

from tokcompile.errors import RecoveryError
from tokcompile.recovery.data import Item, Stream
from tokcompile.recovery.losses import LossKind, TokenChoice
from tokcompile.recovery.parameters import chosen_parameters, own_memory, training_mode
from tokcompile.recovery.report import RecoveryReport
from tokcompile.recovery.settings import check_arguments, lr_schedule, run_digest
from tokcompile.recovery.step import Run, train


def recover(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Item],
    *,
    steps: int | None = None,
    epochs: int = 1,
    trainable: str | Sequence[str] = "prepared",
    loss: LossKind = "forward_kl",
    temperature: float = 1.0,
    hidden_weight: float = 0.0,
    tokens: str | TokenChoice = "all",
    lr: float = 1e-4,
    schedule: str = "cosine",
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    accumulation: int = 1,
    seed: int = 0,
    checkpoints: str | PathLike[str] | None = None,
    save_every: int = 100,
    progress: bool = False,
    accelerator: Any = None,
) -> RecoveryReport:
    """Train ``model`` in place to agree with ``teacher`` on the logits of ``data``.

    Each item of ``data`` is one batch for one process. A step takes ``accumulation`` items for each process; started by
    ``accelerate launch`` on n processes it takes n times as many, and does what one process does with n times the
    ``accumulation``. Logits are compared at the positions of the original sequence that both models have: text for a
    model that lost visual tokens, the positions before a label where the items have ``labels`` (-100: none).

    Dropout acts where ``model`` is in training mode; the teacher is always in evaluation mode.

    Args:
        model: what :func:`tokcompile.optimize` returned. Whatever is trained gets memory of its own first, so the
            original, which shares its parameters, is left alone.
        teacher: the original model.
        data: keyword arguments of ``forward`` (mappings), or tensors (its first argument). A sequence is shuffled
            anew in each epoch; anything else is taken in order, and again from the start if it can be.
        steps: optimizer steps; by default what ``epochs`` passes over ``data`` give.
        trainable: "prepared" (what calibration made), "norms" (parameters of modules that hold vectors only: norms,
            layer scales), "all", or glob patterns of parameter names; a list of any of these is their union.
        loss: "forward_kl" (``KL(teacher | model)``) or "reverse_kl".
        temperature: divides the logits; the loss is multiplied by its square.
        hidden_weight: weight of the squared error of all hidden states over their squared norm, beside the loss.
        tokens: "all", "tip", "sstoken", or a :class:`~tokcompile.recovery.losses.Tip` or
            :class:`~tokcompile.recovery.losses.SsToken`.
        lr, weight_decay: of AdamW. schedule: a name that ``transformers.get_scheduler`` knows.
        warmup: share of the steps in which the rate rises. max_grad_norm: gradients are clipped to this norm.
        checkpoints: a folder. The run goes on from the checkpoint in it, if any, as if it had not been interrupted,
            provided that model, data and settings are the same.
        save_every: steps between checkpoints.
        progress: show a progress bar.
        accelerator: an ``accelerate.Accelerator`` of your own, without mixed precision.

    Returns:
        Loss of each step, number of positions, and which parameters were trained.

    Raises:
        RecoveryError: data that is empty or does not fit the model, another vocabulary, nothing to train, the same
            model twice, a checkpoint of another run, or a loss that is not finite (the weights are those before).
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise RecoveryError("recover runs on accelerate; install it with pip install 'tokcompile[train]'") from error
    choice = check_arguments(loss, tokens, temperature, accumulation, steps, epochs, save_every)
    if teacher is model:
        raise RecoveryError(
            "teacher and model are one object; pass the original model as teacher (for a model that "
            "was optimized in place, a copy.deepcopy made before)"
        )
    accelerator = accelerator or Accelerator()
    if accelerator.mixed_precision != "no":
        raise RecoveryError(
            f"mixed_precision={accelerator.mixed_precision!r}: operations of rewritten graphs do not "
            "follow autocast; train in the dtype of the model (fp32, or model.to(torch.bfloat16))"
        )
    for module in (model, teacher):
        if not hasattr(module, "hf_device_map"):  # accelerate spread it over devices itself
            module.to(accelerator.device)
    parameters = chosen_parameters(model, trainable)
    own_memory(model, teacher, parameters)
    stream = Stream(data, seed)
    group = accumulation * accelerator.num_processes
    if steps is None:
        steps = stream.steps(epochs, group)
    settings = {
        "steps": steps,
        "trained": run_digest(parameters),
        "loss": loss,
        "temperature": temperature,
        "hidden_weight": hidden_weight,
        "tokens": tokens if choice is None else [type(choice).__name__, asdict(choice)],
        "lr": lr,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "accumulation": accumulation,
        "processes": accelerator.num_processes,
        "seed": seed,
    }
    with training_mode(model, teacher, parameters), torch.random.fork_rng():
        torch.manual_seed(seed + accelerator.process_index)
        run = Run(
            model,
            teacher,
            parameters,
            accelerator,
            loss=loss,
            temperature=temperature,
            hidden_weight=hidden_weight,
            choice=choice,
            accumulation=accumulation,
            max_grad_norm=max_grad_norm,
        )
        run.optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=weight_decay)
        run.scheduler = lr_schedule(schedule, run.optimizer, warmup, steps)
        return train(run, stream, steps, settings, checkpoints, save_every, progress)

"""What a user hands in, a model and inputs of it: mistakes are told in one line, with the way out."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tokcompile.errors import TokcompileError
from tokcompile.prepare.arguments import arguments

Error = type[TokcompileError]


def check_model(model: Any, what: str, error: Error = TokcompileError) -> None:
    """
    Args:
        what: the function that was called, for the message.

    Raises:
        TokcompileError: of the type ``error``; ``model`` is no module that graphs can be captured of.
    """
    if isinstance(model, str):
        raise error(
            f"{what} takes a torch.nn.Module, not the text {model[:80]!r}; load the model first, with from_pretrained "
            "of transformers say, and pass what that returns"
        )
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise error(f"{what} takes a torch.nn.Module, not the class {model.__name__}; pass an instance of it")
    if isinstance(model, torch.export.ExportedProgram):
        raise error(f"{what} takes a torch.nn.Module, not an exported program; pass the model that was exported")
    if not isinstance(model, nn.Module):
        raise error(f"{what} takes a torch.nn.Module, not {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise error(
            f"{what}: the model is compiled by torch.compile already, which hides its layers; pass the model itself "
            "(model._orig_mod), tokcompile compiles it"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise error(f"{what}: the model is TorchScript, which is captured already; pass the torch.nn.Module behind it")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise error(
            f"{what}: the model is wrapped in {type(model).__name__}, whose copies would not be the optimized one; "
            "pass the model inside (model.module)"
        )
    name = _without_values(model)
    if name is not None:
        raise error(
            f"{what}: '{name}' is on the meta device and has no values; load the weights first (from_pretrained, or "
            "to_empty() and load_state_dict)"
        )


def _without_values(model: nn.Module) -> str | None:
    """A weight on the meta device that no hook of accelerate fills when its module runs (offload)."""
    for path, module in model.named_modules():
        if not hasattr(module, "_hf_hook"):
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if tensor.is_meta:
                    return f"{path}.{name}" if path else name
    return None


def warn_of_training_mode(model: nn.Module, what: str) -> None:
    """Warn where a model in training mode computes something else than in evaluation."""
    random = next(
        (
            name
            for name, module in model.named_modules()
            if module.training
            and (
                (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
                or (isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats)
            )
        ),
        None,
    )
    if random is not None:
        kind = type(model.get_submodule(random)).__name__
        warnings.warn(
            f"{what}: the model is in training mode, in which '{random}' ({kind}) gives other results than in "
            "evaluation; call model.eval() first, unless it is to be trained",
            stacklevel=4,
        )


def check_inputs(model: nn.Module, inputs: Any, what: str, error: Error = TokcompileError) -> None:
    """
    Args:
        what: as for :func:`check_model`.

    Raises:
        TokcompileError: of the type ``error``; ``inputs`` is no mapping of arguments that the model takes.
    """
    signature = inspect.signature(model.forward)
    first = next(iter(signature.parameters), "input_ids")
    if not isinstance(inputs, Mapping):
        kind = "tensor" if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise error(
            f"{what}: inputs is a {kind}; pass a mapping of keyword arguments, such as {{{first!r}: ...}} (a dict, or "
            "what a processor or tokenizer returns)"
        )
    generate = getattr(type(model), "generate", None)
    if (
        generate is not None
        and inputs
        and set(inputs) & set(inspect.signature(generate).parameters) - {"self", "kwargs"}
    ):
        return
    arguments(model, inputs, 0, what=f"{what}: inputs", error=error, counted=False)
    required = [
        p.name
        for p in signature.parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in inputs
    ]
    if required and generate is None:
        raise error(f"{what}: inputs has the keys {sorted(inputs)}; the forward of this model also needs {required[0]}")

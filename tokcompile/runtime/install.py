"""Give a model the forward that captures, and take it away again."""

from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from tokcompile.runtime.encoders import Encoder, SequenceEncoder
from tokcompile.runtime.forward import Forward, Stages
from tokcompile.runtime.session import Session
from tokcompile.state import NAMESPACE

Model = TypeVar("Model", bound=nn.Module)
#: Attribute of an optimized model that holds its session.
SESSION = "_tokcompile_session"


def share(model: Model) -> Model:
    """A copy of the module tree over the memory of the same parameters and buffers.

    Parameters are objects of their own, so ``.to()``, ``.requires_grad_()`` and ``.grad`` of the one leave the other
    alone; what is written into them in place (an optimizer step, ``load_state_dict``) shows in both. Those that an
    optimizer steps already stay the same objects, or it would find no gradient. Adapters that are merged into shared
    weights are merged in both: the list that says so is shared too.
    """
    stepped = _stepped()
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    for parameter in model.parameters():
        if (
            type(parameter) is nn.Parameter and id(parameter) not in stepped
        ):  # others (quantised ones) know best what they are
            alias = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            alias.__dict__.update(parameter.__dict__)
            memo[id(parameter)] = alias
    for module in model.modules():
        merged = module.__dict__.get("merged_adapters")
        if isinstance(merged, list):
            memo[id(merged)] = merged
    return copy.deepcopy(model, memo)


def _stepped() -> set[int]:
    """Identities of the parameters that some optimizer of this process steps."""
    kind = torch.optim.Optimizer
    found = [item for item in gc.get_objects() if issubclass(type(item), kind)]
    return {id(p) for optimizer in found for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}


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
    stages = Stages(type(model), session)
    model.forward = Forward(model, stages)
    if session.prepared is not None:
        model.add_module(NAMESPACE, session.prepared)
    object.__setattr__(model, SESSION, session)
    _settle(model)
    encoder = _own_encoder(model)
    if encoder is not None:
        object.__setattr__(encoder, "forward", SequenceEncoder(model, type(encoder).forward, session))
    base = getattr(model, "base_model", None)
    if stages.takes_features and base is not None:
        for name in ("get_image_features", "get_video_features"):
            if getattr(base, name, None) is not None:
                object.__setattr__(base, name, Encoder(base, name, session))


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

"""Models that FSDP shards layer by layer (``fully_shard``): all layers are gathered in front of a graph.

FSDP gathers the weights of a layer by hooks, when that layer runs. A graph has no layers that run, so the weights of
all of them are gathered before it and given back behind it: as much memory as one whole model, for as long as a call
takes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_FSDP = "torch.distributed.fsdp._fully_shard"


def sharded_layers(model: nn.Module) -> list[Any]:
    """The modules inside ``model`` whose weights FSDP gathers when they run."""
    if _FSDP not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule) and module is not model]


@contextlib.contextmanager
def gathered(layers: list[Any]) -> Iterator[None]:
    """Have the weights of ``layers`` whole, without the hooks that do so one by one.

    Where gradients are asked for nothing is gathered: FSDP takes them layer by layer. Nor is anything where FSDP
    changes the type of what goes in and out of a layer.
    """
    if not layers or torch.is_grad_enabled() or any(_casts(layer) for layer in layers):
        yield
        return
    hooks = [hooks for layer in layers for hooks in (layer._forward_pre_hooks, layer._forward_hooks)]
    taken = [(place, list(place.items())) for place in hooks]
    try:
        for layer in layers:
            layer.unshard()
        for place in hooks:
            for number in [n for n, hook in place.items() if _is_fsdp(hook)]:
                del place[number]
        yield
    finally:
        for place, items in taken:
            place.clear()
            place.update(items)
        for layer in layers:
            layer.reshard()


def _is_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)


def _casts(layer: Any) -> bool:
    policy = layer._get_fsdp_state()._mp_policy
    return policy.param_dtype is not None or policy.output_dtype is not None

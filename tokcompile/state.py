"""Prepared state: what calibration made of a model, as parameters that the optimized model owns.

The state is a submodule of the optimized model, ``model.tokcompile``, so ``.to()``, ``state_dict``, training and saving
see it. A tensor has the name ``tokcompile.<pass>.<module path>.<name>``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

#: Name of the submodule of an optimized model.
NAMESPACE = "tokcompile"
#: Module path of a region that belongs to no submodule.
_ROOT = "_root"


class _Scope(nn.Module):
    """One component of a module path; the buffers ``host_buffers`` stay in host memory wherever the module is moved."""

    host_buffers: Sequence[str] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> _Scope:
        kept = {name: self._buffers[name] for name in self.host_buffers if name in self._buffers}
        for name in kept:
            self._buffers[name] = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            assert tensor is not None
            form = fn(tensor[:0])
            self._buffers[name] = fn(tensor) if form.is_meta else tensor.to(form.dtype)
        return self


class PreparedState(nn.Module):
    """Tensors and facts by pass name and region key (see :func:`tokcompile.plan.region_keys`).

    Attributes:
        facts: (pass, key) -> what else the pass has to know when it rewrites the region; JSON values only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[tuple[str, str], dict[str, Any]] = {}

    def put(
        self, pass_name: str, key: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Store the state of one region.

        Args:
            tensors: name -> tensor; an :class:`~torch.nn.Parameter` can be trained, anything else is a buffer.
            facts: JSON values. ``host``, where given: names of buffers that stay in host memory.
        """
        scope: nn.Module = self
        for part in _parts(pass_name, key):
            if part not in scope._modules:
                scope.add_module(part, _Scope())
            scope = scope._modules[part]  # type: ignore[assignment]
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                scope.register_parameter(name, tensor)
            else:
                scope.register_buffer(name, tensor)
        self.facts[pass_name, key] = dict(facts or {})
        scope.host_buffers = tuple(self.facts[pass_name, key].get("host", ()))  # type: ignore[assignment]

    def has(self, pass_name: str, key: str) -> bool:
        return (pass_name, key) in self.facts

    def scope(self, pass_name: str, key: str) -> nn.Module:
        """The module that holds the tensors of a region."""
        scope: nn.Module = self
        for part in _parts(pass_name, key):
            scope = scope._modules[part]  # type: ignore[assignment]
        return scope

    def tensors(self, pass_name: str, key: str) -> dict[str, torch.Tensor]:
        """name -> tensor of a region: the live ones."""
        scope = self.scope(pass_name, key)
        return {**dict(scope.named_parameters(recurse=False)), **dict(scope.named_buffers(recurse=False))}

    def keys(self, pass_name: str) -> Iterator[str]:
        """Keys of the regions that have state of this pass."""
        return (key for name, key in self.facts if name == pass_name)


def origin(model: nn.Module) -> dict[str, tuple[int, torch.dtype]]:
    """name -> (how often it was written to, dtype) of every tensor of the model that is not prepared state."""
    return {
        name: (tensor._version, tensor.dtype)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor) and not name.startswith(f"{NAMESPACE}.")
    }


class Sources:
    """The weights that prepared parts were made from, as they were then.

    Parts do not follow their sources: a layer of experts goes on computing with the neurons that it was given.
    """

    def __init__(self, model: nn.Module, prepared: PreparedState) -> None:
        keys = {key.split("#")[0] for _, key in prepared.facts}
        self._places = [
            (path, module, name)
            for path, module in model.named_modules()
            if not f"{path}.".startswith(f"{NAMESPACE}.") and any(_inside(path, key) for key in keys)
            for name in module._parameters
        ]
        self._seen = [_form(module, name) for _, module, name in self._places]

    def changed(self) -> list[str]:
        """Names of the parameters that were written to or exchanged since they were last asked for."""
        now = [_form(module, name) for _, module, name in self._places]
        found = [
            f"{path}.{name}"
            for (path, _, name), old, new in zip(self._places, self._seen, now, strict=True)
            if old != new and old[2:] == new[2:]  # a change of type or device is one of the parts, too
        ]
        self._seen = now
        return found


def _inside(path: str, key: str) -> bool:
    """Whether a module is the region's, or inside of it; the region may be named from a module further in."""
    return f".{path}.".find(f".{key}.") >= 0 if key else True


def _form(module: nn.Module, name: str) -> tuple[Any, ...]:
    tensor = module._parameters[name]
    if tensor is None or tensor.is_meta:
        return None, None, None, None
    version = None if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def _parts(pass_name: str, key: str) -> list[str]:
    return [pass_name, *(key.split(".") if key else [_ROOT])]

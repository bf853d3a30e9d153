"""Ways into a model that do not lead through its own forward."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tokcompile.errors import CacheError
from tokcompile.runtime.calls import Call
from tokcompile.runtime.forward import Stages
from tokcompile.runtime.gate import apart, captures
from tokcompile.runtime.session import Session


class Generate:
    """A ``generate()`` of a model's own, which calls the models inside and may never call ``forward``."""

    def __init__(self, owner: nn.Module, session: Session) -> None:
        self._tokcompile_owner, self.session = owner, session
        functools.update_wrapper(self, types.MethodType(type(owner).generate, owner))  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """
        Raises:
            NoMatchError: no graph took part, and ``on_no_match="error"``.
        """
        original = type(self._tokcompile_owner).generate  # type: ignore[attr-defined]
        given = _bound(original, self._tokcompile_owner, args, kwargs)
        with self.session.calls.open(Call(visual_mask=self._visual_mask(given))) as call:
            result = original(self._tokcompile_owner, *args, **kwargs)
        if not call.reached:
            self.session.never_reached(
                f"generate() of {type(self._tokcompile_owner).__name__}",
                "it calls neither forward nor a model inside that generates with a cache; optimize the model that it "
                "calls, or call forward",
            )
        return result

    def _visual_mask(self, given: Mapping[str, Any]) -> torch.Tensor | None:
        """The tokens of images in a prompt: as the user says, else those with the id that the configuration names."""
        if self.session.visual_mask is not None:
            found: torch.Tensor | None = self.session.visual_mask(given)
            return found
        ids, config = given.get("input_ids"), getattr(self._tokcompile_owner, "config", None)
        token = next(
            (
                t
                for name in ("image_token_id", "image_token_index")
                if isinstance(t := getattr(config, name, None), int)
            ),
            None,
        )
        return ids == token if isinstance(ids, torch.Tensor) and token is not None else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Generate, (self._tokcompile_owner, self.session)


class PassedOn:
    """The forward of a wrapper: the model inside has a captured one. A wrapper that goes past it is captured itself."""

    def __init__(self, owner: nn.Module, stages: Stages) -> None:
        self._tokcompile_owner, self.stages, self.passes_by = owner, stages, False
        functools.update_wrapper(self, types.MethodType(stages.original, owner))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if not captures():
                return apart(self, args, kwargs)
            return self.stages.original(self._tokcompile_owner, *args, **kwargs)
        if not self.passes_by:
            with self.stages.session.calls.open(Call()) as call:
                result = self.stages.original(self._tokcompile_owner, *args, **kwargs)
            if call.tried:
                return result
            self.passes_by = True
        return self.stages(self._tokcompile_owner, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return PassedOn, (self._tokcompile_owner, self.stages)


class Refused:
    """A method that would go past what the recipe does: continuous batching, with its paged cache."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self._tokcompile_owner, self.name = owner, name
        functools.update_wrapper(self, types.MethodType(getattr(type(owner), name), owner))

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """
        Raises:
            CacheError: always.
        """
        raise CacheError(
            f"{self.name}: continuous batching keeps the requests in one paged cache, and an optimized model does not "
            "serve that; call generate() with a padded batch, or use the original model"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Refused, (self._tokcompile_owner, self.name)


#: Methods for continuous batching.
BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def _bound(function: Any, owner: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    try:
        given = dict(inspect.signature(function).bind(owner, *args, **kwargs).arguments)
    except TypeError:  # a mistake of the caller, which the function itself will tell
        return dict(kwargs)
    for value in [v for v in given.values() if isinstance(v, dict)]:
        given |= value
    return given


def running_methods(model: nn.Module) -> dict[str, set[str]]:
    """Public methods of a model's own that run modules inside it, without ``forward``: each with their names.

    A model's own methods are those of its class and of bases that have, or inherit, a forward; what a library gives to
    all models is not among them.
    """
    own: dict[str, types.FunctionType] = {}
    for kind in _own_classes(type(model)):
        for name, value in vars(kind).items():
            function = None if isinstance(value, staticmethod | type) else inspect.unwrap(value)
            if isinstance(function, types.FunctionType):
                own.setdefault(name, function)
    children = {name for name, child in model.named_children() if child is not None}
    found = {}
    for name in own:
        if name.startswith("_") or name == "forward" or name in dir(nn.Module):
            continue
        if name.startswith(("get_input_", "get_output_", "set_", "resize_", "prepare_")):
            continue
        touched = _names(own, name, set()) & children
        if touched and "forward" not in _names(own, name, set()):
            found[name] = touched
    return found


def _own_classes(kind: type) -> Iterator[type]:
    bases = [base for base in kind.__mro__ if issubclass(base, nn.Module) and base is not nn.Module]
    last = max((i for i, base in enumerate(bases) if "forward" in vars(base)), default=-1)
    return iter(bases[: last + 1])


def _names(own: Mapping[str, types.FunctionType], name: str, seen: set[str]) -> set[str]:
    """The names that a method reads, and those that methods read which it calls."""
    seen.add(name)
    codes, names = [own[name].__code__], set()
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    for other in names & own.keys() - seen:
        if other != "forward":
            names |= _names(own, other, seen)
    return names

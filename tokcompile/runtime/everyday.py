"""What Python and notebooks do with an optimized model: copies, pickles, its repr, and transformers' own saving."""

from __future__ import annotations

import functools
import html
import types
import warnings
from typing import Any

from torch import nn

from tokcompile.runtime.session import Session

#: Set by transformers on a model whose layers have the hooks that record hidden states.
HOOKED = "_output_capturing_hooks_installed"
_HOOK = "output_capturing_hook"


class Unhooked:
    """``__reduce_ex__`` of a module: without the recording hooks of transformers, which cannot be pickled.

    The forward of the optimized model has them installed anew before its first call.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._tokcompile_owner = owner

    def __call__(self, protocol: Any) -> Any:
        owner = self._tokcompile_owner
        reduced: Any = type(owner).__reduce_ex__(owner, protocol)
        function, args, state, *rest = reduced
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name not in (HOOKED, "__reduce_ex__")}
            lost = [key for key, hook in owner._forward_hooks.items() if _records(hook)]
            for name, value in state.items():
                if lost and name.startswith("_forward_hooks"):
                    state[name] = type(value)((k, v) for k, v in value.items() if k not in lost)
        return function, args, state, *rest


def settle(model: nn.Module) -> None:
    """Do now what transformers does under a lock at the first call; Dynamo cannot trace a lock.

    From then on copies and pickles are made without the hooks, see :class:`Unhooked`.
    """
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:
        return
    for module in model.modules():
        function: Any = type(module).forward
        captures = False
        while function is not None and not captures:
            captures = "capture_outputs" in getattr(getattr(function, "__code__", None), "co_qualname", "")
            function = getattr(function, "__wrapped__", None)
        # a model installs the hooks of the models inside it, and a second set would record everything twice
        if captures and not any(getattr(inner, HOOKED, False) for inner in module.modules()):
            maybe_install_capturing_hooks(module)  # type: ignore[arg-type]
    for module in model.modules():
        if vars(module).get(HOOKED) or any(map(_records, module._forward_hooks.values())):
            object.__setattr__(module, "__reduce_ex__", Unhooked(module))


def _records(hook: Any) -> bool:
    return _HOOK in getattr(hook, "__qualname__", "")


class Told:
    """``extra_repr`` and ``_repr_html_`` of an optimized model: that it is one, and what the recipe did to it."""

    def __init__(self, owner: nn.Module, session: Session, name: str) -> None:
        self._tokcompile_owner, self.session, self.name = owner, session, name

    def __call__(self) -> str:
        line = "optimized by " + repr(self.session.report)
        if self.name == "_repr_html_":
            return f"<pre>{html.escape(repr(self._tokcompile_owner))}</pre>"
        own = type(self._tokcompile_owner).extra_repr(self._tokcompile_owner)
        return f"{own}\n{line}" if own else line

    def __reduce__(self) -> tuple[Any, ...]:
        return Told, (self._tokcompile_owner, self.session, self.name)


class DenseSaving:
    """transformers' ``save_pretrained``, which writes the weights and knows nothing of the recipe."""

    def __init__(self, owner: nn.Module) -> None:
        self._tokcompile_owner = owner
        functools.update_wrapper(self, types.MethodType(type(owner).save_pretrained, owner))  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            "save_pretrained of the model writes its dense weights, and the recipe stays behind; "
            "tokcompile.save_pretrained(model, folder) writes both",
            stacklevel=2,
        )
        return type(self._tokcompile_owner).save_pretrained(self._tokcompile_owner, *args, **kwargs)  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return DenseSaving, (self._tokcompile_owner,)

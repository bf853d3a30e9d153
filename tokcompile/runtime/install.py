"""Give a model the forward that captures, and take it away again."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import types
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from tokcompile.errors import TokcompileError
from tokcompile.kinds import Stage
from tokcompile.runtime.cache import cache_argument
from tokcompile.runtime.drafts import PromptLength, drafts
from tokcompile.runtime.encoders import Encoder, Part, SequenceEncoder
from tokcompile.runtime.everyday import DenseSaving, Told, Unhooked, settle
from tokcompile.runtime.forward import Forward, Stages
from tokcompile.runtime.outer import BATCHING, Generate, PassedOn, Refused, running_methods
from tokcompile.runtime.session import Session
from tokcompile.state import NAMESPACE

Model = TypeVar("Model", bound=nn.Module)
#: Attribute of an optimized model that holds its session.
SESSION = "_tokcompile_session"
_FEATURES = ("get_image_features", "get_video_features")
_INSTALLED = (
    *(Forward, PassedOn, Generate, PromptLength, Encoder, SequenceEncoder, Part),
    *(Refused, DenseSaving, Told, Unhooked),
)


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
    try:
        clone = copy.deepcopy(model, memo)
    except Exception as error:
        raise TokcompileError(
            f"the model cannot be copied: {str(error).splitlines()[0] if str(error) else type(error).__name__}; pass "
            "inplace=True to change the model itself"
        ) from error
    _own_functions(model, clone)
    return clone


def _own_functions(model: nn.Module, clone: nn.Module) -> None:
    """Functions that stand in the place of methods (``forward`` of a layer of tensor parallelism) and hold modules of
    ``model`` hold those of ``clone``: a copy of a function is the function itself."""
    pairs = list(zip(model.modules(), clone.modules(), strict=True))
    of = {id(old): new for old, new in pairs}
    copies: dict[int, types.FunctionType] = {}

    def holds(value: Any, seen: set[int]) -> bool:
        if isinstance(value, types.FunctionType) and id(value) not in seen:
            seen.add(id(value))  # it may hold itself
            return any(holds(_content(cell), seen) for cell in value.__closure__ or ())
        return id(value.__self__ if isinstance(value, types.MethodType) else value) in of

    def own(value: Any) -> Any:
        if not holds(value, set()):
            return value
        if isinstance(value, nn.Module):
            return of[id(value)]
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, of[id(value.__self__)])
        if id(value) not in copies:
            olds = value.__closure__
            cells = tuple(types.CellType() if holds(_content(cell), set()) else cell for cell in olds)
            copies[id(value)] = _like(value, cells)
            for cell, old in zip(cells, olds, strict=True):
                if cell is not old:
                    cell.cell_contents = own(_content(old))
        return copies[id(value)]

    for _, new in pairs:
        for name, value in vars(new).items():
            if isinstance(value, types.FunctionType):
                new.__dict__[name] = own(value)


def _like(value: types.FunctionType, cells: tuple[Any, ...]) -> types.FunctionType:
    """The same function over other cells."""
    made = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
    made.__kwdefaults__ = value.__kwdefaults__
    functools.update_wrapper(made, value)
    del made.__dict__["__wrapped__"]  # the modules of the original hang on it
    made.__dict__ |= {name: item for name, item in vars(value).items() if name == "__wrapped__"}
    return made


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


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


def run_once(model: nn.Module, inputs: Mapping[str, Any], decode: bool = False) -> None:
    """As :func:`run`, without gradients and for two new tokens at most.

    Args:
        decode: have a model that generates make two tokens, so that there is a decode step.
    """
    limited = dict(inputs)
    if "max_new_tokens" in inputs:
        limited["max_new_tokens"] = min(int(inputs["max_new_tokens"]), 2)
    elif decode and hasattr(model, "generate") and inputs.get("use_cache") is not False:
        limited = {k: v for k, v in inputs.items() if k != "labels"} | {"max_new_tokens": 2}
    elif hasattr(model, "generate") and any(k not in inspect.signature(model.forward).parameters for k in inputs):
        limited["max_new_tokens"] = 2
    with torch.no_grad():
        run(model, limited)


def install(model: nn.Module, session: Session) -> None:
    """Give ``model`` a forward that captures, rewrites and runs the original one, and see to other ways into it.

    A model inside that generates by itself (what a wrapper wraps, the language model of a caption model) gets a forward
    of its own: the outer ``generate()`` may call it and no other. What else such a ``generate()`` calls, and methods
    that run layers without ``forward``, are captured part by part.
    """
    inner = list(_generators(model))
    for module in inner:
        _install_one(module, session)
    stages = _install_one(model, session)
    if len(inner) == 1 and not stages.cache_name and _wraps(model, inner[0]):
        model.forward = PassedOn(model, stages)
    if session.prepared is not None:
        model.add_module(NAMESPACE, session.prepared)
    object.__setattr__(model, SESSION, session)
    settle(model)
    for name in ("extra_repr", "_repr_html_"):
        _put(model, name, Told(model, session, name))
    if callable(getattr(type(model), "save_pretrained", None)):
        _put(model, "save_pretrained", DenseSaving(model))
    holding = {name for name, child in model.named_children() if any(m in inner for m in child.modules())}
    methods = running_methods(model)
    if "generate" in methods:
        for name in methods.pop("generate") - holding:
            part = getattr(model, name)
            if "forward" not in vars(part) and any(True for _ in part.children()):
                _put(part, "forward", Part(part, "forward", session))
        _put(model, "generate", Generate(model, session))
    methods = {n: names for n, names in methods.items() if n not in vars(model) and not names & holding}
    for name in methods.keys() - (_FEATURES if stages.takes_features else ()):
        stage = Stage.FORWARD if name.startswith("forward") or len(methods) == 1 else Stage.ENCODER
        _put(model, name, Part(model, name, session, stage))


def _install_one(model: nn.Module, session: Session) -> Stages:
    stages = Stages(type(model), session)
    _put(model, "forward", Forward(model, stages))
    for name in BATCHING:
        if hasattr(type(model), name):
            _put(model, name, Refused(model, name))
    if drafts(model) and any(method.last_tokens_choose for _, method in session.passes):
        _put(model, "generate", PromptLength(model, session))
    encoder = _own_encoder(model)
    if encoder is not None:
        _put(encoder, "forward", SequenceEncoder(model, type(encoder).forward, session))
    base = getattr(model, "base_model", None)
    if stages.takes_features and base is not None:
        for name in _FEATURES:
            if getattr(base, name, None) is not None:
                _put(base, name, Encoder(base, name, session))
    return stages


def _put(owner: nn.Module, name: str, value: Any) -> None:
    object.__setattr__(owner, name, value)


def _generators(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost models inside ``model`` that generate by themselves, through a forward that takes a cache."""
    for child in model.children():
        if callable(getattr(type(child), "generate", None)) and cache_argument(
            inspect.signature(type(child).forward).parameters
        ):
            yield child
        else:
            yield from _generators(child)


def _wraps(model: nn.Module, inner: nn.Module) -> bool:
    """Whether nearly all parameters of ``model`` are those of the model inside."""
    inside = sum(p.numel() for p in inner.parameters())
    return inside > 0.95 * sum(p.numel() for p in model.parameters())


def _own_encoder(model: Any) -> nn.Module | None:
    """The encoder of an encoder-decoder model: ``generate()`` calls it by itself, ahead of every forward."""
    if "encoder_outputs" not in inspect.signature(type(model).forward).parameters or not hasattr(model, "get_encoder"):
        return None
    encoder = model.get_encoder()
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def uninstall(model: nn.Module) -> None:
    """Take away all that :func:`install` gave."""
    for module in model.modules():
        for name in [n for n, value in vars(module).items() if isinstance(value, _INSTALLED)]:
            del module.__dict__[name]
    model.__dict__.pop(SESSION, None)
    model._modules.pop(NAMESPACE, None)

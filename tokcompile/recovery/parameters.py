"""Which parameters are trained."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from tokcompile.errors import RecoveryError
from tokcompile.state import NAMESPACE

# .. what is trained


def chosen_parameters(model: nn.Module, trainable: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters by name, floating ones only."""
    every = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    chosen: dict[str, nn.Parameter] = {}
    fixed = [
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        for buffer in getattr(module, "host_buffers", ())
        if name.startswith(f"{NAMESPACE}.")
    ]
    for wish in [trainable] if isinstance(trainable, str) else trainable:
        for name in fixed:
            if wish in ("prepared", "all") or fnmatch.fnmatchcase(name, wish):
                raise RecoveryError(
                    f"trainable={wish!r}: {name} stays in host memory and cannot be trained; make the "
                    "model with table: model, or choose parameters by patterns that leave it out"
                )
        if wish == "all":
            found = every
        elif wish == "prepared":
            found = {n: p for n, p in every.items() if n.startswith(f"{NAMESPACE}.")}
            if not found:
                raise RecoveryError(
                    "trainable='prepared': no pass of this recipe prepared parameters; choose 'norms', "
                    "'all', or patterns of parameter names"
                )
        elif wish == "norms":
            vectors = {
                name
                for name, module in model.named_modules()
                if all(p.dim() <= 1 for p in module.parameters(recurse=False))
            }
            found = {n: p for n, p in every.items() if n.rpartition(".")[0] in vectors}
        else:
            found = {n: p for n, p in every.items() if fnmatch.fnmatchcase(n, wish)}
        if not found:
            near = difflib.get_close_matches(wish, every, n=3, cutoff=0.3)
            raise RecoveryError(
                f"trainable: no parameter matches {wish!r}"
                + (f"; near are {', '.join(near)}" if near else "; choose prepared, norms, all, or a pattern of names")
            )
        chosen.update(found)
    return {n: p for n, p in every.items() if n in chosen}


def own_memory(model: nn.Module, teacher: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Training writes in place, and ``model`` lies in the memory of the original."""
    theirs = {id(p) for p in teacher.parameters()}
    for name, parameter in parameters.items():
        if id(parameter) in theirs:
            raise RecoveryError(
                f"{name} is one object in teacher and model, so training would change the teacher; "
                "pass a copy.deepcopy of the teacher"
            )
        parameter.data = parameter.data.clone()
    if model.training:  # batch norms write into buffers
        copies: dict[int, Tensor] = {}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())


@contextlib.contextmanager
def training_mode(model: nn.Module, teacher: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for ``parameters`` only, the teacher in evaluation mode; undone at the end."""
    wanted = {id(p) for p in parameters.values()}
    before = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in teacher.modules()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        teacher.eval()
        yield
    finally:
        for parameter, flag in before:
            parameter.grad = None
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode

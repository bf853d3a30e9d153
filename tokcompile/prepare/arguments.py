"""One item of calibration data as the arguments of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tokcompile.errors import CalibrationError, TokcompileError

Item = Mapping[str, Any] | torch.Tensor


def arguments(
    model: nn.Module,
    item: Any,
    number: int,
    *,
    what: str = "calibration item",
    error: type[TokcompileError] = CalibrationError,
    counted: bool = True,
) -> dict[str, Any]:
    """One input as keyword arguments.

    Args:
        counted: whether it is one of several, so that a message names its ``number``.

    Raises:
        TokcompileError: of the type ``error``; it is of another form, or has no argument that ``forward`` knows.
    """
    parameters = inspect.signature(model.forward).parameters
    one = f"{what} {number}" if counted else what
    if isinstance(item, torch.Tensor):
        return {next(iter(parameters)): item}
    if not isinstance(item, Mapping):
        raise error(
            f"{one} is a {type(item).__name__}; expected a mapping of keyword arguments, such as "
            "{'input_ids': ...}, or a tensor"
        )
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [k for k in item if k not in parameters]
    named = {p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not item or (unknown and not hasattr(model, "generate") and not takes_any) or not named & set(item):
        raise error(
            f"{one} has the keys {sorted(item)}; the forward of this model takes {', '.join(sorted(named)[:12])}"
        )
    return dict(item)


def shown(data: Iterable[Item], progress: bool) -> Iterable[Item]:
    if not progress:
        return data
    from rich.progress import track

    total = len(data) if isinstance(data, Sequence) else None
    return track(data, description="Calibrating", total=total)

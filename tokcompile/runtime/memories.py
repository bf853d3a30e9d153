"""Values that decode steps hand on."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary


class Memories:
    """Values that decode steps hand on, by the tensor that holds the keys of a layer (see :class:`plan.Memory`).

    They live as long as that tensor, and count as long as nobody else wrote to it. Tensors of inference mode do not
    tell; with these, values are kept only where every step makes a new tensor of keys.
    """

    def __init__(self) -> None:
        self._of: Any = WeakIdKeyDictionary()

    def get(self, keys: torch.Tensor) -> list[torch.Tensor] | None:
        version, values = self._of.get(keys, (None, None))
        return values if version == _version(keys) else None

    def put(self, keys: torch.Tensor, values: list[torch.Tensor], in_place: bool) -> None:
        if not (in_place and keys.is_inference()):
            self._of[keys] = _version(keys), values


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

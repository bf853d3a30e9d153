"""Which numbers, added to the logits of an attention or put in their place, hide a key."""

from __future__ import annotations

import torch
from torch import Tensor

#: At or below it a number hides its key: next to any visible key the weight is exactly 0, since exp(x) is 0 in fp32
#: below -104. Models hide with -inf, the lowest number of a type, -1e9 or -1e4 (-9984 in bf16; a bias may be added to
#: it). A bias by distance (ALiBi: less than 1 a token) comes there after 8,000 tokens, where its weight is 0 as well.
#: A power of two is the same number in every type.
HIDDEN = -8192.0


def hides(number: float) -> bool:
    """Whether a number hides its key."""
    return number <= HIDDEN


def is_hidden(mask: Tensor) -> Tensor:
    """bool, of the shape of ``mask``: where a mask hides; a mask is bool (True: visible) or float (added)."""
    return mask.logical_not() if mask.dtype == torch.bool else mask <= HIDDEN


def is_visible(mask: Tensor) -> Tensor:
    """The opposite of :func:`is_hidden`."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN

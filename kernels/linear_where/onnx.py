"""How ``tokcompile::linear_where`` lowers to ONNX: the layer for all tokens, and a Where.

A file saves nothing by a table then: tokens that have a row are multiplied too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def decompose(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """``linear_where`` in operations that ONNX has: multiplies all tokens."""
    value = functional.linear(x, weight, bias)
    return torch.where(mask.unsqueeze(-1), value, torch.zeros((), dtype=value.dtype, device=value.device))


DECOMPOSITIONS = {"linear_where": decompose}

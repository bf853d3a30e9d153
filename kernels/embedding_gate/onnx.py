"""How ``tokcompile::embedding_gate`` lowers to ONNX: Gather, Where, the activation and a product.

program.run_decompositions({torch.ops.tokcompile.embedding_gate.default: decompose})
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation import activate
from .reference import rows


def decompose(
    gate: Tensor,
    table: Tensor,
    index: Tensor,
    activation: str,
    remap: Tensor | None = None,
    fallback: Tensor | None = None,
) -> Tensor:
    """``embedding_gate`` in operations that ONNX has; arguments as in ``reference.embedding_gate_reference``."""
    place = rows(index, table.shape[0], remap)
    value = torch.nn.functional.embedding(place.clamp(min=0), table).to(gate.dtype)
    other = torch.zeros((), dtype=gate.dtype, device=gate.device) if fallback is None else fallback.to(gate.dtype)
    return activate(gate, activation) * torch.where((place < 0).unsqueeze(-1), other, value)


DECOMPOSITIONS = {"embedding_gate": decompose}

"""How ``tokcompile::grouped_ffn`` lowers to ONNX: to standard operations, before export.

    program.run_decompositions({torch.ops.tokcompile.grouped_ffn.default: decompose})

One ONNX Loop over the experts. A step picks the tokens that chose the expert (NonZero, Gather), multiplies only these,
and adds them to the result (ScatterND). A runtime therefore does the work of the chosen experts alone, and reads
nothing of an expert without tokens but the slice that the step gathers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional

from ..activation import activate
from .reference import is_gated


def dense_gate(index: Tensor, weight: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Weights [N, E] and choice bool [N, E] of every expert for every token, from slots.

    An expert that stands in several slots of a token counts with the sum of its weights.
    """
    member = index.unsqueeze(-1) == torch.arange(experts, device=index.device)
    return torch.where(member, weight.unsqueeze(-1), 0).sum(1), member.any(1)


def decompose(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str, bias: Tensor | None = None
) -> Tensor:
    """``grouped_ffn`` in operations that ONNX has; arguments as in ``reference.grouped_ffn_reference``."""
    experts, gated = gate_up.shape[0], is_gated(gate_up, down)
    wide = torch.promote_types(x.dtype, torch.float32)
    gates, chosen = dense_gate(index, weight.to(wide), experts)
    gates, chosen = gates.T.contiguous(), chosen.T.contiguous()

    def body(expert: Tensor, result: Tensor) -> tuple[Tensor, Tensor]:
        one = expert.reshape(1)
        token = chosen.index_select(0, one).squeeze(0).nonzero().squeeze(-1)
        hidden = functional.linear(x.index_select(0, token), gate_up.index_select(0, one).squeeze(0))
        if bias is not None:
            hidden = hidden + bias.index_select(0, one)
        if gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = activate(gate, activation) * up
        else:
            hidden = activate(hidden, activation)
        part = functional.linear(hidden, down.index_select(0, one).squeeze(0)).to(wide)
        scale = gates.index_select(0, one).squeeze(0).index_select(0, token)
        return expert + 1, result.index_put((token,), part * scale.unsqueeze(-1), accumulate=True)

    start = torch.zeros((), dtype=torch.int64, device=x.device)
    state = (start, torch.zeros_like(x, dtype=wide))
    result = while_loop(lambda expert, _: expert < experts, body, state)[1]  # type: ignore[no-untyped-call]
    return result.to(x.dtype)


DECOMPOSITIONS = {"grouped_ffn": decompose}

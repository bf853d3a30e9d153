"""Routed feed-forward experts, gated or plain, as one operation.

Importing the package registers ``torch.ops.tokcompile.grouped_ffn``.
"""

from .onnx import decompose
from .op import grouped_ffn, grouped_ffn_host, supports
from .reference import grouped_ffn_reference, is_gated, slots_of_gate

__all__ = [
    "decompose",
    "grouped_ffn",
    "grouped_ffn_host",
    "grouped_ffn_reference",
    "is_gated",
    "slots_of_gate",
    "supports",
]

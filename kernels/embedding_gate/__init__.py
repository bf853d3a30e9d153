"""A gated product with rows of a table, as one operation (STEM).

Importing the package registers ``torch.ops.tokcompile.embedding_gate``.
"""

from .onnx import decompose
from .op import embedding_gate, embedding_gate_host, supports
from .reference import embedding_gate_reference, rows

__all__ = [
    "decompose",
    "embedding_gate",
    "embedding_gate_host",
    "embedding_gate_reference",
    "rows",
    "supports",
]

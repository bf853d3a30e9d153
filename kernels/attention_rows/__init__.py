"""How much attention a few queries pay to each key, without the matrix of all queries.

Importing the package registers ``torch.ops.tokcompile.attention_rows``.
"""

from .onnx import decompose
from .op import attention_rows, supports
from .reference import attention_rows_reference

__all__ = ["attention_rows", "attention_rows_reference", "decompose", "supports"]

"""Rows of a tensor by a list of each head, and rows back to their places: compress and decompress.

Importing the package registers ``torch.ops.tokcompile.gather_rows`` and ``scatter_rows``.
"""

from .onnx import decompose_gather, decompose_scatter
from .op import gather_rows, scatter_rows, supports
from .reference import gather_rows_reference, scatter_rows_reference

__all__ = [
    "decompose_gather",
    "decompose_scatter",
    "gather_rows",
    "gather_rows_reference",
    "scatter_rows",
    "scatter_rows_reference",
    "supports",
]

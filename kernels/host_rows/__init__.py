"""Rows of tables in host memory, copied to the device while it computes something else (STEM).

Importing the package registers ``unique_ids``, ``fetch_rows`` and ``await_rows`` of ``torch.ops.tokcompile``.
"""

from .onnx import DECOMPOSITIONS
from .op import await_rows, fetch_rows, side_stream, unique_ids
from .reference import fetch_rows_reference, unique_ids_reference

__all__ = [
    "DECOMPOSITIONS",
    "await_rows",
    "fetch_rows",
    "fetch_rows_reference",
    "side_stream",
    "unique_ids",
    "unique_ids_reference",
]

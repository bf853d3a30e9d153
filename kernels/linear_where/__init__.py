"""A linear layer for some of the tokens; the dense way out for tokens without a row in a table (STEM).

Importing the package registers ``torch.ops.tokcompile.linear_where``.
"""

from .onnx import decompose
from .op import linear_where

__all__ = ["decompose", "linear_where"]

"""Attention over listed blocks of keys: a list for each block of queries (sparse prefill, encoders).

Importing the package registers ``torch.ops.tokcompile.block_list_attention``.
"""

from .onnx import decompose
from .op import block_list_attention, supports
from .reference import block_list_attention_reference

__all__ = ["block_list_attention", "block_list_attention_reference", "decompose", "supports"]

"""Attention of a few queries over listed keys: decoding over a selected part of the cache.

Importing the package registers ``torch.ops.tokcompile.token_list_attention``.
"""

from .onnx import decompose
from .op import supports, token_list_attention
from .reference import token_list_attention_reference

__all__ = ["decompose", "supports", "token_list_attention", "token_list_attention_reference"]

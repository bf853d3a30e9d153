"""Greedy selection of diverse tokens (ToDRE's max-sum rule, the k-center rule) as one operation.

Importing the package registers ``torch.ops.tokcompile.greedy_select``.
"""

from .onnx import decompose
from .op import greedy_select, supports
from .reference import CRITERIA, greedy_select_reference, isolation, quantise

__all__ = ["CRITERIA", "decompose", "greedy_select", "greedy_select_reference", "isolation", "quantise", "supports"]

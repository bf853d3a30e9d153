"""How each operation aligns the dimensions of its operands and results: the rules that the token axis follows.

Importing the package registers them.
"""

from tokcompile.rewrite.token_rules import indexing, pointwise, products, rows, shapes

__all__ = ["indexing", "pointwise", "products", "rows", "shapes"]

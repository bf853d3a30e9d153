"""The votes of attention heads for the keys of a cache, for the rows that need them (TokenSelect).

Importing the package registers ``torch.ops.tokcompile.token_votes``.
"""

from .onnx import decompose
from .op import supports, token_votes
from .reference import token_votes_reference, votes

__all__ = ["decompose", "supports", "token_votes", "token_votes_reference", "votes"]

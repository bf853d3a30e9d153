"""What passes share that choose keys in a decode step moved: this name stays for one release.

Import :mod:`tokcompile.families.sparse_attention.decode` instead.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

#: Name -> the module that has it now.
_MOVED = {
    "SparseDecodeParams": "tokcompile.families.sparse_attention.decode.base",
    "SparseDecode": "tokcompile.families.sparse_attention.decode.base",
    "FIXED": "tokcompile.families.sparse_attention.decode.base",
    "least_length": "tokcompile.families.sparse_attention.decode.lists",
    "ends": "tokcompile.families.sparse_attention.decode.lists",
    "listed": "tokcompile.families.sparse_attention.decode.lists",
    "joined": "tokcompile.families.sparse_attention.decode.lists",
    "chosen": "tokcompile.families.sparse_attention.decode.lists",
    "decode_form": "tokcompile.families.sparse_attention.decode.form",
    "visible_keys": "tokcompile.families.sparse_attention.decode.form",
    "Followed": "tokcompile.families.sparse_attention.decode.followed_keys",
    "followed_keys": "tokcompile.families.sparse_attention.decode.followed_keys",
}


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.{name} moved to {_MOVED[name]}.{name}; the old place goes with the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module(_MOVED[name]), name)

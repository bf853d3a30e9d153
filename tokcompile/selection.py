"""Selection of visual tokens moved: this name stays for one release.

Import :mod:`tokcompile.rewrite.selection` instead.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

#: Name -> the module that has it now.
_MOVED = dict.fromkeys(
    (
        "segments",
        "segment_sizes",
        "segment_positions",
        "budgets",
        "budgets_count",
        "rank_in_segment",
        "keep_mask",
        "keep_index",
        "kept_rows",
        "kept_size",
        "random_scores",
        "pooled",
        "row_attention",
        "class_attention_scores",
        "NO_RANK",
    ),
    "tokcompile.rewrite.selection",
)


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.{name} moved to {_MOVED[name]}.{name}; the old place goes with the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(importlib.import_module(_MOVED[name]), name)

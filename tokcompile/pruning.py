"""What passes share that choose, merge or drop tokens moved: this name stays for one release.

Import :mod:`tokcompile.families.pruning` instead.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

#: Name -> the module that has it now.
_MOVED = {
    "VisualParams": "tokcompile.families.pruning.visual",
    "VisualSelection": "tokcompile.families.pruning.visual",
    "PatchParams": "tokcompile.families.pruning.patches",
    "PatchSelection": "tokcompile.families.pruning.patches",
    "drop_visual": "tokcompile.families.pruning.drop",
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

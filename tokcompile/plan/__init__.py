"""What a recipe does to a graph: steps, the regions they take, and what is expected of them.

The names that were in a module of this name stay for one release.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

#: Name -> the module that has it now.
_MOVED = {
    "Pass": "tokcompile.plan.pass_base",
    "Seen": "tokcompile.plan.pass_base",
    "Context": "tokcompile.rewrite.context",
    "SizeFunction": "tokcompile.rewrite.graph_inputs",
    "StateInput": "tokcompile.rewrite.graph_inputs",
    "Memory": "tokcompile.rewrite.graph_inputs",
    "MemoryInput": "tokcompile.rewrite.graph_inputs",
    "HostSize": "tokcompile.rewrite.graph_inputs",
    "Kept": "tokcompile.rewrite.graph_inputs",
    "Observer": "tokcompile.rewrite.graph_inputs",
    "region_keys": "tokcompile.regions.places",
    "layer_of": "tokcompile.regions.places",
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

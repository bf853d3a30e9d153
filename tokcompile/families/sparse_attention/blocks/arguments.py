"""Inputs of a graph by the names of the model's arguments."""

from __future__ import annotations

import re

from torch import Tensor, fx

from tokcompile.regions.model import AttentionRegion
from tokcompile.rewrite.context import Context


def argument(ctx: Context, region: AttentionRegion, name: str, why: str) -> fx.Node:
    """The tensor that the model takes as ``name``.

    Args:
        why: the parameter that names it, for the reason.

    Raises:
        NarrowError: this graph takes none of that name.
    """
    named = [n for n in ctx.captured.placeholders if _name(n) == name and isinstance(n.meta.get("val"), Tensor)]
    if len(named) == 1:
        return named[0]
    known = sorted({_name(n) for n in ctx.captured.placeholders} - {""})
    raise ctx.refuse(
        region.output,
        f"no tensor argument {name!r}, which {why} needs; this graph takes {', '.join(known) or 'none'} (an argument "
        "that the model does not use is in no graph)",
    )


def _name(node: fx.Node) -> str:
    """The name of the model's argument that an input of the graph is; "" for weights and sizes."""
    found = re.fullmatch(r"l_(?:kwargs_|args_)?(\w+?)_*", str(node.meta.get("argument", "")).lower())
    return found[1] if found and not re.search("(_parameters|_buffers|_modules)_", found[1]) else ""

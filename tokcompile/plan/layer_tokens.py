"""How many tokens each layer has, before and after the rewrite."""

from __future__ import annotations

from typing import Any

import torch

from tokcompile.capture.sizes import hint
from tokcompile.regions.model import Layer, Regions


class LayerTokens:
    """Tokens of each layer of the stacks of one graph: made before the graph is rewritten, read afterwards."""

    def __init__(self, regions: Regions, stage: str) -> None:
        self.found: list[tuple[Layer, dict[str, Any]]] = []
        for stack in regions.stacks:
            for layer in stack.layers:
                second = layer.feed_forward
                self.found.append(
                    (
                        layer,
                        {
                            "stage": stage,
                            "stack": stack.kind,
                            "stack_path": stack.path,
                            "index": layer.index,
                            "path": layer.path,
                            "attention": layer.attention.path if layer.attention else None,
                            "feed_forward": second.path if second else None,
                            "feed_forward_kind": second.kind if second else "feed_forward",
                            "tokens_before": _tokens(layer),
                        },
                    )
                )

    def after(self) -> list[dict[str, Any]]:
        """Entries for :attr:`Report.layers`, once the graph has been rewritten."""
        return [{**entry, "tokens_after": _tokens(layer)} for layer, entry in self.found]


def _tokens(layer: Layer) -> int:
    """Tokens of a layer's output, at the sizes that the graph was captured with."""
    value = layer.output.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return 0
    return hint(value.shape[-2], 0)

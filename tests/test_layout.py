"""``contiguous()`` in front of a ``view``: nothing to do at capture, something behind what a rewrite puts there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tokcompile
from tokcompile.capture.trace import loosen_view

HEADS, WIDTH = 4, 32


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        query, key, value = (
            part.view(rows, length, HEADS, width // HEADS).transpose(1, 2) for part in self.inner(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(rows, length, width))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(50, WIDTH), nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(WIDTH), Attention()]) for _ in range(2))
        self.head = nn.Linear(WIDTH, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for norm, attention in self.layers:  # type: ignore[misc]
            x = x + attention(norm(x))
        return self.head(x)  # type: ignore[no-any-return]


def decoder(rows: int) -> tuple[Decoder, Tensor]:
    torch.manual_seed(0)
    return Decoder().eval(), torch.randint(0, 50, (rows, 24))


@pytest.mark.parametrize("rows", [1, 2])
def test_sparse_prefill(rows: int) -> None:
    params = {"least": 4, "window": 4, "min_length": 8, "calm": 1.0}
    model, ids = decoder(rows)

    def sparse(keep: float) -> Tensor:
        recipe = {"recipe_version": 1, "steps": [{"pass": "token_sparse", "params": {**params, "keep": keep}}]}
        with torch.no_grad():
            return tokcompile.optimize(model, recipe, lowering="eager")(ids)

    with torch.no_grad():
        dense = model(ids)
    torch.testing.assert_close(sparse(1.0), dense, rtol=0, atol=1e-5)
    assert not torch.allclose(sparse(0.25), dense, atol=1e-3)


def test_dense_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, ids = decoder(2)
    tokcompile.export_onnx(model, {"ids": ids}, tmp_path, check=True)


@pytest.mark.parametrize("written", [False, True])
def test_a_view_that_is_written_to_stays_one(written: bool) -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.view.default, (graph.placeholder("x"), [4]))
    part = graph.call_function(torch.ops.aten.slice.Tensor, (node, 0, 0, 2))
    if written:
        graph.call_function(torch.ops.aten.add_.Tensor, (part, 1))
    assert loosen_view(node) is not written

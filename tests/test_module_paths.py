"""Module paths are those of ``named_modules()``, however a model keeps them; and masks that layers fill in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokcompile
from tests.members import members
from tokcompile.capture.graph import clean_path
from tokcompile.state import PreparedState


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("L['model'].__dict__['_modules']['stack'].layers.0.self_attn", "stack.layers.0.self_attn"),
        ("L['model'].inner.__dict__['_modules']['stack']._modules['0']", "inner.stack.0"),
        ("L['base']._modules['blocks']._modules['0'].attn", "blocks.0.attn"),
        ("L['model'].q_proj.lora_A['default']", "q_proj.lora_A.default"),
        ("L['model']._modules['two words']._modules['a-b']", "two words.a-b"),
        ("L['model']._orig_mod.layers[3]", "layers.3"),
        ("L['model']", ""),
        ("visual.blocks.0", "visual.blocks.0"),
    ],
)
def test_clean_path(given: str, path: str) -> None:
    assert clean_path(given) == path


class OwnAttributes(nn.Module):
    """As diffusers' models have it: Dynamo reads the modules of such a one from its ``__dict__``."""

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class Named(OwnAttributes):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.embed, self.name = nn.Embedding(99, 32), name
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
        self.add_module(name, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    def forward(self, ids: Tensor) -> Tensor:
        return self._modules[self.name](self.embed(ids))


@pytest.mark.parametrize("name", ["stack", "host", "two words"])
def test_paths_filters_and_state(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = Named(name).eval(), {"ids": torch.randint(0, 99, (2, 12))}
    known = {path for path, _ in model.named_modules()}
    step = {"pass": "moe_from_dense", "params": {"experts": 4, "shared": 1, "active": 3, "gate": "off"}}
    step["target"] = {"path": f"{name}.layers.*"}
    recipe = {"recipe_version": 1, "steps": [step]}
    fast = tokcompile.optimize(model, recipe, lowering="eager", calibration=[inputs] * 2)
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs), model(**inputs), rtol=0, atol=1e-4)
    report = tokcompile.report(fast)
    assert report.steps[0].matches == 2
    assert {region["path"] for region in report.regions} <= known


def test_state_of_a_module_called_host() -> None:
    state = PreparedState()
    state.put("stem", "a.host.b", {"table": torch.ones(2), "rows": torch.ones(3)}, {"host": ["table"]})
    state.half()
    assert set(state.tensors("stem", "a.host.b")) == {"table", "rows"}


class Attention(nn.Module):
    """The causal mask and the window are filled in place, in the layer."""

    def __init__(self, window: int, d: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.window, self.heads, self.qkv, self.o = window, heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (p.view(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).split(d, 2))
        mask = torch.ones(t, t, dtype=q.dtype, device=q.device).triu(diagonal=1)
        mask.masked_fill_(mask.bool(), float("-inf"))
        if self.window:
            mask = torch.full((t, t), float("-inf"), dtype=q.dtype, device=q.device)
            for i in range(t):
                mask[i, max(0, i - self.window + 1) : i + 1] = 0.0
        weights = F.softmax(q @ k.mT * (d // self.heads) ** -0.5 + mask, dim=-1)
        return self.o((weights @ v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, window: int, d: int = 32) -> None:
        super().__init__()
        self.n1, self.n2, self.attention = nn.RMSNorm(d), nn.RMSNorm(d), Attention(window)
        self.gate, self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, windows: tuple[int, ...], d: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, d), nn.Linear(d, 64)
        self.blocks = nn.ModuleList(Block(window) for window in windows)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("windows", members([[4, 0, 4], [0, 0], [4, 4, 0]], [[4, 0, 4]]))
def test_first_tokens_read_off_a_mask_further_down(windows: list[int]) -> None:
    torch.manual_seed(0)
    model = Decoder(windows).eval()
    seen, unseen = [{"ids": torch.randint(3, 30, (2, 10))} for _ in range(2)], torch.randint(30, 60, (2, 10))
    recipe = {"recipe_version": 1, "steps": [{"pass": "stem", "params": {"convert": 1.0}}]}
    fast = tokcompile.optimize(model, recipe, lowering="eager", calibration=seen)
    with torch.no_grad():
        torch.testing.assert_close(fast(unseen), model(unseen), rtol=0, atol=1e-5)  # tokens without a row are dense
        assert not torch.allclose(fast(**seen[0]), model(**seen[0]), atol=1e-3)
        torch.testing.assert_close(fast(**seen[0])[:, 0], model(**seen[0])[:, 0], rtol=0, atol=1e-5)  # dense_first
    assert tokcompile.report(fast).steps[0].matches == len(windows)

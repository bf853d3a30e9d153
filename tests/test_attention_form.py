"""Attention regions are read to the last factor: recomputing every one of them from its form changes nothing."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from tests.members import members
from tests.triton_tools import dense
from tests.zoo import capture_graphs, decoders, encoders
from tokcompile.capture.canonical import canonicalise
from tokcompile.errors import NarrowError
from tokcompile.formulas.attention import AttentionForm, read_attention, with_sink
from tokcompile.formulas.mask import MaskForm, read_mask
from tokcompile.regions import find_regions
from tokcompile.rewrite.context import Context


class Written(nn.Module):
    """Decoder attention by hand, in one of several spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, self.width, self.heads = spelling, 16, 4
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        b, s, _ = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, self.width).unbind(2)
        later = torch.ones(s, s, dtype=torch.bool).triu(1)
        if self.spelling == "tril":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            score = (q @ k.transpose(-2, -1)) / 4.0
            score = score.masked_fill(torch.tril(torch.ones(s, s))[None, None] == 0, -1e9)
            y = (score.softmax(-1) @ v).transpose(1, 2)
        elif self.spelling == "einsum":
            score = torch.einsum("bqhd,bkhd->bhqk", q * 0.25, k).masked_fill(later, float("-inf"))
            if keep is not None:
                score = score.masked_fill(~keep[:, None, None, :], float("-inf"))
            y = torch.einsum("bhij,bjhd->bihd", score.softmax(-1), v)
        elif self.spelling == "bmm":
            q, k, v = (t.transpose(1, 2).reshape(-1, s, self.width) for t in (q, k, v))
            score = torch.bmm(q, k.transpose(1, 2)) * 0.25 + torch.full((s, s), float("-inf")).triu(1)
            y = torch.bmm(score.softmax(-1), v).view(b, self.heads, s, self.width).transpose(1, 2)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        return self.out(y.reshape(b, s, -1))


def written(spelling: str, keep: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    inputs: dict[str, Any] = {"x": torch.randn(2, 9, 64)}
    if keep:
        inputs["keep"] = torch.ones(2, 9, dtype=torch.bool)
        inputs["keep"][0, 5] = False
    return Written(spelling).eval(), inputs


def padded(family):
    model, inputs = family()
    inputs = dict(inputs)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, :3] = 0
    return model, inputs


def eager(family):
    model, inputs = padded(family)
    model.set_attn_implementation("eager")
    return model, inputs


def cached(family):
    model, inputs = padded(family)
    return model, {**inputs, "use_cache": True}


KEYS = "keys"
CASES = {
    "llama": (lambda: padded(decoders.llama), KEYS, None),
    "llama_eager": (lambda: eager(decoders.llama), KEYS, None),
    "llama_cached": (lambda: cached(decoders.llama), KEYS, None),
    "qwen3": (lambda: padded(decoders.qwen3), KEYS, None),
    "gemma2": (lambda: padded(decoders.gemma2), KEYS, 4),
    "gemma3": (lambda: padded(decoders.gemma3_text), KEYS, 4),
    "mistral": (lambda: padded(decoders.mistral), KEYS, 4),
    "gpt2": (lambda: padded(decoders.gpt2), KEYS, None),
    "gpt2_eager": (lambda: eager(decoders.gpt2), KEYS, None),
    "gpt_oss": (lambda: padded(decoders.gpt_oss), KEYS, 4),
    "gpt_neox": (lambda: padded(decoders.gpt_neox), KEYS, None),
    "gptj": (lambda: padded(decoders.gptj), KEYS, None),
    "opt": (lambda: padded(decoders.opt), KEYS, None),
    "falcon": (lambda: padded(decoders.falcon), KEYS, None),
    "bloom": (lambda: padded(decoders.bloom), "rest", None),
    "deepseek_v3": (lambda: padded(decoders.deepseek_v3), KEYS, None),
    "bert": (lambda: padded(encoders.bert), KEYS, None),
    "encoder_by_hand": (encoders.hand_written, "full", None),
    "tril": (lambda: written("tril"), "causal", None),
    "bmm": (lambda: written("bmm"), "causal", None),
    "flag": (lambda: written("flag"), "causal", None),
    "einsum": (lambda: written("einsum"), "causal", None),
    "einsum_keys": (lambda: written("einsum", True), KEYS, None),
}


def attention(form: AttentionForm, shape: MaskForm, query, key, value, *extra):
    """The form, computed in fp64 under the mask that the parts say."""
    names = [n for n, v in (("keys", shape.keys), ("rest", shape.rest), ("sink", form.sink)) if v is not None]
    given = dict(zip(names, extra, strict=True))
    queries, keys = query.shape[2], key.shape[2]
    place = (torch.arange(queries) + keys - queries)[:, None]
    visible = torch.ones(queries, keys, dtype=torch.bool)
    if shape.causal:
        visible = visible & (torch.arange(keys) <= place)
    if shape.window is not None:
        visible = visible & (torch.arange(keys) > place - shape.window)
    visible = visible[None, None]
    if "keys" in given:
        visible = visible & given["keys"][:, None, None, :]
    if "rest" in given and given["rest"].dtype == torch.bool:
        visible = visible & given["rest"]
    if "rest" in given and given["rest"].is_floating_point():
        # an added mask: one more axis of the query and the key would say it; here in full
        group = query.shape[1] // key.shape[1]
        k, v = (t.double().repeat_interleave(group, 1) for t in (key, value))
        score = query.double() @ k.transpose(-1, -2) * form.scale + given["rest"].double()
        score = torch.where(visible, score, -float("inf"))
        return (torch.nan_to_num(score.softmax(-1)) @ v).to(query.dtype)
    output, lse = dense(query, key, value, visible, form.scale, form.softcap)
    if "sink" in given:
        output = with_sink(output, lse, given["sink"].double())
    return output.to(query.dtype)


#: The first of each spelling; the rest take their time.
SLOW = ["llama_eager", "llama_cached", "qwen3", "gemma3", "mistral", "gpt2_eager", "gpt_neox", "gptj", "opt", "falcon"]
SLOW += ["deepseek_v3", "bert"]


@pytest.mark.parametrize("name", members(CASES, [name for name in CASES if name not in SLOW]))
def test_every_attention_can_be_computed_from_its_form(name):
    family, says, window = CASES[name]
    model, inputs = family()
    (captured,) = capture_graphs(model, inputs)
    canonicalise(captured)
    ctx = Context(captured, find_regions(captured.graph), [])
    regions = ctx.regions.of("attention")
    assert regions
    windows = []
    for region in regions:
        form = read_attention(ctx, region)
        shape = read_mask(ctx, form)
        windows.append(shape.window)
        assert form.heads == (region.shapes["H"], region.shapes["Hkv"])
        assert shape.causal == (name not in ("bert", "encoder_by_hand"))
        assert (shape.keys is not None) == (says in ("keys", "rest"))
        assert (shape.rest is not None) == (says == "rest")
        extra = [n for n in (shape.keys, shape.rest, form.sink) if n is not None]
        form.replace(ctx, functools.partial(attention, form, shape), form.query, form.key, form.value, *extra)
    assert window in windows
    captured.graph.eliminate_dead_code()
    assert not [n for n in captured.graph.nodes if "scaled_dot_product" in str(n.target)]
    captured.graph_module.recompile()
    found, wanted = run(model, inputs, captured), run(model, inputs)
    keep = inputs.get("attention_mask")
    if keep is not None:
        keep = keep[:, -wanted.shape[1] :].bool()
        found, wanted = found[keep], wanted[keep]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)


def run(model, inputs, captured=None):
    """The model's first output; with ``captured``, by that graph."""
    torch._dynamo.reset()
    if captured is None:
        with torch.no_grad():
            result = model(**inputs)
    else:
        from tokcompile.capture.capture import DYNAMO_CONFIG

        def backend(graph_module, _):
            return captured.graph_module.forward

        with torch.no_grad(), torch._dynamo.config.patch(**DYNAMO_CONFIG):
            result = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)(**inputs)
    if isinstance(result, torch.Tensor):
        return result
    return getattr(result, "logits", result[0])


class Odd(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv = kind, nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        score = q @ k.transpose(-1, -2)
        if self.kind == "scaled_after":
            score = (score + torch.full((x.shape[1], x.shape[1]), -1e9).triu(1)) * 0.5
        weight = score.softmax(-1)
        if self.kind == "sharpened":
            weight = weight * weight
        if self.kind == "dropout":
            weight = nn.functional.dropout(weight, 0.1, self.training)
        return (weight @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("scaled_after", "scaled after the mask"), ("sharpened", "found mul"), ("dropout", r"dropout of 0.1.*model.eval")],
)
def test_other_formulas_are_refused_with_the_node(kind, message):
    (captured,) = capture_graphs(Odd(kind).train(), {"x": torch.randn(2, 5, 32)})
    ctx = Context(captured, find_regions(captured.graph), [])
    (region,) = ctx.regions.of("attention")
    with pytest.raises(NarrowError, match=message) as caught:
        read_attention(ctx, region)
    assert "test_attention_form.py" in caught.value.source

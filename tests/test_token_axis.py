"""Narrowing of random programs against brute force, and what the analysis of the token axis must refuse.

A program is a list of steps with parameters. Every step is written twice: once as model code over the whole batch,
which is captured and narrowed, and once for a single row that has only its kept tokens and its side inputs at their
positions (no batch, no masks for empty slots, no axis analysis). Both must agree on every live token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401  (its operator for grouped products)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tokcompile.capture.capture import from_dynamo
from tokcompile.capture.captured import Captured
from tokcompile.capture.trace import trace
from tokcompile.errors import NarrowError
from tokcompile.rewrite.labels import is_token
from tokcompile.rewrite.narrow import Cut, check, narrow

aten = torch.ops.aten


# ------------------------------------------------------------------------------------------- values of a program


@dataclass(frozen=True)
class Spec:
    """An input: its dimensions ("B", "S", ("cat", n): n entries and then the tokens, or a number) and its kind."""

    dims: tuple[Any, ...]
    kind: str = "float"


@dataclass
class Sizes:
    batch: int
    tokens: int
    width: int
    heads: int

    @property
    def head(self) -> int:
        return self.width // self.heads


def draw(spec: Spec, sizes: Sizes, generator: torch.Generator) -> Tensor:
    def size(d: Any) -> int:
        if isinstance(d, tuple):
            return d[1] + sizes.tokens
        return {"B": sizes.batch, "S": sizes.tokens}.get(d, d)

    shape = [size(d) for d in spec.dims]
    if spec.kind == "ids":
        return torch.randint(0, 11, shape, generator=generator)
    if spec.kind == "bool":  # attention masks: a token always sees itself
        own = torch.arange(shape[-2])[:, None] + shape[-1] - shape[-2]
        return (torch.rand(shape, generator=generator) > 0.4) | (torch.arange(shape[-1])[None] == own)
    scale = 1.0 / math.sqrt(shape[-1]) if spec.kind == "weight" else 1.0
    return torch.randn(shape, generator=generator) * scale


class Whole:
    """What a step sees in the captured program."""

    def __init__(self, values: dict[str, Tensor], x: Tensor, sizes: Sizes) -> None:
        self.values, self.sizes, self.heads = values, sizes, sizes.heads
        self.B, self.S, self.D = x.shape[0], x.shape[1], sizes.width

    def __call__(self, name: str) -> Tensor:
        return self.values[name]


class Row:
    """What a step sees in the brute force: one row, the tokens at ``positions``."""

    def __init__(self, values: dict[str, Tensor], specs: dict[str, Spec], sizes: Sizes, row: int) -> None:
        self.values, self.specs, self.sizes, self.heads, self.row = values, specs, sizes, sizes.heads, row
        self.positions = torch.arange(sizes.tokens)
        self.caches: dict[str, Tensor] = {}  # step -> which of its cached keys are left
        self.step = ""

    @property
    def cached(self) -> Tensor | None:
        return self.caches[self.step][self.row] if self.step in self.caches else None

    def __call__(self, name: str) -> Tensor:
        value = self.values[name]
        at = 0
        for d in self.specs[name].dims:
            if d == "B":
                value = value.select(at, self.row)
                continue
            if d == "S":
                value = value.index_select(at, self.positions)
            elif isinstance(d, tuple):
                front = torch.arange(d[1])
                if d[0] == "cache" and self.cached is not None:
                    past = self.values[f"{self.step}.ck"].shape[2] if f"{self.step}.ck" in self.values else 0
                    front = torch.cat([self.cached, torch.arange(past, d[1])])
                value = value.index_select(at, torch.cat([front, d[1] + self.positions]))
            at += 1
        return value


# ------------------------------------------------------------------------------------------------- the steps

Params = dict[str, Any]


@dataclass
class Step:
    """``sides(params, sizes)`` names the inputs; ``whole`` and ``row`` compute the same thing."""

    params: Callable[[random.Random, Sizes], Params]
    sides: Callable[[Params, Sizes], dict[str, Spec]]
    whole: Callable[[Params, Tensor, Callable[[str], Tensor], Whole], Tensor]
    row: Callable[[Params, Tensor, Callable[[str], Tensor], Row], Tensor]
    ragged: bool = True


STEPS: dict[str, Step] = {}
TOKEN_SHAPES = {"S": ("S",), "1S": (1, "S"), "BS": ("B", "S")}


def pick(*names: str) -> Callable[[random.Random, Sizes], Params]:
    return lambda d, sizes: {"kind": d.choice(names)}


def no_sides(p: Params, sizes: Sizes) -> dict[str, Spec]:
    return {}


def channel_whole(p: Params, x: Tensor, v: Any, c: Whole) -> Tensor:
    """Everything that acts on channels, in the spellings of model code."""
    kind, B, S, D, H = p["kind"], c.B, c.S, c.D, c.heads
    Dh = D // H
    if kind == "gelu":
        return F.gelu(x) + 0.1
    if kind == "layer_norm":
        return F.layer_norm(x, (D,))
    if kind == "rms":
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    if kind == "std":
        return x / (1 + torch.std(x, -1, True, True))
    if kind == "softmax":
        return torch.softmax(x, -1)
    if kind == "normalize":
        return F.normalize(x, dim=-1)
    if kind == "max":
        return torch.maximum(x, x.max(-1, keepdim=True).values - 1)
    if kind == "sort":
        return x.sort(-1).values
    if kind == "cumsum":
        return x.cumsum(-1) / D
    if kind == "flip":
        return x.flip(-1)
    if kind == "roll":
        return x.roll(1, -1)
    if kind == "topk":
        return x + x.topk(1, -1).values
    if kind == "slice":
        return torch.cat([x[..., 1:], x[..., :1]], -1)
    if kind == "chunk":
        a, b = x.chunk(2, -1)
        return torch.cat([b, a * 2], -1)
    if kind == "split":
        a, b = x.split([1, D - 1], -1)
        return torch.cat([b, a], dim=2)
    if kind == "stack":
        return torch.stack([x, x * 0.5], 1).mean(1)
    if kind == "stack_front":
        a, b = torch.stack([x.sin(), x.cos()]).unbind(0)
        return a * b
    if kind == "pairs":
        return torch.stack([x[..., 0::2], -x[..., 1::2]], -1).flatten(2)
    if kind == "index":
        return x[:, :, torch.arange(D - 1, -1, -1)]
    if kind == "heads_view":
        return F.layer_norm(x.view(B, S, H, Dh), (Dh,)).view(B, S, D)
    if kind == "heads_transpose":
        y = x.view(B, S, H, Dh).transpose(1, 2).cumsum(1)
        return y.transpose(1, 2).reshape(B, S, H * Dh)
    if kind == "heads_permute":
        y = x.reshape(B, S, H, Dh).permute(2, 1, 0, 3).softmax(0)
        return y.permute(2, 1, 0, 3).reshape(B, -1, D)
    if kind == "heads_unflatten":
        return x.unflatten(-1, (H, Dh)).transpose(-1, -2).softmax(-1).transpose(-1, -2).flatten(2)
    if kind == "heads_folded":
        y = x.view(B, S, H, Dh).transpose(1, 2).reshape(B * H, S, Dh).softmax(-1)
        return y.view(B, H, S, Dh).transpose(1, 2).reshape(B, S, -1)
    if kind == "flat":
        return F.softmax(x.reshape(B * S, D), 1).view(B, S, D)
    if kind == "flat_minus_one":
        return F.layer_norm(x.view(-1, D), (D,)).view(B, -1, D)
    if kind == "flatten_unflatten":
        return torch.tanh(x.flatten(0, 1)).unflatten(0, (B, S))
    if kind == "view_as":
        return x.reshape(-1, D).sigmoid().view_as(x)
    if kind == "flat_heads":
        return x.reshape(B * S * H, Dh).softmax(-1).reshape(B, S, H, Dh).reshape(x.shape)
    if kind == "channels_first":
        return x.transpose(1, 2).softmax(1).permute(0, 2, 1)
    if kind == "tokens_first":
        return x.transpose(0, 1).contiguous().cumsum(2).swapaxes(0, 1)
    if kind == "movedim":
        return x.movedim(1, 0).softmax(-1).movedim(0, 1)
    if kind == "expand":
        y = x.unsqueeze(2).expand(B, S, 2, D)
        return y.reshape(B, S, 2 * D)[..., 1 : D + 1]
    if kind == "expand_heads":
        y = x.view(B, S, H, Dh).transpose(1, 2)[:, :, None].expand(-1, -1, 2, -1, -1)
        return y.reshape(B, 2 * H, S, Dh)[:, H:].transpose(1, 2).flatten(2)
    if kind == "repeat":
        return x.repeat(1, 1, 2)[..., 1 : D + 1] + x.tile(2)[..., :D]
    if kind == "repeat_interleave":
        return x.repeat_interleave(2, -1)[..., :D]
    if kind == "einsum":
        return torch.einsum("bshd,bshe->bsde", x.view(B, S, H, Dh), x.view(B, S, H, Dh)).sum(-1).repeat(1, 1, H)
    if kind == "einsum_implicit":
        return x - torch.einsum("asd,d", x, torch.ones(D))[..., None] / D
    if kind == "where":
        return torch.where(x > 0, x, 0.1 * x).masked_fill(x > 1.5, 1.5)
    if kind == "pad":
        return F.pad(x, (1, 0))[..., :D]
    if kind == "squeeze":
        return x.unsqueeze(1).tanh().squeeze(1)
    if kind == "isin":
        return x + torch.isin(x.floor(), torch.arange(S, dtype=x.dtype)).to(x.dtype)
    if kind == "var_mean":
        var, mean = torch.var_mean(x, -1, keepdim=True)
        return (x - mean) * torch.rsqrt(var + 1e-5)
    if kind == "dropout":
        return F.dropout(x, 0.5, training=False) + torch.native_dropout(x, 0.5, False)[0]
    if kind == "new":
        return x + x.new_ones(B, S, 1) + torch.ones_like(x) + x.new_zeros(x.shape)
    raise AssertionError(kind)


def channel_row(p: Params, x: Tensor, v: Any, r: Row) -> Tensor:
    kind, n, D, H = p["kind"], len(x), r.sizes.width, r.heads
    Dh = D // H
    heads = x.view(n, H, Dh)
    plain: dict[str, Callable[[], Tensor]] = {
        "gelu": lambda: F.gelu(x) + 0.1,
        "layer_norm": lambda: F.layer_norm(x, (D,)),
        "rms": lambda: x / (x.square().mean(1)[:, None] + 1e-6).sqrt(),
        "std": lambda: x / (1 + x.std(1)[:, None]),
        "softmax": lambda: x.softmax(1),
        "normalize": lambda: x / x.norm(dim=1)[:, None].clamp(min=1e-12),
        "max": lambda: torch.maximum(x, x.amax(1)[:, None] - 1),
        "sort": lambda: torch.stack([row.sort().values for row in x]),
        "cumsum": lambda: x.cumsum(1) / D,
        "flip": lambda: x.flip(1),
        "roll": lambda: x.roll(1, 1),
        "topk": lambda: x + x.amax(1)[:, None],
        "slice": lambda: x.roll(-1, 1),
        "chunk": lambda: torch.cat([x[:, D // 2 :], 2 * x[:, : D // 2]], 1),
        "split": lambda: x.roll(-1, 1),
        "stack": lambda: x * 0.75,
        "stack_front": lambda: x.sin() * x.cos(),
        "pairs": lambda: x * torch.tensor([1.0, -1.0]).repeat(D // 2),
        "index": lambda: x.flip(1),
        "heads_view": lambda: F.layer_norm(heads, (Dh,)).view(n, D),
        "heads_transpose": lambda: heads.cumsum(1).view(n, D),
        "heads_permute": lambda: heads.softmax(1).view(n, D),
        "heads_unflatten": lambda: heads.softmax(1).view(n, D),
        "heads_folded": lambda: heads.softmax(2).view(n, D),
        "flat": lambda: x.softmax(1),
        "flat_minus_one": lambda: F.layer_norm(x, (D,)),
        "flatten_unflatten": lambda: x.tanh(),
        "view_as": lambda: x.sigmoid(),
        "flat_heads": lambda: heads.softmax(2).view(n, D),
        "channels_first": lambda: x.softmax(1),
        "tokens_first": lambda: x.cumsum(1),
        "movedim": lambda: x.softmax(1),
        "expand": lambda: x.roll(-1, 1),
        "expand_heads": lambda: heads[:, [h // 2 for h in range(H, 2 * H)]].reshape(n, D),
        "repeat": lambda: x.roll(-1, 1) + x,
        "repeat_interleave": lambda: x[:, [i // 2 for i in range(D)]],
        "einsum": lambda: (heads.transpose(1, 2) @ heads).sum(2).repeat(1, H),
        "einsum_implicit": lambda: x - x.mean(1)[:, None],
        "where": lambda: torch.where(x > 0, x, 0.1 * x).clamp(max=1.5),
        "pad": lambda: torch.cat([torch.zeros(n, 1), x[:, :-1]], 1),
        "squeeze": lambda: x.tanh(),
        "isin": lambda: x + ((x.floor() >= 0) & (x.floor() < r.sizes.tokens)).float(),
        "var_mean": lambda: (x - x.mean(1)[:, None]) / (x.var(1)[:, None] + 1e-5).sqrt(),
        "dropout": lambda: 2 * x,
        "new": lambda: x + 2,
    }
    return plain[kind]()


CHANNEL = (  # noqa: SIM905
    "gelu layer_norm rms std softmax normalize max sort cumsum flip roll topk slice chunk split stack stack_front "
    "pairs index heads_view heads_transpose heads_permute heads_unflatten heads_folded flat flat_minus_one "
    "flatten_unflatten view_as flat_heads channels_first tokens_first movedim expand expand_heads repeat "
    "repeat_interleave einsum einsum_implicit "
    "where pad squeeze isin var_mean dropout new"
).split()
STEPS["channel"] = Step(pick(*CHANNEL), no_sides, channel_whole, channel_row)


def linear_whole(p: Params, x: Tensor, v: Any, c: Whole) -> Tensor:
    kind, w = p["kind"], v("w")
    if kind == "linear":
        return F.linear(x, w)
    if kind == "matmul":
        return x @ w.t()
    if kind == "addmm":
        return torch.addmm(w[0], x.view(-1, c.D), w.t()).view(c.B, c.S, c.D)
    if kind == "bmm":
        return torch.bmm(x, w.t()[None].expand(c.B, -1, -1))
    return torch.einsum("bsd,ed->bse", x, w)


STEPS["linear"] = Step(
    pick("linear", "matmul", "addmm", "bmm", "einsum"),
    lambda p, s: {"w": Spec((s.width, s.width), "weight")},
    linear_whole,
    lambda p, x, v, r: (x[:, None] * v("w")[None]).sum(2) + (v("w")[0] if p["kind"] == "addmm" else 0),
)


def side_params(d: random.Random, sizes: Sizes) -> Params:
    return {
        "shape": d.choice(sorted(TOKEN_SHAPES)),
        "kind": d.choice(["add", "gate", "where", "cat", "flat", "heads", "ids", "mul_in_place"]),
    }


def side_specs(p: Params, s: Sizes) -> dict[str, Spec]:
    lead = TOKEN_SHAPES[p["shape"]]
    if p["kind"] == "ids":
        return {"ids": Spec(lead, "ids"), "table": Spec((11, s.width))}
    if p["kind"] in ("gate", "where"):
        return {"side": Spec(lead)}
    if p["kind"] == "cat":
        return {"side": Spec(("B", "S", s.width))}
    if p["kind"] == "flat":
        return {"side": Spec(("B", "S", s.width))}
    return {"side": Spec((*lead, s.head if p["kind"] == "heads" else s.width))}


def side_whole(p: Params, x: Tensor, v: Any, c: Whole) -> Tensor:
    kind = p["kind"]
    if kind == "ids":
        return x + F.embedding(v("ids"), v("table"))
    side = v("side")
    if kind in ("add", "mul_in_place"):
        return x + side if kind == "add" else (x + 0).mul_(side)
    if kind == "gate":
        return x * side.unsqueeze(-1).sigmoid()
    if kind == "where":
        return torch.where((side > 0)[..., None], x, -x)
    if kind == "cat":
        return torch.cat([x[..., 1:], side[..., :1]], 2)
    if kind == "flat":
        return (x.reshape(c.B * c.S, c.D) * side.reshape(c.B * c.S, c.D)).view(c.B, c.S, c.D)
    y = x.view(c.B, c.S, c.heads, -1).transpose(1, 2)
    side = side.unsqueeze(1) if side.dim() == 3 else side
    return (y * side).transpose(1, 2).reshape(c.B, c.S, c.D)


def side_row(p: Params, x: Tensor, v: Any, r: Row) -> Tensor:
    n, D, kind = len(x), r.sizes.width, p["kind"]
    if kind == "ids":
        return x + v("table")[v("ids").reshape(n)]
    side = v("side")
    if kind in ("gate", "where"):
        side = side.reshape(n, 1)
        return x * side.sigmoid() if kind == "gate" else x * torch.where(side > 0, 1.0, -1.0)
    if kind == "heads":
        return x * side.reshape(n, D // r.heads).repeat(1, r.heads)
    side = side.reshape(n, D)
    if kind == "cat":
        return torch.cat([x[:, 1:], side[:, :1]], 1)
    return x + side if kind == "add" else x * side


STEPS["side"] = Step(side_params, side_specs, side_whole, side_row)


# attention

MASKS = ["none", "B1SS", "11SS", "SS", "1SS", "B11S"]


def attention_params(d: random.Random, sizes: Sizes) -> Params:
    style = d.choice(["sdpa", "eager", "einsum", "folded"])
    groups = [g for g in (1, 2, 4) if sizes.heads % g == 0]
    p: Params = {
        "style": style,
        "group": d.choice(groups),
        "mask": d.choice(MASKS),
        "bool": d.random() < 0.5,
        "gqa": d.choice(["expand", "repeat", "native"]),
        "rope": d.choice(["none", "S", "1S", "BS", "ids"]) if sizes.head % 2 == 0 else "none",
        "cache": d.choice([0, 0, 2, sizes.tokens]),
        "class": d.choice([0, 0, 1, 3]),
        "causal": d.choice(["no", "no", "arange", "flag"]),
    }
    if p["class"]:
        p["rope"] = "none"
    if p["causal"] == "flag" and (p["cache"] or p["style"] != "sdpa"):
        p["causal"] = "arange"
    if p["causal"] == "flag":
        p["mask"] = "none"
    return p


def attention_specs(p: Params, s: Sizes) -> dict[str, Spec]:
    kv = s.width // p["group"]
    specs = {
        "q": Spec((s.width, s.width), "weight"),
        "k": Spec((kv, s.width), "weight"),
        "v": Spec((kv, s.width), "weight"),
    }
    if p["rope"] == "ids":
        specs["ids"] = Spec(("B", "S"), "ids")
    elif p["rope"] != "none":
        specs["cos"] = specs["sin"] = Spec((*TOKEN_SHAPES[p["rope"]], s.head))
    if p["cache"]:
        name = ("B", s.heads // p["group"], p["cache"], s.head)
        specs["ck"] = specs["cv"] = Spec(name, "cache")
    if p["class"]:
        specs["cls"] = Spec((1, p["class"], s.width))
    kind = "bool" if p["bool"] else "float"
    query: Any = ("cat", p["class"]) if p["class"] else "S"
    key: Any = ("cache", p["cache"] + p["class"]) if p["cache"] + p["class"] else "S"
    if p["mask"] == "B1SS":
        specs["mask"] = Spec(("B", 1, query, key), kind)
    elif p["mask"] == "11SS":
        specs["mask"] = Spec((1, 1, query, key), kind)
    elif p["mask"] == "SS":
        specs["mask"] = Spec((query, key), kind)
    elif p["mask"] == "1SS":
        specs["mask"] = Spec((1, query, key), kind)
    elif p["mask"] == "B11S":
        specs["mask"] = Spec(("B", 1, 1, key), "float")
    return specs


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def frequencies(ids: Tensor, half: int) -> Tensor:
    angles = ids[..., None].float() * (0.5 ** torch.arange(half).float())
    return torch.cat([angles, angles], -1)


def attention_whole(p: Params, x: Tensor, v: Any, c: Whole) -> Tensor:
    B, H, Hkv = c.B, c.heads, c.heads // p["group"]
    Dh = c.D // H
    if p["class"]:
        x = torch.cat([v("cls").expand(B, -1, -1), x], 1)
    T = x.shape[1]
    q = F.linear(x, v("q")).view(B, T, H, Dh).transpose(1, 2)
    k = F.linear(x, v("k")).view(B, T, Hkv, Dh).transpose(1, 2)
    w = F.linear(x, v("v")).view(B, T, Hkv, Dh).permute(0, 2, 1, 3)
    if p["rope"] != "none":
        if p["rope"] == "ids":
            angles = frequencies(v("ids"), Dh // 2)
            cos, sin = angles.cos(), angles.sin()
        else:
            cos, sin = v("cos"), v("sin")
        if cos.dim() == 3:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = q * cos + rotate(q) * sin, k * cos + rotate(k) * sin
    if p["cache"]:
        k, w = torch.cat([v("ck"), k], 2), torch.cat([v("cv"), w], dim=-2)
    length = k.shape[2]
    mask = v("mask") if p["mask"] != "none" else None
    if p["causal"] == "arange":
        allowed = torch.arange(length)[None] <= torch.arange(T)[:, None] + (length - T)
        if mask is None:
            mask = allowed
        elif mask.dtype == torch.bool:
            mask = mask & allowed
        else:
            mask = mask + torch.zeros(T, length).masked_fill(~allowed, float("-inf"))
    native = p["gqa"] == "native" and p["style"] == "sdpa"
    if p["group"] > 1 and not native:
        if p["gqa"] == "repeat":
            k, w = k.repeat_interleave(p["group"], 1), w.repeat_interleave(p["group"], dim=1)
        else:
            k, w = (t[:, :, None].expand(B, Hkv, p["group"], length, Dh).reshape(B, H, length, Dh) for t in (k, w))
    if p["style"] == "sdpa":
        y = F.scaled_dot_product_attention(
            q, k, w, attn_mask=mask, is_causal=p["causal"] == "flag", enable_gqa=native and p["group"] > 1
        )
    else:
        if p["style"] == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(Dh)
        elif p["style"] == "eager":
            scores = torch.matmul(q, k.transpose(2, 3)) * Dh**-0.5
        else:
            scores = torch.bmm(q.reshape(B * H, T, Dh), k.reshape(B * H, length, Dh).transpose(1, 2)) * Dh**-0.5
            scores = scores.view(B, H, T, length)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        if p["style"] == "einsum":
            y = torch.einsum("bhqk,bhkd->bhqd", probs, w)
        elif p["style"] == "eager":
            y = torch.matmul(probs, w)
        else:
            y = torch.bmm(probs.view(B * H, T, length), w.reshape(B * H, length, Dh)).view(B, H, T, Dh)
    y = y.transpose(1, 2).contiguous().view(B, T, c.D)
    if p["class"]:
        return y[:, p["class"] :] + y[:, : p["class"]].mean(1, keepdim=True) + y[:, 0].unsqueeze(1)
    return y


def attention_row(p: Params, x: Tensor, v: Any, r: Row) -> Tensor:
    H, D = r.heads, r.sizes.width
    Dh, n = D // H, p["class"]
    if n:
        x = torch.cat([v("cls")[0], x])
    T = len(x)
    if p["rope"] == "ids":
        angles = frequencies(v("ids"), Dh // 2)
        cos, sin = angles.cos(), angles.sin()
    elif p["rope"] != "none":
        cos, sin = (v(name).reshape(T, Dh) for name in ("cos", "sin"))
    positions = torch.cat([torch.arange(n), n + r.positions])
    past = p["cache"]
    if past:
        front = torch.arange(past) if r.cached is None else r.cached
    out = []
    for h in range(H):
        g = h // p["group"]
        q = x @ v("q")[h * Dh : (h + 1) * Dh].t()
        k = x @ v("k")[g * Dh : (g + 1) * Dh].t()
        w = x @ v("v")[g * Dh : (g + 1) * Dh].t()
        if p["rope"] != "none":
            q, k = (t * cos + rotate(t) * sin for t in (q, k))
        if past:
            k, w = torch.cat([v("ck")[g][front], k]), torch.cat([v("cv")[g][front], w])
        scores = q @ k.t() / math.sqrt(Dh)
        if p["mask"] != "none":
            mask = v("mask")
            mask = mask.reshape(mask.shape[-2], mask.shape[-1])
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        if p["causal"] != "no":
            at = positions if not past else torch.cat([front, past + positions])
            own = positions + past
            scores = scores.masked_fill(at[None] > own[:, None], float("-inf"))
        out.append(scores.softmax(1) @ w)
    y = torch.cat(out, 1)
    return y[n:] + y[:n].mean(0) + y[0] if n else y


STEPS["attention"] = Step(attention_params, attention_specs, attention_whole, attention_row)


# the number of tokens, class tokens inside the stream, reductions


def pooled_whole(p: Params, x: Tensor, v: Any, c: Whole) -> Tensor:
    kind = p["kind"]
    if kind == "mean":
        return x + x.mean(1, keepdim=True)
    if kind == "max":
        return x - x.amax(dim=1)[:, None]
    if kind == "linear_attention":
        return x @ (x.softmax(-1).transpose(1, 2) @ x)
    if kind == "einsum":
        return torch.einsum("bsd,bde->bse", x, torch.einsum("bsd,bse->bde", x, x))
    if kind == "pool_softmax":
        weights = x.mean(-1, keepdim=True).softmax(1)
        return x + (weights * x).sum(1, keepdim=True)
    raise AssertionError(kind)


def pooled_row(p: Params, x: Tensor, v: Any, r: Row) -> Tensor:
    kind = p["kind"]
    if kind == "mean":
        return x + x.mean(0)
    if kind == "max":
        return x - x.amax(0)
    if kind == "linear_attention":
        return x @ (x.softmax(1).t() @ x)
    if kind == "einsum":
        return x @ (x.t() @ x)
    return x + (x.mean(1).softmax(0)[:, None] * x).sum(0)


STEPS["pooled"] = Step(
    pick("mean", "max", "linear_attention", "einsum", "pool_softmax"), no_sides, pooled_whole, pooled_row, ragged=False
)


def pool_attention_whole(p: Params, x: Tensor, v: Any, c: Whole) -> Tensor:
    scores = F.linear(x, v("probe"))  # [B, S, 1]
    if p["kind"] == "tokens_last":
        weights = scores.transpose(1, 2).softmax(-1)
        return x + weights @ x
    weights = scores.softmax(1)
    return x + weights.transpose(1, 2) @ x


STEPS["pool_attention"] = Step(
    pick("tokens_last", "tokens_middle"),
    lambda p, s: {"probe": Spec((1, s.width), "weight")},
    pool_attention_whole,
    lambda p, x, v, r: x + (x @ v("probe")[0]).softmax(0) @ x,
)


def positions_whole(p: Params, x: Tensor, v: Any, c: Whole) -> Tensor:
    length = x.shape[1]
    at = torch.arange(length, dtype=x.dtype)
    if p["kind"] == "column":
        return x + at[:, None]
    if p["kind"] == "expanded":
        return x * at[None].expand(x.shape[0], length).unsqueeze(-1).cos()
    distance = at[:, None] - at[None]
    scores = x @ x.transpose(1, 2) - distance.abs()
    return scores.softmax(-1) @ x


def positions_row(p: Params, x: Tensor, v: Any, r: Row) -> Tensor:
    at = r.positions.to(x.dtype)
    if p["kind"] == "column":
        return x + at[:, None]
    if p["kind"] == "expanded":
        return x * at[:, None].cos()
    return (x @ x.t() - (at[:, None] - at[None]).abs()).softmax(1) @ x


STEPS["positions"] = Step(pick("column", "expanded", "distance"), no_sides, positions_whole, positions_row)


def protected_whole(p: Params, x: Tensor, v: Any, c: Whole) -> Tensor:
    """Reads of the first token and of the last one; both are kept in every row."""
    kind = p["kind"]
    if kind == "select":
        return x + x[:, 0].unsqueeze(1)
    if kind == "slice":
        return x * x[:, :1]
    if kind == "patches":
        return torch.cat([x[:, :1], torch.tanh(x[:, 1:])], 1)
    if kind == "residual":
        return x + torch.cat([x[:, 0:1] * 2, torch.tanh(x[:, 1:])], 1)
    if kind == "cross":
        y = F.scaled_dot_product_attention(x[:, :1], x, x)
        return torch.cat([y, x[:, 1:] + y], 1)
    if kind == "last":
        return x - x[:, -1].unsqueeze(1)
    return x + x[:, -1:]


def protected_row(p: Params, x: Tensor, v: Any, r: Row) -> Tensor:
    kind = p["kind"]
    if kind in ("select", "slice"):
        return x + x[0] if kind == "select" else x * x[0]
    if kind == "patches":
        return torch.cat([x[:1], x[1:].tanh()])
    if kind == "residual":
        return x + torch.cat([x[:1] * 2, x[1:].tanh()])
    if kind == "cross":
        y = (x[:1] @ x.t() / math.sqrt(x.shape[1])).softmax(1) @ x
        return torch.cat([y, x[1:] + y])
    return x - x[-1] if kind == "last" else x + x[-1]


STEPS["first"] = Step(
    pick("select", "slice", "patches", "residual", "cross"), no_sides, protected_whole, protected_row, ragged=False
)
STEPS["last"] = Step(pick("last", "last_slice"), no_sides, protected_whole, protected_row)


EXPERTS, SLOTS = 3, 2


def experts_specs(p: Params, s: Sizes) -> dict[str, Spec]:
    return {"g": Spec((EXPERTS, s.width), "weight"), "w": Spec((EXPERTS, s.width, s.width), "weight")}


def experts_whole(p: Params, x: Tensor, v: Any, c: Whole) -> Tensor:
    """A mixture of experts, in the ways in which model code brings rows to experts and back."""
    kind, w, flat = p["kind"], v("w"), x.reshape(-1, c.D)
    shares, ids = (flat @ v("g").t()).softmax(-1).topk(SLOTS, -1)
    if kind == "nonzero":
        out = torch.zeros_like(flat)
        chosen = F.one_hot(ids, EXPERTS).permute(2, 1, 0)
        for e in range(EXPERTS):
            slot, token = torch.where(chosen[e] > 0)
            out.index_add_(0, token, (flat[token] @ w[e]).tanh() * shares[token, slot, None])
        return out.view(x.shape)
    if kind == "batched":
        y = torch.bmm(flat.repeat_interleave(SLOTS, 0)[:, None], w[ids.reshape(-1)]).squeeze(1).tanh()
        return (y * shares.reshape(-1, 1)).view(-1, SLOTS, c.D).sum(1).view(x.shape)
    if kind == "slots_first":
        key, part = ids.t().reshape(-1), shares.t().reshape(-1)
    else:
        key, part = ids.reshape(-1), shares.reshape(-1)
    key, order = key.sort()
    token = order % (c.B * c.S) if kind == "slots_first" else order // SLOTS
    rows = flat.index_select(0, token) if kind == "argsort" else flat[token]
    if kind == "gather":
        rows = flat.gather(0, token[:, None].expand(-1, c.D))
    if kind == "grouped":
        ends = torch.histc(key.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        y = torch.ops.transformers.grouped_mm_fallback(rows, w, ends)
    else:
        y = torch.einsum("nd,nde->ne", rows, w[key])
    y = y.tanh() * part[order][:, None]
    if kind in ("add", "slots_first"):
        return torch.zeros_like(flat).index_add_(0, token, y).view(x.shape)
    if kind == "add_new":
        return torch.zeros(c.B * c.S, c.D).index_add(0, token, y).view(x.shape)
    if kind == "gather":
        return torch.zeros_like(flat).scatter_add(0, token[:, None].expand_as(y), y).view(x.shape)
    if kind == "argsort":
        y = y[order.argsort()]
    elif kind == "put":
        back = torch.empty_like(y)
        back[order] = y
        y = back
    else:
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0])
        y = y[place]
    return y.view(-1, SLOTS, c.D).sum(1).view(x.shape)


def experts_row(p: Params, x: Tensor, v: Any, r: Row) -> Tensor:
    shares, ids = (x @ v("g").t()).softmax(1).topk(SLOTS, 1)
    each = torch.einsum("nd,kde->nke", x, v("w")).tanh()
    return sum(each[torch.arange(len(x)), ids[:, s]] * shares[:, s, None] for s in range(SLOTS))  # type: ignore[return-value]


EXPERT_KINDS = ["batched", "grouped", "add", "add_new", "gather", "argsort", "put", "place", "slots_first", "nonzero"]
STEPS["experts"] = Step(pick(*EXPERT_KINDS), experts_specs, experts_whole, experts_row)


# ---------------------------------------------------------------------------------------------------- programs


@dataclass
class Program:
    """``stages``: steps above the first cut, between the cuts, below the last one."""

    sizes: Sizes
    stages: list[list[tuple[str, Params]]]
    keep: list[int]
    ragged: bool
    cache_cut: bool
    seed: int
    specs: dict[str, Spec] = field(default_factory=dict)

    def named(self) -> list[list[tuple[str, str, Params]]]:
        count = 0
        out = []
        for stage in self.stages:
            out.append([])
            for name, p in stage:
                out[-1].append((f"{count}", name, p))
                count += 1
        return out

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        self.specs = {"x": Spec(("B", "S", self.sizes.width))}
        for stage in self.named():
            for prefix, name, p in stage:
                self.specs |= {f"{prefix}.{key}": spec for key, spec in STEPS[name].sides(p, self.sizes).items()}
        return {name: draw(spec, self.sizes, generator) for name, spec in self.specs.items()}

    def whole(self, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        x = values["x"]
        cuts = []
        context = Whole(values, x, self.sizes)
        for i, stage in enumerate(self.named()):
            for prefix, name, p in stage:
                x = STEPS[name].whole(p, x, lambda key, prefix=prefix: values[f"{prefix}.{key}"], context)
            if i < len(self.keep):
                if i or stage:  # else the cut is at the input itself
                    x = x * 1.0
                cuts.append(x)
        return (x, *cuts)

    def row(self, values: dict[str, Tensor], row: int, kept: list[Tensor], caches: dict[str, Tensor]) -> Tensor:
        x = values["x"][row]
        context = Row(values, self.specs, self.sizes, row)
        context.caches = caches
        empty = 0
        for i, stage in enumerate(self.named()):
            for prefix, name, p in stage:
                context.step = prefix
                x = STEPS[name].row(p, x, lambda key, prefix=prefix: context(f"{prefix}.{key}"), context)
            if i < len(self.keep):
                live = kept[i][row]
                live, empty = live[live >= 0] - empty, int((live < 0).sum())
                x, context.positions = x[live], context.positions[live]
        return x


def ascending(chosen: list[int], size: int) -> list[int]:
    """Kept slots in order, empty slots (-1) in front."""
    return [-1] * (size - len(chosen)) + sorted(chosen)


def choose(program: Program, keep: int, before: list[list[int]], rng: random.Random) -> list[list[int]]:
    """``before``: the slots of each row that hold a token. The last one is always kept, the first in full rows."""
    rows = []
    first = not program.ragged
    for i, slots in enumerate(before):
        must = {slots[-1]} | ({slots[0]} if first else set())
        count = keep
        if program.ragged and i > 0:
            count = rng.randint(1, keep)
        count = min(count, len(slots))
        rest = [s for s in slots if s not in must]
        rows.append(ascending([*must, *rng.sample(rest, max(0, min(len(rest), count - len(must))))], keep))
    return rows


def make_program(d: random.Random, symbolic: bool = False, only: tuple[str, Params] | None = None) -> Program:
    heads, head = d.choice([(1, 4), (2, 2), (2, 4), (4, 2), (4, 4), (3, 2)])
    width = heads * head
    # traps: as many tokens as channels, heads, head channels or rows
    tokens = d.choice(sorted({width, heads + 2, head + 2, 5, 7} | {s for s in (heads, head) if s >= 4}))
    sizes = Sizes(d.choice([2, 3] if symbolic else [1, 2, 3, tokens if tokens < 6 else 2]), tokens, width, heads)
    ragged = d.random() < 0.3 if only is None else STEPS[only[0]].ragged and d.random() < 0.5
    names = [n for n, step in STEPS.items() if step.ragged or not ragged]
    names += ["channel", "attention", "attention", "side"]

    def stage(least: int, most: int) -> list[tuple[str, Params]]:
        chosen = [d.choice(names) for _ in range(d.randint(least, most))]
        return [(name, STEPS[name].params(d, sizes)) for name in chosen]

    cuts = 1 if only is not None else d.choice([1, 1, 2])
    stages = [[only]] if only is not None else [stage(1, 4 if cuts == 1 else 3) for _ in range(cuts)]
    keep = [d.randint(3, max(3, tokens - 1))]
    if cuts == 2:
        keep.append(d.randint(2, keep[0]))
    return Program(
        sizes, [stage(0, 1) if only is None else [], *stages], keep, ragged, d.random() < 0.5, d.randint(0, 999)
    )


@st.composite
def programs(draw: st.DrawFn, symbolic: bool = False) -> Program:
    return make_program(random.Random(draw(st.integers(0, 2**32))), symbolic)


# ----------------------------------------------------------------------------------------- capture and compare


def capture(
    function: Callable[..., Any],
    inputs: dict[str, Tensor],
    specs: dict[str, Spec] | None = None,
    symbolic: bool = False,
) -> Captured:
    """Trace ``function(values)``; with ``symbolic`` the sizes named "B" and "S" in ``specs`` are symbols."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    names = list(inputs)
    fakes = []
    symbols: dict[Any, Any] = {}
    blank = Captured(None, mode, "dynamo")  # type: ignore[arg-type]

    def size(d: Any, hint: int) -> Any:
        if not symbolic or isinstance(d, int):
            return hint
        if isinstance(d, tuple):
            return d[1] + size("S", hint - d[1])
        if d not in symbols:
            symbols[d] = blank.new_size(hint, d)
        return symbols[d]

    for name, value in inputs.items():
        dims = specs[name].dims if specs is not None else value.shape
        with mode:
            fakes.append(torch.empty([size(d, n) for d, n in zip(dims, value.shape, strict=True)], dtype=value.dtype))
    graph_module = trace(lambda *args: function(dict(zip(names, args, strict=True))), fakes, mode)
    return Captured(graph_module, mode, "dynamo")


def placeholders(captured: Captured, inputs: dict[str, Tensor]) -> dict[str, torch.fx.Node]:
    return dict(zip(inputs, captured.placeholders, strict=True))


def output_nodes(captured: Captured) -> list[torch.fx.Node]:
    return list(next(iter(captured.graph.find_nodes(op="output"))).args[0])


@dataclass
class Feed:
    """One call: the inputs of the program, the kept positions of each cut, those of the cached keys."""

    values: dict[str, Tensor]
    kept: list[Tensor]
    caches: dict[str, Tensor]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return (
            self.values
            | {f"keep{i}": k for i, k in enumerate(self.kept)}
            | {f"cache{n}": k for n, k in self.caches.items()}
        )


def feed(program: Program) -> Feed:
    values, rng, sizes = program.inputs(), random.Random(program.seed), program.sizes
    slots = [list(range(sizes.tokens)) for _ in range(sizes.batch)]
    kept: list[Tensor] = []
    for keep in program.keep:
        rows = choose(program, keep, slots, rng)
        slots = [[i for i, k in enumerate(row) if k >= 0] for row in rows]
        kept.append(torch.tensor(rows))
    caches: dict[str, Tensor] = {}
    for name, spec in program.specs.items():
        if program.cache_cut and name.endswith(".ck"):
            past = spec.dims[2]
            caches[name[:-3]] = torch.tensor([sorted(rng.sample(range(past), past - 1)) for _ in range(sizes.batch)])
    return Feed(values, kept, caches)


def narrowed(
    program: Program,
    given: Feed,
    symbolic: bool = False,
    make: Callable[..., Captured] | None = None,
) -> Captured:
    """Capture the program and narrow it at every cut, the upper one first."""
    inputs = given.inputs
    specs = (
        program.specs
        | {f"keep{i}": Spec(("B", f"K{i}")) for i in range(len(given.kept))}
        | {f"cache{n}": Spec(("B", k.shape[1])) for n, k in given.caches.items()}
    )
    captured = (make or capture)(program.whole, inputs, specs, symbolic=symbolic)
    nodes = placeholders(captured, inputs)
    for i, keep in enumerate(program.keep):
        index = nodes[f"keep{i}"]
        size: Any = keep
        if symbolic:
            with captured.graph.inserting_after(captured.placeholders[-1]):
                size = captured.graph.call_function(aten.sym_size.int, (index, 1))
            size.meta["val"] = index.meta["val"].shape[1]
        cuts = [Cut(output_nodes(captured)[1 + i], index, size, ragged=program.ragged, prefix=1, suffix=1)]
        if i == 0:
            cuts += [
                Cut(nodes[f"{n}.{key}"], nodes[f"cache{n}"], k.shape[1], token_dim=2)
                for n, k in given.caches.items()
                for key in ("ck", "cv")
            ]
        narrow(captured, cuts)
    return captured


def compare(program: Program, given: Feed, results: tuple[Tensor, ...]) -> None:
    out, last = results[0], given.kept[-1]
    assert not out.isnan().any()
    assert out.shape[1] == last.shape[1]
    for row in range(program.sizes.batch):
        wanted = program.row(given.values, row, given.kept, given.caches)
        torch.testing.assert_close(out[row][last[row] >= 0], wanted, rtol=1e-4, atol=1e-4)


def check_literal(program: Program) -> None:
    given = feed(program)
    captured = narrowed(program, given)
    compare(program, given, captured.graph_module(*given.inputs.values()))


def check_symbolic(program: Program, make: Callable[..., Captured] | None = None) -> bool:
    """Returns whether the graph also ran with other numbers of rows and tokens."""
    given = feed(program)
    captured = narrowed(program, given, symbolic=True, make=make)
    compare(program, given, captured.graph_module(*given.inputs.values()))
    x = placeholders(captured, given.inputs)["x"].meta["val"]
    if len({str(s) for s in x.shape[:2] if isinstance(s, torch.SymInt) and s.node.expr.is_Symbol}) < 2:
        return False
    sizes = replace(program.sizes, tokens=program.sizes.tokens + 2, batch=5 - program.sizes.batch)
    other = replace(program, sizes=sizes, keep=[k + 1 for k in program.keep], seed=program.seed + 1, specs={})
    given = feed(other)
    compare(other, given, captured.graph_module(*given.inputs.values()))
    return True


SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@settings(max_examples=60, **SETTINGS)
@given(programs())
def test_literal_sizes(program: Program) -> None:
    check_literal(program)


@settings(max_examples=8, **SETTINGS)
@given(programs(symbolic=True))
def test_symbolic_sizes(program: Program) -> None:
    check_symbolic(program)


@pytest.mark.parametrize("kind", CHANNEL)
def test_channel_steps(kind: str) -> None:
    check_literal(make_program(random.Random(kind), only=("channel", {"kind": kind})))


@pytest.mark.parametrize("style", ["sdpa", "eager", "einsum", "folded"])
@pytest.mark.parametrize("mask", ["none", "B1SS", "SS"])
def test_attention_steps(style: str, mask: str) -> None:
    rng = random.Random(style + mask)
    program = make_program(rng)
    params = attention_params(rng, program.sizes) | {"style": style, "mask": mask, "causal": "no"}
    check_literal(replace(program, stages=[[], [("attention", params)]], keep=[3]))


@pytest.mark.parametrize("ragged", [False, True])
def test_as_many_tokens_as_head_channels(ragged: bool) -> None:
    """64 tokens, head width 64: nothing but the flow of the axes tells them apart."""
    sizes = Sizes(batch=2, tokens=64, width=128, heads=2)
    attention = {
        "style": "eager",
        "group": 1,
        "mask": "SS",
        "bool": False,
        "gqa": "expand",
        "rope": "S",
        "cache": 0,
        "class": 0,
        "causal": "arange",
    }
    check_literal(
        Program(
            sizes,
            [
                [],
                [
                    ("attention", attention),
                    ("side", {"shape": "S", "kind": "heads"}),
                    ("channel", {"kind": "heads_permute"}),
                    ("attention", attention | {"style": "folded", "cache": 64}),
                ],
            ],
            [17],
            ragged,
            True,
            5,
        )
    )


def _from_dynamo(
    function: Callable[..., Any], inputs: dict[str, Tensor], specs: dict[str, Spec], symbolic: bool = True
) -> Captured:
    names, graphs = list(inputs), []

    def backend(graph_module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append((from_dynamo(graph_module), [n.name for n in graph_module.graph.find_nodes(op="placeholder")]))
        return graph_module

    values = [v.clone() for v in inputs.values()]
    for name, value in zip(names, values, strict=True):
        for i, d in enumerate(specs[name].dims):
            if not isinstance(d, int):
                torch._dynamo.maybe_mark_dynamic(value, i)

    def call(*v: Tensor) -> Any:
        used = [t.clone() for t in v]  # all are inputs of the graph, in this order
        return (*function(dict(zip(names, v, strict=True))), *used)

    torch.compile(call, backend=backend, fullgraph=True)(*values)
    captured, _ = graphs[0]
    assert len(graphs) == 1
    return captured


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_expert_steps(kind: str) -> None:
    rng = random.Random(kind)
    check_literal(make_program(rng, only=("experts", {"kind": kind})))
    check_symbolic(make_program(rng, symbolic=True, only=("experts", {"kind": kind})))


@pytest.mark.parametrize("seed", range(2))
def test_through_dynamo(seed: int) -> None:
    rng = random.Random(seed)
    program = make_program(rng, symbolic=True)
    attention = attention_params(rng, program.sizes) | {"style": ["eager", "sdpa"][seed]}
    program = replace(
        program,
        keep=[3],
        cache_cut=False,
        stages=[[], [("attention", attention), ("side", {"shape": "S", "kind": "heads"})]],
    )
    given = feed(program)
    inputs = given.inputs
    specs = program.specs | {"keep0": Spec(("B", "K"))}
    captured = _from_dynamo(program.whole, inputs, specs)
    tensors = [n for n in captured.placeholders if isinstance(n.meta["val"], Tensor)]
    assert [tuple(int(s) for s in n.meta["val"].shape) for n in tensors] == [tuple(v.shape) for v in inputs.values()]
    nodes = dict(zip(inputs, tensors, strict=True))
    index = nodes["keep0"]
    with captured.graph.inserting_after(captured.placeholders[-1]):
        size = captured.graph.call_function(aten.sym_size.int, (index, 1))
    size.meta["val"] = index.meta["val"].shape[1]
    assert isinstance(nodes["x"].meta["val"].shape[1], torch.SymInt)
    narrow(captured, [Cut(nodes["x"], index, size, ragged=program.ragged, prefix=1, suffix=1)])
    flat = dict(zip(tensors, inputs.values(), strict=True))
    symbols = {
        n.meta["val"].shape[i].node.expr: v.shape[i]
        for n, v in flat.items()
        for i in range(v.dim())
        if isinstance(n.meta["val"].shape[i], torch.SymInt)
    }
    args = [flat[n] if n in flat else int(symbols[n.meta["val"].node.expr]) for n in captured.placeholders]
    results = captured.graph_module(*args)
    compare(program, given, results)


# ------------------------------------------------------------------------------------------------------ refusals

B, S, D = 2, 6, 8
CONV = torch.randn(D, D, 3)
MIX = torch.randn(S, S)

REFUSED: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "conv1d": (lambda x: F.conv1d(x.transpose(1, 2), CONV.to(x)), "conv1d", "neighbouring tokens"),
    "token_mixing_linear": (lambda x: F.linear(x.transpose(1, 2), MIX.to(x)), "linear", "token-mixing"),
    "token_mixing_matmul": (lambda x: x + MIX.to(x) @ x, "add", "not the token axis"),
    "grid": (lambda x: x.view(B, 2, 3, D), "view", "folded to a grid"),
    "grid_unflatten": (lambda x: x.unflatten(1, (2, 3)), "unflatten", "folded to a grid"),
    "windows": (lambda x: x.view(B, 3, 2, D).transpose(1, 2).reshape(2 * B, 3, D), "view", "windows"),
    "windows_reshape": (lambda x: x.reshape(B * 3, 2, D), "reshape", "windows"),
    "patch_merging": (lambda x: torch.cat([x[:, 0::2], x[:, 1::2]], -1), "slice_1", "strided"),
    "patch_merging_view": (lambda x: x.reshape(B, S // 2, 2 * D), "reshape", "splits the token axis"),
    "cumsum": (lambda x: x.cumsum(1), "cumsum", "runs along the token axis"),
    "flip": (lambda x: x.flip(1), "flip", "runs along the token axis"),
    "flip_both": (lambda x: x.flip(1, 2), "flip", "runs along the token axis"),
    "topk": (lambda x: x.topk(2, 1).values, "topk", "runs along the token axis"),
    "sort": (lambda x: x.sort(dim=1).values, "sort", "runs along the token axis"),
    "roll": (lambda x: x.roll(1, 1), "roll", "runs along the token axis"),
    "roll_flat": (lambda x: x.roll(1), "roll", "runs along the token axis"),
    "diff": (lambda x: x.diff(dim=1), "diff", "runs along the token axis"),
    "triu": (lambda x: (x @ x.mT).triu(), "triu", "runs along the token axis"),
    "argmax": (lambda x: x.argmax(1), "argmax", "position in the unpruned sequence"),
    "argmax_all": (lambda x: x.argmax(), "argmax", "position in the unpruned sequence"),
    "max_with_indices": (lambda x: x.max(1), "max_1", "position in the unpruned sequence"),
    "slice_inside": (lambda x: x[:, 3:], "slice_1", "border among tokens"),
    "slice_front": (lambda x: x[:, :3], "slice_1", "border among tokens"),
    "select_inside": (lambda x: x[:, 2], "select", "token 2 is read"),
    "select_first_unprotected": (lambda x: x[:, 0], "select", "token 0 is read"),
    "shift": (lambda x: x[:, :-1], "slice_1", "border among tokens"),
    "layer_norm": (lambda x: F.layer_norm(x, (S, D)), "layer_norm", "runs over the token axis"),
    "group_norm": (lambda x: F.group_norm(x.transpose(1, 2), 2), "group_norm", "mixes tokens"),
    "split": (lambda x: x.split([2, 4], 1), "split_with_sizes", "divides the token axis"),
    "chunk": (lambda x: x.chunk(2, 1), "chunk", "divides the token axis"),
    "unbind": (lambda x: x.unbind(1), "unbind", "divides the token axis"),
    "pad": (lambda x: F.pad(x, (0, 0, 0, 1)), "pad", "neighbouring tokens"),
    "boolean_mask": (lambda x: x[x[:, :, 0] > 0], "index", "boolean mask"),
    "index_all_rows": (lambda x: x[:, torch.tensor([1, 2])], "index", "one index for all rows"),
    "index_several": (
        lambda x: x[torch.arange(B)[:, None], torch.zeros(B, 3, dtype=torch.long)],
        "index",
        "several tokens",
    ),
    "index_of_heads": (
        lambda x: x.view(B, S, 4, 2).transpose(1, 2)[:, torch.arange(4), torch.arange(4)],
        "index",
        "one index for all rows",
    ),
    "index_select": (lambda x: x.index_select(1, torch.tensor([0, 1])), "index_select", "picks tokens"),
    "gather": (lambda x: x.gather(1, torch.zeros(B, 1, D, dtype=torch.long)), "gather", "picks tokens"),
    "repeat": (lambda x: x.repeat(1, 2, 1), "repeat", "repeats the token axis"),
    "repeat_interleave": (
        lambda x: x.repeat_interleave(torch.tensor([1, 1, 2, 1, 1, 1]), 1),
        "repeat_interleave",
        "some tokens more often",
    ),
    "repeat_interleave_flat": (lambda x: x.repeat_interleave(2), "repeat_interleave", "all values in one row"),
    "other_axis": (lambda x: x + x.mean(1, keepdim=True).expand(B, S, D), "add", "not the token axis"),
    "shared_flattened": (lambda x: torch.cat([x.view(B * S, D), x.view(B * S, D)]), "cat", "flattened token axis"),
    "prelu": (lambda x: F.prelu(x, torch.arange(S).to(x)), "prelu", "slope"),
    "weight_from_tokens": (lambda x: F.linear(torch.ones(3, D), x[0]), "linear", "depends on tokens"),
    "unknown": (lambda x: torch.cdist(x, x), "cdist", "not known to the token-axis analysis"),
    "causal_against_cache": (
        lambda x: F.scaled_dot_product_attention(
            x, torch.cat([torch.ones(B, 2, D), x], 1), torch.cat([torch.ones(B, 2, D), x], 1), is_causal=True
        ),
        "scaled_dot_product_attention",
        "is_causal",
    ),
}


def plain_capture(function: Callable[..., Any], *inputs: Tensor) -> Captured:
    return capture(lambda v: function(*v.values()), {str(i): t for i, t in enumerate(inputs)})


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusals(name: str) -> None:
    function, node, reason = REFUSED[name]
    x, keep = torch.randn(B, S, D), torch.tensor([[0, 2, 5], [1, 3, 5]])

    def model(x: Tensor, keep: Tensor) -> Any:
        y = x * 2
        out = function(y)
        return (y, *out) if isinstance(out, (tuple, list)) else (y, out)

    captured = plain_capture(model, x, keep)
    before, wanted = captured.graph_module.code, captured.graph_module(x, keep)
    cut = output_nodes(captured)[0]
    with pytest.raises(NarrowError) as error:
        narrow(captured, [Cut(cut, captured.placeholders[1], 3)])
    assert reason in error.value.reason
    assert error.value.node == node
    assert node in str(error.value)
    with pytest.raises(NarrowError):
        check(captured, cut)
    captured.graph_module.recompile()
    assert captured.graph_module.code == before
    for a, b in zip(captured.graph_module(x, keep), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(1) / x.shape[1],
        lambda x: x * x.shape[1],
        lambda x: x / math.sqrt(64) * (1.0 / x.shape[1]),
        lambda x: x.softmax(-1) * (x.shape[0] * x.shape[1]),
    ],
)
def test_number_of_tokens_in_arithmetic(function: Callable[[Tensor], Tensor]) -> None:
    inputs = {"x": torch.randn(2, 6, 8), "keep": torch.tensor([[0, 2, 5], [1, 3, 5]])}

    def model(v: dict[str, Tensor]) -> Any:
        y = v["x"] * 2
        return y, y + function(y).mean()

    captured = capture(model, inputs, {"x": Spec(("B", "S", 8)), "keep": Spec(("B", 3))}, symbolic=True)
    before = captured.graph_module.code
    with pytest.raises(NarrowError, match="used as a number in arithmetic"):
        narrow(captured, [Cut(output_nodes(captured)[0], captured.placeholders[1], 3)])
    assert captured.graph_module.code == before


RAGGED_REFUSED = {
    "mean": (lambda x: x.mean(1), "reduces over the tokens"),
    "max": (lambda x: x.amax(1), "reduces over the tokens"),
    "all": (lambda x: x.sum(), "reduces over the tokens"),
    "linear_attention": (lambda x: x.mT @ x, "sums over the tokens"),
    "einsum": (lambda x: torch.einsum("bsd,bse->bde", x, x), "sums over the tokens"),
    "sigmoid_attention": (lambda x: (x @ x.mT).sigmoid() @ x, "sums over the tokens"),
    "log_softmax": (lambda x: (x @ x.mT).log_softmax(-1) @ x, "sums over the tokens"),
    "other_softmax": (lambda x: (x @ x.mT).softmax(1) @ x, "sums over the tokens"),
    "folded": (lambda x: (x @ x.mT)[:, None].expand(B, 2, S, S).reshape(2 * B, S, S).softmax(-1), "flattened together"),
    "first": (lambda x: x[:, 0], "token 0 is read"),
    "patches": (lambda x: x[:, 1:], "border among tokens"),
}


@pytest.mark.parametrize("name", sorted(RAGGED_REFUSED))
def test_refusals_of_padded_rows(name: str) -> None:
    """What lets empty slots count is refused for padded rows, and only for them."""
    function, reason = RAGGED_REFUSED[name]
    x, keep = torch.randn(B, S, D), torch.tensor([[0, 2, 5], [0, 3, 5]])
    for ragged in (True, False):
        captured = plain_capture(lambda x, keep: (y := x * 2, function(y)), x, keep)
        cut = Cut(output_nodes(captured)[0], captured.placeholders[1], 3, ragged=ragged, prefix=1)
        if ragged:
            with pytest.raises(NarrowError, match=reason):
                narrow(captured, [cut])
            with pytest.raises(NarrowError, match=reason):
                check(captured, cut.node, prefix=1, ragged=True)
        else:
            narrow(captured, [cut])
            y = torch.stack([2 * x[i, keep[i]] for i in range(B)])
            torch.testing.assert_close(captured.graph_module(x, keep)[1], function_on_kept(name, y))


def function_on_kept(name: str, y: Tensor) -> Tensor:
    if name == "folded":
        return (y @ y.mT)[:, None].expand(B, 2, 3, 3).reshape(2 * B, 3, 3).softmax(-1)
    return RAGGED_REFUSED[name][0](y)


def test_labels() -> None:
    """Labels name the axis, whatever its size: here everything is 4 wide."""

    def model(x: Tensor, weight: Tensor) -> Any:
        y = x * 2
        heads = y.view(4, 4, 4, 4).transpose(1, 2)
        scores = heads @ heads.transpose(2, 3)
        return y, heads, scores, scores.softmax(-1) @ heads, y.reshape(16, 16), y[..., :4] @ weight

    captured = plain_capture(model, torch.randn(4, 4, 16), torch.randn(4, 4))
    y, heads, scores, mixed, flat, last = output_nodes(captured)
    flow = check(captured, y)
    where = [
        [i for i, dim in enumerate(flow.labels[node]) if is_token(dim)] for node in (heads, scores, mixed, flat, last)
    ]
    assert where == [[2], [2, 3], [2], [0], [1]]
    assert [f.axis.kind for f in flow.labels[flat][0] if f.axis] == ["batch", "token"]
    assert list(flow.attention) == [n for n in captured.graph.nodes if "softmax" in n.name]

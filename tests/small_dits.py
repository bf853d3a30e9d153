"""Small diffusion transformers written by hand: text in the sequence (both orders), text by cross attention, none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, TEXT = 32, 4, 7


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, (WIDTH,)) * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Self or cross attention with normed queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)

    def project(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        other = x if other is None else other
        q, k, v = (
            m(t).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m, t in ((self.q, x), (self.k, other), (self.v, other))
        )
        return self.norm_q(q) * 2, self.norm_k(k), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """One stream: modulated attention (and cross attention), modulated feed-forward."""

    def __init__(self, cross: bool = False) -> None:
        super().__init__()
        self.attn, self.cross = Attention(), Attention() if cross else None
        self.mod, self.out, self.out_cross = (
            nn.Linear(WIDTH, 6 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, step: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        a, b, c, d, e, f = self.mod(step).chunk(6, -1)
        x = x + c[:, None] * self.out(self.attn.attend(*self.attn.project(modulated(x, a, b)), mask))
        if self.cross is not None:
            x = x + self.out_cross(self.cross.attend(*self.cross.project(x, text)))
        return x + f[:, None] * self.ff(modulated(x, d, e))


class Joint(nn.Module):
    """Two streams that meet in attention."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first, self.picture, self.text = first, Block(), Block()

    def forward(self, x: Tensor, text: Tensor, step: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        mods = [m.mod(step).chunk(6, -1) for m in (self.picture, self.text)]
        parts = [
            m.attn.project(modulated(t, mod[0], mod[1]))
            for m, t, mod in zip((self.picture, self.text), (x, text), mods, strict=True)
        ]
        order = [parts[1], parts[0]] if self.first else parts
        q, k, v = (torch.cat([one, other], 2) for one, other in zip(*order, strict=True))
        y = self.picture.attn.attend(q, k, v, mask)
        sizes = [x.shape[1], text.shape[1]]
        of = y.split(sizes[::-1] if self.first else sizes, 1)
        both = []
        for m, t, mod, part in zip(
            (self.picture, self.text), (x, text), mods, of[::-1] if self.first else of, strict=True
        ):
            t = t + mod[2][:, None] * m.out(part)
            both.append(t + mod[5][:, None] * m.ff(modulated(t, mod[3], mod[4])))
        return both[0], both[1]


class TinyDiT(nn.Module):
    """latents [B, 4, h, w], timestep [B], text [B, T, 16] -> the noise, of the shape of the latents.

    Args:
        kind: "joint" (two layers of two streams), "single" (one of two streams, one of one stream that holds both),
            "cross", "plain".
        first: the text stands in front of the picture. depth: layers of "cross" and "plain".
    """

    def __init__(self, kind: str, first: bool = False, depth: int = 2) -> None:
        super().__init__()
        self.kind, self.first = kind, first
        self.patch, self.words = nn.Conv2d(4, WIDTH, 2, 2), nn.Linear(16, WIDTH)
        self.time, self.unpatch = (
            nn.Sequential(nn.Linear(8, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)),
            nn.Linear(WIDTH, 16),
        )
        if kind in ("joint", "single"):
            self.layers = nn.ModuleList([Joint(first), Joint(first) if kind == "joint" else Block()])
        else:
            self.layers = nn.ModuleList([Block(kind == "cross") for _ in range(depth)])

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        rate = torch.arange(1, 9) / 8
        step = self.time(torch.cos(timestep[:, None] * rate))
        x = self.patch(latents)
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        place = torch.arange(x.shape[1])[:, None] * torch.arange(1, WIDTH + 1) / 50
        x = x + torch.sin(place)
        words = None if text is None else self.words(text)
        mask = None
        if text_mask is not None:
            whole = torch.ones(x.shape[0], x.shape[1], dtype=torch.bool)
            parts = [text_mask, whole] if self.first else [whole, text_mask]
            mask = torch.cat(parts, 1)[:, None, None]
        for layer in self.layers:
            if isinstance(layer, Joint):
                x, words = layer(x, words, step, mask)
            elif self.kind == "single":
                both = layer(torch.cat([words, x] if self.first else [x, words], 1), step, None, mask)
                x = both[:, words.shape[1] :] if self.first else both[:, : x.shape[1]]
            else:
                x = layer(x, step, words)
        x = self.unpatch(functional.layer_norm(x, (WIDTH,)))
        x = x.unflatten(1, (height, width)).unflatten(-1, (4, 2, 2))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def tiny_dit(kind: str, first: bool = False, masked: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model and inputs: 9 x 12 patches, two rows."""
    torch.manual_seed(0)
    model = TinyDiT(kind, first).eval()
    inputs = {"latents": torch.randn(2, 4, 18, 24), "timestep": torch.tensor([0.9, 0.2])}
    if kind != "plain":
        inputs["text"] = torch.randn(2, TEXT, 16)
    if masked:
        inputs["text_mask"] = torch.arange(TEXT).expand(2, TEXT) < torch.tensor([[TEXT], [4]])
    return model, inputs

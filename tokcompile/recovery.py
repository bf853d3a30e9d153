"""Recovery: train a compressed model to give the logits of the dense one again: :func:`recover`. Needs accelerate."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokcompile.api import record
from tokcompile.calibration import arguments
from tokcompile.distillation import (
    LOSSES,
    LossKind,
    SsToken,
    Tip,
    TokenChoice,
    best_of_rows,
    hidden_losses,
    label_losses,
    sstoken_scores,
    tip_measures,
    tip_scores,
    token_losses,
)
from tokcompile.errors import RecoveryError
from tokcompile.session import KeptEntry
from tokcompile.stages import SESSION
from tokcompile.state import NAMESPACE

Item = Mapping[str, Any] | Tensor


@dataclass
class RecoveryReport:
    """What :func:`recover` did.

    Attributes:
        steps: optimizer steps, those of an earlier run that was continued included.
        losses: mean loss over the positions of each step. rates: its learning rate.
        tokens: positions that were trained on, in all.
        trained: name -> number of values of the trained parameters.
        unused: those that the loss does not depend on; they stayed as they were.
        seconds: time of this call.
    """

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens: int = 0
    trained: dict[str, int] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        tenth = max(1, len(self.losses) // 10)
        first, last = (sum(part) / len(part) for part in (self.losses[:tenth], self.losses[-tenth:]))
        return (f"{self.steps} steps on {self.tokens} positions, {sum(self.trained.values())} values in "
                f"{len(self.trained)} parameters trained ({len(self.unused)} not used by the loss); loss "
                f"{first:.4g} -> {last:.4g} (mean of the first and the last {tenth} steps)")


def recover(model: nn.Module, teacher: nn.Module, data: Iterable[Item], *, steps: int | None = None, epochs: int = 1,
            trainable: str | Sequence[str] = "prepared", loss: LossKind = "forward_kl", temperature: float = 1.0,
            hidden_weight: float = 0.0, tokens: str | TokenChoice = "all", lr: float = 1e-4, schedule: str = "cosine",
            warmup: float = 0.05, weight_decay: float = 0.0, max_grad_norm: float = 1.0, accumulation: int = 1,
            seed: int = 0, checkpoints: str | PathLike[str] | None = None, save_every: int = 100,
            progress: bool = False, accelerator: Any = None) -> RecoveryReport:
    """Train ``model`` in place to agree with ``teacher`` on the logits of ``data``.

    Each item of ``data`` is one batch for one process. A step takes ``accumulation`` items for each process; started by
    ``accelerate launch`` on n processes it takes n times as many, and does what one process does with n times the
    ``accumulation``. Logits are compared at the positions of the original sequence that both models have: text for a
    model that lost visual tokens, the positions before a label where the items have ``labels`` (-100: none).

    Dropout acts where ``model`` is in training mode; the teacher is always in evaluation mode.

    Args:
        model: what :func:`tokcompile.optimize` returned. Whatever is trained gets memory of its own first, so the
            original, which shares its parameters, is left alone.
        teacher: the original model.
        data: keyword arguments of ``forward`` (mappings), or tensors (its first argument). A sequence is shuffled
            anew in each epoch; anything else is taken in order, and again from the start if it can be.
        steps: optimizer steps; by default what ``epochs`` passes over ``data`` give.
        trainable: "prepared" (what calibration made), "norms" (parameters of modules that hold vectors only: norms,
            layer scales), "all", or glob patterns of parameter names; a list of any of these is their union.
        loss: "forward_kl" (``KL(teacher | model)``) or "reverse_kl".
        temperature: divides the logits; the loss is multiplied by its square.
        hidden_weight: weight of the squared error of all hidden states over their squared norm, beside the loss.
        tokens: "all", "tip", "sstoken", or a :class:`~tokcompile.distillation.Tip` or
            :class:`~tokcompile.distillation.SsToken`.
        lr, weight_decay: of AdamW. schedule: a name that ``transformers.get_scheduler`` knows.
        warmup: share of the steps in which the rate rises. max_grad_norm: gradients are clipped to this norm.
        checkpoints: a folder. The run goes on from the checkpoint in it, if any, as if it had not been interrupted,
            provided that model, data and settings are the same.
        save_every: steps between checkpoints.
        progress: show a progress bar.
        accelerator: an ``accelerate.Accelerator`` of your own, without mixed precision.

    Returns:
        Loss of each step, number of positions, and which parameters were trained.

    Raises:
        RecoveryError: data that is empty or does not fit the model, another vocabulary, nothing to train, the same
            model twice, a checkpoint of another run, or a loss that is not finite (the weights are those before).
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise RecoveryError("recover runs on accelerate; install it with pip install 'tokcompile[train]'") from error
    choice = _check(loss, tokens, temperature, accumulation, steps, epochs, save_every)
    if teacher is model:
        raise RecoveryError("teacher and model are one object; pass the original model as teacher (for a model that "
                            "was optimized in place, a copy.deepcopy made before)")
    accelerator = accelerator or Accelerator()
    if accelerator.mixed_precision != "no":
        raise RecoveryError(f"mixed_precision={accelerator.mixed_precision!r}: operations of rewritten graphs do not "
                            "follow autocast; train in the dtype of the model (fp32, or model.to(torch.bfloat16))")
    for module in (model, teacher):
        if not hasattr(module, "hf_device_map"):  # accelerate spread it over devices itself
            module.to(accelerator.device)
    parameters = _chosen(model, trainable)
    _own_memory(model, teacher, parameters)
    stream = _Stream(data, seed)
    group = accumulation * accelerator.num_processes
    if steps is None:
        steps = stream.steps(epochs, group)
    settings = {
        "steps": steps, "trained": _digest(parameters), "loss": loss, "temperature": temperature,
        "hidden_weight": hidden_weight, "tokens": tokens if choice is None else [type(choice).__name__, asdict(choice)],
        "lr": lr, "schedule": schedule, "warmup": warmup, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm,
        "accumulation": accumulation, "processes": accelerator.num_processes, "seed": seed}
    with _training(model, teacher, parameters), torch.random.fork_rng():
        torch.manual_seed(seed + accelerator.process_index)
        run = _Run(model, teacher, parameters, accelerator, loss=loss, temperature=temperature,
                   hidden_weight=hidden_weight, choice=choice, accumulation=accumulation, max_grad_norm=max_grad_norm)
        run.optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=weight_decay)
        run.scheduler = _schedule(schedule, run.optimizer, warmup, steps)
        return _train(run, stream, steps, settings, checkpoints, save_every, progress)


def _check(loss: str, tokens: str | TokenChoice, temperature: float, accumulation: int, steps: int | None,
           epochs: int, save_every: int) -> TokenChoice | None:
    for name, value in (("accumulation", accumulation), ("steps", 1 if steps is None else steps), ("epochs", epochs),
                        ("save_every", save_every)):
        if value < 1:
            raise RecoveryError(f"{name}={value}: expected at least 1")
    if temperature <= 0:
        raise RecoveryError(f"temperature={temperature}: expected a number above 0")
    if loss not in LOSSES:
        raise RecoveryError(f"loss={loss!r}: choose one of {', '.join(LOSSES)}")
    if isinstance(tokens, (Tip, SsToken)):
        return tokens
    choices: dict[str, TokenChoice | None] = {"all": None, "tip": Tip(), "sstoken": SsToken()}
    if tokens not in choices:
        raise RecoveryError(f"tokens={tokens!r}: choose all, tip, sstoken, or a Tip or SsToken object")
    return choices[tokens]


def _schedule(name: str, optimizer: torch.optim.Optimizer, warmup: float, steps: int) -> Any:
    from transformers import get_scheduler

    try:
        return get_scheduler(name, optimizer, num_warmup_steps=round(warmup * steps), num_training_steps=steps)
    except ValueError as error:
        raise RecoveryError(f"schedule={name!r}: {error}") from error


# .. what is trained


def _chosen(model: nn.Module, trainable: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters by name, floating ones only."""
    every = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    chosen: dict[str, nn.Parameter] = {}
    fixed = [f"{name}.{buffer}" for name, module in model.named_modules() for buffer in getattr(module, "host", ())
             if name.startswith(f"{NAMESPACE}.")]
    for wish in [trainable] if isinstance(trainable, str) else trainable:
        for name in fixed:
            if wish in ("prepared", "all") or fnmatch.fnmatchcase(name, wish):
                raise RecoveryError(f"trainable={wish!r}: {name} stays in host memory and cannot be trained; make the "
                                    "model with table: model, or choose parameters by patterns that leave it out")
        if wish == "all":
            found = every
        elif wish == "prepared":
            found = {n: p for n, p in every.items() if n.startswith(f"{NAMESPACE}.")}
            if not found:
                raise RecoveryError("trainable='prepared': no pass of this recipe prepared parameters; choose 'norms', "
                                    "'all', or patterns of parameter names")
        elif wish == "norms":
            vectors = {name for name, module in model.named_modules()
                       if all(p.dim() <= 1 for p in module.parameters(recurse=False))}
            found = {n: p for n, p in every.items() if n.rpartition(".")[0] in vectors}
        else:
            found = {n: p for n, p in every.items() if fnmatch.fnmatchcase(n, wish)}
        if not found:
            near = difflib.get_close_matches(wish, every, n=3, cutoff=0.3)
            raise RecoveryError(f"trainable: no parameter matches {wish!r}"
                                + (f"; near are {', '.join(near)}" if near else "; choose prepared, norms, all, or a "
                                   "pattern of names"))
        chosen.update(found)
    return {n: p for n, p in every.items() if n in chosen}


def _own_memory(model: nn.Module, teacher: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Training writes in place, and ``model`` lies in the memory of the original."""
    theirs = {id(p) for p in teacher.parameters()}
    for name, parameter in parameters.items():
        if id(parameter) in theirs:
            raise RecoveryError(f"{name} is one object in teacher and model, so training would change the teacher; "
                                "pass a copy.deepcopy of the teacher")
        parameter.data = parameter.data.clone()
    if model.training:  # batch norms write into buffers
        copies: dict[int, Tensor] = {}
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())


def _digest(parameters: Mapping[str, nn.Parameter]) -> str:
    text = ";".join(f"{n}{tuple(p.shape)}{p.dtype}" for n, p in parameters.items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def _training(model: nn.Module, teacher: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for ``parameters`` only, the teacher in evaluation mode; undone at the end."""
    wanted = {id(p) for p in parameters.values()}
    before = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in teacher.modules()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in wanted)
        teacher.eval()
        yield
    finally:
        for parameter, flag in before:
            parameter.grad = None
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


# .. data


class _Stream:
    """Items without end, by number; the same ones however many processes take them."""

    def __init__(self, data: Iterable[Item], seed: int) -> None:
        self.data, self.seed = data, seed
        self.indexed = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Mapping)
        if isinstance(data, Mapping) or not (self.indexed or hasattr(data, "__iter__")):
            raise RecoveryError(f"data is a {type(data).__name__}; expected an iterable of inputs, such as "
                                "[{'input_ids': ...}, ...]")
        self.size = len(data) if hasattr(data, "__len__") else None  # type: ignore[arg-type]
        if self.size == 0:
            raise RecoveryError("the data is empty: give at least one input, such as {'input_ids': ...}")
        self._order: tuple[int, list[int]] = (-1, [])
        self._iterator: Iterator[Item] | None = None
        self._next = 0

    def steps(self, epochs: int, group: int) -> int:
        if self.size is None:
            raise RecoveryError("data has no length, so say how long to train: steps=")
        return max(1, self.size * epochs // group)

    def item(self, number: int) -> Item:
        """Item ``number``; numbers only grow."""
        if self.indexed:
            assert self.size is not None
            epoch, place = divmod(number, self.size)
            if self._order[0] != epoch:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._order = epoch, torch.randperm(self.size, generator=generator).tolist()
            return self.data[self._order[1][place]]  # type: ignore[index, no-any-return]
        while True:
            item = self._pull()
            self._next += 1
            if self._next > number:
                return item

    def _pull(self) -> Item:
        if self._iterator is None:
            self._iterator = iter(self.data)
        with contextlib.suppress(StopIteration):
            return next(self._iterator)
        if self._next == 0:
            raise RecoveryError("the data is empty: give at least one input, such as {'input_ids': ...}; a generator "
                                "that was used before gives nothing more")
        fresh = iter(self.data)
        if fresh is self._iterator:
            raise RecoveryError(f"the data ran out after {self._next} items, and a generator cannot start again; pass "
                                "a list, an object whose __iter__ starts anew, or fewer steps")
        self._iterator = fresh
        return next(fresh)


# .. one batch


@dataclass
class _Batch:
    """Positions at which both models gave logits, in a row.

    Attributes:
        student, teacher: ``[N, V]``.
        rows: int64 ``[N]``, their row in the batch. positions: their place in the unpruned sequence.
        labels: int64 ``[N]``, the token that follows; None without token ids.
        hidden: of each layer, ``[N, D]`` of student and teacher.
        on_prompt: see :func:`~tokcompile.distillation.sstoken_scores`.
    """

    student: Tensor
    teacher: Tensor
    rows: Tensor
    positions: Tensor
    labels: Tensor | None
    hidden: list[tuple[Tensor, Tensor]]
    on_prompt: Tensor | None = None


class _Run:
    """The models, and what is done with one step's items."""

    optimizer: torch.optim.Optimizer
    scheduler: Any

    def __init__(self, model: nn.Module, teacher: nn.Module, parameters: dict[str, nn.Parameter], accelerator: Any, *,
                 loss: LossKind, temperature: float, hidden_weight: float, choice: TokenChoice | None,
                 accumulation: int, max_grad_norm: float) -> None:
        self.model, self.teacher, self.parameters, self.accelerator = model, teacher, parameters, accelerator
        self.loss, self.temperature, self.hidden_weight, self.choice = loss, temperature, hidden_weight, choice
        self.accumulation, self.max_grad_norm = accumulation, max_grad_norm
        self.history: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.visual = _visual_ids(model)
        self.probe: Any = None
        if isinstance(choice, SsToken) and choice.gamma < 1:
            from tokcompile.prompt_attention import PromptAttention

            self.probe = PromptAttention(teacher)

    def step(self, items: Sequence[dict[str, Any]], number: int) -> tuple[float, int]:
        """One optimizer step: -> (mean loss, number of positions), over all processes."""
        everywhere = None
        if isinstance(self.choice, Tip) and len(items) > 1:
            with torch.no_grad():
                everywhere = self._everywhere([tip_measures(b.student, b.teacher) for b in map(self.compare, items)])
        total, count = torch.zeros((), dtype=torch.float64), 0
        for item in items:
            before = self._before(item) if isinstance(self.choice, SsToken) else None
            batch = self.compare(item)
            chosen = self._choose(batch, everywhere, before, number)
            losses = token_losses(batch.student[chosen], batch.teacher[chosen], self.loss, self.temperature)
            if self.hidden_weight:
                losses = losses + self.hidden_weight * hidden_losses(
                    [a[chosen] for a, _ in batch.hidden], [b[chosen] for _, b in batch.hidden])
            if losses.requires_grad:
                losses.sum().backward()
            total += losses.detach().sum().double().cpu()
            count += losses.numel()
        return self._update(total, count)

    def _update(self, total: Tensor, count: int) -> tuple[float, int]:
        accelerator, parameters = self.accelerator, list(self.parameters.values())
        sums = torch.tensor([float(total), count, *(p.grad is not None for p in parameters)],
                            dtype=torch.float32 if accelerator.device.type == "mps" else torch.float64,
                            device=accelerator.device)
        sums = accelerator.reduce(sums, "sum").tolist()
        loss, count = sums[0] / max(sums[1], 1), int(sums[1])
        if count == 0:
            raise RecoveryError("no position to compare in a whole step: every label is -100, or every token is "
                                "padding or an image")
        if not math.isfinite(loss):
            raise RecoveryError("the loss is not finite; the weights are those of the step before. Lower lr, or "
                                "max_grad_norm")
        if not any(sums[2:]):
            raise RecoveryError("the logits depend on none of the chosen parameters: "
                                f"{', '.join(list(self.parameters)[:4])}, ...")
        for (name, parameter), has in zip(self.parameters.items(), sums[2:], strict=True):
            if not has:
                continue
            self.used.add(name)
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(grad, "sum") / count
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, count

    # .. which positions

    def _choose(self, batch: _Batch, everywhere: Tensor | None, before: Tensor | None, number: int) -> Tensor:
        choice, rows = self.choice, batch.rows
        if isinstance(choice, Tip):
            measures = tip_measures(batch.student.detach(), batch.teacher)
            if everywhere is None:
                everywhere = self._everywhere([measures])
            return best_of_rows(tip_scores(measures, everywhere, choice), rows, choice.ratio, up=False)
        if isinstance(choice, SsToken):
            assert before is not None
            assert batch.labels is not None
            with torch.no_grad():
                now = label_losses(batch.student.detach(), batch.labels)
            gamma = choice.gamma if number >= choice.warmup or choice.gamma == 1 else 0.0
            if number == 0 and choice.gamma == 1:
                return torch.ones_like(rows, dtype=torch.bool)  # nothing has improved yet
            scores = sstoken_scores(before, now, batch.on_prompt, rows, gamma)
            return best_of_rows(scores, rows, choice.ratio, up=True)
        return torch.ones_like(rows, dtype=torch.bool)

    def _everywhere(self, parts: list[Tensor]) -> Tensor:
        """Measures of all items of the step, on all processes: ``[3, M]``."""
        mine = torch.cat(parts, 1)
        padded = self.accelerator.pad_across_processes(mine.T.contiguous(), dim=0, pad_index=float("nan"))
        every = self.accelerator.gather(padded)
        return every[~every[:, 0].isnan()].T

    def _before(self, item: dict[str, Any]) -> Tensor:
        """Losses of the tokens under the weights that training began with."""
        now = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.history[name]
            with torch.no_grad():
                batch = self.compare(item, probe=False)
                if batch.labels is None:
                    raise RecoveryError("tokens='sstoken' compares losses of tokens, and the items hold no input_ids "
                                        "(or labels) of the shape of the logits; use Tip()")
                return label_losses(batch.student, batch.labels)
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = now[name]

    # .. forward

    def compare(self, item: dict[str, Any], probe: bool = True) -> _Batch:
        """Run both models on one item."""
        kwargs = {k: v for k, v in item.items() if k != "labels"}
        if self.hidden_weight:
            kwargs["output_hidden_states"] = True
        labels, mass = item.get("labels"), None
        with torch.no_grad():
            if probe and self.probe is not None:
                theirs, mass = self._probed(item, kwargs)
            else:
                theirs = self.teacher(**kwargs)
        recorder = record(self.model) if hasattr(self.model, SESSION) else contextlib.nullcontext()
        with recorder as recording:
            ours = self.model(**kwargs)
        kept = recording.kept if recording is not None else []
        student, teacher = _logits(ours, "model"), _logits(theirs, "teacher")
        if student.shape[-1] != teacher.shape[-1]:
            raise RecoveryError(f"vocabulary mismatch: the model gives {student.shape[-1]} logits for each position, "
                                f"the teacher {teacher.shape[-1]}; they must share the tokenizer")
        if student.dim() == 2:  # one for each row: a classifier
            student, teacher, labels = student[:, None], teacher[:, None], None
            kept = []
        place = _positions(student, teacher.shape[1], kept)
        valid, following = self._valid(item, labels, teacher)
        ok = (place >= 0) & valid.gather(1, place.clamp(min=0))
        row, slot = ok.nonzero(as_tuple=True)
        at = place[row, slot]
        hidden = _hidden(ours, theirs, kept, row, at) if self.hidden_weight else []
        on_prompt = mass[row, at + 1] if mass is not None else None
        return _Batch(student[row, slot], teacher[row, at], row, at,
                      None if following is None else following[row, at], hidden, on_prompt)

    def _valid(self, item: dict[str, Any], labels: Any, teacher: Tensor) -> tuple[Tensor, Tensor | None]:
        """bool ``[B, S]``: the positions to compare; and the token that follows each (int64, or None)."""
        shape = teacher.shape[:2]
        ids, mask = item.get("input_ids"), item.get("attention_mask")
        if labels is not None:
            if labels.shape != shape:
                raise RecoveryError(f"labels are {tuple(labels.shape)}, the logits of the teacher {tuple(shape)}; "
                                    "leave labels out, and all positions are compared")
            following = F.pad(labels, (0, 1), value=-100)[:, 1:]
            return following != -100, following.clamp(min=0)
        valid = torch.ones(shape, dtype=torch.bool, device=teacher.device)
        if mask is not None and mask.shape == shape:
            valid &= mask.bool() & F.pad(mask, (0, 1), value=1)[:, 1:].bool()
        if ids is None or ids.shape != shape:
            return valid, None
        following = F.pad(ids, (0, 1), value=-1)[:, 1:]
        for token in self.visual:
            valid &= (ids != token) & (following != token)
        if isinstance(self.choice, SsToken):  # the last position has no token to compare losses of
            valid &= following >= 0
        return valid, following.clamp(min=0)

    def _probed(self, item: dict[str, Any], kwargs: dict[str, Any]) -> tuple[Any, Tensor]:
        from tokcompile.prompt_attention import prompt_mass

        labels, mask = item.get("labels"), item.get("attention_mask")
        if labels is None or not bool((labels == -100).any()):
            raise RecoveryError("tokens='sstoken' looks at the attention on the prompt, and the items do not say where "
                                "it is: give labels with -100 there, or use SsToken(gamma=1)")
        prompt = labels == -100
        return prompt_mass(self.probe, prompt & mask.bool() if mask is not None else prompt, kwargs)


def _logits(output: Any, whose: str) -> Tensor:
    """``[B, V]`` or ``[B, S, V]``."""
    found = output
    if not isinstance(found, Tensor):
        found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        if found is None and isinstance(output, (tuple, list)) and output:
            found = output[0]
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        form = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else "missing"
        raise RecoveryError(f"recover compares logits [B, V] or [B, S, V]; those of the {whose} are {form} (its output "
                            f"is a {type(output).__name__}); use the model with its head")
    return found


def _positions(student: Tensor, length: int, kept: Sequence[KeptEntry]) -> Tensor:
    """int64 ``[B, K]``: the place of each position of the student in the unpruned sequence; -1 at empty slots."""
    shape = student.shape[:2]
    fitting = [entry.indices for entry in kept if entry.indices.shape == shape]
    if fitting:
        return fitting[-1]
    if shape[1] != length:
        raise RecoveryError(f"the model gives logits for {shape[1]} positions, the teacher for {length}, and no step "
                            "of the recipe says which positions are left; pass the original model as teacher")
    return torch.arange(length, device=student.device).expand(shape)


def _hidden(ours: Any, theirs: Any, kept: Sequence[KeptEntry], row: Tensor, at: Tensor) -> list[tuple[Tensor, Tensor]]:
    first, second = getattr(ours, "hidden_states", None), getattr(theirs, "hidden_states", None)
    if not first or not second or len(first) != len(second):
        raise RecoveryError("hidden_weight: the models give no hidden states (output_hidden_states=True), or not one "
                            "for each layer; leave hidden_weight at 0")
    pairs = []
    for a, b in zip(first, second, strict=True):
        place = _positions(a, b.shape[1], kept)
        slot = (place[row] < at[:, None]).sum(1)  # ascending, empty slots in front
        pairs.append((a[row, slot], b[row, at]))
    return pairs


def _visual_ids(model: nn.Module) -> list[int]:
    """Ids that stand for images in a prompt; nothing is predicted there."""
    config = getattr(model, "config", None)
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return sorted({v for v in (getattr(config, n, None) for n in names) if isinstance(v, int)})


# .. the loop


def _train(run: _Run, stream: _Stream, steps: int, settings: dict[str, Any], folder: str | PathLike[str] | None,
           save_every: int, progress: bool) -> RecoveryReport:
    started = time.perf_counter()
    report = RecoveryReport(trained={n: p.numel() for n, p in run.parameters.items()})
    checkpoints, accelerator = None, run.accelerator
    if isinstance(run.choice, SsToken):
        run.history = {n: p.detach().clone() for n, p in run.parameters.items()}
    if folder is not None:
        from tokcompile.recovery_state import Checkpoints

        checkpoints = Checkpoints(folder, settings, run.parameters, run.optimizer, run.scheduler, accelerator)
        if run.history:
            run.history = checkpoints.start(run.history)
        found = checkpoints.load()
        if found is not None:
            report.steps, history = found
            report.losses, report.rates, report.tokens = history["losses"], history["rates"], history["tokens"]
            run.used = set(history["used"])
    with _bar(progress and accelerator.is_main_process, steps, report.steps) as tick:
        for number in range(report.steps, steps):
            items = []
            for part in range(run.accumulation):
                index = (number * run.accumulation + part) * accelerator.num_processes + accelerator.process_index
                items.append(_to_device(run, stream.item(index), index))
            rate = run.scheduler.get_last_lr()[0]
            loss, count = run.step(items, number)
            report.steps, report.tokens = number + 1, report.tokens + count
            report.losses.append(loss)
            report.rates.append(rate)
            tick(loss)
            if checkpoints is not None and (report.steps % save_every == 0 or report.steps == steps):
                checkpoints.save(report.steps, {"losses": report.losses, "rates": report.rates,
                                                "tokens": report.tokens, "used": sorted(run.used)})
    report.unused = [n for n in run.parameters if n not in run.used]
    report.seconds = time.perf_counter() - started
    return report


def _to_device(run: _Run, item: Any, number: int) -> dict[str, Any]:
    kwargs = arguments(run.model, item, number, what="data item", error=RecoveryError)
    moved = {k: v.to(run.accelerator.device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    if hasattr(getattr(run.model, "config", None), "use_cache"):
        moved.setdefault("use_cache", False)  # a cache would hold on to keys and values that nothing reads
    return moved


@contextlib.contextmanager
def _bar(show: bool, steps: int, done: int) -> Iterator[Any]:
    if not show:
        yield lambda loss: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                  TextColumn("loss {task.fields[loss]}"), TimeRemainingColumn()) as bar:
        task = bar.add_task("Recovering", total=steps, completed=done, loss="-")
        yield lambda loss: bar.update(task, advance=1, loss=f"{loss:.4f}")

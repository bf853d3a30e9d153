"""One optimizer step: both models on one batch, the positions that count, the losses."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokcompile.api import record
from tokcompile.errors import RecoveryError
from tokcompile.prepare.arguments import arguments
from tokcompile.recovery.data import Batch, Stream, shared_positions
from tokcompile.recovery.losses import (
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
from tokcompile.recovery.report import RecoveryReport
from tokcompile.runtime.install import SESSION
from tokcompile.runtime.recording import KeptEntry


class Run:
    """The models, and what is done with one step's items.

    One class: items, losses and the step itself read the same models and settings.
    """

    optimizer: torch.optim.Optimizer
    scheduler: Any

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        parameters: dict[str, nn.Parameter],
        accelerator: Any,
        *,
        loss: LossKind,
        temperature: float,
        hidden_weight: float,
        choice: TokenChoice | None,
        accumulation: int,
        max_grad_norm: float,
    ) -> None:
        self.model, self.teacher, self.parameters, self.accelerator = model, teacher, parameters, accelerator
        self.loss, self.temperature, self.hidden_weight, self.choice = loss, temperature, hidden_weight, choice
        self.accumulation, self.max_grad_norm = accumulation, max_grad_norm
        self.history: dict[str, Tensor] = {}
        self.used: set[str] = set()
        self.visual = _visual_ids(model)
        self.probe: Any = None
        if isinstance(choice, SsToken) and choice.gamma < 1:
            from tokcompile.recovery.prompt_attention import PromptAttention

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
                    [a[chosen] for a, _ in batch.hidden], [b[chosen] for _, b in batch.hidden]
                )
            if losses.requires_grad:
                losses.sum().backward()
            total += losses.detach().sum().double().cpu()
            count += losses.numel()
        return self._update(total, count)

    def _update(self, total: Tensor, count: int) -> tuple[float, int]:
        accelerator, parameters = self.accelerator, list(self.parameters.values())
        sums = torch.tensor(
            [float(total), count, *(p.grad is not None for p in parameters)],
            dtype=torch.float32 if accelerator.device.type == "mps" else torch.float64,
            device=accelerator.device,
        )
        sums = accelerator.reduce(sums, "sum").tolist()
        loss, count = sums[0] / max(sums[1], 1), int(sums[1])
        if count == 0:
            raise RecoveryError(
                "no position to compare in a whole step: every label is -100, or every token is padding or an image"
            )
        if not math.isfinite(loss):
            raise RecoveryError(
                "the loss is not finite; the weights are those of the step before. Lower lr, or max_grad_norm"
            )
        if not any(sums[2:]):
            raise RecoveryError(
                f"the logits depend on none of the chosen parameters: {', '.join(list(self.parameters)[:4])}, ..."
            )
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

    def _choose(self, batch: Batch, everywhere: Tensor | None, before: Tensor | None, number: int) -> Tensor:
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
                    raise RecoveryError(
                        "tokens='sstoken' compares losses of tokens, and the items hold no input_ids "
                        "(or labels) of the shape of the logits; use Tip()"
                    )
                return label_losses(batch.student, batch.labels)
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = now[name]

    # .. forward

    def compare(self, item: dict[str, Any], probe: bool = True) -> Batch:
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
            raise RecoveryError(
                f"vocabulary mismatch: the model gives {student.shape[-1]} logits for each position, "
                f"the teacher {teacher.shape[-1]}; they must share the tokenizer"
            )
        if student.dim() == 2:  # one for each row: a classifier
            student, teacher, labels = student[:, None], teacher[:, None], None
            kept = []
        place = shared_positions(student, teacher.shape[1], kept)
        valid, following = self._valid(item, labels, teacher)
        ok = (place >= 0) & valid.gather(1, place.clamp(min=0))
        row, slot = ok.nonzero(as_tuple=True)
        at = place[row, slot]
        hidden = _hidden(ours, theirs, kept, row, at) if self.hidden_weight else []
        on_prompt = mass[row, at + 1] if mass is not None else None
        return Batch(
            student[row, slot],
            teacher[row, at],
            row,
            at,
            None if following is None else following[row, at],
            hidden,
            on_prompt,
        )

    def _valid(self, item: dict[str, Any], labels: Any, teacher: Tensor) -> tuple[Tensor, Tensor | None]:
        """bool ``[B, S]``: the positions to compare; and the token that follows each (int64, or None)."""
        shape = teacher.shape[:2]
        ids, mask = item.get("input_ids"), item.get("attention_mask")
        if labels is not None:
            if labels.shape != shape:
                raise RecoveryError(
                    f"labels are {tuple(labels.shape)}, the logits of the teacher {tuple(shape)}; "
                    "leave labels out, and all positions are compared"
                )
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
        from tokcompile.recovery.prompt_attention import prompt_mass

        labels, mask = item.get("labels"), item.get("attention_mask")
        if labels is None or not bool((labels == -100).any()):
            raise RecoveryError(
                "tokens='sstoken' looks at the attention on the prompt, and the items do not say where "
                "it is: give labels with -100 there, or use SsToken(gamma=1)"
            )
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
        raise RecoveryError(
            f"recover compares logits [B, V] or [B, S, V]; those of the {whose} are {form} (its output "
            f"is a {type(output).__name__}); use the model with its head"
        )
    return found


def _hidden(ours: Any, theirs: Any, kept: Sequence[KeptEntry], row: Tensor, at: Tensor) -> list[tuple[Tensor, Tensor]]:
    first, second = getattr(ours, "hidden_states", None), getattr(theirs, "hidden_states", None)
    if not first or not second or len(first) != len(second):
        raise RecoveryError(
            "hidden_weight: the models give no hidden states (output_hidden_states=True), or not one "
            "for each layer; leave hidden_weight at 0"
        )
    pairs = []
    for a, b in zip(first, second, strict=True):
        place = shared_positions(a, b.shape[1], kept)
        slot = (place[row] < at[:, None]).sum(1)  # ascending, empty slots in front
        pairs.append((a[row, slot], b[row, at]))
    return pairs


def _visual_ids(model: nn.Module) -> list[int]:
    """Ids that stand for images in a prompt; nothing is predicted there."""
    config = getattr(model, "config", None)
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return sorted({v for v in (getattr(config, n, None) for n in names) if isinstance(v, int)})


# .. the loop


def train(
    run: Run,
    stream: Stream,
    steps: int,
    settings: dict[str, Any],
    folder: str | PathLike[str] | None,
    save_every: int,
    progress: bool,
) -> RecoveryReport:
    started = time.perf_counter()
    report = RecoveryReport(trained={n: p.numel() for n, p in run.parameters.items()})
    checkpoints, accelerator = None, run.accelerator
    if isinstance(run.choice, SsToken):
        run.history = {n: p.detach().clone() for n, p in run.parameters.items()}
    if folder is not None:
        from tokcompile.recovery.checkpoints import Checkpoints

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
                checkpoints.save(
                    report.steps,
                    {"losses": report.losses, "rates": report.rates, "tokens": report.tokens, "used": sorted(run.used)},
                )
    report.unused = [n for n in run.parameters if n not in run.used]
    report.seconds = time.perf_counter() - started
    return report


def _to_device(run: Run, item: Any, number: int) -> dict[str, Any]:
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

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    ) as bar:
        task = bar.add_task("Recovering", total=steps, completed=done, loss="-")
        yield lambda loss: bar.update(task, advance=1, loss=f"{loss:.4f}")

"""Time and memory of a model, dense and with recipes, in one interleaved run: :func:`bench`.

Also what any timing needs: :func:`interleaved`, :func:`quantile`, :func:`versions`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tokcompile.errors import TokcompileError
from tokcompile.measure.timing import Progress, in_turn, load, peak_memory, versions
from tokcompile.prepare.given import check_inputs, check_model
from tokcompile.recipes import Recipe
from tokcompile.reporting.bench_result import (
    COMPILED,
    EAGER,
    PARTS,
    BenchResult,
    BenchRow,
    Timing,
    _device_name,
    _names,
    amdahl,
)

# ----------------------------------------------------------------------------------------------------------- bench


def bench(
    model: nn.Module,
    inputs: Mapping[str, Any],
    recipes: Sequence[Any] = (),
    *,
    new_tokens: int = 16,
    rounds: int = 10,
    warmup: int = 2,
    lowering: str = "inductor",
    compiled_baseline: bool = True,
    memory: bool = True,
    calibration: Any = None,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure ``model`` dense (eager, and under ``torch.compile``) and with each recipe, in turns.

    Args:
        model: in eval mode, on its device. It is not changed: everything runs on copies that share its parameters.
        inputs: keyword arguments of ``generate`` (where the model has it), else of ``forward``.
        recipes: names, paths, mappings or recipes.
        new_tokens: tokens generated in each round; 1 leaves decoding out.
        rounds, warmup: timed rounds, and rounds before them.
        lowering: of the recipes, see :func:`tokcompile.optimize`.
        compiled_baseline: whether plain ``torch.compile`` is measured; it is the baseline then.
        memory: whether peak memory is measured, in a round of its own.
        calibration: for the recipes with passes that take it, see :func:`tokcompile.optimize`.
        progress: called with what is being done, steps done, steps in all.

    Raises:
        TokcompileError: a bad argument, or a recipe that does not fit the model (see :func:`tokcompile.optimize`).
    """
    from tokcompile.api import optimize, report
    from tokcompile.runtime.install import share

    if new_tokens < 1 or rounds < 1 or warmup < 1:
        raise TokcompileError("new_tokens, rounds and warmup should be at least 1")
    check_model(model, "bench")
    check_inputs(model, inputs, "bench")
    if isinstance(recipes, str):
        raise TokcompileError(f"recipes is a sequence of recipes; pass [{recipes!r}]")
    loaded = [Recipe.load(recipe) for recipe in recipes]
    names = _names(loaded)
    generates = callable(getattr(model, "generate", None)) and getattr(model, "can_generate", lambda: True)()
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    first = next((value for value in inputs.values() if isinstance(value, torch.Tensor)), None)
    result = BenchResult(
        type(model).__name__,
        _device_name(device),
        len(first) if first is not None else 1,
        new_tokens if generates else 0,
        COMPILED if compiled_baseline else EAGER,
        versions=versions(),
        load=load(),
    )

    models: dict[str, nn.Module] = {EAGER: share(model)}
    if compiled_baseline:
        models[COMPILED] = _plainly_compiled(share(model))
    for name, recipe in zip(names, loaded, strict=True):
        given = calibration if _takes_calibration(recipe) else None
        models[name] = optimize(model, recipe, lowering=lowering, calibration=given)
    calls = {name: _Call(one, inputs, new_tokens if generates else 0, device) for name, one in models.items()}

    rows = {name: BenchRow(name) for name in models}
    _compile(calls, rows, progress)
    for name, found in in_turn(calls, rounds, warmup, progress).items():
        for part in PARTS:
            if all(part in entry for entry in found):
                setattr(rows[name], part, Timing.of([entry[part] for entry in found]))
    for number, (name, call) in enumerate(calls.items()):
        if memory:
            if progress:
                progress(f"memory of {name}", number, len(calls))
            with torch.inference_mode():
                rows[name].peak_bytes = peak_memory(call, device)
    for name in names:
        result.reports[name] = report(models[name])
        ratios = [step.flop_ratio for step in result.reports[name].steps if step.flop_ratio]
        rows[name].flop_ratio = max(ratios, default=None)
    _compare(list(rows.values()), rows[result.baseline])
    result.rows = list(rows.values())
    return result


def _takes_calibration(recipe: Recipe) -> bool:
    from tokcompile.registry import get_pass

    return any(getattr(get_pass(step.pass_), "calibration", "none") != "none" for step in recipe.steps)


def _compile(calls: Mapping[str, _Call], rows: Mapping[str, BenchRow], progress: Progress | None) -> None:
    """The first call of each model, with its time."""
    for number, (name, call) in enumerate(calls.items()):
        if progress:
            progress(f"compiling {name}", number, len(calls))
        started = time.perf_counter()
        with torch.inference_mode():
            call()
        rows[name].compile_seconds = None if name == EAGER else time.perf_counter() - started


def _compare(rows: Sequence[BenchRow], base: BenchRow) -> None:
    """Fill in speed-ups and ceilings."""
    for row in rows:
        for part in PARTS:
            mine, its = getattr(row, part), getattr(base, part)
            if mine is not None and its is not None and row is not base:
                row.speedup[part] = its.median / mine.median
        if row.flop_ratio and base.ttft is not None:
            changed = base.prefill or base.ttft  # the part of the time that the recipe makes shorter
            row.ceiling = amdahl(base.ttft.median, changed.median, row.flop_ratio)


class _Call:
    """One timed call of a model: times of its parts in ms."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any], new_tokens: int, device: torch.device) -> None:
        self.model, self.inputs, self.new_tokens, self.device = model, dict(inputs), new_tokens, device
        self.prefill: list[float] = []
        if new_tokens:
            object.__setattr__(model, "forward", self._timed(model.forward))

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.prefill:  # only the first forward of a call
                return forward(*args, **kwargs)
            started = self._now()
            out = forward(*args, **kwargs)
            self.prefill.append((self._now() - started) * 1e3)
            return out

        return timed

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self) -> dict[str, float]:
        if not self.new_tokens:
            started = self._now()
            self.model(**self.inputs)
            elapsed = (self._now() - started) * 1e3
            return {"ttft": elapsed}
        self.prefill.clear()
        tokens = _Arrivals()
        started = self._now()
        with _quiet():
            self.model.generate(
                **{  # type: ignore[operator]
                    "do_sample": False,
                    **self.inputs,
                    "max_new_tokens": self.new_tokens,
                    "min_new_tokens": self.new_tokens,
                    "streamer": tokens,
                }
            )
        parts = {"ttft": (tokens.times[0] - started) * 1e3, "prefill": self.prefill[0]}
        if len(tokens.times) > 1:
            parts["decode"] = (tokens.times[-1] - tokens.times[0]) * 1e3 / (len(tokens.times) - 1)
        return parts


class _Arrivals:
    """Streamer that notes when each token came; tokens are on the host by then."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt:
            self.times.append(time.perf_counter())
        self.prompt = False

    def end(self) -> None:
        pass


def _plainly_compiled(model: nn.Module) -> nn.Module:
    """``torch.compile`` with default settings on both stages that ``generate`` calls."""
    object.__setattr__(model, "forward", torch.compile(model.forward))
    base = getattr(model, "base_model", None)
    if base is not None and hasattr(base, "get_image_features"):
        object.__setattr__(base, "get_image_features", torch.compile(base.get_image_features))
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' remarks on generation settings."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)

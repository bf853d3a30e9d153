"""What any timing needs: rounds in turn, the machine and its versions, peak memory."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tokcompile.version import __version__

#: Called after each step with what is being done, steps done, and steps in all.
Progress = Callable[[str, int, int], None]


def in_turn(
    calls: Mapping[str, Callable[[], Mapping[str, float]]],
    repeats: int,
    warmup: int = 3,
    progress: Progress | None = None,
) -> dict[str, list[Mapping[str, float]]]:
    """What each call returned in each round. Every round runs each call once, so that load from outside hits all alike.

    Args:
        calls: name -> function without arguments that gives the times of its parts.
        repeats: rounds that count. warmup: rounds before them (compilation belongs there).
    """
    results: dict[str, list[Mapping[str, float]]] = {name: [] for name in calls}
    total, done = len(calls) * (repeats + warmup), 0
    with torch.inference_mode():
        for name, call in calls.items():
            for _ in range(warmup):
                if progress:
                    progress(f"warming up {name}", done, total)
                call()
                done += 1
        gc.collect()
        gc.disable()
        try:
            for turn in range(repeats):
                names = list(calls)
                shift = turn % len(names)  # nobody always runs behind the same other
                for name in names[shift:] + names[:shift]:
                    if progress:
                        progress(f"round {turn + 1} of {repeats}", done, total)
                    results[name].append(calls[name]())
                    done += 1
        finally:
            gc.enable()
    if progress:
        progress("measured", total, total)
    return results


def interleaved(calls: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 3) -> dict[str, list[float]]:
    """Wall times in ms of whole calls, see :func:`in_turn`."""

    def timed(call: Callable[[], Any]) -> dict[str, float]:
        started = time.perf_counter()
        result = call()
        elapsed = (time.perf_counter() - started) * 1e3
        del result
        return {"ms": elapsed}

    found = in_turn({name: functools.partial(timed, call) for name, call in calls.items()}, repeats, warmup)
    return {name: [entry["ms"] for entry in entries] for name, entries in found.items()}


def versions() -> dict[str, Any]:
    """What the figures hang on."""
    return {
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "tokcompile": __version__,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """Model name of the processor and its number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def load() -> float | None:
    """Load average of the last minute; None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that ``call`` holds at one time beyond what was held before; None where the device cannot say.

    CUDA: PyTorch's caching allocator. CPU: the allocations of PyTorch, added up from a profile.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    results = profile.profiler.kineto_results if profile.profiler is not None else None
    if results is None:
        return None
    cpu = torch.autograd.DeviceType.CPU  # type: ignore[attr-defined]
    events = [e for e in results.events() if e.name() == "[memory]" and e.device_type() == cpu]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's library notes its start and stop on the process's standard error, past Python."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)

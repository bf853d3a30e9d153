"""Measure the host loop: ``python -m tokcompile.kernels.greedy_select`` (one thread, smallest of several runs)."""

from __future__ import annotations

import time

import torch

from .op import greedy_select_host
from .reference import CRITERIA

SHAPES = ((576, 58, 896), (576, 58, 4096), (2880, 288, 896), (2880, 288, 4096))


def tokens(count: int, width: int) -> torch.Tensor:
    """Clusters with a common mean: float32 [1, count, width]."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(24, width, generator=generator)
    cluster = torch.randint(0, 24, (count,), generator=generator)
    noise = torch.randn(count, width, generator=generator)
    return (centres[cluster] + 0.6 * noise + 0.3 * torch.randn(width, generator=generator)).unsqueeze(0)


def main() -> None:
    torch.set_num_threads(1)
    for count, kept, width in SHAPES:
        features, segment = tokens(count, width), torch.zeros(1, count, dtype=torch.int64)
        budget = torch.full_like(segment, kept)
        cells = [f"{count} -> {kept}, {width}"]
        for criterion in CRITERIA:
            best = float("inf")
            for _ in range(7 if count < 1000 else 3):
                start = time.perf_counter()
                greedy_select_host(features, segment, budget, criterion)
                best = min(best, time.perf_counter() - start)
            cells.append(f"{1000 * best:.1f}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

"""Settings of every test: quiet and offline transformers, one thread, a fixed seed, no compiled code left behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)  # the tests run side by side, one process for each core
#: Captures make objects by the million, and nearly all of them stay: looking for circles less often saves a tenth.
gc.set_threshold(100_000, 20, 100)


def pytest_collection_finish() -> None:
    """What was imported stays for good, so no later collection has to look at it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What is frozen would be taken for a leak by libraries that look for one at the end."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

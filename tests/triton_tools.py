"""What tests of kernels share: the interpreter, compilation for absent GPUs, dense attention to compare with."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokcompile.kernels.launch import AVAILABLE, Launch, Usage, interpreted

needs_triton = pytest.mark.skipif(not AVAILABLE, reason="Triton is not installed")
needs_compiler = pytest.mark.skipif(not AVAILABLE or interpreted(), reason="no Triton, or TRITON_INTERPRET=1")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

#: Shared memory that a program can have, in bytes, by compute capability.
SHARED = {80: 163 << 10, 90: 227 << 10}

#: Largest relative error, by norm: fp32 as DESIGN's oracles ask; fp16 and bf16 a few roundings to 11 and 8 bits (the
#: weights and the result are rounded once each, RMS 2**-12.8 and 2**-9.8; sums are fp32).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def run_interpreted(module: str, function: str) -> None:
    """Call ``function("cpu")`` of a test module in a process of its own, whose Triton kernels are interpreted."""
    code = f"from {module} import {function}; {function}('cpu'); print('equal')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.stdout.strip() == "equal", result.stderr


def compiled(launch: Launch, capability: int, spilled: int = 0) -> Usage:
    """Compile, and assert that the program fits: shared memory, and at most ``spilled`` bytes of spilled registers."""
    usage = launch.compile(capability)
    assert 0 < usage.registers <= 255
    assert usage.shared <= SHARED[capability], usage
    assert usage.spilled <= spilled, usage
    return usage


def dense(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention in fp64 under an explicit mask: output [B, H, Q, Dv] and log-sum-exp [B, H, Q].

    Args:
        query: [B, H, Q, D]. key: [B, Hkv, L, D]. value: [B, Hkv, L, Dv].
        visible: bool, broadcast to [B, H, Q, L]; a row without a key gives 0 and -inf.
    """
    group = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(group, 1) for t in (key, value))
    score = query.double() @ key.transpose(-1, -2) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    score = torch.where(visible, score, -math.inf)
    return torch.nan_to_num(score.softmax(-1)) @ value, score.logsumexp(-1)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert finite values within :data:`TOLERANCE`, by norm; infinite ones must be infinite in both."""
    found, expected = found.double(), expected.double()
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite), "NaN or infinite values where none belong"
    assert torch.equal(found[~finite], expected[~finite])
    norm = expected[finite].norm()
    error = float((found[finite] - expected[finite]).norm() / norm.clamp(min=1e-3))
    assert error <= TOLERANCE[dtype], f"relative error {error:.3g} in {dtype}"

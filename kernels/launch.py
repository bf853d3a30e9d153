"""A Triton launch as a value: run it on a device, or compile it for one that is not there and read what it uses.

A kernel's ``triton.py`` builds its launches from tensors. With tensors on the ``meta`` device nothing is allocated, so
the very launch that a size would get can be compiled for any architecture on any machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton

    AVAILABLE = True
except ImportError:  # Triton has no build for this platform
    AVAILABLE = False

#: Multiprocessors that are assumed where the device is not there (an H100 has 132).
PROCESSORS = 132

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for the compiler (environment variable, read at import of a kernel)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(tensor: Tensor) -> tuple[bool, str]:
    """Whether a Triton kernel can run where the tensor is, and why not."""
    if not AVAILABLE:
        return False, "Triton is not installed"
    if not tensor.is_cuda and not interpreted():
        return False, f"the Triton kernel needs a CUDA device, the tensors are on {tensor.device}"
    return True, ""


def power_of_two(number: int, least: int = 16) -> int:
    """The smallest power of two that is at least ``number`` and ``least``."""
    return max(least, 1 << max(0, number - 1).bit_length())


def processors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 2 if interpreted() and tensor.device.type == "cpu" else PROCESSORS


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's stack, where registers go that do not fit.
        shared: bytes of shared memory of a program.
    """

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: the ``triton.jit`` function.
        grid: programs.
        arguments: by name, run-time arguments in the order of the kernel's parameters, then constants.
        constants: names of those that are ``tl.constexpr``.
        warps, stages: of a program; of the software pipeline.
    """

    kernel: Callable[..., Any]
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2

    def run(self) -> None:
        """Run on the device of the tensors (or in the interpreter)."""
        if 0 in self.grid:
            return
        self.kernel[self.grid](  # type: ignore[index]
            **self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages
        )

    def compile(self, capability: int) -> Usage:
        """Compile for compute capability ``capability`` (80, 90), specialised as :meth:`run` would specialise."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = {}, dict(self.constants), {}
        for place, name in enumerate(self.kernel.arg_names):  # type: ignore[attr-defined]
            value = constants[name] if name in constants else self.arguments[name]
            signature[name] = "constexpr" if name in constants else _type(value)
            if signature[name] == "constexpr":
                constants[name] = value
            elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[place,] = [["tt.divisibility", 16]]
        compiled = triton.compile(
            ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": self.warps, "num_stages": self.stages},
        )
        registers, stack = _resources(compiled.asm["cubin"])
        return Usage(registers, stack, compiled.metadata.shared)


def _type(value: Any) -> str:
    """Triton's name of an argument's type; None and 1 are compiled in, as at run time."""
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}"
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack (spilled registers) of a thread, by the ``cuobjdump`` that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump did not say what the kernel uses: {text!r}")
    return int(found[1]), int(found[2])

"""Activation functions by name, with their derivatives: shared by the kernels of feed-forward layers.

Names are those that ``regions.feed_forward`` gives to what it finds. Values are computed in fp32 at least and rounded
once, as PyTorch's own operations do; derivatives in the type of their argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ImportError:  # Triton has no build for this platform
    AVAILABLE = False

_SQRT_HALF = math.sqrt(0.5)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
_TANH_SCALE = math.sqrt(2 / math.pi)


def _quick_gelu(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def _silu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * _SQRT_HALF)) + x * _INV_SQRT_2PI * torch.exp(-0.5 * x * x)


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    t = torch.tanh(_TANH_SCALE * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _TANH_SCALE * (1 + 3 * 0.044715 * x * x)


def _quick_gelu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return s * (1 + 1.702 * x * (1 - s))


def _sigmoid_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s)


#: name -> (function, derivative), elementwise.
_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (functional.silu, _silu_slope),
    "gelu": (functional.gelu, _gelu_slope),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
    "quick_gelu": (_quick_gelu, _quick_gelu_slope),
    "relu": (torch.relu, lambda x: (x > 0).to(x.dtype)),
    "relu2": (_relu2, lambda x: 2 * torch.relu(x)),
    "sigmoid": (torch.sigmoid, _sigmoid_slope),
    "tanh": (torch.tanh, lambda x: 1 - torch.tanh(x).square()),
    "identity": (lambda x: x.clone(), torch.ones_like),
}

ACTIVATIONS = tuple(_FUNCTIONS)


def check_activation(name: str) -> None:
    """Raise ValueError unless ``name`` is one of :data:`ACTIVATIONS`."""
    if name not in _FUNCTIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")


def activate(x: Tensor, name: str) -> Tensor:
    """The activation ``name`` of ``x``, same shape and type."""
    check_activation(name)
    return _FUNCTIONS[name][0](x)


def slope(x: Tensor, name: str) -> Tensor:
    """The derivative of the activation ``name`` at ``x``, same shape and type."""
    check_activation(name)
    return _FUNCTIONS[name][1](x)


if AVAILABLE:

    @triton.jit  # type: ignore[untyped-decorator]
    def activate_block(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
        """The activation of a block of fp32 values."""
        if ACTIVATION == "silu":
            y = x * tl.sigmoid(x)
        elif ACTIVATION == "gelu":
            y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
        elif ACTIVATION == "gelu_tanh":
            # 0.5 * (1 + tanh(z)) == sigmoid(2 * z)
            y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        elif ACTIVATION == "quick_gelu":
            y = x * tl.sigmoid(1.702 * x)
        elif ACTIVATION == "relu":
            y = tl.where(x > 0, x, 0.0)
        elif ACTIVATION == "relu2":
            y = tl.where(x > 0, x * x, 0.0)
        elif ACTIVATION == "sigmoid":
            y = tl.sigmoid(x)
        elif ACTIVATION == "tanh":
            y = 2.0 * tl.sigmoid(2.0 * x) - 1.0
        else:
            tl.static_assert(ACTIVATION == "identity", "unknown activation")
            y = x
        return y

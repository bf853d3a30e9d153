"""Which matrix product a large linear layer runs on the CPU, measured for its shape when a graph is compiled.

Inductor calls BLAS, whatever the number of rows. Where a cut leaves few rows, BLAS is less efficient: 122 rows by a
weight of 4864 x 896 took 3.8 times less than 640 rows, not 5.2 times less (2 cores, MKL). oneDNN does better at some
shapes and worse at others, so both are timed, on the sizes at hand and with random numbers, and oneDNN is taken where
it is clearly faster. The weight stays the model's own parameter: nothing is packed or copied ahead of time.

Layers with weights of one shape get the same operator, which looks the number of rows up when it runs: stages of a
stack that differ in their number of tokens stay one form to :mod:`tokcompile.repeated`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, fx

from tokcompile.capture.captured import Captured
from tokcompile.capture.sizes import hint, product

aten = torch.ops.aten

#: Below this many multiply-adds x 2 a layer is left alone: what can be won is less than the noise of a timing.
LEAST_FLOPS = 1e8
#: oneDNN must take at most this share of the time of BLAS.
CLEARLY = 0.95
ROUNDS = 4

_library = torch.library.Library("tokcompile", "FRAGMENT")
_library.define("measured_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _measured_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [..., in] @ weight [out, in]^T + bias [out]``, fp32 on the CPU, no gradient; as it was fastest when timed."""
    out, width = weight.shape
    known = _faster.get((out, width, torch.get_num_threads()), {})
    rows = x.numel() // width
    if rows not in known and known and rows:
        rows = min(known, key=lambda n: abs(math.log(n / rows)))
    return (_onednn_linear if known.get(rows) else torch.nn.functional.linear)(x, weight, bias)


_library.impl("measured_linear", _measured_linear, "CPU")


@torch.library.register_fake("tokcompile::measured_linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


#: (out, in, threads) -> rows -> whether oneDNN is clearly faster, as measured in this process.
_faster: dict[tuple[int, int, int], dict[int, bool]] = {}


def choose_linears(captured: Captured) -> int:
    """Replace linear layers of ``captured`` by the faster product where that is oneDNN's; returns how many, in place.

    Only for fp32 on the CPU and without gradients.
    """
    if torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
        return 0
    shapes = {node: _shape(node) for node in captured.graph.find_nodes(op="call_function", target=aten.linear.default)}
    gains = {shape[1:] for shape in set(shapes.values()) if shape is not None and _is_faster(*shape)}
    chosen = [node for node, shape in shapes.items() if shape is not None and shape[1:] in gains]
    for node in chosen:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        node.target, node.kwargs = torch.ops.tokcompile.measured_linear.default, {}
        node.args = (node.args[0], node.args[1], bias)
    if chosen:
        captured.graph_module.recompile()
    return len(chosen)


def _shape(node: fx.Node) -> tuple[int, int, int] | None:
    """(rows, out, in) of a layer that could be either."""
    x, weight = (n.meta["val"] for n in node.args[:2])  # type: ignore[union-attr]
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or x.device.type != "cpu" or weight.dim() != 2:
        return None
    rows = product(hint(size) for size in x.shape[:-1])
    if not all(isinstance(s, int) for s in weight.shape) or not weight.is_contiguous():
        return None
    return rows, *weight.shape


def _is_faster(rows: int, out: int, width: int) -> bool:
    known = _faster.setdefault((out, width, torch.get_num_threads()), {})
    if rows not in known:
        known[rows] = 2 * rows * out * width >= LEAST_FLOPS and _times_say(rows, out, width)
    return known[rows]


def _times_say(rows: int, out: int, width: int) -> bool:
    generator = torch.Generator().manual_seed(0)  # leaves the state of the user's generator alone
    x = torch.rand(rows, width, generator=generator)
    # two weights in turn, as in a model: no layer finds its own weight in the cache
    weights = [torch.rand(out, width, generator=generator) for _ in range(2)]
    blas = onednn = float("inf")
    for _ in range(ROUNDS):
        blas = min(blas, _seconds(lambda w: torch.nn.functional.linear(x, w), weights))
        onednn = min(onednn, _seconds(lambda w: _onednn_linear(x, w, None), weights))
    return onednn <= CLEARLY * blas


def _seconds(call: Callable[[Tensor], Tensor], weights: list[Tensor]) -> float:
    started = time.perf_counter()
    for weight in weights:
        call(weight)
    return time.perf_counter() - started

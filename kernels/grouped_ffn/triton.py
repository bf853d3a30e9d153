"""Triton kernels of routed experts: two organisations.

**Many tokens** (prefill, calibration). Pairs (token, slot) are sorted by expert. A program computes one tile of pairs
of one expert; which one, it finds from the running number of tiles of the experts before it. Rows are not padded: the
tokens are read where they are, and the last tile of an expert is masked. The number of tiles is known on the device
only, so the grid is as large as it can be for this number of pairs, and programs without a tile return at once: nothing
is copied to the host, and CUDA graphs can record the launches. Activation, product with the up part and the weight of a
slot are done on the way out of the two products; the slots of a token are then summed in order, without atomics, so
that the result is the same at every run.

**Few tokens** (decode). No sorting: a program multiplies a block of rows of one expert by one token. An expert that no
slot names is not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..launch import AVAILABLE, Launch, power_of_two
from .reference import is_gated

if AVAILABLE:
    import triton
    import triton.language as tl

    from ..activation import activate_block

#: Most experts; every program reads the table of tiles.
MAX_EXPERTS = 4096

#: Tokens, and slots of all tokens, up to which the organisation for few tokens runs.
DECODE_TOKENS = 4
DECODE_SLOTS = 16

#: Entries of the results of single slots that are held at a time; more tokens are computed in chunks.
MAX_ENTRIES = 1 << 28


if AVAILABLE:

    @triton.jit  # type: ignore[untyped-decorator]
    def locate(  # type: ignore[no-untyped-def]
        tiles, offsets, experts, blocks, EXPERTS: tl.constexpr, BM: tl.constexpr, GROUP: tl.constexpr
    ):
        """Expert, first pair, end of the expert's pairs and column block of this program; expert = experts: no tile.

        Programs are ordered so that GROUP tiles share the weights of a column block while these are in the cache.
        """
        program = tl.program_id(0)
        number = tl.num_programs(0) // blocks
        first = program // (GROUP * blocks) * GROUP
        height = tl.minimum(number - first, GROUP)
        tile = first + program % (GROUP * blocks) % height
        column = program % (GROUP * blocks) // height
        place = tl.arange(0, EXPERTS)
        ends = tl.load(tiles + 1 + place, mask=place < experts, other=2147483647)
        expert = tl.sum((ends <= tile).to(tl.int32)).to(tl.int64)
        before = tl.load(tiles + expert, mask=expert < experts, other=0)
        start = tl.load(offsets + expert, mask=expert < experts, other=0) + (tile - before) * BM
        end = tl.load(offsets + expert + 1, mask=expert < experts, other=0)
        return expert, start, end, column

    @triton.jit  # type: ignore[untyped-decorator]
    def up_kernel(  # type: ignore[no-untyped-def]
        x,  # [N, d]
        gate_up,  # [E, 2m, d] or [E, m, d]
        bias,  # [E, 2m] or [E, m]
        order,  # int64 [P]: pairs sorted by expert
        offsets,  # int64 [E + 1]: where an expert's pairs begin
        tiles,  # int64 [E + 1]: number of tiles before an expert
        hidden,  # [P, m]: result, in sorted order
        slots,
        experts,
        width,
        inner,  # k, E, d, m
        GATED: tl.constexpr,
        BIAS: tl.constexpr,
        ACTIVATION: tl.constexpr,
        PRECISION: tl.constexpr,
        EXPERTS: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        expert, start, end, column = locate(tiles, offsets, experts, tl.cdiv(inner, BN), EXPERTS, BM, GROUP)
        if expert < experts:
            row = start + tl.arange(0, BM)
            inside = row < end
            token = tl.load(order + row, mask=inside, other=0) // slots
            n = column * BN + tl.arange(0, BN)
            k = tl.arange(0, BK)
            height = inner * (2 if GATED else 1)
            left = x + token[:, None] * width + k[None, :]
            right = gate_up + (expert * height + n[None, :]) * width + k[:, None]
            first = tl.zeros([BM, BN], dtype=tl.float32)
            second = tl.zeros([BM, BN], dtype=tl.float32)
            for low in range(0, width, BK):
                within = k < width - low
                a = tl.load(left + low, mask=inside[:, None] & within[None, :], other=0.0)
                use = (n < inner)[None, :] & within[:, None]
                b = tl.load(right + low, mask=use, other=0.0)
                first = tl.dot(a, b, first, input_precision=PRECISION)
                if GATED:
                    b = tl.load(right + inner * width + low, mask=use, other=0.0)
                    second = tl.dot(a, b, second, input_precision=PRECISION)
            if BIAS:
                row_of_bias = bias + expert * height + n
                first += tl.load(row_of_bias, mask=n < inner, other=0.0).to(tl.float32)[None, :]
                if GATED:
                    second += tl.load(row_of_bias + inner, mask=n < inner, other=0.0).to(tl.float32)[None, :]
            value = activate_block(first, ACTIVATION)
            if GATED:
                value *= second
            out = hidden + row[:, None].to(tl.int64) * inner + n[None, :]
            tl.store(out, value.to(hidden.dtype.element_ty), mask=inside[:, None] & (n < inner)[None, :])

    @triton.jit  # type: ignore[untyped-decorator]
    def down_kernel(  # type: ignore[no-untyped-def]
        hidden,  # [P, m], in sorted order
        down,  # [E, d, m]
        weight,  # [P], in the order of pairs
        order,
        offsets,
        tiles,
        parts,  # [P, d]: result, in the order of pairs
        experts,
        width,
        inner,
        PRECISION: tl.constexpr,
        EXPERTS: tl.constexpr,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        GROUP: tl.constexpr,
    ):
        expert, start, end, column = locate(tiles, offsets, experts, tl.cdiv(width, BN), EXPERTS, BM, GROUP)
        if expert < experts:
            row = start + tl.arange(0, BM)
            inside = row < end
            pair = tl.load(order + row, mask=inside, other=0)
            n = column * BN + tl.arange(0, BN)
            k = tl.arange(0, BK)
            left = hidden + row[:, None].to(tl.int64) * inner + k[None, :]
            right = down + (expert * width + n[None, :]) * inner + k[:, None]
            value = tl.zeros([BM, BN], dtype=tl.float32)
            for low in range(0, inner, BK):
                within = k < inner - low
                a = tl.load(left + low, mask=inside[:, None] & within[None, :], other=0.0)
                b = tl.load(right + low, mask=(n < width)[None, :] & within[:, None], other=0.0)
                value = tl.dot(a, b, value, input_precision=PRECISION)
            value *= tl.load(weight + pair, mask=inside, other=0.0).to(tl.float32)[:, None]
            out = parts + pair[:, None] * width + n[None, :]
            tl.store(out, value.to(parts.dtype.element_ty), mask=inside[:, None] & (n < width)[None, :])

    @triton.jit  # type: ignore[untyped-decorator]
    def sum_kernel(  # type: ignore[no-untyped-def]
        parts,  # [N * k, d]; rows of empty slots hold anything
        index,  # int64 [N, k]
        result,  # [N, d]
        slots,
        experts,
        width,
        BN: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        value = tl.zeros([BN], dtype=tl.float32)
        for slot in range(slots):
            pair = token * slots + slot
            expert = tl.load(index + pair)
            end = tl.where((expert >= 0) & (expert < experts), width, 0)
            value += tl.load(parts + pair * width + n, mask=n < end, other=0.0).to(tl.float32)
        tl.store(result + token * width + n, value.to(result.dtype.element_ty), mask=n < width)

    @triton.jit  # type: ignore[untyped-decorator]
    def few_up_kernel(  # type: ignore[no-untyped-def]
        x,
        gate_up,
        bias,
        index,  # int64 [N, k]
        hidden,  # [N * k, m]: result; rows of empty slots stay as they are
        slots,
        experts,
        width,
        inner,
        GATED: tl.constexpr,
        BIAS: tl.constexpr,
        ACTIVATION: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
    ):
        pair = tl.program_id(0).to(tl.int64)
        expert = tl.load(index + pair)
        if (expert >= 0) & (expert < experts):
            n = tl.program_id(1) * BN + tl.arange(0, BN)
            k = tl.arange(0, BK)
            height = inner * (2 if GATED else 1)
            left = x + pair // slots * width + k
            right = gate_up + (expert * height + n[:, None]) * width + k[None, :]
            first = tl.zeros([BN, BK], dtype=tl.float32)
            second = tl.zeros([BN, BK], dtype=tl.float32)
            for low in range(0, width, BK):
                within = k < width - low
                a = tl.load(left + low, mask=within, other=0.0).to(tl.float32)[None, :]
                use = (n < inner)[:, None] & within[None, :]
                first += a * tl.load(right + low, mask=use, other=0.0).to(tl.float32)
                if GATED:
                    second += a * tl.load(right + inner * width + low, mask=use, other=0.0).to(tl.float32)
            value = tl.sum(first, axis=1)
            if BIAS:
                value += tl.load(bias + expert * height + n, mask=n < inner, other=0.0).to(tl.float32)
            value = activate_block(value, ACTIVATION)
            if GATED:
                other = tl.sum(second, axis=1)
                if BIAS:
                    other += tl.load(bias + expert * height + inner + n, mask=n < inner, other=0.0).to(tl.float32)
                value *= other
            tl.store(hidden + pair * inner + n, value.to(hidden.dtype.element_ty), mask=n < inner)

    @triton.jit  # type: ignore[untyped-decorator]
    def few_down_kernel(  # type: ignore[no-untyped-def]
        hidden,
        down,
        weight,
        index,
        result,  # [N, d]
        slots,
        experts,
        width,
        inner,
        BN: tl.constexpr,
        BK: tl.constexpr,
    ):
        token = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        value = tl.zeros([BN, BK], dtype=tl.float32)
        for slot in range(slots):
            pair = token * slots + slot
            expert = tl.load(index + pair)
            if (expert >= 0) & (expert < experts):
                scale = tl.load(weight + pair).to(tl.float32)
                right = down + (expert * width + n[:, None]) * inner + k[None, :]
                for low in range(0, inner, BK):
                    within = k < inner - low
                    a = scale * tl.load(hidden + pair * inner + low + k, mask=within, other=0.0).to(tl.float32)
                    use = (n < width)[:, None] & within[None, :]
                    value += a[None, :] * tl.load(right + low, mask=use, other=0.0).to(tl.float32)
        tl.store(result + token * width + n, tl.sum(value, axis=1).to(result.dtype.element_ty), mask=n < width)


def grouped_ffn_triton(
    x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor, activation: str, bias: Tensor | None = None
) -> Tensor:
    """As ``reference.grouped_ffn_reference``; an index outside 0..E-1 is an empty slot."""
    x, index, weight = x.contiguous(), index.contiguous(), weight.contiguous()
    gate_up, down = gate_up.contiguous(), down.contiguous()
    bias = None if bias is None else bias.contiguous()
    tokens, slots = index.shape
    result = torch.empty_like(x)
    if slots == 0 or down.shape[0] == 0 or down.shape[2] == 0:
        return result.zero_()
    step = max(1, MAX_ENTRIES // (slots * max(x.shape[1], down.shape[2])))
    for low in range(0, tokens, step):
        part = slice(low, low + step)
        for launch in launches(x[part], index[part], weight[part], gate_up, down, activation, bias, result[part]):
            launch.run()
    return result


def launches(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    bias: Tensor | None,
    result: Tensor,
) -> list[Launch]:
    """The launches that compute ``result`` [N, d], by the number of tokens; all tensors contiguous."""
    tokens, slots = index.shape
    few = tokens <= DECODE_TOKENS or tokens * slots <= DECODE_SLOTS
    return (_few if few else _many)(x, index, weight, gate_up, down, activation, bias, result)


def _many(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    bias: Tensor | None,
    result: Tensor,
) -> list[Launch]:
    (tokens, width), slots = x.shape, index.shape[1]
    experts, _, inner = down.shape
    pairs = tokens * slots
    sizes, warps = tiling(pairs, experts, x.dtype)
    height = sizes["BM"]
    ordered, order = torch.sort(index.reshape(-1), stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(experts + 1, device=x.device))
    tiles = torch.zeros_like(offsets)
    tiles[1:] = torch.div(offsets.diff() + (height - 1), height, rounding_mode="floor").cumsum(0)
    most = pairs // height + min(experts, pairs)  # every expert ends in a tile that is not full, at most
    hidden = x.new_empty(pairs, inner)
    parts = x.new_empty(pairs, width)
    lists = {"order": order, "offsets": offsets, "tiles": tiles}
    counts = {"experts": experts, "width": width, "inner": inner}
    constants = {"PRECISION": precision(x.dtype), "EXPERTS": power_of_two(experts), **sizes}
    bend = {"GATED": is_gated(gate_up, down), "BIAS": bias is not None, "ACTIVATION": activation}
    block = min(1024, power_of_two(width))
    return [
        Launch(
            up_kernel,
            (most * -(-inner // sizes["BN"]),),
            {
                "x": x,
                "gate_up": gate_up,
                "bias": x if bias is None else bias,
                **lists,
                "hidden": hidden,
                "slots": slots,
                **counts,
            },
            bend | constants,
            warps,
            STAGES,
        ),
        Launch(
            down_kernel,
            (most * -(-width // sizes["BN"]),),
            {"hidden": hidden, "down": down, "weight": weight, **lists, "parts": parts, **counts},
            constants,
            warps,
            STAGES,
        ),
        Launch(
            sum_kernel,
            (tokens, -(-width // block)),
            {"parts": parts, "index": index, "result": result, "slots": slots, "experts": experts, "width": width},
            {"BN": block},
        ),
    ]


def _few(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    bias: Tensor | None,
    result: Tensor,
) -> list[Launch]:
    (tokens, width), slots = x.shape, index.shape[1]
    experts, _, inner = down.shape
    hidden = x.new_empty(tokens * slots, inner)
    counts = {"slots": slots, "experts": experts, "width": width, "inner": inner}
    bend = {"GATED": is_gated(gate_up, down), "BIAS": bias is not None, "ACTIVATION": activation}
    return [
        Launch(
            few_up_kernel,
            (tokens * slots, -(-inner // FEW["BN"])),
            {
                "x": x,
                "gate_up": gate_up,
                "bias": x if bias is None else bias,
                "index": index,
                "hidden": hidden,
                **counts,
            },
            bend | FEW,
        ),
        Launch(
            few_down_kernel,
            (tokens, -(-width // FEW["BN"])),
            {"hidden": hidden, "down": down, "weight": weight, "index": index, "result": result, **counts},
            FEW,
        ),
    ]


#: Block sizes for few tokens: neighbouring threads load 16 bytes each of one row.
FEW = {"BN": 16, "BK": 256}

#: Depth of the software pipeline of the products.
STAGES = 3


def tiling(pairs: int, experts: int, dtype: torch.dtype) -> tuple[dict[str, int], int]:
    """Block sizes and warps for many tokens, by the average number of pairs of an expert."""
    rows = pairs / experts
    if dtype == torch.float32:  # larger blocks spill registers
        small = rows <= 16
        return {"BM": 16 if small else 32, "BN": 32 if small else 64, "BK": 64 if small else 16, "GROUP": 8}, 4
    if rows <= 16:
        return {"BM": 16, "BN": 64, "BK": 128, "GROUP": 1}, 4
    if rows <= 64:
        return {"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4
    return {"BM": 128, "BN": 64, "BK": 64, "GROUP": 8}, 8


def precision(dtype: torch.dtype) -> str:
    """How products of fp32 are computed: as PyTorch's setting for matrix products says."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"

"""Measures each kernel against the dense operation that it stands in for.

    python benchmarks/kernel_speed.py [--only token_list_attention,...] [--quick] [--seconds 2] [--out DIR]

Writes ``benchmarks/results/kernels.csv`` and the tables of ``docs/kernels.md``. On CUDA: bf16, heads and widths of an
8 B model, FlashAttention through ``scaled_dot_product_attention``, all lengths. On the CPU: fp32, a small model, the
implementation that runs there (not Triton), and the lengths that fit into the time of a case. ``--quick`` takes tiny
sizes, to see that everything runs.

What counts as the limit is measured in the same run: a large matrix product (FLOP/s) and a large copy (bytes/s, read
and written). The shortest time that a case can take is the larger of FLOPs / peak and bytes / peak; ``share of the
limit`` is that time over the median. Operands that stay in a cache can therefore have more than 100 %.

FLOPs and bytes are those that the case needs at least: products with listed keys, listed rows read once for each head
that reads them, results written once.

==========================  ===========================================================================================
block_list_attention        causal prefill over all blocks, and over a quarter of them, against causal attention
token_list_attention        one query over 256 or 1024 listed keys of a cache, against attention over the whole cache
attention_rows              column sums of the last 128 queries' weights, against the attention of these queries
gather_rows                 half of the rows of each head, against ``torch.gather``
grouped_ffn                 6 of 8 experts (75 % of the neurons), against the dense gated layer
embedding_gate              silu(gate) * table[id], against ``F.embedding`` and a product
token_sparse                choice, gathering, attention and scattering of one layer, against causal attention
fasa, tokenselect           scores, choice and attention over 256 keys, against attention over the whole cache
==========================  ===========================================================================================
"""

from __future__ import annotations

import argparse
import csv
import functools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import harness  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from tokcompile.kernels.attention_rows import attention_rows  # noqa: E402
from tokcompile.kernels.block_list_attention import block_list_attention  # noqa: E402
from tokcompile.kernels.embedding_gate import embedding_gate  # noqa: E402
from tokcompile.kernels.gather_rows import gather_rows  # noqa: E402
from tokcompile.kernels.grouped_ffn import grouped_ffn  # noqa: E402
from tokcompile.kernels.launch import AVAILABLE, Launch, interpreted  # noqa: E402
from tokcompile.kernels.token_list_attention import token_list_attention  # noqa: E402
from tokcompile.measure.timing import in_turn  # noqa: E402

DOCS = HERE.parent / "docs" / "kernels.md"
MARKER = "<!-- below: written by benchmarks/kernel_speed.py from benchmarks/results/kernels.csv -->"
BLOCK_Q, BLOCK_K, WINDOW = 128, 64, 128
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
#: Seconds that a sample takes at least: clocks of CPU time can advance in steps of 10 ms.
RESOLUTION = {"wall": 0.0, "cpu": 0.1}
K = 1024


@dataclass(frozen=True)
class Sizes:
    """Heads and widths of the model, and the lengths to run."""

    heads: int
    kv_heads: int
    head_dim: int
    width: int
    inner: int
    dtype: torch.dtype
    prefill: tuple[int, ...]
    cache: tuple[int, ...]
    tokens: tuple[int, ...]


LENGTHS = {
    "prefill": tuple(n * K for n in (4, 8, 16, 32, 64, 128)),
    "cache": tuple(n * K for n in (4, 8, 16, 32, 64, 128, 256)),
    "tokens": (1, 16, 512, 4096),
}
LARGE = Sizes(32, 8, 128, 4096, 14336, torch.bfloat16, **LENGTHS)
SMALL = Sizes(9, 3, 64, 576, 1536, torch.float32, **LENGTHS)
TINY = Sizes(4, 2, 16, 32, 64, torch.float32, (256,), (320,), (1, 24))


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        kernel, name: of the kernel, and what is measured of it. length: tokens or cached keys.
        run: tensors -> the kernel's result. dense: tensors -> the result of what it stands in for.
        make: device -> tensors by name. flops, moved: of the kernel, at least (moved in bytes); dense_*: of the other.
        launches: tensors (may be on ``meta``) -> Triton launches; None: made of other kernels.
    """

    kernel: str
    name: str
    length: int
    make: Callable[[str], dict[str, Any]]
    run: Callable[..., Any]
    dense: Callable[..., Any]
    flops: float
    moved: float
    dense_flops: float
    dense_moved: float
    launches: Callable[..., list[Launch]] | None = None


@dataclass
class Row:
    """A line of the result file; times in ms, rates in 1e9 a second.

    Attributes:
        contestant: "tokcompile", or the dense operation. share: see the module. speedup: over the dense operation.
        sm_80, sm_90: registers of a thread / bytes of spilled registers / bytes of shared memory, the most of the
            launches of the kernel in bf16 at the sizes of an 8 B model and this length; empty without Triton.
        peak_gflops, peak_gbs: measured in this run. clock: "wall", or "cpu" for CPU time, see ``--clock``.
    """

    kernel: str
    case: str
    length: int
    contestant: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int = 0
    gflops: float | None = None
    gbs: float | None = None
    share: float | None = None
    speedup: float | None = None
    sm_80: str = ""
    sm_90: str = ""
    peak_gflops: float | None = None
    peak_gbs: float | None = None
    clock: str = ""
    dtype: str = ""
    device: str = ""
    threads: int = 0
    load: float | None = None
    torch: str = ""
    tokcompile: str = ""


COLUMNS = [f.name for f in fields(Row)]


# ------------------------------------------------------------------------------------------------------------ cases


def _tensors(device: str, seed: int = 0) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Makers of random numbers and of random integers below a limit."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def below(limit: int, *shape: int) -> Tensor:
        return torch.randint(0, limit, shape, generator=generator, device=device)

    return normal, below


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """Dense attention; on CUDA with FlashAttention and nothing else."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if query.is_cuda:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    return functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


def _qkv(s: Sizes, queries: int, length: int, device: str) -> dict[str, Tensor]:
    normal, _ = _tensors(device)
    return {
        "query": normal(1, s.heads, queries, s.head_dim, dtype=s.dtype),
        "key": normal(1, s.kv_heads, length, s.head_dim, dtype=s.dtype),
        "value": normal(1, s.kv_heads, length, s.head_dim, dtype=s.dtype),
    }


def blocks(s: Sizes, length: int, share: float | None) -> Case:
    """Prefill over all blocks (``share`` None), or over a share of those that a block of queries can see."""
    size, rows = s.dtype.itemsize, -(-length // BLOCK_Q)
    most = length // BLOCK_K
    capacity = max(1, math.ceil(most * (share or 1)))

    def make(device: str) -> dict[str, Any]:
        t: dict[str, Any] = _qkv(s, length, length, device)
        if share is None:
            return {**t, "index": None, "count": None}
        normal, _ = _tensors(device)
        last = (torch.arange(rows, device=device) + 1) * (BLOCK_Q // BLOCK_K) - 1  # the block on the diagonal
        score = normal(1, s.kv_heads, rows, most, dtype=torch.float32)
        place = torch.arange(most, device=device)
        score = score.masked_fill(place > last[:, None], -math.inf).masked_fill(place == last[:, None], math.inf)
        # the first ``count`` entries of a list are read: the block on the diagonal, then others that are seen
        index = score.topk(capacity, -1).indices.int()
        seen = (last + 1).clamp(max=most)
        count = (seen * share).ceil().int().clamp(min=1).expand(1, s.kv_heads, rows).contiguous()
        return {**t, "index": index, "count": count}

    def launches(query: Tensor, key: Tensor, value: Tensor, index: Any, count: Any) -> list[Launch]:
        from tokcompile.kernels.block_list_attention.triton import launch

        return [launch(query, key, value, index, count, None, BLOCK_Q, BLOCK_K)[0]]

    pairs = length * (length + 1) / 2
    qo, kv = 2 * s.heads * length * s.head_dim * size, 2 * s.kv_heads * length * s.head_dim * size
    part = 1 if share is None else share
    return Case(
        "block_list_attention",
        "all blocks" if share is None else f"{share:.0%} of the blocks",
        length,
        make,
        lambda query, key, value, index, count: block_list_attention(
            query, key, value, index, count, None, BLOCK_Q, BLOCK_K
        ),
        lambda query, key, value, **_: sdpa(query, key, value, True),
        4 * s.heads * s.head_dim * pairs * part,
        qo + kv,
        4 * s.heads * s.head_dim * pairs,
        qo + kv,
        launches,
    )


def listed(s: Sizes, length: int, budget: int) -> Case:
    """One query over ``budget`` keys of a cache of ``length``; one list for each key head."""
    size = s.dtype.itemsize

    def make(device: str) -> dict[str, Any]:
        _, below = _tensors(device)
        return {**_qkv(s, 1, length, device), "index": below(length, 1, s.kv_heads, budget).sort(-1).values}

    def launches(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> list[Launch]:
        from tokcompile.kernels.token_list_attention.triton import launches as made

        return made(query, key, value, index)[0]

    work, bytes_ = 4 * s.heads * s.head_dim, 2 * s.kv_heads * s.head_dim * size
    return Case(
        "token_list_attention",
        f"{budget} keys",
        length,
        make,
        lambda query, key, value, index: token_list_attention(query, key, value, index),
        lambda query, key, value, **_: sdpa(query, key, value),
        work * budget,
        bytes_ * budget,
        work * length,
        bytes_ * length,
        launches,
    )


def rows(s: Sizes, length: int) -> Case:
    """Column sums of the weights of the last queries."""
    size, window = s.dtype.itemsize, min(WINDOW, length)

    def launches(query: Tensor, key: Tensor, value: Tensor) -> list[Launch]:
        from tokcompile.kernels.attention_rows.triton import launches as made

        return made(query, key)[0]

    keys = s.kv_heads * length * s.head_dim * size
    return Case(
        "attention_rows",
        f"last {window} queries",
        length,
        functools.partial(_qkv, s, window, length),
        lambda query, key, value: attention_rows(query, key),
        lambda query, key, value: sdpa(query, key, value),
        4 * s.heads * window * length * s.head_dim,
        2 * keys + 4 * s.heads * length,
        4 * s.heads * window * length * s.head_dim,
        2 * keys,
        launches,
    )


def gathered(s: Sizes, length: int) -> Case:
    """Half of the rows of each key head, for each query head."""
    size, kept = s.dtype.itemsize, length // 2
    group = s.heads // s.kv_heads

    def make(device: str) -> dict[str, Any]:
        normal, _ = _tensors(device)
        order = normal(1, s.heads, length, dtype=torch.float32).topk(kept, -1).indices.sort(-1).values
        return {"source": normal(1, s.kv_heads, length, s.head_dim, dtype=s.dtype), "index": order}

    def dense(source: Tensor, index: Tensor) -> Tensor:
        wide = source.repeat_interleave(group, 1) if group > 1 else source
        return wide.gather(2, index.unsqueeze(-1).expand(-1, -1, -1, s.head_dim))

    def launches(source: Tensor, index: Tensor) -> list[Launch]:
        from tokcompile.kernels.gather_rows.triton import launch

        result = source.new_empty(*index.shape, source.shape[3])
        return [launch(source, index, result, source.shape[2], False)]

    moved = 2 * s.heads * kept * s.head_dim * size + 8 * s.heads * kept
    return Case(
        "gather_rows",
        "half of the rows",
        length,
        make,
        lambda source, index: gather_rows(source, index),
        dense,
        0,
        moved,
        0,
        moved,
        launches,
    )


def experts(s: Sizes, tokens: int) -> Case:
    """6 of 8 experts of an eighth of the neurons each."""
    size, number, active = s.dtype.itemsize, 8, 6
    inner = s.inner // number

    def make(device: str) -> dict[str, Any]:
        normal, _ = _tensors(device)
        return {
            "x": normal(tokens, s.width, dtype=s.dtype),
            "index": normal(tokens, number, dtype=torch.float32).topk(active, -1).indices,
            "weight": normal(tokens, active, dtype=s.dtype),
            "gate_up": normal(number, 2 * inner, s.width, dtype=s.dtype),
            "down": normal(number, s.width, inner, dtype=s.dtype),
        }

    def dense(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        # the same numbers as one gated layer; layout does not matter for time
        gate, up = functional.linear(x, gate_up.view(-1, s.width)).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, down.view(s.width, -1))

    def launches(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> list[Launch]:
        from tokcompile.kernels.grouped_ffn.triton import launches as made

        return made(x, index, weight, gate_up, down, "silu", None, torch.empty_like(x))

    neurons = 3 * s.width * inner
    used = number if tokens > 1 else active
    io = 2 * tokens * s.width * size
    return Case(
        "grouped_ffn",
        "6 of 8 experts",
        tokens,
        make,
        lambda **t: grouped_ffn(**t, activation="silu"),
        dense,
        2 * neurons * active * tokens,
        neurons * used * size + io,
        2 * neurons * number * tokens,
        neurons * number * size + io,
        launches,
    )


def table(s: Sizes, tokens: int) -> Case:
    """The fused product against a look-up, an activation and a product."""
    size, count = s.dtype.itemsize, 8192

    def make(device: str) -> dict[str, Any]:
        normal, below = _tensors(device)
        return {
            "gate": normal(tokens, s.inner, dtype=s.dtype),
            "table": normal(count, s.inner, dtype=s.dtype),
            "index": below(count, tokens),
        }

    def launches(gate: Tensor, table: Tensor, index: Tensor) -> list[Launch]:
        from tokcompile.kernels.embedding_gate.triton import launch

        return [launch(gate, table, index, "silu", None, None, torch.empty_like(gate))]

    moved = 3 * tokens * s.inner * size
    return Case(
        "embedding_gate",
        "silu(gate) * row",
        tokens,
        make,
        lambda gate, table, index: embedding_gate(gate, table, index, "silu"),
        lambda gate, table, index: functional.silu(gate) * functional.embedding(index, table),
        0,
        moved,
        0,
        moved,
        launches,
    )


def token_sparse(s: Sizes, length: int, keep: float) -> Case:
    """One layer of Token Sparse Attention."""
    from tokcompile.kernels.token_sparse_attention import op as sparse_prefill  # noqa: F401  registers the operation

    size, window = s.dtype.itemsize, min(WINDOW, length // 4)
    kept = int(keep * (length - window)) + window
    qo, kv = 2 * s.heads * length * s.head_dim * size, 2 * s.kv_heads * length * s.head_dim * size
    dense = 2 * s.heads * s.head_dim * length * (length + 1)
    return Case(
        "token_sparse",
        f"{keep:.0%} of the tokens",
        length,
        functools.partial(_qkv, s, length, length),
        lambda query, key, value: torch.ops.tokcompile.token_sparse_attention(
            query, key, value, keep=keep, least=0, window=window
        ),
        lambda query, key, value: sdpa(query, key, value, True),
        2 * s.heads * s.head_dim * (2 * window * length + kept * (kept + 1)),
        qo + kv,
        dense,
        qo + kv,
    )


def decoding(s: Sizes, length: int, name: str, budget: int = 256) -> Case:
    """A whole decode step of a method, as it stands in a graph: scores, choice, attention."""
    from tokcompile.families.sparse_attention.decode.lists import ends
    from tokcompile.families.sparse_attention.decode.lists import listed as choose
    from tokcompile.passes.sparse_attention.fasa import Fasa
    from tokcompile.passes.sparse_attention.tokenselect import TokenSelect

    method = {"fasa": Fasa, "tokenselect": TokenSelect}[name](
        {"fasa": Fasa, "tokenselect": TokenSelect}[name].Params(budget=budget)
    )
    budget = min(budget, length // 2)
    size, scale = s.dtype.itemsize, s.head_dim**-0.5

    def make(device: str) -> dict[str, Any]:
        planes = torch.zeros(s.kv_heads, s.head_dim, device=device)
        planes[:, : s.head_dim // 2] = 1
        return {**_qkv(s, 1, length, device), "planes": planes}

    def run(query: Tensor, key: Tensor, value: Tensor, planes: Tensor) -> Tensor:
        candidate, oldest, newest = ends(None, length, 4, 1, query.device)
        scores = method.score(query, key, candidate, scale, 0.0, 0, planes).values
        index = choose(scores, candidate, oldest, newest, budget).expand(1, s.kv_heads, budget)
        return token_list_attention(query, key, value, index)[0]

    work, bytes_ = 4 * s.heads * s.head_dim, 2 * s.kv_heads * s.head_dim * size
    score = 2 * s.head_dim * length * (s.kv_heads if name == "fasa" else s.heads)
    return Case(
        name,
        f"{budget} keys",
        length,
        make,
        run,
        lambda query, key, value, **_: sdpa(query, key, value),
        work * budget + score,
        bytes_ * (budget + length / 2),
        work * length,
        bytes_ * length,
    )


CASES: dict[str, Callable[[Sizes], Iterator[Case]]] = {
    "block_list_attention": lambda s: (blocks(s, n, share) for n in s.prefill for share in (None, 0.25)),
    "token_list_attention": lambda s: (listed(s, n, b) for n in s.cache for b in (256, 1024) if b < n),
    "attention_rows": lambda s: (rows(s, n) for n in s.prefill),
    "gather_rows": lambda s: (gathered(s, n) for n in s.prefill),
    "grouped_ffn": lambda s: (experts(s, n) for n in s.tokens),
    "embedding_gate": lambda s: (table(s, n) for n in s.tokens),
    "token_sparse": lambda s: (token_sparse(s, n, keep) for n in s.prefill for keep in (0.68, 0.5)),
    "fasa": lambda s: (decoding(s, n, "fasa") for n in s.cache),
    "tokenselect": lambda s: (decoding(s, n, "tokenselect") for n in s.cache),
}


# ---------------------------------------------------------------------------------------------------------- measure


def peaks(device: str, dtype: torch.dtype, clock: str, quick: bool = False) -> tuple[float, float]:
    """FLOP/s of a large product and bytes/s of a large copy (read and written), the best of ten."""
    large = device == "cuda"
    size = 256 if quick else 8192 if large else 2048
    numbers = (1 << 20) if quick else (1 << 28) if large else 1 << 26
    one = torch.randn(size, size, device=device).to(dtype)
    source = torch.zeros(numbers, dtype=torch.uint8 if quick else torch.float32, device=device)
    target = torch.empty_like(source)
    product = times({"": lambda: one @ one}, 10, device, clock)[""]
    copy = times({"": lambda: target.copy_(source)}, 10, device, clock)[""]
    return 2 * size**3 / min(product) * 1e3, 2 * source.numel() * source.element_size() / min(copy) * 1e3


def times(calls: dict[str, Callable[[], Any]], repeats: int, device: str, clock: str) -> dict[str, list[float]]:
    """Times in ms; on the CPU the calls take turns, on CUDA each runs with an emptied L2 cache."""
    if device != "cuda":
        now = CLOCKS[clock]

        def timed(call: Callable[[], Any]) -> dict[str, float]:
            count, started = 0, now()
            while count == 0 or now() - started < RESOLUTION[clock]:
                call()
                count += 1
            return {"ms": (now() - started) / count * 1e3}

        found = in_turn({name: functools.partial(timed, call) for name, call in calls.items()}, repeats, warmup=1)
        return {name: [entry["ms"] for entry in entries] for name, entries in found.items()}
    from triton.testing import do_bench

    with torch.inference_mode():
        return {
            name: do_bench(call, warmup=50, rep=max(100, 10 * repeats), return_mode="all")
            for name, call in calls.items()
        }


def usage(case: Case, capability: int) -> str:
    """Registers / spilled bytes / shared bytes: the most of the launches, compiled for a device that need not exist."""
    if not AVAILABLE or interpreted() or case.launches is None:
        return ""
    tensors = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in case.make("meta").items()}
    used = [launch.compile(capability) for launch in case.launches(**tensors)]
    return "/".join(str(max(getattr(u, name) for u in used)) for name in ("registers", "spilled", "shared"))


def measure(
    case: Case,
    device: str,
    seconds: float,
    repeats: int | None,
    limits: tuple[float, float],
    longest: float,
    clock: str,
) -> list[Row] | None:
    """Two lines, the kernel and the dense operation; None: one call takes longer than ``longest`` seconds."""
    now = CLOCKS[clock]
    with torch.inference_mode():
        tensors = case.make(device)
        calls = {"tokcompile": lambda: case.run(**tensors), "dense": lambda: case.dense(**tensors)}
        slowest = 0.0
        for call in calls.values():
            started = now()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            slowest = max(slowest, now() - started)
    if slowest > longest:
        return None
    rounds = repeats or max(3, min(200, int(seconds / max(slowest, RESOLUTION[clock], 1e-4) / 2)))
    found = times(calls, rounds, device, clock)
    median = {name: harness.quantile(t, 0.5) for name, t in found.items()}
    lines = []
    for name, flops, moved in (("tokcompile", case.flops, case.moved), ("dense", case.dense_flops, case.dense_moved)):
        taken = median[name] / 1e3
        bound = max(flops / limits[0], moved / limits[1])
        lines.append(
            Row(
                case.kernel,
                case.name,
                case.length,
                name,
                median[name],
                harness.quantile(found[name], 0.2),
                harness.quantile(found[name], 0.8),
                len(found[name]),
                flops / taken / 1e9 if flops else None,
                moved / taken / 1e9,
                bound / taken,
                median["dense"] / median[name] if name == "tokcompile" else None,
            )
        )
    return lines


def run(
    names: Sequence[str],
    device: str,
    quick: bool,
    seconds: float,
    repeats: int | None,
    longest: float,
    clock: str = "wall",
    compiles: bool = True,
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """All cases of the named kernels. A length at which one call takes longer than ``longest`` ends its case."""
    sizes = TINY if quick else LARGE if device == "cuda" else SMALL
    load, limits = harness.load(), peaks(device, sizes.dtype, clock, quick)
    seen = harness.versions()
    origin: dict[str, Any] = {
        "peak_gflops": limits[0] / 1e9,
        "peak_gbs": limits[1] / 1e9,
        "load": load,
        "clock": clock,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else seen["cpu"],
        "torch": seen["torch"],
        "tokcompile": seen["tokcompile"],
    }
    found: list[Row] = []
    for name in names:
        ended: set[str] = set()
        compiled = {(c.name, c.length): c for c in CASES[name](TINY if quick else LARGE)}
        for case in CASES[name](sizes):
            lines = None if case.name in ended else measure(case, device, seconds, repeats, limits, longest, clock)
            if lines is None:
                ended.add(case.name)
                lines = [Row(case.kernel, case.name, case.length, "tokcompile")]
            like = compiled.get((case.name, case.length))
            if like is not None and compiles:
                lines[0].sm_80, lines[0].sm_90 = usage(like, 80), usage(like, 90)
            for line in lines:
                for key, value in origin.items():
                    setattr(line, key, value)
                tell(line)
            found += lines
    return found


# ------------------------------------------------------------------------------------------------------------- page


def _text(line: Row) -> dict[str, str]:
    """Cells of the file: numbers with four significant digits."""
    return {k: f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for k, v in asdict(line).items()}


def markdown(lines: Sequence[dict[str, str]]) -> str:
    """A table for each kernel: the kernel beside the dense operation, and what the compiled kernel uses."""
    parts = []
    for kernel in dict.fromkeys(m["kernel"] for m in lines):
        table_ = [
            f"## {kernel}",
            "",
            "| case | length | ms (p20 to p80) | dense ms (p20 to p80) | speed-up | GFLOP/s | GB/s | "
            "share of the limit | dense's share | sm_80 | sm_90 |",
            "|---|--:|" + "--:|" * 9,
        ]
        mine = [m for m in lines if m["kernel"] == kernel]
        for m in (m for m in mine if m["contestant"] == "tokcompile"):
            other = next(
                (
                    o
                    for o in mine
                    if o["contestant"] == "dense" and (o["case"], o["length"]) == (m["case"], m["length"])
                ),
                None,
            )
            cells = [
                m["case"],
                _length(m["length"]),
                _times(m),
                _times(other),
                m["speedup"],
                m["gflops"],
                m["gbs"],
                _percent(m),
                _percent(other),
                m["sm_80"],
                m["sm_90"],
            ]
            table_.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(table_))
        first = mine[0]
        clock = "CPU time" if first["clock"] == "cpu" else "wall time"
        parts.append(
            f"{clock}; {first['device']}, threads: {first['threads']}, {first['dtype']}; measured peaks: "
            f"{first['peak_gflops']} GFLOP/s, {first['peak_gbs']} GB/s; torch {first['torch']}; load before "
            f"the run {first['load'] or 'unknown'}."
        )
    return "\n\n".join(parts)


def _length(text: str) -> str:
    return f"{int(text) // K}K" if int(text) >= K else text


def _times(line: dict[str, str] | None) -> str:
    return f"{line['median_ms']} ({line['p20_ms']} to {line['p80_ms']})" if line and line["median_ms"] else "not run"


def _percent(line: dict[str, str] | None) -> str:
    return f"{100 * float(line['share']):.0f} %" if line and line["share"] else ""


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="comma-separated: " + ", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help="tiny sizes, 2 rounds: a smoke test")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a case may take, about")
    parser.add_argument(
        "--longest",
        type=float,
        default=None,
        help="seconds of one call; longer lengths are left out (8 on the CPU, no limit on CUDA)",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave the columns sm_80 and sm_90 empty")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=sorted(CLOCKS),
        help="cpu: CPU time, for one thread on a machine that computes other things too; not for CUDA",
    )
    parser.add_argument("--repeats", type=int, help="rounds, instead of as many as fit")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args(argv)
    names = options.only.split(",")
    if unknown := sorted(set(names) - set(CASES)):
        parser.error(f"unknown kernel {', '.join(unknown)}; choose from {', '.join(CASES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", harness.THREADS)))
    longest = options.longest or (math.inf if device == "cuda" else 8.0)
    out = options.out or (Path(tempfile.gettempdir()) / "tokcompile-quick" if options.quick else harness.RESULTS)
    for name in names:  # file and page after each kernel: a run that is cut off leaves what it has
        save(
            out,
            run(
                [name],
                device,
                options.quick,
                options.seconds,
                options.repeats or (2 if options.quick else None),
                longest,
                options.clock,
                not options.no_compile,
                _show,
            ),
        )
    print(out / "kernels.csv")
    return 0


def save(out: Path, lines: Sequence[Row]) -> None:
    """Put the lines of their kernels into ``kernels.csv`` (others stay), and the tables into the docs."""
    file, fresh = out / "kernels.csv", {line.kernel for line in lines}
    kept = [m for m in harness.read_csv(file) if m["kernel"] not in fresh] if file.exists() else []
    merged = sorted([*kept, *map(_text, lines)], key=lambda m: list(CASES).index(m["kernel"]))
    out.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as target:
        writer = csv.DictWriter(target, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(merged)
    if out == harness.RESULTS:
        DOCS.write_text(f"{DOCS.read_text().split(MARKER)[0]}{MARKER}\n\n{markdown(merged)}\n")


def _show(line: Row) -> None:
    taken = "not run" if line.median_ms is None else f"{line.median_ms:10.3f} ms"
    share = "" if line.share is None else f"{100 * line.share:4.0f} % of the limit"
    speed = "" if line.speedup is None else f"{line.speedup:6.2f}x"
    print(f"{line.kernel:22} {line.case:22} {line.length:7} {line.contestant:10} {taken} {speed:8} {share}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())

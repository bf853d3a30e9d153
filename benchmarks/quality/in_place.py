"""What the passes compute, put into a Llama-like model that runs as it is: nothing is captured or compiled.

To sweep budgets in minutes: capturing a model of 30 layers takes longer than asking it a few hundred tokens. The choice
of keys, the experts and the tables are the passes' own functions; ``tests/test_language_benchmark.py`` holds that a
model changed here gives what :func:`tokcompile.optimize` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.cache_utils import DynamicCache, DynamicLayer

from tokcompile.families.moe import experts
from tokcompile.families.sparse_attention.decode.base import SparseDecode
from tokcompile.families.sparse_attention.decode.lists import ends, joined, listed
from tokcompile.families.stem import token_table
from tokcompile.kernels.embedding_gate import embedding_gate, rows
from tokcompile.kernels.linear_where import linear_where
from tokcompile.kernels.token_list_attention import token_list_attention
from tokcompile.kernels.token_sparse_attention import (  # noqa: F401  sparse_prefill registers its operation
    op as sparse_prefill,
)
from tokcompile.passes.moe.moe_from_dense import MoeFromDense
from tokcompile.passes.sparse_attention.fasa import Fasa
from tokcompile.passes.sparse_attention.token_sparse import TokenSparse
from tokcompile.passes.sparse_attention.tokenselect import TokenSelect
from tokcompile.passes.stem.stem import Stem
from tokcompile.plan.pass_base import Seen

NAME = "tokcompile_in_place"
Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor | None]
"""(layer, query [B, H, Q, D], key, value [B, Hkv, L, D], scale) -> output [B, H, Q, D]; None: dense."""
FeedForward = Callable[[Tensor, Tensor], Tensor]
"""(hidden states [B, L, d], token ids [B, L]) -> the same shape."""


@contextmanager
def attention_of(model: nn.Module, function: Attention) -> Iterator[None]:
    """While open, self-attention without padding is computed by ``function``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **more: Any) -> Any:
        found = function(module.layer_idx, query, key, value, scaling)
        if found is None:
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **more)
        return found.transpose(1, 2), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config: Any = model.config
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


class InPlace(nn.Module):
    """A model with another attention, or with other feed-forward layers (layer -> function); its weights are shared.

    The ids that feed-forward layers get are -1 at the first ``dense_first`` tokens of a text. A prefill does not differ
    from the model's in the layers below ``first``, so that :func:`above` can leave them out.
    """

    def __init__(
        self,
        model: Any,
        attention: Attention | None = None,
        feed_forward: Mapping[int, FeedForward] | None = None,
        dense_first: int = 0,
        first: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.attention, self.feed_forward = model, attention, feed_forward or {}
        self.dense_first, self.first = dense_first, first

    def forward(self, **kwargs: Any) -> Any:
        """As the model's."""
        with self._changed():
            return self.model(**kwargs)

    def generate(self, **kwargs: Any) -> Any:
        """As the model's."""
        with self._changed():
            return self.model.generate(**kwargs)

    @contextmanager
    def _changed(self) -> Iterator[None]:
        ids: list[Tensor] = []

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values", kwargs.get("cache"))
            left = max(0, self.dense_first - (cache.get_seq_length() if cache is not None else 0))
            found = kwargs["input_ids"].clone()
            found[:, :left] = -1
            ids[:] = [found]

        with ExitStack() as stack:
            stack.callback(self.model.register_forward_pre_hook(note, with_kwargs=True).remove)
            if self.attention is not None:
                stack.enter_context(attention_of(self.model, self.attention))
            for number, function in self.feed_forward.items():
                mlp = self.model.model.layers[number].mlp
                mlp.forward = lambda x, f=function: f(x, ids[0])
                stack.callback(delattr, mlp, "forward")
            yield


# ------------------------------------------------------------------------------------- what candidates have in common


class Room(DynamicLayer):
    """Keys and values with room for ``more`` tokens, which are written in place; a step copies the new ones alone."""

    def __init__(self, keys: Tensor, values: Tensor, more: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.room = [torch.cat([t, t.new_empty(*t.shape[:2], more, t.shape[3])], 2) for t in (keys, values)]
        self.cut(keys.shape[2])

    def cut(self, length: int) -> None:
        """Leave the first ``length`` tokens."""
        self.keys, self.values = (t[:, :, :length] for t in self.room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        for whole, new in zip(self.room, (key_states, value_states), strict=True):
            whole[:, :, start:end] = new
        self.cut(end)
        return self.keys, self.values


def roomy(pairs: Iterable[tuple[Tensor, Tensor]], more: int) -> DynamicCache:
    """A cache of :class:`Room` layers. ``pairs``: keys and values of each layer, [B, Hkv, L, D]."""
    cache = DynamicCache()
    cache.layers = [Room(key, value, more) for key, value in pairs]
    return cache


@dataclass(frozen=True)
class Lower:
    """What the layers below ``first`` make of a text: hidden states [1, L, d], and their keys and values."""

    first: int
    hidden: Tensor
    pairs: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def lower_of(model: Any, ids: Tensor, first: int) -> Lower:
    """Read ``ids [1, L]`` with the layers below ``first``."""

    class Enough(Exception):
        pass

    def stop(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])
        raise Enough

    hidden: list[Tensor] = []
    cache = DynamicCache()
    hook = model.model.layers[first].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Enough:
        pass
    finally:
        hook.remove()
    return Lower(first, hidden[0], [(layer.keys, layer.values) for layer in cache.layers[:first]])


@torch.no_grad()
def above(model: Any, ids: Tensor, lower: Lower) -> tuple[Tensor, DynamicCache]:
    """Read ``ids [1, L]`` with the layers from ``lower.first`` on: logits of the last token, and the whole cache.

    ``model`` may be an :class:`InPlace`, with ``first`` no less.
    """
    inner = model.model if isinstance(model, InPlace) else model
    if isinstance(model, InPlace) and model.first < lower.first:
        raise ValueError(f"the model differs from layer {model.first} on, and the layers below {lower.first} were read")
    below, cache = inner.model.layers[: lower.first], DynamicCache()
    for layer in below:
        layer.forward = lambda *args, **kwargs: lower.hidden
    try:
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    finally:
        for layer in below:
            del layer.forward
    for number, pair in enumerate(lower.pairs):  # afterwards: with keys in layer 0 the text would count as read
        cache.update(*pair, number)
    return logits, cache


# -------------------------------------------------------------------------------------------------------- attention


def sparse_prefill_of(
    model: Any, params: TokenSparse.Params, layers: Collection[int] | None = None, seed: int = 0
) -> InPlace:
    """These layers sparse; None: the upper part, as :class:`TokenSparse` without calibration.

    ``seed`` is for ``select: random``; with 0 the choice is the pass's.
    """
    depth = len(model.model.layers)
    sparse = range(depth - max(1, int(params.calm * depth + 0.5)), depth) if layers is None else layers

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
        if layer not in sparse or query.shape[2] != key.shape[2]:
            return None
        drawn = layer + depth * seed if params.select == "random" else -1
        found: Tensor = torch.ops.tokcompile.token_sparse_attention(
            query,
            key,
            value,
            None,
            None,
            scale,
            0.0,
            0,
            params.coverage,
            params.keep or 0.0,
            params.least,
            params.window,
            params.pool,
            drawn,
        )
        return found

    return InPlace(model, attention, first=min(sparse))


def sparse_decode_of(
    model: Any, method: SparseDecode | TokenSelect, first: int = 1, state: Mapping[int, Tensor] | None = None
) -> InPlace:
    """Decode steps of the layers ``first`` and up. ``state``: layer -> what :meth:`SparseDecode.score` takes more.

    With ``reuse`` the model has a list ``reused``: whether each row reused its list, by step and layer.
    """
    p: Any = method.params
    memory: dict[int, Any] = {}
    reused: list[bool] = []

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
        if layer < first or query.shape[2] != 1:
            return None
        candidate, oldest, newest = ends(None, key.shape[2], p.sinks, p.recent, key.device)
        more = () if state is None else (state[layer],)
        if getattr(p, "reuse", None) is None:
            scores = method.score(query, key, candidate, scale, 0.0, layer, *more).values
            index = listed(scores, candidate, oldest, newest, p.budget.count(key.shape[2]))
        else:
            length, before, kept = memory.get(layer, (0, None, None))
            if length + 1 != key.shape[2]:  # another text
                before = query.new_full((query.shape[0], query[0].numel()), torch.nan)
                kept = torch.full((query.shape[0], p.budget.num - p.sinks - p.recent), -1)
            best, before, kept, rows = method.select(query, key, candidate, scale, 0.0, before, kept)
            memory[layer] = key.shape[2], before, kept
            reused.extend(rows.tolist())
            index = joined(best, oldest, newest)
        index = index.expand(query.shape[0], key.shape[1], index.shape[2])
        return token_list_attention(query, key, value, index, None, scale, False, 0.0)[0]

    made = InPlace(model, attention)
    made.reused = reused
    return made


@torch.no_grad()
def fasa_planes(model: Any, method: Fasa, data: Iterable[Mapping[str, Tensor]]) -> dict[int, Tensor]:
    """Layer -> dominant components [Hkv, D]; the model rotates halves."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    chunks = [(i, i + width // 2) for i in range(width // 2)]
    member = torch.zeros(width, len(chunks))
    for number, chunk in enumerate(chunks):
        member[list(chunk), number] = 1
    seen: dict[str, Seen] = {}

    def watch(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
        found = seen.setdefault(str(layer), Seen(str(layer), str(layer)))
        found.facts.update(pairing="halves", chunks=chunks, kv_heads=key.shape[1], width=width)
        length = query.shape[2]
        places = torch.linspace(length // 2, length - 1, min(method.params.queries, length)).round().long().unique()
        for row in places.tolist():
            method._compare(query[0, :, row], key[0, :, : row + 1], member, found)

    watched = InPlace(model, watch)
    for item in data:
        watched(**item, use_cache=False)
    return {int(key): tensors["components"] for key, (tensors, _) in method.prepare(seen).items()}


# ------------------------------------------------------------------------------------------------------ feed-forward


@torch.no_grad()
def observed(
    model: Any,
    data: Iterable[Mapping[str, Tensor]],
    experts_params: MoeFromDense.Params | None,
    stem_params: Stem.Params | None,
) -> dict[str, Seen]:
    """What calibration of the two passes sees of each layer."""
    layers = model.model.layers
    embedding = model.get_input_embeddings().weight
    seen = {}
    for number, layer in enumerate(layers):
        weights = {
            "gate": layer.mlp.gate_proj.weight,
            "up": layer.mlp.up_proj.weight,
            "down": layer.mlp.down_proj.weight,
            "embedding": embedding,
        }
        seen[str(number)] = Seen(str(number), str(number), number, len(layers), weights=weights)
        seen[str(number)].facts["activation"] = "silu"
    for place, item in enumerate(data):

        def watch(x: Tensor, ids: Tensor, number: int, place: int = place) -> Tensor:
            mlp, sums = layers[number].mlp, seen[str(number)].sums
            flat = x.reshape(-1, x.shape[-1])
            gate, up = silu(mlp.gate_proj(flat)), mlp.up_proj(flat)
            inner = gate * up
            if experts_params is not None:
                top = inner.abs().topk(experts_params.top, dim=-1).indices.to(torch.int32)
                experts.sample(sums, "top", top, experts_params.tokens)
                experts.sample(sums, "x", flat, experts_params.samples)
            if stem_params is not None:
                every = stem_params.held_out
                held = torch.full((len(flat),), bool(every) and place % every == every - 1)
                token_table.accumulate(sums, ids.reshape(-1), gate, up, held, len(embedding), stem_params.max_rows)
            found: Tensor = mlp.down_proj(inner).view(x.shape)
            return found

        watched = InPlace(model, None, {n: lambda x, ids, n=n: watch(x, ids, n) for n in range(len(layers))})
        watched(**item, use_cache=False)
    return seen


@torch.no_grad()
def experts_of(model: Any, params: MoeFromDense.Params, seen: dict[str, Seen]) -> InPlace:
    """Every layer as shared and routed experts, whatever their speed."""
    method = MoeFromDense(params.model_copy(update={"gate": "off"}))
    found: dict[int, FeedForward] = {}
    for key, (tensors, _) in method.prepare(seen).items():
        if tensors:

            def run(x: Tensor, ids: Tensor, t: Any = tensors) -> Tensor:
                return experts.run(x.reshape(-1, x.shape[-1]), t, "silu", params.router, params.active).view(x.shape)

            found[int(key)] = run
    return InPlace(model, None, found)


@torch.no_grad()
def fixed_neurons_of(model: Any, share: float, seen: dict[str, Seen]) -> InPlace:
    """A control of experts: this share of the neurons of each layer, those of most energy, the same for all tokens."""
    found: dict[int, FeedForward] = {}
    for key, layer in seen.items():
        weights = layer.weights
        energy = experts.energy(layer.sums["x"], weights, "silu").mean(0)
        kept = energy.topk(round(share * len(energy))).indices
        less = {"gate": weights["gate"][kept], "up": weights["up"][kept], "down": weights["down"][:, kept]}
        found[int(key)] = lambda x, ids, w=less: experts.dense(x, w, "silu")
    return InPlace(model, None, found)


@torch.no_grad()
def tables_of(
    model: Any,
    params: Stem.Params,
    seen: dict[str, Seen],
    random_layers: int | None = None,
    random_rows: int | None = None,
) -> InPlace:
    """Tables in the place of up-projections; ids without a row keep theirs.

    Args:
        random_layers: seed of a control: as many layers, drawn instead of chosen.
        random_rows: seed of a control: every id reads the row of some other id.
    """
    made = Stem(params).prepare(seen)
    count = sum(bool(tensors) for tensors, _ in made.values())
    if random_layers is not None:
        drawn = torch.randperm(len(seen), generator=torch.Generator().manual_seed(random_layers))[:count].tolist()
        made = Stem(params.model_copy(update={"convert": 1.0})).prepare(
            {k: v for k, v in seen.items() if int(k) in drawn}
        )
    found: dict[int, FeedForward] = {}
    for key, (tensors, _) in made.items():
        if not tensors:
            continue
        if random_rows is not None:
            mixed = torch.randperm(len(tensors["table"]), generator=torch.Generator().manual_seed(random_rows))
            tensors = {**tensors, "table": tensors["table"][mixed]}

        def run(x: Tensor, ids: Tensor, t: Any = tensors, mlp: Any = model.model.layers[int(key)].mlp) -> Tensor:
            missing = rows(ids, t["table"].shape[0], t["remap"]) < 0
            other = linear_where(x, mlp.up_proj.weight, None, missing)
            result: Tensor = mlp.down_proj(embedding_gate(mlp.gate_proj(x), t["table"], ids, "silu", t["remap"], other))
            return result

        found[int(key)] = run
    return InPlace(model, None, found, params.dense_first)

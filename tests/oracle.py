"""The exactness oracle: the untouched model with chosen keys hidden from chosen layers.

Pruning tokens after layer ``k`` must equal the original model in which, from layer ``k + 1`` on, no query sees the keys
of the pruned tokens, at the same positions. ``dropped`` says it for each layer: ``{layer index: [B, S] bool}``, True
where the key of that prompt token is hidden. Layers that are not in ``dropped`` are left alone, bit for bit; keys of
generated tokens are always visible. The values at hidden tokens themselves mean nothing: compare at kept tokens.

Models of transformers are changed through an attention function and a mask function registered under one name and set
on the configuration that the layers read, so towers with a configuration of their own keep their attention. The
functions call those of the model's own implementation ("sdpa" or "eager"); only the mask differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.zoo.vlm import SPECIAL, Case

Dropped = dict[int, Tensor]


class Run(NamedTuple):
    """What a generation returned: logits ``[B, V]`` of each step, before any processor, and tokens ``[B, steps]``."""

    logits: list[Tensor]
    tokens: Tensor


def hide_from(layer: int, hidden: Tensor, n_layers: int) -> Dropped:
    """Hide the keys of ``hidden [B, S]`` in ``layer`` and all layers after it."""
    return dict.fromkeys(range(layer, n_layers), hidden)


def hidden_columns(hidden: Tensor, batch: int, start: int, width: int) -> Tensor:
    """``[batch, 1, 1, width]``, True for hidden keys, for key columns that stand for positions ``start ...``.

    Rows are repeated when a beam search has expanded the batch; positions beyond the prompt are visible.
    """
    hidden = hidden.repeat_interleave(batch // hidden.shape[0], dim=0)
    padded = F.pad(hidden, (0, max(start + width - hidden.shape[1], 0)))
    return padded[:, None, None, start : start + width]


def hide(allowed: Tensor, hidden: Tensor, first_query: int) -> Tensor:
    """Remove the ``hidden`` columns of ``allowed`` (bool, or additive float); a query left without a key sees itself.

    Args:
        allowed: ``[B or 1, heads or 1, Q, K]``.
        hidden: ``[B, 1, 1, K]`` bool.
        first_query: column of the first query.
    """
    queries, keys = allowed.shape[-2:]
    own = torch.arange(queries, device=allowed.device)[:, None] + first_query == torch.arange(
        keys, device=allowed.device
    )
    if allowed.dtype == torch.bool:
        left = allowed & ~hidden
        emptied = allowed.any(-1, keepdim=True) & ~left.any(-1, keepdim=True)
        return left | (emptied & own)
    lowest = torch.finfo(allowed.dtype).min
    left = allowed.masked_fill(hidden, lowest)
    emptied = (allowed > lowest).any(-1, keepdim=True) & ~(left > lowest).any(-1, keepdim=True)
    return left.masked_fill(emptied & own, 0.0)


class _Hidden:
    """The hidden keys of one call, and how many tokens each layer has seen."""

    def __init__(self, layers: Sequence[nn.Module], dropped: Dropped) -> None:
        self.dropped = dropped
        self.index = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
        self.seen: dict[int, int] = {}

    def columns(self, module: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor | None, int]:
        """Hidden columns of this attention call (None: nothing to hide) and the column of its first query."""
        index, queries, keys = self.index[id(module)], query.shape[2], key.shape[2]
        # a call whose queries are all its keys begins anew: a prefill, or a step without cache
        self.seen[index] = seen = queries if queries == keys else self.seen.get(index, 0) + queries
        start = max(seen - keys, 0)  # a sliding cache has forgotten the first keys; a static one is longer than seen
        hidden = self.dropped.get(index)
        columns = None if hidden is None else hidden_columns(hidden, query.shape[0], start, keys)
        return columns, seen - queries - start


_current: list[_Hidden] = []


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The eager attention that transformers' models spell out, with the capped scores of Gemma 2."""
    groups = query.shape[1] // key.shape[1]
    scores = torch.matmul(query, repeat_kv(key, groups).transpose(2, 3))
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, repeat_kv(value, groups)).transpose(1, 2).contiguous(), weights


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    base: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    hidden, first_query = _current[-1].columns(module, query, key)
    if hidden is not None:
        if attention_mask is None:
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)[None, None]
            causal = kwargs.pop("is_causal", None)
            if base == "sdpa" and (getattr(module, "is_causal", True) if causal is None else causal):
                attention_mask = attention_mask.tril(first_query)
            if base == "eager":
                lowest = torch.finfo(query.dtype).min
                attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
                    ~attention_mask, lowest
                )
        attention_mask = hide(attention_mask, hidden, first_query)
    function = _eager if base == "eager" else sdpa_attention_forward
    return function(module, query, key, value, attention_mask, *args, **kwargs)


_NAMES = {base: f"{base}_with_hidden_keys" for base in ("sdpa", "eager")}
for _base, _name in _NAMES.items():
    ALL_ATTENTION_FUNCTIONS.register(_name, partial(_attention, base=_base))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_name, ALL_MASK_ATTENTION_FUNCTIONS[_base])


@contextlib.contextmanager
def hidden_keys(layers: Sequence[nn.Module], dropped: Dropped, configs: Sequence[Any] = ()) -> Iterator[None]:
    """Within the context, ``layers`` (of a model of transformers) hide the keys of ``dropped``.

    Args:
        layers: all layers that read the same configuration, in order.
        dropped: layer index -> ``[B, S]`` bool.
        configs: further configurations that masks are made from.
    """
    found = [module.config for layer in layers for module in layer.modules() if hasattr(module, "config")]
    unique = {id(config): config for config in [*found, *configs]}
    before = {key: config._attn_implementation for key, config in unique.items()}
    _current.append(_Hidden(layers, dropped))
    try:
        for key, config in unique.items():
            config._attn_implementation = _NAMES[before[key]]
        yield
    finally:
        for key, config in unique.items():
            config._attn_implementation = before[key]
        _current.pop()


@contextlib.contextmanager
def _hooks(layers: Sequence[Any], dropped: Dropped) -> Iterator[None]:
    """As :func:`hidden_keys` for layers with a ``mask_hook``."""

    def hook(index: int, allowed: Tensor) -> Tensor:
        if index not in dropped:
            return allowed
        return hide(allowed, hidden_columns(dropped[index], allowed.shape[0], 0, allowed.shape[-1]), 0)

    try:
        for layer in layers:
            layer.mask_hook = hook
        yield
    finally:
        for layer in layers:
            layer.mask_hook = None


def _masked(case: Case, dropped: Dropped) -> contextlib.AbstractContextManager[None]:
    if case.has_generate:
        return hidden_keys(case.decoder_layers, dropped, [case.model.config.get_text_config()])  # type: ignore[union-attr]
    return _hooks(case.decoder_layers, dropped)


def forward(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """Logits ``[B, S, V]`` of the model as it is, without cache."""
    with torch.no_grad():
        if not case.has_generate:
            return case.model(**inputs)
        return case.model(**inputs, use_cache=False).logits


def run(case: Case, inputs: dict[str, Tensor], max_new_tokens: int = 8, **generate_kwargs: Any) -> Run:
    """Greedy generation of the model as it is. Models without ``generate`` are called anew for each token."""
    if case.has_generate:
        with torch.no_grad():
            out = case.model.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                output_logits=True,
                **generate_kwargs,
            )
        return Run(list(out.logits), out.sequences[:, inputs["input_ids"].shape[1] :])
    inputs, logits, tokens = dict(inputs), [], []
    for _ in range(max_new_tokens):
        logits.append(forward(case, inputs)[:, -1])
        scores = logits[-1].clone()
        scores[:, SPECIAL] = -torch.inf
        tokens.append(scores.argmax(-1, keepdim=True))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[-1]], dim=1)
        mask = inputs["attention_mask"]
        inputs["attention_mask"] = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
    return Run(logits, torch.cat(tokens, dim=1))


def masked_forward(case: Case, inputs: dict[str, Tensor], dropped: Dropped) -> Tensor:
    """Logits ``[B, S, V]`` of the dense model with the keys of ``dropped`` hidden."""
    with _masked(case, dropped):
        return forward(case, inputs)


def masked_run(
    case: Case, inputs: dict[str, Tensor], dropped: Dropped, max_new_tokens: int = 8, **generate_kwargs: Any
) -> Run:
    """Generation of the dense model with the keys of ``dropped`` hidden, in the prefill and in every decode step."""
    with _masked(case, dropped):
        return run(case, inputs, max_new_tokens, **generate_kwargs)


def difference(one: Run, other: Run) -> float:
    """Largest difference of the logits over all steps."""
    return max((a - b).abs().max().item() for a, b in zip(one.logits, other.logits, strict=True))

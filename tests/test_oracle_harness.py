"""The oracle itself: what it must equal where another way to compute the same thing exists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.zoo.encoders_for_pruning import ENCODERS, EncoderCase
from tests.zoo.vlm import SPECIAL, VARIANTS, VLMS, Case

CASES = {**VLMS, **VARIANTS}
CACHED = [name for name in CASES if not name.startswith("plain")]


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return _case(cases, request.param)


def _case(cases: dict[str, Case], name: str) -> Case:
    if name not in cases:
        cases[name] = CASES[name]()
    return cases[name]


def every_second_visual(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """``[B, S]``: every second visual token of each row, the same share in every row."""
    visual = case.visual_mask(inputs)
    return visual & (visual.cumsum(-1) % 2 == 0)


def nothing(case: Case, inputs: dict[str, Tensor]) -> oracle.Dropped:
    none = torch.zeros_like(case.visual_mask(inputs))
    return oracle.hide_from(0, none, len(case.decoder_layers))


def padded_batch(case: Case) -> dict[str, Tensor]:
    return case.inputs(batch=2, left_padding=3)


def test_dense_generation_varies(case: Case) -> None:
    inputs = case.inputs(batch=2, left_padding=3, images_per_row=2)
    dense = oracle.run(case, inputs)
    assert dense.tokens.shape == (2, 8)
    assert len(dense.tokens[:, :4].unique()) > 3
    assert not torch.isin(dense.tokens, torch.tensor(SPECIAL)).any()
    assert torch.isfinite(torch.stack(dense.logits)).all()
    assert torch.stack(dense.logits).std() > 0.5


def test_without_entries_the_oracle_is_the_model_bit_for_bit(case: Case) -> None:
    inputs = padded_batch(case)
    dense, masked = oracle.run(case, inputs), oracle.masked_run(case, inputs, {})
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, masked.logits, strict=True))
    assert torch.equal(oracle.forward(case, inputs), oracle.masked_forward(case, inputs, {}))


@pytest.mark.parametrize("padding", [0, 3])
def test_hiding_nothing_is_the_model(case: Case, padding: int) -> None:
    inputs = case.inputs(batch=2, left_padding=padding)
    dense, masked = oracle.run(case, inputs), oracle.masked_run(case, inputs, nothing(case, inputs))
    assert torch.equal(dense.tokens, masked.tokens)
    assert oracle.difference(dense, masked) < 1e-5
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        oracle.forward(case, inputs)[seen],
        oracle.masked_forward(case, inputs, nothing(case, inputs))[seen],
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("layer", [0, 2])
def test_hiding_changes_prefill_and_every_decode_step(case: Case, layer: int) -> None:
    inputs = padded_batch(case)
    dropped = oracle.hide_from(layer, every_second_visual(case, inputs), len(case.decoder_layers))
    dense, masked = oracle.run(case, inputs), oracle.masked_run(case, inputs, dropped)
    for a, b in zip(dense.logits, masked.logits, strict=True):
        assert ((a - b).abs().amax(-1) > 1e-2).all(), "each row must change well above the tolerance of the comparisons"


@contextlib.contextmanager
def noise_at(case: Case, hidden: Tensor) -> Iterator[None]:
    """Add noise to the prompt's ``hidden`` tokens at the input of the first decoder layer."""

    def add(_: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        if x.shape[1] != hidden.shape[1]:
            return None
        rows = hidden.repeat_interleave(len(x) // len(hidden), dim=0)[..., None]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        return (x + noise * rows, *args[1:]), kwargs

    handle = case.decoder_layers[0].register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_hidden_keys_have_no_influence(case: Case) -> None:
    """With a token's keys hidden in every layer, its own value cannot reach a kept token."""
    inputs = padded_batch(case)
    hidden = every_second_visual(case, inputs)
    dropped = oracle.hide_from(0, hidden, len(case.decoder_layers))
    before = oracle.masked_forward(case, inputs, dropped)
    with noise_at(case, hidden):
        after = oracle.masked_forward(case, inputs, dropped)
    kept = inputs["attention_mask"].bool() & ~hidden
    assert torch.equal(before[kept], after[kept])
    assert not torch.equal(before[hidden], after[hidden])


@pytest.mark.parametrize("num_beams", [1, 3])
def test_hidden_keys_have_no_influence_on_generation(case: Case, num_beams: int) -> None:
    if not case.has_generate and num_beams > 1:
        pytest.skip("no generate()")
    inputs = case.inputs(batch=2, left_padding=3, text_len=6)
    hidden = every_second_visual(case, inputs)
    dropped = oracle.hide_from(0, hidden, len(case.decoder_layers))
    more = {"num_beams": num_beams} if num_beams > 1 else {}
    before = oracle.masked_run(case, inputs, dropped, **more)
    with noise_at(case, hidden):
        after = oracle.masked_run(case, inputs, dropped, **more)
        seen = oracle.run(case, inputs, **more)
    assert torch.equal(before.tokens, after.tokens)
    assert oracle.difference(before, after) == 0
    assert (before.logits[0] - seen.logits[0]).abs().max() > 1e-2


def _shorten(value: Any, kept: Tensor, length: int) -> Any:
    """Keep the columns ``kept [B, S]`` (the same number in each row) on every axis of size S behind the batch."""
    if isinstance(value, dict):
        return {key: _shorten(item, kept, length) for key, item in value.items()}
    if not isinstance(value, Tensor) or length not in value.shape:
        return value
    if value.dim() == 4:  # [B, 1, S, S]
        rows = [value[b][:, kept[b]][:, :, kept[b]] for b in range(len(value))]
        return torch.stack(rows)
    if value.dim() == 3 and value.shape[2] == length:  # positions [3 or 4, B, S]
        return torch.stack([value[:, b][:, kept[b]] for b in range(value.shape[1])], dim=1)
    return torch.stack([value[b][kept[b]] for b in range(len(value))])


class _Stop(Exception):
    pass


def shortened_forward(case: Case, inputs: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Logits ``[B, kept, V]`` of the dense text tower on a prompt without ``hidden`` tokens, positions as before."""
    model, kept = case.model, ~hidden
    if not case.has_generate:
        x = model.embed_inputs(inputs["input_ids"], inputs["pixel_values"])
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            return model.decode(*(_shorten(value, kept, hidden.shape[1]) for value in (x, mask, positions)))
    seen: dict[str, Any] = {}

    def record(_: Any, args: Any, kwargs: Any) -> None:
        seen.update(kwargs)
        raise _Stop

    handle = case.text_tower.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with contextlib.suppress(_Stop):
            oracle.forward(case, inputs)
    finally:
        handle.remove()
    length = hidden.shape[1]
    if seen.get("position_ids") is None:
        seen["position_ids"] = torch.arange(length).expand(len(hidden), -1)
    deepstack = seen.pop("deepstack_visual_embeds", None)
    if deepstack is not None:  # one feature for each visual token that is left
        visual = seen["visual_pos_masks"]
        deepstack = [feature[kept[visual]] for feature in deepstack]
        seen["deepstack_visual_embeds"] = deepstack
    short = {key: _shorten(value, kept, length) for key, value in seen.items()}
    with torch.no_grad():
        hidden_states = case.text_tower(**short)[0]
        logits = model.lm_head(hidden_states)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@pytest.mark.parametrize("padding", [0, 3])
def test_hiding_from_the_first_layer_is_a_shorter_prompt_at_the_old_positions(case: Case, padding: int) -> None:
    inputs = case.inputs(batch=2, left_padding=padding)
    if case.name == "gemma3_window":
        pytest.skip("the window counts positions; a shorter prompt would see further back")
    hidden = every_second_visual(case, inputs)
    dropped = oracle.hide_from(0, hidden, len(case.decoder_layers))
    masked = oracle.masked_forward(case, inputs, dropped)
    short = shortened_forward(case, inputs, hidden)
    kept, seen = ~hidden, inputs["attention_mask"].bool()
    masked = torch.stack([masked[b, kept[b]] for b in range(2)])
    seen = torch.stack([seen[b, kept[b]] for b in range(2)])
    torch.testing.assert_close(masked[seen], short[seen], atol=1e-5, rtol=0)


def test_rows_of_a_padded_batch_are_single_runs(case: Case) -> None:
    inputs = padded_batch(case)
    hidden = every_second_visual(case, inputs)
    dropped = oracle.hide_from(1, hidden, len(case.decoder_layers))
    together = oracle.masked_run(case, inputs, dropped)
    for row in range(2):
        single = case.row(inputs, row)
        own = hidden[row : row + 1, inputs["attention_mask"][row].bool()]
        alone = oracle.masked_run(case, single, oracle.hide_from(1, own, len(case.decoder_layers)))
        assert torch.equal(alone.tokens[0], together.tokens[row])
        for a, b in zip(alone.logits, together.logits, strict=True):
            torch.testing.assert_close(a[0], b[row], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", CACHED)
def test_cached_decoding_is_uncached_decoding(name: str, cases: dict[str, Case]) -> None:
    """Also for a sliding window shorter than the prompt, whose cache forgets the first keys."""
    case = _case(cases, name)
    inputs = case.inputs(batch=2, left_padding=3, images_per_row=2, text_len=6)
    dropped = oracle.hide_from(1, every_second_visual(case, inputs), len(case.decoder_layers))
    cached = oracle.masked_run(case, inputs, dropped)
    uncached = oracle.masked_run(case, inputs, dropped, use_cache=False)
    assert torch.equal(cached.tokens, uncached.tokens)
    assert oracle.difference(cached, uncached) < 2e-5


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl", "internvl", "smolvlm"])
def test_rows_with_unequal_images(name: str, cases: dict[str, Case]) -> None:
    case = _case(cases, name)
    inputs = case.inputs(batch=3, images_per_row=[2, 1, 0], sizes=[1, 0])
    counts = case.visual_mask(inputs).sum(1)
    assert counts[0] > counts[1] > counts[2] == 0
    dropped = oracle.hide_from(1, every_second_visual(case, inputs), len(case.decoder_layers))
    dense, masked = oracle.run(case, inputs), oracle.masked_run(case, inputs, dropped)
    for a, b in zip(dense.logits[:1], masked.logits[:1], strict=True):
        change = (a - b).abs().amax(-1)
        assert (change[:2] > 1e-2).all()
        assert change[2] < 1e-5, "a row without images has nothing to drop"


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_eager_attention_hides_the_same_keys(name: str, cases: dict[str, Case]) -> None:
    fused, spelled = _case(cases, name), CASES[name]("eager")  # type: ignore[call-arg]
    inputs = padded_batch(fused)
    dropped = oracle.hide_from(1, every_second_visual(fused, inputs), len(fused.decoder_layers))
    one, other = oracle.masked_run(fused, inputs, dropped), oracle.masked_run(spelled, inputs, dropped)
    assert torch.equal(one.tokens, other.tokens)
    assert oracle.difference(one, other) < 2e-5


# --------------------------------------------------------------------------------------------------------- encoders


@pytest.fixture(scope="module", params=list(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> EncoderCase:
    return ENCODERS[request.param]()


def some_hidden(case: EncoderCase, batch: int = 2) -> Tensor:
    """``[B, N]``: five tokens behind the prefix, others in each row."""
    order = torch.rand(batch, case.tokens - case.prefix_tokens, generator=torch.Generator().manual_seed(3)).argsort(-1)
    hidden = torch.zeros(batch, case.tokens, dtype=torch.bool)
    return hidden.scatter(1, order[:, :5] + case.prefix_tokens, True)


def test_encoder_layers(encoder: EncoderCase) -> None:
    assert len(encoder.layers) == 4
    assert encoder.run(encoder.inputs(3)).shape == (3, encoder.tokens, 32)


def test_encoder_with_nothing_hidden(encoder: EncoderCase) -> None:
    inputs = encoder.inputs()
    dense = encoder.run(inputs)
    torch.testing.assert_close(encoder.oracle(inputs, {}), dense, atol=1e-5, rtol=0)
    none = torch.zeros(2, encoder.tokens, dtype=torch.bool)
    torch.testing.assert_close(encoder.oracle(inputs, oracle.hide_from(0, none, 4)), dense, atol=1e-5, rtol=0)


def _before_pooling(encoder: EncoderCase, inputs: dict[str, Tensor]) -> Tensor:
    """Tokens out of the model; those of CLIP's text model before it picks the end-of-sequence token by position."""
    if encoder.name != "clip_text":
        return encoder.run(inputs)
    normed: list[Tensor] = []

    def record(_: Any, __: Any, output: Tensor) -> None:
        normed.append(output)
        raise _Stop

    handle = encoder.model.get_submodule("final_layer_norm").register_forward_hook(record)
    try:
        with contextlib.suppress(_Stop):
            encoder.run(inputs)
    finally:
        handle.remove()
    return normed[0]


@pytest.mark.parametrize("layer", [0, 2])
def test_encoder_with_hidden_keys_is_the_encoder_on_the_other_tokens(encoder: EncoderCase, layer: int) -> None:
    """Positions enter before the first layer, so running the layers on fewer tokens is the same thing."""
    inputs, hidden = encoder.inputs(), some_hidden(encoder)
    masked = encoder.oracle(inputs, oracle.hide_from(layer, hidden, 4))
    handle = encoder.layers[layer].register_forward_pre_hook(
        lambda _, args: (torch.stack([row[keep] for row, keep in zip(args[0], ~hidden, strict=True)]), *args[1:])
    )
    try:
        short = _before_pooling(encoder, inputs)
    finally:
        handle.remove()
    dense = encoder.run(inputs)
    for row in range(2):
        torch.testing.assert_close(masked[row, ~hidden[row]], short[row], atol=1e-5, rtol=0)
        assert (masked[row] - dense[row])[~hidden[row]].abs().max() > 1e-2


def test_rows_of_an_encoder_batch_are_single_runs(encoder: EncoderCase) -> None:
    inputs, hidden = encoder.inputs(), some_hidden(encoder)
    together = encoder.oracle(inputs, oracle.hide_from(1, hidden, 4))
    for row in range(2):
        single = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = encoder.oracle(single, oracle.hide_from(1, hidden[row : row + 1], 4))
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)

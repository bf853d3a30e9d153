"""Generation with pruned models: images and rows, beams, chat turns, sampling, and caches that are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import tokcompile
from tests import oracle
from tests.members import members
from tests.pruning import RANDOM, TODRE, check, close, generate, hidden, optimized
from tests.zoo.vlm import TEXT_VOCAB, VLMS, Case, shallow
from tokcompile.capture.capture import from_dynamo
from tokcompile.capture.sizes import equal
from tokcompile.errors import CacheError, NarrowError
from tokcompile.rewrite.pruned_cache import LOGICAL, narrow_pruned_cache
from tokcompile.runtime.cache import PrunedLayer, adopt, append_held, note_held
from tokcompile.runtime.install import SESSION
from tokcompile.runtime.recording import Recording

#: One plain family, one whose positions have three parts, one with sliding layers.
FAMILIES = members(["llava", "qwen2_5_vl", "gemma3"], ["llava"])


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Keeps compiled code from test to test: the tests of a family share one optimized model."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=FAMILIES)
def shared(request: pytest.FixtureRequest) -> Iterator[tuple[Case, Any]]:
    torch._dynamo.reset()
    case = shallow(VLMS[request.param](), 3)  # the late cut of todre leaves one layer behind it
    yield case, optimized(case.model, TODRE)
    torch._dynamo.reset()


def runs(visual: Tensor) -> list[list[int]]:
    """Lengths of the runs of True in each row."""
    out: list[list[int]] = []
    for row in visual.tolist():
        lengths, before = [], False
        for flag in row:
            if flag and not before:
                lengths.append(0)
            if flag:
                lengths[-1] += 1
            before = flag
        out.append(lengths)
    return out


def kept_of_each_image(case: Case, inputs: dict[str, Tensor], indices: Tensor) -> list[list[int]]:
    visual = case.visual_mask(inputs)
    out = []
    for row, kept in enumerate(indices):
        number = (visual[row] & ~torch.nn.functional.pad(visual[row], (1, 0))[:-1]).cumsum(0)
        chosen = kept[kept >= 0]
        ids = number[chosen][visual[row][chosen]]
        out.append([int((ids == i + 1).sum()) for i in range(int(number.max()))])
    return out


# ------------------------------------------------------------------------------------------------ images and rows


@pytest.mark.slow
def test_several_images_keep_a_budget_each(shared: tuple[Case, Any]) -> None:
    case, model = shared
    inputs = case.inputs(batch=2, images_per_row=2, left_padding=3)
    recording = check(model, case, inputs)
    wanted = [[(n + 3) // 4 for n in row] for row in runs(case.visual_mask(inputs))]
    assert kept_of_each_image(case, inputs, recording.kept[0].indices) == wanted


def test_rows_with_unequal_images(shared: tuple[Case, Any]) -> None:
    """Rows keep different numbers of tokens: empty slots in front, hidden from every query."""
    case, model = shared
    inputs = case.inputs(batch=3, images_per_row=[1, 3, 2], sizes=list(range(min(case.n_sizes, 3))))
    recording = check(model, case, inputs)
    first, last = (entry.indices for entry in recording.kept)
    assert (first < 0).any()
    assert (last < 0).any()
    wanted = [[(n + 3) // 4 for n in row] for row in runs(case.visual_mask(inputs))]
    assert kept_of_each_image(case, inputs, first) == wanted
    for indices in (first, last):  # ascending, empty slots in front
        assert (indices.diff(dim=1) > 0).logical_or(indices[:, :-1] < 0).all()


def test_a_batch_equals_single_runs(shared: tuple[Case, Any]) -> None:
    case, model = shared
    inputs = case.inputs(batch=2, left_padding=3)
    both, _ = generate(model, inputs, 4)
    for row in range(2):
        single, _ = generate(model, case.row(inputs, row), 4)
        assert torch.equal(single.tokens[0], both.tokens[row])
        close([x[0] for x in single.logits], [x[row] for x in both.logits])


# ------------------------------------------------------------------------------------------------------- decoding


def test_beam_search(shared: tuple[Case, Any]) -> None:
    case, model = shared
    check(model, case, case.inputs(batch=2, left_padding=3), 5, num_beams=3)


@pytest.mark.parametrize("options", members([{"num_beams": 3}, {"do_sample": True, "top_k": 20}], [{"num_beams": 3}]))
def test_several_answers_to_rows_with_unequal_images(shared: tuple[Case, Any], options: dict[str, Any]) -> None:
    """Each prompt becomes several rows before the prefill or after it; each keeps what its prompt keeps."""
    case, model = shared
    inputs = case.inputs(batch=2, images_per_row=[2, 1])
    torch.manual_seed(5)
    found, recording = generate(model, inputs, 4, num_return_sequences=2, **options)
    dropped = hidden(recording, inputs["input_ids"].shape[1], len(case.decoder_layers))
    torch.manual_seed(5)
    wanted = oracle.masked_run(case, inputs, dropped, 4, num_return_sequences=2, **options)
    assert found.tokens.shape[0] == 4
    assert torch.equal(found.tokens, wanted.tokens)


def test_sampling_with_a_seed(shared: tuple[Case, Any]) -> None:
    case, model = shared
    inputs = case.inputs(batch=2, left_padding=3)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20}
    torch.manual_seed(5)
    found, recording = generate(model, inputs, 5, **options)
    dropped = hidden(recording, inputs["input_ids"].shape[1], len(case.decoder_layers))
    torch.manual_seed(5)
    wanted = oracle.masked_run(case, inputs, dropped, 5, **options)
    assert torch.equal(found.tokens, wanted.tokens)
    greedy, _ = generate(model, inputs, 5)
    assert not torch.equal(found.tokens, greedy.tokens)


def test_without_cache_equals_cached(shared: tuple[Case, Any]) -> None:
    case, model = shared
    inputs = case.inputs(batch=2, left_padding=3)
    cached, _ = generate(model, inputs, 4)
    plain, _ = generate(model, inputs, 4, use_cache=False)
    assert torch.equal(cached.tokens, plain.tokens)
    close(plain.logits, cached.logits)


def test_prompt_lookup_decoding(shared: tuple[Case, Any]) -> None:
    """Candidates are checked in one call of several tokens, and rejected ones are cropped from the cache."""
    case, model = shared
    inputs = case.inputs(batch=1)
    greedy, _ = generate(model, inputs, 8)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], greedy.tokens)


# ----------------------------------------------------------------------------------------------------- chat turns


def _turn(model: Any, inputs: dict[str, Tensor], cache: Any, steps: int) -> Any:
    with torch.no_grad():
        return model.generate(
            **inputs, past_key_values=cache, max_new_tokens=steps, return_dict_in_generate=True, output_logits=True
        )


def _second(case: Case, inputs: dict[str, Tensor], sequences: Tensor, more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of a second turn: the whole conversation as ids, only the new images."""
    ids = torch.cat([sequences, more["input_ids"]], 1)
    grown = ids.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(ids.shape[0], grown, dtype=torch.long)], 1)
    taken = {"input_ids": ids, "attention_mask": mask, **case.extra(ids, mask)}
    return {**{k: v for k, v in more.items() if k not in taken}, **taken}


def _conversation(case: Case, model: Any, more: dict[str, Tensor], steps: int = 3) -> list[Recording]:
    """Two turns on one cache, compared step by step with the dense model that hides what both turns dropped."""
    inputs = case.inputs(batch=2, left_padding=3)
    layers, length = len(case.decoder_layers), inputs["input_ids"].shape[1]
    with tokcompile.record(model) as first:
        one = _turn(model, inputs, None, steps)
    second = _second(case, inputs, one.sequences, more)
    past = one.past_key_values.get_seq_length()
    assert past == length + steps - 1  # the last token has not been read yet
    with tokcompile.record(model) as again:
        two = _turn(model, second, one.past_key_values, steps)

    dropped = hidden(first, length, layers)
    with oracle._masked(case, dropped):
        ref = _turn(case.model, inputs, None, steps)
        close(one.logits, ref.logits)
        assert torch.equal(one.sequences, ref.sequences)
        total = second["input_ids"].shape[1]
        later = hidden(again, total - past, layers)
        none = torch.zeros(2, total, dtype=torch.bool)
        for layer in range(layers):
            both = none.clone()
            both[:, :length] |= dropped.get(layer, none[:, :length])
            both[:, past:] |= later.get(layer, none[:, past:])
            dropped[layer] = both
        ref = _turn(case.model, second, ref.past_key_values, steps)
    close(two.logits, ref.logits)
    assert torch.equal(two.sequences, ref.sequences)
    return [first, again]


@pytest.mark.slow
def test_second_turn_of_text(shared: tuple[Case, Any]) -> None:
    case, model = shared
    first, again = _conversation(case, model, {"input_ids": torch.randint(3, TEXT_VOCAB, (2, 5))})
    assert len(first.kept) == 2
    assert not again.kept


def test_second_turn_with_an_image(shared: tuple[Case, Any]) -> None:
    case, model = shared
    if case.name == "qwen2_5_vl":
        pytest.skip(
            "transformers needs the sizes of all images but the pixels of the new one, so the dense model "
            "cannot do it either"
        )
    first, again = _conversation(case, model, case.inputs(batch=2, seed=7, text_len=6))
    assert len(first.kept) == len(again.kept) == 2
    assert (again.kept[0].indices >= 0).all()


@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_what_a_pruned_cache_holds_is_one_axis() -> None:
    """Dynamo may give the lengths of keys and values a symbol each, as it does for sliding layers."""
    torch._dynamo.reset()
    lengths: list[Any] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        captured = from_dynamo(module)
        past = [node.args[0] for node in captured.graph.nodes if node.target is LOGICAL]
        assert not equal(*(node.meta["val"].shape[2] for node in past))
        narrow_pruned_cache(captured)
        lengths.extend(node.meta["val"].shape[2] for node in past)
        return captured.graph_module

    def attend(query: Tensor, keys: Tensor, values: Tensor, held: Tensor) -> Tensor:
        keys, values = (torch.ops.tokcompile.logical(t, held, 9, False) for t in (keys, values))
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values)

    keys, values = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    for tensor in (keys, values):
        torch._dynamo.mark_dynamic(tensor, 2)
    held = torch.tensor([0, 2, 3, 5, 8]).expand(2, -1)
    torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)(torch.randn(2, 2, 1, 4), keys, values, held)
    assert equal(*lengths)


def test_a_refusal_in_a_later_graph_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    case = shallow(VLMS["llava"]())
    model = optimized(case.model, RANDOM)
    generate(model, case.inputs(batch=2), 2)
    ((_, method),) = getattr(model, SESSION).passes

    def refuse(*args: Any) -> None:
        raise NarrowError("tokens cannot leave here", node="here")

    monkeypatch.setattr(method, "apply", refuse)
    inputs = case.inputs(batch=3, text_len=9)
    with pytest.warns(UserWarning, match="not in another prefill graph of .*: tokens cannot leave here"):
        found, recording = generate(model, inputs, 2)
    assert not recording.kept
    close(found.logits, oracle.masked_run(case, inputs, {}, 2).logits)
    assert "tokens cannot leave here" in tokcompile.report(model).steps[0].reason
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------- direct calls


def test_direct_forward(shared: tuple[Case, Any]) -> None:
    """Logits come back for the tokens that are left after the last cut."""
    case, model = shared
    inputs = case.inputs(batch=2, left_padding=3)
    with torch.no_grad(), tokcompile.record(model) as recording:
        logits = model(**inputs).logits
    kept = recording.kept[-1].indices
    dropped = hidden(recording, inputs["input_ids"].shape[1], len(case.decoder_layers))
    wanted = oracle.masked_forward(case, inputs, dropped)
    real = inputs["attention_mask"].gather(1, kept).bool()  # padded positions mean nothing
    close(logits[real], wanted.gather(1, kept[..., None].expand(-1, -1, wanted.shape[-1]))[real])


@pytest.mark.parametrize("name", members(VLMS, ["qwen2_5_vl"]))
def test_a_direct_forward_that_keeps_everything_is_the_dense_one(name: str) -> None:
    """Images are encoded in front of the captured forward, which must not lose what positions are made of."""
    case = shallow(VLMS[name]())
    model = optimized(case.model, [{"pass": "random", "params": {"keep": 1.0, "seed": 0}}])
    inputs = case.inputs(batch=2, left_padding=3)
    with torch.no_grad():
        wanted, found = (getattr(out, "logits", out) for out in (case.model(**inputs), model(**inputs)))
    real = inputs["attention_mask"].bool()
    close(found[real], wanted[real])


@pytest.mark.slow
def test_a_loss_inside_the_graph_is_that_of_the_kept_tokens() -> None:
    case = shallow(VLMS["llava"]())
    torch.compiler.reset()  # sizes of earlier calls would make Dynamo's symbolic from the start
    model = optimized(case.model, RANDOM)
    for batch in (2, 3):  # static sizes, then symbolic ones, where labels have symbols of their own
        inputs = case.inputs(batch=batch, left_padding=batch)
        labels = inputs["input_ids"].masked_fill(case.visual_mask(inputs) | (inputs["attention_mask"] == 0), -100)
        with torch.no_grad(), tokcompile.record(model) as recording:
            output = model(**inputs, labels=labels)
        target = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].gather(1, recording.kept[-1].indices)
        assert torch.equal(
            output.loss, torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), target.flatten())
        )


# --------------------------------------------------------------------------------------------------------- caches


def _refused(cache: Any, steps: Any = RANDOM, **options: Any) -> str:
    case = shallow(VLMS["llava"]())
    inputs = case.inputs(batch=1)
    before = oracle.run(case, inputs, 3)
    model = optimized(case.model, steps)
    if cache is not None:
        options["past_key_values"] = cache(case.model.config.get_text_config())
    with tokcompile.record(model) as recording, pytest.raises(CacheError) as caught:
        generate(model, inputs, 3, **options)
    assert not recording.kept  # nothing was dropped, nothing was compiled
    assert not [stage for stage in tokcompile.report(model).stages if stage.name != "encoder"]
    after = oracle.run(case, inputs, 3)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
    return str(caught.value)


def _static(config: Any) -> StaticCache:
    return StaticCache(config=config, max_cache_len=64)


def _offloaded(config: Any) -> DynamicCache:
    return DynamicCache(config=config, offloading=True)


def _quantized(config: Any) -> DynamicCache:
    """A dynamic cache with layers of another kind, as a quantized cache has (its packages need not be installed)."""
    from transformers.cache_utils import DynamicLayer

    class PackedLayer(DynamicLayer):
        pass

    cache = DynamicCache(config=config)
    cache.layers = [PackedLayer() for _ in cache.layers]
    return cache


@pytest.mark.parametrize(
    ("cache", "options", "says"),
    members(
        [
            (None, {"cache_implementation": "static"}, "StaticCache .* default dynamic cache"),
            (_static, {}, "StaticCache .* default dynamic cache"),
            (_offloaded, {}, "offloaded cache .* default dynamic cache"),
            (_quantized, {}, "PackedLayer, which cannot hold fewer tokens; use a plain dynamic cache"),
        ],
        [
            (_static, {}, "StaticCache .* default dynamic cache"),
            (_quantized, {}, "PackedLayer, which cannot hold fewer tokens; use a plain dynamic cache"),
        ],
    ),
)
def test_caches_that_cannot_lose_tokens(cache: Any, options: dict[str, Any], says: str) -> None:
    import re

    assert re.search(says, _refused(cache, **options))


def _layers(count: int = 2, length: int = 6) -> tuple[DynamicCache, list[PrunedLayer]]:
    cache = DynamicCache()
    for layer in range(count):
        keys = torch.arange(2 * length, dtype=torch.float).view(2, 1, length, 1)
        cache.update(keys, keys + 100, layer)
    adopt(cache)
    return cache, cache.layers  # type: ignore[return-value]


def test_adopting_a_filled_cache_keeps_what_it_holds() -> None:
    cache, layers = _layers()
    assert all(isinstance(layer, PrunedLayer) for layer in layers)
    assert cache.get_seq_length() == 6
    assert torch.equal(layers[1].keys[0, 0, :, 0], torch.arange(6.0))


def test_a_cache_counts_unpruned_tokens() -> None:
    cache, layers = _layers(length=4)
    positions = torch.tensor([[0, 2, 5, 7], [-1, 1, 6, 7]])
    note_held(layers, [positions, positions], 8)
    assert layers[0].held is layers[1].held
    assert layers[0].held.ragged
    assert cache.get_seq_length() == 8
    append_held(layers, 2)
    assert cache.get_seq_length() == 10
    assert layers[0].held.positions.tolist() == [[0, 2, 5, 7, 8, 9], [-1, 1, 6, 7, 8, 9]]


def test_positions_move_with_the_rows() -> None:
    cache, layers = _layers(length=4)
    note_held(layers, [torch.tensor([[0, 2, 5, 7], [1, 2, 6, 7]])] * 2, 8)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert layers[0].held.positions.tolist() == [[1, 2, 6, 7]] * 2
    cache.batch_repeat_interleave(2)
    assert layers[0].held.positions.shape == (4, 4)
    cache.batch_select_indices(torch.tensor([0]))
    assert layers[1].held.positions.tolist() == [[1, 2, 6, 7]]


def test_crop() -> None:
    cache, layers = _layers(length=4)
    note_held(layers, [torch.tensor([[0, 2, 6, 7], [1, 2, 6, 7]])] * 2, 8)
    cache.crop(-2)
    assert cache.get_seq_length() == 6
    assert layers[0].held.positions.tolist() == [[0, 2], [1, 2]]
    assert layers[1].keys.shape[-2] == 2
    with pytest.raises(CacheError, match=r"cannot crop 2 tokens: some of them were pruned; start from a fresh cache"):
        cache.crop(-2)
    assert layers[0].keys.shape[-2] == 2  # refused before anything changed

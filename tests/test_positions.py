"""``positions: compact``: a pruned prompt is a shorter prompt. The oracle is the dense language model that reads the
embeddings of the kept tokens alone, row by row, at the positions 0, 1, 2, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokcompile
from tests import oracle
from tests.members import members
from tests.pruning import close, generate, optimized
from tests.zoo import vlm as zoo
from tests.zoo.vlm import IMAGE, VIDEO, VLMS, Case, PlainVLM, randomize, shallow
from tokcompile.errors import CacheError, NoMatchError
from tokcompile.rewrite.selection import budgets, pooled, segments
from tokcompile.runtime.recording import Recording


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """Keeps compiled code from test to test: most of them share one optimized model."""
    torch.manual_seed(0)


def step(name: str = "random", **params: Any) -> list[dict[str, Any]]:
    return [{"pass": name, "params": {"keep": 0.25, "positions": "compact", **params}}]


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Case, Any]]:
    """A small LLaVA, and the same with a quarter of its visual tokens."""
    torch._dynamo.reset()
    case = shallow(VLMS["llava"]())
    yield case, optimized(case.model, step())
    torch._dynamo.reset()


def embeddings(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """``[B, S, D]``: what the dense model's layers read."""
    seen: list[Tensor] = []
    handle = case.text_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        case.model(**inputs, use_cache=False)
    handle.remove()
    return seen[0]


def shortened(case: Case, embedded: Tensor, tokens: Tensor, hidden: oracle.Dropped) -> list[Tensor]:
    """Logits ``[V]`` of each step of the dense language model on one row ``[1, n, D]`` and the tokens that follow."""
    tower: Any = case.text_tower
    logits, cache = [], None
    with torch.no_grad(), oracle.hidden_keys(case.decoder_layers, hidden, [case.model.config.get_text_config()]):  # type: ignore[union-attr, arg-type]
        start, read = 0, embedded
        for token in tokens.tolist():
            positions = torch.arange(start, start + read.shape[1])[None]
            out = tower(inputs_embeds=read, position_ids=positions, past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + read.shape[1]
            logits.append(case.model.lm_head(out.last_hidden_state)[0, -1])  # type: ignore[operator, union-attr]
            read = tower.get_input_embeddings()(torch.tensor([[token]]))
    return logits


def equals_shortened(
    case: Case, inputs: dict[str, Tensor], found: oracle.Run, recording: Recording, pool: bool = False
) -> None:
    """Every row and step of ``found`` equals the dense language model on what the row kept, and nothing else."""
    embedded, alive = embeddings(case, inputs), inputs["attention_mask"].bool()
    if pool:
        segment = segments(case.visual_mask(inputs))
        embedded = pooled(embedded, segment, budgets(segment, 1, 4))[0]
    first, *later = recording.kept
    layers = len(case.decoder_layers)
    for row in range(alive.shape[0]):
        kept = [i for i in first.indices[row].tolist() if i >= 0 and alive[row, i]]
        hidden: oracle.Dropped = {}
        for entry in later:
            left = set(entry.indices[row].tolist())
            hidden |= oracle.hide_from(entry.layer, torch.tensor([[i not in left for i in kept]]), layers)
        wanted = shortened(case, embedded[row : row + 1, kept], found.tokens[row], hidden)
        close([step[row] for step in found.logits], wanted)


def check(
    case: Case,
    steps: list[dict[str, Any]],
    inputs: dict[str, Tensor],
    max_new_tokens: int = 6,
    model: Any = None,
    **kwargs: Any,
) -> Recording:
    model = model or optimized(case.model, steps)
    found, recording = generate(model, inputs, max_new_tokens, **kwargs)
    equals_shortened(case, inputs, found, recording, pool=bool(steps) and steps[0]["pass"] == "pool")
    return recording


# ------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize(
    "name",
    members(["llava", "llava_next", "llava_onevision", "internvl", "smolvlm"], ["llava"]),
)
def test_equals_the_dense_model_on_fewer_embeddings(name: str) -> None:
    """Rows of different length, one of them with padding in front."""
    case = shallow(VLMS[name]())
    inputs = case.inputs(batch=2, left_padding=3)
    recording = check(case, step(), inputs)
    assert recording.kept[0].indices.shape[1] < inputs["input_ids"].shape[1] - 8


@pytest.mark.parametrize(
    ("name", "params", "attention"),
    members(
        [
            ("todre", {"criterion": "herding", "drop_layer": 1}, "sdpa"),
            ("todre", {"drop_layer": 1}, "eager"),
            ("vtc_cls", {}, "sdpa"),
            ("pool", {}, "sdpa"),
        ],
        [("todre", {"drop_layer": 1}, "eager"), ("vtc_cls", {}, "sdpa"), ("pool", {}, "sdpa")],
    ),
)
def test_each_pass(name: str, params: dict[str, Any], attention: str) -> None:
    """The late drop of todre hides keys in the last layers; it leaves positions as the first cut made them."""
    case = shallow(VLMS["llava"](attention), 3)  # type: ignore[call-arg]
    recording = check(case, step(name, **params), case.inputs(batch=2, left_padding=3))
    assert len(recording.kept) == (2 if params.get("drop_layer") else 1)


def test_rows_with_unequal_images_and_a_row_of_text(shared: tuple[Case, Any]) -> None:
    """A row without an image is not moved at all."""
    case, model = shared
    inputs = case.inputs(batch=3, images_per_row=[1, 2, 0])
    recording = check(case, [], inputs, model=model)
    assert (recording.kept[0].indices[2] >= 0).sum() > inputs["attention_mask"][2].sum()  # its padding too is kept


def test_keeping_everything_is_the_dense_model() -> None:
    case = shallow(VLMS["llava"]())
    inputs = case.inputs(batch=2, left_padding=3)
    found, _ = generate(optimized(case.model, step(keep=1.0)), inputs, 6)
    wanted = oracle.run(case, inputs, 6)
    assert torch.equal(found.logits[0], wanted.logits[0])  # the prefill, bit for bit
    close(found.logits, wanted.logits)
    assert torch.equal(found.tokens, wanted.tokens)


@pytest.mark.slow
def test_a_batch_equals_single_runs_and_is_not_keep(shared: tuple[Case, Any]) -> None:
    case, model = shared
    inputs = case.inputs(batch=2, left_padding=3)
    both, _ = generate(model, inputs, 4)
    for row in range(2):
        single, _ = generate(model, case.row(inputs, row), 4)
        close([x[0] for x in single.logits], [x[row] for x in both.logits])
    kept, _ = generate(optimized(case.model, step(positions="keep")), inputs, 1)
    assert (kept.logits[0] - both.logits[0]).abs().max() > 0.1


@pytest.mark.slow
def test_without_a_cache_and_with_beams(shared: tuple[Case, Any]) -> None:
    case, model = shared
    inputs = case.inputs(batch=2, left_padding=3)
    cached, _ = generate(model, inputs, 4)
    plain, _ = generate(model, inputs, 4, use_cache=False)
    close(plain.logits, cached.logits)
    with torch.no_grad():
        beams = model.generate(**inputs, max_new_tokens=4, num_beams=3)
        again = model.generate(**inputs, max_new_tokens=4, num_beams=3, use_cache=False)
    assert torch.equal(beams, again)


def test_a_direct_forward_without_positions(shared: tuple[Case, Any]) -> None:
    """Positions are then a row that all rows share."""
    case, model = shared
    for batch in (1, 2):
        inputs = case.inputs(batch=batch)
        with torch.no_grad(), tokcompile.record(model) as recording:
            logits = model(**inputs).logits[:, -1]
        equals_shortened(case, inputs, oracle.Run([logits], logits.argmax(-1, keepdim=True)), recording)


def test_a_second_turn_of_text(shared: tuple[Case, Any]) -> None:
    """It continues from the last position, as if the first prompt had been the shorter one."""
    case, model = shared
    inputs = case.inputs(batch=1)
    with torch.no_grad(), tokcompile.record(model) as recording:
        one = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
        more = torch.cat([one.sequences, torch.tensor([[11, 12, 13, 14]])], 1)
        two = model.generate(
            input_ids=more,
            past_key_values=one.past_key_values,
            max_new_tokens=3,
            return_dict_in_generate=True,
            output_logits=True,
        )
    length = inputs["input_ids"].shape[1]
    said = two.sequences[0, length:]
    kept = recording.kept[0].indices[0]
    wanted = shortened(case, embeddings(case, inputs)[:, kept], said, {})
    close([x[0] for x in two.logits], wanted[-3:])


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("qwen2_5_vl", "positions with 4 axes"),
        ("gemma3", "window of 512 tokens"),
        ("paligemma", "mask that is more than causal"),
    ],
)
def test_models_that_cannot_be_moved(name: str, says: str) -> None:
    case = shallow(VLMS[name]())
    inputs = case.inputs(batch=1)
    before = oracle.run(case, inputs, 2)
    model = optimized(case.model, step())
    with pytest.raises(NoMatchError, match=f"{says}.*positions: keep"):
        generate(model, inputs, 2)
    after = oracle.run(case, inputs, 2)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


def test_an_image_in_a_later_turn_is_refused(shared: tuple[Case, Any]) -> None:
    case, model = shared
    inputs = case.inputs(batch=1)
    with torch.no_grad():
        one = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
        held = one.past_key_values.layers[0].keys.clone()
        more = case.inputs(batch=1, seed=7)
        more["input_ids"] = torch.cat([one.sequences, more["input_ids"]], 1)
        del more["attention_mask"]
        with pytest.raises(CacheError, match=r"an image after tokens that are in the cache.*positions: keep"):
            model.generate(**more, past_key_values=one.past_key_values, max_new_tokens=2)
    assert torch.equal(one.past_key_values.layers[0].keys, held)


class Causal(nn.Module):
    """A model written by hand, with positions that all rows share; ``form`` says how they enter."""

    def __init__(self, form: str = "computed") -> None:
        super().__init__()
        self.vlm, self.form = PlainVLM("index_put", layers=2), form
        self.learned = nn.Embedding(64, 64)
        angles = torch.arange(64)[:, None] * self.vlm.inv_freq
        self.register_buffer("table", torch.cat([angles, angles], dim=-1), persistent=False)

    def embed(self, input_ids: Tensor, pixel_values: Tensor, pixel_values_videos: Tensor) -> Tensor:
        x = self.vlm.embed(input_ids)
        for token, pixels in ((IMAGE, pixel_values), (VIDEO, pixel_values_videos)):
            x = x.masked_scatter((input_ids == token)[..., None].expand_as(x), self.vlm.encode(pixels).flatten(0, 1))
        return x  # type: ignore[no-any-return]

    def decode(self, x: Tensor) -> Tensor:
        position_ids = torch.arange(x.shape[1])[None]
        if self.form == "learned":
            x = x + self.learned(position_ids)
        if self.form == "halved":
            position_ids = position_ids // 2
        angles = position_ids[:, None, :, None] * self.vlm.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        if self.form == "table":
            angles = self.table[position_ids][:, None]  # type: ignore[index]
        if self.form == "squared":
            angles = angles * angles
        cos, sin = angles.cos(), angles.sin()
        if self.form == "scaled":
            cos, sin = (f * position_ids[:, None, :, None].float().exp() for f in (cos, sin))
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
        for layer in self.vlm.layers:
            x = layer(x, cos, sin, allowed)
        return self.vlm.head(self.vlm.norm(x))  # type: ignore[no-any-return]

    def forward(self, input_ids: Tensor, pixel_values: Tensor, pixel_values_videos: Tensor) -> Tensor:
        return self.decode(self.embed(input_ids, pixel_values, pixel_values_videos))


def image_and_video() -> dict[str, Tensor]:
    row = [*[IMAGE] * 16, 7, 8, *[VIDEO] * 16, 9, 10]
    return {
        "input_ids": torch.tensor([row, row]),
        "pixel_values": torch.randn(2, 3, 32, 32),
        "pixel_values_videos": torch.randn(2, 3, 32, 32),
    }


def test_image_and_video_in_one_prompt() -> None:
    """What enters last loses tokens, as with ``positions: keep``."""
    model: Any = randomize(Causal())
    inputs = image_and_video()
    pruned = optimized(model, step(keep=5))
    with torch.no_grad(), tokcompile.record(pruned) as recording:
        found = pruned(**inputs)
        embedded = model.embed(**inputs)
        [entry] = recording.kept
        close(found, model.decode(embedded.gather(1, entry.indices[..., None].expand(-1, -1, embedded.shape[2]))))
    assert found.shape[1] == 36 - 11


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ("learned", "embedding is computed from positions"),
        ("table", "index is computed from positions"),
        ("squared", "mul is computed from positions"),
        ("scaled", "exp is computed from positions"),
        ("halved", "floor_divide makes these positions"),
        ("unrotated", "in rotary embeddings only, and none is recognised"),
    ],
)
def test_other_ways_in_which_positions_enter_are_refused(form: str, says: str, monkeypatch: Any) -> None:
    if form == "unrotated":
        monkeypatch.setattr(zoo, "_rotate", lambda x, cos, sin: x)
    model, inputs = randomize(Causal(form)), image_and_video()
    with torch.no_grad():
        wanted = model(**inputs)
        with pytest.raises(NoMatchError, match=f"{says}.*positions: keep"):
            optimized(model, [{**step()[0], "target": {"modality": "video"}}], inputs=inputs)
        assert torch.equal(model(**inputs), wanted)


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor() -> None:
    """The moved positions are chosen in front of the graph, together with the tokens."""
    case = shallow(VLMS["llava"](), 3)
    check(
        case,
        [],
        case.inputs(batch=2, left_padding=3),
        4,
        optimized(case.model, step("todre", drop_layer=1), lowering="inductor"),
    )

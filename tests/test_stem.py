"""STEM: tables that hold the exact up-projections equal the dense layer; what has no row stays dense; editing rows."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokcompile
from tests import oracle, pruning
from tests.members import members
from tests.zoo import decoders, vlm
from tests.zoo.vision import vit
from tokcompile.errors import CalibrationError, NoMatchError, RecipeError, TokcompileError
from tokcompile.kernels.embedding_gate import rows as rows_of
from tokcompile.passes.stem.stem import Stem

VOCABULARY = 128


class Gated(nn.Module):
    """A hand-written causal transformer; up and gate are one linear, the gate is the second half."""

    class Layer(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.wide, self.narrow = nn.Linear(width, 192), nn.Linear(96, width)
            self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(self.one(x)).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            up, gate = self.wide(self.two(x)).chunk(2, dim=-1)
            return x + self.narrow(up * F.gelu(gate))

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(self.Layer(width, 4) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def gated():
    torch.manual_seed(0)
    return Gated().eval(), {"input_ids": decoders.text()["input_ids"]}


FAMILIES: dict[str, Callable] = {
    "llama": decoders.llama,
    "qwen3": decoders.qwen3,
    "gemma2": decoders.gemma2,
    "phi3": decoders.phi3,
    "hand_written": gated,
}
OUTPUTS = ("o_proj", "out")


def without_mixing(model: nn.Module) -> nn.Module:
    """Attention adds nothing: the up-projection of a token is a function of its id alone."""
    for name, module in model.named_modules():
        if name.endswith(OUTPUTS) and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def recipe(target: dict | None = None, **params) -> dict:
    params = {"held_out": 0, "shrinkage": 0.0, "dense_first": 0} | params
    return {
        "recipe_version": 1,
        "description": "test",
        "steps": [{"pass": "stem", "target": target or {}, "params": params}],
    }


def output(model: nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result.logits


def tables(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    state = model.tokcompile
    return {key: state.tensors("stem", key) for key in state.keys("stem")}


@contextlib.contextmanager
def looked_up(
    model: nn.Module, state: dict[str, dict[str, Tensor]], ids: Tensor, fallback: str = "dense"
) -> Iterator[None]:
    """The oracle: within the context the linears of up-projections give rows of the tables, by token id.

    Args:
        ids: [B, S], -1 where the token has no id.
    """
    hooks = []
    for path, tensors in state.items():
        if not tensors:
            continue
        layer = model.get_submodule(path)
        name, start = (
            ("up_proj", 0)
            if hasattr(layer, "up_proj")
            else ("gate_up_proj", 96)
            if hasattr(layer, "gate_up_proj")
            else ("wide", 0)
        )

        def replace(_module, _args, value: Tensor, start=start, tensors=tensors) -> Tensor:
            place = rows_of(ids, len(tensors["table"]), tensors["remap"])
            width = tensors["table"].shape[1]
            up = value[..., start : start + width]
            other = torch.where((ids < 0).unsqueeze(-1), up, tensors["mean"]) if fallback == "mean" else up
            found = torch.where((place >= 0).unsqueeze(-1), tensors["table"][place.clamp(min=0)], other)
            return torch.cat([value[..., :start], found, value[..., start + width :]], -1)

        hooks.append(layer.get_submodule(name).register_forward_hook(replace))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def close(one: Tensor, other: Tensor, limit: float = 1e-5) -> None:
    error = float((one.double() - other.double()).norm() / other.double().norm())
    assert error <= limit, error


@pytest.mark.parametrize("family", members(FAMILIES, ["llama", "phi3", "hand_written"]))
def test_a_table_with_the_exact_rows_equals_the_dense_layer(family):
    dense, inputs = FAMILIES[family]()
    without_mixing(dense)
    optimized = tokcompile.optimize(dense, recipe(), calibration=[inputs], lowering="eager", inputs=inputs)
    step = tokcompile.report(optimized).steps[0]
    assert step.status == "matched"
    assert step.matches == 2
    assert all(len(t["table"]) == len(inputs["input_ids"].unique()) for t in tables(optimized).values())
    close(output(optimized, inputs), output(dense, inputs))
    with torch.no_grad():  # and it is the tables that the result comes from
        for tensors in tables(optimized).values():
            tensors["table"].add_(1.0)
    assert not torch.allclose(output(optimized, inputs), output(dense, inputs), atol=1e-3)


@pytest.mark.parametrize(
    ("family", "fallback"),
    members(itertools.product(FAMILIES, ["dense", "mean"]), [("gemma2", "mean"), ("hand_written", "dense")]),
)
def test_rows_are_read_by_id_and_what_has_none_falls_back(family, fallback):
    dense, inputs = FAMILIES[family]()
    seen = (
        inputs
        | {"input_ids": inputs["input_ids"][:, :5]}
        | ({"attention_mask": inputs["attention_mask"][:, :5]} if "attention_mask" in inputs else {})
    )
    optimized = tokcompile.optimize(dense, recipe(fallback=fallback), calibration=[seen], lowering="eager")
    mixed = inputs | {"input_ids": inputs["input_ids"].roll(2, 1)}  # rows out of order, ids without a row between them
    mixed["input_ids"][1, 3:6] = mixed["input_ids"][1, 2]  # and duplicates
    with looked_up(dense, tables(optimized), mixed["input_ids"], fallback):
        expected = output(dense, mixed)
    close(output(optimized, mixed), expected)
    assert not torch.allclose(expected, output(dense, mixed), atol=1e-4)


def test_unseen_ids_leave_a_dense_model():
    dense, inputs = decoders.llama()
    optimized = tokcompile.optimize(dense, recipe(), calibration=[inputs], lowering="eager")
    other = inputs | {"input_ids": inputs["input_ids"] + 50}
    torch.testing.assert_close(output(optimized, other), output(dense, other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", members(["llava", "gemma3"], ["llava"]))
def test_visual_positions_stay_dense(name):
    case = vlm.shallow(vlm.VLMS[name]())
    inputs = case.inputs(batch=2, left_padding=3)
    optimized = tokcompile.optimize(
        case.model, recipe({"path": "*language_model*"}), calibration=[inputs], lowering="eager"
    )
    ids = torch.where(case.visual_mask(inputs), -1, inputs["input_ids"])
    for tensors in tables(optimized).values():
        assert int(tensors["remap"][vlm.IMAGE]) == -1
    with looked_up(case.model, tables(optimized), ids):
        expected = output(case.model, inputs)
    real = inputs["attention_mask"].bool()
    close(output(optimized, inputs)[real], expected[real])


@pytest.mark.parametrize("dense_first", members([0, 1], [1]))
def test_ids_and_first_tokens_follow_what_a_pruning_step_keeps(dense_first):
    case = vlm.shallow(vlm.VLMS["llava"]())
    inputs = case.inputs(batch=2, left_padding=3)
    both = recipe({"path": "*language_model*"}, dense_first=dense_first)
    both["steps"].insert(0, {"pass": "random", "params": {"keep": 0.25}})
    optimized = tokcompile.optimize(case.model, both, calibration=[inputs], lowering="eager", inputs=inputs)
    assert [s.status for s in tokcompile.report(optimized).steps] == ["matched", "matched"]
    with tokcompile.record(optimized) as recording:
        found = output(optimized, inputs)
    kept = recording.kept[-1].indices
    dropped = pruning.hidden(recording, inputs["input_ids"].shape[1], len(case.decoder_layers))
    left = torch.zeros_like(inputs["attention_mask"]).scatter_(1, kept.clamp(min=0), (kept >= 0).long())
    ids = without_first(
        torch.where(case.visual_mask(inputs), -1, inputs["input_ids"]), left * inputs["attention_mask"], dense_first
    )
    with looked_up(case.model, tables(optimized), ids):
        expected = oracle.masked_forward(case, inputs, dropped)
    real = (kept >= 0) & inputs["attention_mask"].bool().gather(1, kept.clamp(min=0))
    rows = torch.arange(2)[:, None].expand_as(kept)
    assert found.shape[1] == kept.shape[1] < inputs["input_ids"].shape[1]
    close(found[real], expected[rows[real], kept[real]])
    # and decode steps read the rows of the tokens that they generate
    tokens = optimized.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 4


def test_cached_decoding_equals_one_forward_and_a_batch_equals_its_rows():
    dense, inputs = decoders.llama()
    inputs = {"input_ids": inputs["input_ids"]}
    optimized = tokcompile.optimize(dense, recipe(), calibration=[inputs], lowering="eager")
    whole = output(optimized, inputs | {"use_cache": False})
    for row in range(2):
        one = {"input_ids": inputs["input_ids"][row : row + 1], "use_cache": False}
        close(output(optimized, one), whole[row : row + 1])
    with torch.no_grad():
        out = optimized(inputs["input_ids"][:, :6], use_cache=True)
        for place in range(6, 9):
            out = optimized(input_ids=inputs["input_ids"][:, place : place + 1], past_key_values=out.past_key_values)
            close(out.logits[:, -1], whole[:, place])


def test_bf16_equals_fp32_to_its_rounding():
    dense, inputs = decoders.llama()
    without_mixing(dense)
    expected = output(dense, inputs)
    optimized = tokcompile.optimize(dense.bfloat16(), recipe(), calibration=[inputs], lowering="eager")
    # 2 layers; each product is rounded to 8 bits of mantissa (2 ** -9 relative), dense bf16 differs as much
    close(output(optimized, inputs), expected, 1.5e-2)
    close(output(dense, inputs), expected, 1.5e-2)


# .. the first tokens


def without_first(ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """``ids`` with -1 at the first ``count`` tokens of each row that are no padding, one by one."""
    ids = ids.clone()
    for row in range(ids.shape[0]):
        left = count
        for place in range(ids.shape[1]):
            if mask[row, place] and left > 0:
                ids[row, place] = -1
                left -= 1
    return ids


@pytest.mark.parametrize(
    ("family", "count", "fallback"),
    members(
        itertools.product(FAMILIES, [1, 3], ["dense", "mean"]),
        [("llama", 1, "dense"), ("phi3", 3, "mean"), ("hand_written", 1, "mean")],
    ),
)
def test_the_first_visible_tokens_stay_dense(family, count, fallback):
    dense, inputs = FAMILIES[family]()
    mask = torch.ones_like(inputs["input_ids"])
    if "attention_mask" in inputs:
        mask[0, :4] = 0
        inputs = inputs | {"attention_mask": mask}
    optimized = tokcompile.optimize(
        dense, recipe(dense_first=count, fallback=fallback), calibration=[inputs], lowering="eager"
    )
    assert output(optimized, inputs).shape == output(dense, inputs).shape
    assert tokcompile.report(optimized).steps[0].details["dense_first"] == count
    other = inputs | {"input_ids": inputs["input_ids"].roll(1, 1)}  # ids that have rows come first
    ids = without_first(other["input_ids"], mask, count)
    with looked_up(dense, tables(optimized), ids, fallback):
        expected = output(dense, other)
    assert all(int(t["remap"][other["input_ids"][1, 0]]) >= 0 for t in tables(optimized).values())
    with looked_up(dense, tables(optimized), other["input_ids"], fallback):
        assert not torch.allclose(output(dense, other)[mask.bool()], expected[mask.bool()], atol=1e-4)
    close(output(optimized, other)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize(
    ("length", "padding", "cache"),
    members(
        [(*prompt, cache) for prompt in [(3, 2), (1, 0)] for cache in ["dynamic", "static"]],
        [(3, 2, "dynamic")],
    ),
)
def test_decode_steps_know_how_many_tokens_came_before(length, padding, cache):
    """With one visible token in a prompt of row 0 and three in that of row 1, its first step is a second token."""
    from transformers import StaticCache

    dense, inputs = decoders.llama()
    optimized = tokcompile.optimize(dense, recipe(dense_first=2), calibration=[inputs], lowering="eager")
    ids = inputs["input_ids"].roll(3, 1)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with looked_up(dense, tables(optimized), without_first(ids, mask, 2)):
        expected = output(dense, {"input_ids": ids, "attention_mask": mask, "position_ids": places})
    past = StaticCache(dense.config, max_cache_len=12) if cache == "static" else None
    with torch.no_grad():
        for start, stop in [(0, length), *((i, i + 1) for i in range(length, 9))]:
            out = optimized(
                input_ids=ids[:, start:stop],
                attention_mask=mask[:, :stop],
                past_key_values=past,
                position_ids=places[:, start:stop],
                use_cache=True,
            )
            past = out.past_key_values
            real = mask[:, start:stop].bool()
            close(out.logits[real], expected[:, start:stop][real])


def test_every_text_in_a_row_has_a_first_token():
    dense, inputs = decoders.llama()
    optimized = tokcompile.optimize(dense, recipe(dense_first=1), calibration=[inputs], lowering="eager")
    ids = inputs["input_ids"][:1].roll(3, 1)
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "use_cache": False}
    marked = ids.clone()
    marked[0, [0, 4]] = -1
    with looked_up(dense, tables(optimized), marked):
        expected = output(dense, packed)
    close(output(optimized, packed), expected)


def test_without_an_order_of_tokens_none_is_first():
    class Both(Gated):
        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for layer in self.layers:
                q, k, v = layer.mix(layer.one(x)).view(*x.shape[:2], 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
                x = x + layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
                up, gate = layer.wide(layer.two(x)).chunk(2, dim=-1)
                x = x + layer.narrow(up * F.gelu(gate))
            return self.head(x)

    dense, inputs = Both().eval(), {"input_ids": decoders.text()["input_ids"]}
    with pytest.raises(CalibrationError, match=r"see later ones too.*dense_first: 0"):
        tokcompile.optimize(dense, recipe(dense_first=1), calibration=[inputs])
    assert not hasattr(dense, "tokcompile")
    tokcompile.optimize(dense, recipe(dense_first=0), calibration=[inputs], lowering="eager", inputs=inputs)


@pytest.mark.parametrize("attention", members(["sdpa", "eager"], ["sdpa"]))
def test_dropout_in_training_does_not_hide_which_token_is_first(attention):
    dense, inputs = decoders.llama()
    dense.set_attn_implementation(attention)
    inputs["attention_mask"][0, :3] = 0
    optimized = tokcompile.optimize(dense, recipe(dense_first=1), calibration=[inputs], lowering="eager")
    expected = output(optimized, inputs)
    for layer in optimized.model.layers:
        layer.self_attn.attention_dropout = 1e-9  # drops nothing, but the graph cannot know
    close(output(optimized.train(), inputs)[inputs["attention_mask"].bool()], expected[inputs["attention_mask"].bool()])
    assert tokcompile.report(optimized).steps[0].matches == 2


def test_the_first_token_is_dense_by_default():
    assert Stem.Params().dense_first == 1


@pytest.mark.inductor
def test_inductor_computes_the_same():
    dense, inputs = decoders.llama()
    state = tokcompile.calibrate(dense, recipe(), [inputs])
    eager, compiled = (
        tokcompile.optimize(dense, recipe(), calibration=state, lowering=how) for how in ("eager", "inductor")
    )
    other = inputs | {"input_ids": inputs["input_ids"] + 5}
    close(output(compiled, other), output(eager, other))


def test_the_layers_that_the_tables_explain_best_are_converted():
    dense, inputs = decoders.llama(4)
    nn.init.zeros_(dense.model.layers[0].self_attn.o_proj.weight)  # the first layer depends on the id alone
    data = [{"input_ids": inputs["input_ids"].roll(shift, 1)} for shift in range(6)]
    optimized = tokcompile.optimize(
        dense, recipe(convert=1, held_out=3), calibration=data, lowering="eager", inputs=inputs
    )
    step = tokcompile.report(optimized).steps[0]
    assert step.regions == ["model.layers.0.mlp"]
    assert step.details["explained"] > 0.999
    assert "not among the 1 layers" in step.reason


def test_gradients_reach_the_tables():
    dense, inputs = decoders.llama()
    optimized = tokcompile.optimize(dense, recipe(), calibration=[inputs], lowering="eager")
    optimized(**inputs).logits.square().mean().backward()
    used = inputs["input_ids"].unique()
    for tensors in tables(optimized).values():
        norms = tensors["table"].grad.norm(dim=-1)
        assert bool((norms[tensors["remap"][used].long()] > 0).all())
    assert "tokcompile.stem.model.layers.0.mlp.table" in optimized.state_dict()


# .. editing


def test_an_edited_token_reads_the_rows_of_another_one_and_can_be_restored():
    dense, inputs = decoders.llama()
    optimized = tokcompile.optimize(dense, recipe(), calibration=[inputs], lowering="eager", inputs=inputs)
    one, other = (int(t) for t in inputs["input_ids"][0, [2, 5]])
    before = output(optimized, inputs)
    made = tokcompile.stem.edit(optimized, one, like=other)
    assert {c.layer for c in made.changes} == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert all(c.token == one and c.before != c.after for c in made.changes)
    after = output(optimized, inputs)
    assert torch.equal(after[0, :2], before[0, :2])  # causal: what stands in front of the token
    assert torch.equal(after[1], before[1])  # and the other sequence
    assert not torch.allclose(after[0, 2], before[0, 2], atol=1e-4)
    ids = inputs["input_ids"].clone()
    ids[ids == one] = other
    with looked_up(dense, tables(optimized), ids):
        close(after, output(dense, inputs))
    made.restore()
    assert torch.equal(output(optimized, inputs), before)
    with tokcompile.stem.edit(optimized, [one, other], like=[other, one]):
        assert not torch.equal(output(optimized, inputs), before)
    assert torch.equal(output(optimized, inputs), before)


def test_bad_edits():
    dense, inputs = decoders.llama()
    with pytest.raises(TokcompileError, match="no tables"):
        tokcompile.stem.edit(dense, 1, like=2)
    optimized = tokcompile.optimize(dense, recipe(), calibration=[inputs], lowering="eager")
    before = {k: v.clone() for k, v in optimized.state_dict().items()}
    for token, like, message in [
        (4, 5000, "no token id"),
        (4, 127, "has no row"),
        ([4, 5], [6], "2 tokens and 1"),
        ([], 4, "0 tokens"),
    ]:
        with pytest.raises(TokcompileError, match=message):
            tokcompile.stem.edit(optimized, token, like=like)
    assert all(torch.equal(v, before[k]) for k, v in optimized.state_dict().items())


# .. bad input


def test_plain_layers_are_refused():
    dense, inputs = decoders.gpt2()
    with pytest.raises(CalibrationError, match=r"plain feed-forward.*moe_from_dense"):
        tokcompile.optimize(dense, recipe(), calibration=[inputs])
    assert not hasattr(dense, "tokcompile")


def test_layers_without_ids_are_refused():
    dense, inputs = vit()
    with pytest.raises(CalibrationError, match="plain feed-forward"):
        tokcompile.optimize(dense, recipe(), calibration=[inputs])
    dense, inputs = decoders.llama()
    embeds = {"inputs_embeds": dense.get_input_embeddings()(inputs["input_ids"]).detach()}
    with pytest.raises(CalibrationError, match="no input_ids in the graph"):
        tokcompile.optimize(dense, recipe(), calibration=[embeds])
    optimized = tokcompile.optimize(dense, recipe(), calibration=[inputs], lowering="eager")
    with pytest.raises(NoMatchError, match="no input_ids in the graph"):
        output(optimized, embeds)


def test_a_state_for_another_vocabulary_is_refused():
    dense, inputs = decoders.llama()
    state = tokcompile.calibrate(dense, recipe(), [inputs])
    dense.resize_token_embeddings(VOCABULARY + 8)
    optimized = tokcompile.optimize(dense, recipe(), calibration=state, lowering="eager")
    with pytest.raises(NoMatchError, match=r"vocabulary mismatch: .* 128 ids .* 136"):
        output(optimized, inputs)


@pytest.mark.parametrize(
    "params",
    [
        {"convert": 0},
        {"convert": 0.0},
        {"convert": 1.5},
        {"max_rows": 0},
        {"shrinkage": -1.0},
        {"fallback": "zero"},
        {"dense_first": -1},
    ],
)
def test_bad_parameters(params):
    dense, inputs = decoders.llama()
    with pytest.raises(RecipeError, match=next(iter(params))):
        tokcompile.optimize(dense, recipe(**params), calibration=[inputs])

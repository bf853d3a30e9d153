"""Audio encoders with fewer frames: against the same model run by hand, layer by layer, on the frames that are left."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

import tokcompile
from tests import oracle
from tests.members import members
from tests.pruning import close, hidden
from tests.test_patch_merge import by_hand
from tests.zoo.vlm import randomize
from tokcompile.errors import NoMatchError, RecipeError, TokcompileError
from tokcompile.measure.evaluate import controls
from tokcompile.recipes import Recipe

#: Two stages of four layers: 24 frames, 12 after layer 0, 6 after layer 2.
KEEP, AT = [0.5, 0.5], [0.25, 0.75]
METHODS = ["class_attention", "patch_random", "patch_pool", "patch_merge"]


def recipe(name: str, **params: Any) -> dict[str, Any]:
    return {
        "recipe_version": 1,
        "steps": [{"pass": name, "target": {"region": "audio_encoder"}, "params": {"keep": KEEP, "at": AT, **params}}],
    }


def optimized(model: nn.Module, name: str, **params: Any) -> Any:
    return tokcompile.optimize(model, recipe(name, **params), lowering="eager")


@pytest.fixture(scope="module")
def whisper() -> Any:
    """24 frames, width 24 and 4 heads of 6; 48 mel frames enter."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=97,
        d_model=24,
        encoder_layers=4,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=10,
        max_source_positions=24,
        max_target_positions=32,
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=96,
        pad_token_id=96,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return randomize(WhisperForConditionalGeneration(config).eval())


def frames(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 10, 48, generator=torch.Generator().manual_seed(seed))


START = torch.tensor([[1, 5, 9]])
IDS = torch.randint(1, 90, (3, 5), generator=torch.Generator().manual_seed(1))


def attention_by_hand(attention: Any, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, weights ``[B, H, S, S]`` and keys ``[B, H, S, Dh]``, with ``bias [B, S]`` on the logits of each key."""
    query, key, value = (
        p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights = (query @ key.transpose(-1, -2) / 6**0.5 + bias[:, None, None]).softmax(-1)
    return attention.out_proj((weights @ value).transpose(1, 2).flatten(2)), weights, key


def encode_by_hand(
    model: Any, features: Tensor, name: str, kept: dict[int, Tensor], size_bias: bool = True, reach: int = 100
) -> Tensor:
    """The encoder of ``model``, layer by layer. ``kept``: layer -> places ``[B, K]`` of what that layer still has.

    The places are those of the frames when nothing was dropped. For merging they are only compared, not used.
    """
    encoder = model.model.encoder
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).transpose(1, 2) + encoder.embed_positions.weight
    sizes, places = torch.ones(x.shape[:2]), torch.arange(x.shape[1]).expand(x.shape[:2])
    weights = key = context = torch.empty(0)
    for number, layer in enumerate(encoder.layers):
        if number in kept:
            count = kept[number].shape[1]
            if name == "patch_merge":
                rows = [by_hand(x[i], key[i].mean(0), 0, count, sizes[i], reach) for i in range(len(x))]
                left = torch.tensor([[group[0] for group in groups] for _, groups, _ in rows])
                x, sizes = torch.stack([r[0] for r in rows]), torch.stack([r[2] for r in rows])
                assert torch.equal(places.gather(1, left), kept[number])
            elif name == "patch_pool":
                x = torch.stack([x[:, i : i + 2].mean(1) for i in range(0, x.shape[1], 2)], 1)
                left = torch.arange(0, places.shape[1], 2).expand(len(x), -1)
                assert torch.equal(places.gather(1, left), kept[number])
            else:
                left = torch.stack(
                    [
                        torch.stack([torch.where(row == p)[0][0] for p in want])
                        for row, want in zip(places, kept[number], strict=True)
                    ]
                )
                if name == "class_attention":  # what frames get, summed over heads, averaged over those that look
                    best = weights.mean(2).sum(1).topk(count).indices.sort().values
                    assert torch.equal(left, best)
                x = x.gather(1, left[..., None].expand(-1, -1, x.shape[2]))
            places = places.gather(1, left)
            sizes = sizes if name == "patch_merge" else torch.ones(x.shape[:2])
        bias = sizes.log() if size_bias else torch.zeros_like(sizes)
        context, weights, key = attention_by_hand(layer.self_attn, layer.self_attn_layer_norm(x), bias)
        x = x + context
        x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    return encoder.layer_norm(x)


def test_the_reference_is_the_model(whisper: Any) -> None:
    with torch.no_grad():
        close(encode_by_hand(whisper, frames(2), "", {}), whisper.model.encoder(frames(2)).last_hidden_state)


@pytest.mark.parametrize(
    ("name", "params"),
    members(
        [*((n, {}) for n in METHODS), ("patch_merge", {"size_bias": False}), ("patch_merge", {"reach": 1})],
        [(n, {}) for n in METHODS],
    ),
)
def test_frames_that_are_left_equal_the_model_by_hand(whisper: Any, name: str, params: Any) -> None:
    restore = {"restore": False} if name == "patch_merge" else {}
    model, features = optimized(whisper, name, **params, **restore), frames(3)
    with torch.no_grad(), tokcompile.record(model) as recording:
        found = model(input_features=features, decoder_input_ids=IDS, use_cache=False)
    kept = {entry.layer: entry.indices for entry in recording.kept}
    assert {layer: rows.shape[1] for layer, rows in kept.items()} == {1: 12, 3: 6}
    with torch.no_grad():
        encoded = encode_by_hand(whisper, features, name, kept, **params)
        assert encoded.shape == (3, 6, 24)
        close(found.encoder_last_hidden_state, encoded)
        close(
            found.logits,
            whisper(encoder_outputs=BaseModelOutput(last_hidden_state=encoded), decoder_input_ids=IDS).logits,
        )
    if name == "class_attention":
        assert not torch.equal(kept[1][0], kept[1][1])


def test_encoder_first_and_generation_equal_the_model_by_hand(whisper: Any) -> None:
    """As ``generate()`` does it, or by the caller; with a cache of the cross attention, or one graph that makes it."""
    model, features = optimized(whisper, "class_attention"), frames(3)
    with torch.no_grad(), tokcompile.record(model) as recording:
        alone = model.get_encoder()(features)
    with torch.no_grad():
        encoded = encode_by_hand(
            whisper, features, "class_attention", {entry.layer: entry.indices for entry in recording.kept}
        )
        close(alone.last_hidden_state, encoded)
        outputs = BaseModelOutput(last_hidden_state=encoded)
        wanted = whisper(encoder_outputs=outputs, decoder_input_ids=IDS).logits
        close(model(encoder_outputs=alone, decoder_input_ids=IDS).logits, wanted)
        close(model(input_features=features, decoder_input_ids=IDS).logits, wanted)
        settings: Any = {
            "decoder_input_ids": START.expand(3, -1),
            "max_new_tokens": 6,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        want = GenerationMixin.generate(whisper, encoder_outputs=outputs, **settings)
        for given in ({"input_features": features}, {"encoder_outputs": alone}):
            got = GenerationMixin.generate(model, **given, **settings)
            assert torch.equal(got.sequences, want.sequences)
            close(got.logits, want.logits)
    stages = {stage.name for stage in tokcompile.report(model).stages if stage.captured}
    assert stages == {"prefill", "encoder", "decode"}


def test_a_decoder_attends_to_restored_frames_by_how_many_they_are(whisper: Any) -> None:
    """As to the merged ones with the logarithm of their number on each logit: copies are equal."""
    merged, restored = (optimized(whisper, "patch_merge", restore=restore) for restore in (False, True))
    with torch.no_grad(), tokcompile.record(merged) as recording:
        few = merged.get_encoder()(frames(3)).last_hidden_state
        all_ = restored.get_encoder()(frames(3)).last_hidden_state
    assert (few.shape[1], all_.shape[1], recording.kept[-1].indices.shape[1]) == (6, 24, 6)
    same = torch.cdist(all_, few) < 1e-4
    assert (same.sum(2) == 1).all()
    attention = whisper.model.decoder.layers[0].encoder_attn
    query = torch.randn(3, 2, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = attention(query, key_value_states=all_)[0]
        q, k, v = (
            p(x).unflatten(-1, (4, 6)).transpose(1, 2)
            for p, x in ((attention.q_proj, query), (attention.k_proj, few), (attention.v_proj, few))
        )
        logits = q @ k.transpose(-1, -2) / 6**0.5 + same.sum(1).log()[:, None, None]
        close(found, attention.out_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))


@pytest.mark.slow
def test_beams_and_the_models_own_generate(whisper: Any) -> None:
    model, features = optimized(whisper, "class_attention"), frames(2)
    with torch.no_grad():
        encoded = model.get_encoder()(features)
        for settings in ({"num_beams": 3}, {}):
            given: Any = {"max_new_tokens": 5, "do_sample": False, **settings}
            wanted = whisper.generate(encoder_outputs=copy.deepcopy(encoded), **given)
            assert torch.equal(model.generate(features, **given), wanted)


@pytest.mark.parametrize("name", members(METHODS, ["class_attention", "patch_merge"]))
def test_keeping_all_changes_nothing(whisper: Any, name: str) -> None:
    model = optimized(whisper, name, keep=[1.0], at=[0.5])
    ids = torch.tensor([[1, 2], [3, 4]])
    with torch.no_grad():
        found, wanted = (
            m(input_features=frames(2), decoder_input_ids=ids, use_cache=False).logits for m in (model, whisper)
        )
    if name == "patch_merge":  # adds a bias of zeros to attention, which may be another kernel
        close(found, wanted)
    else:
        assert torch.equal(found, wanted)


def test_the_backend_is_one_graph(whisper: Any) -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    given = {"input_features": frames(2), "decoder_input_ids": ids, "use_cache": False}
    compiled = torch.compile(
        whisper, backend="tokcompile", options={"recipe": recipe("class_attention"), "lowering": "eager"}
    )
    with torch.no_grad():
        assert torch.equal(compiled(**given).logits, optimized(whisper, "class_attention")(**given).logits)


def test_a_copy_and_the_original_are_left_apart(whisper: Any) -> None:
    model = optimized(whisper, "patch_random")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        assert model.get_encoder()(frames(1)).last_hidden_state.shape == (1, 6, 24)
        assert not torch.allclose(*(m.get_encoder()(frames(1)).last_hidden_state for m in (model, twin)))
        assert whisper.get_encoder()(frames(1)).last_hidden_state.shape == (1, 24, 24)


def test_attention_weights_over_frames_that_are_gone_are_refused(whisper: Any) -> None:
    """Times of words are read off them, by the place of a frame."""
    model = copy.deepcopy(whisper)
    model.set_attn_implementation("eager")
    model = optimized(model, "patch_random")
    with torch.no_grad():
        encoded = model.get_encoder()(frames(2))
        with pytest.raises(TokcompileError, match=r"gives back the weights of the tokens of an encoder"):
            model(encoder_outputs=encoded, decoder_input_ids=START.expand(2, -1), output_attentions=True)


# -------------------------------------------------------------------------------------------- masks over frames


@pytest.fixture(scope="module")
def speech_to_text() -> Any:
    torch.manual_seed(0)
    config = Speech2TextConfig(
        vocab_size=64,
        d_model=24,
        encoder_layers=4,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        input_feat_per_channel=10,
        max_source_positions=100,
        max_target_positions=32,
        conv_channels=24,
        num_conv_layers=2,
        decoder_start_token_id=1,
    )
    return randomize(Speech2TextForConditionalGeneration(config).eval())


def padded() -> dict[str, Tensor]:
    """96 mel frames, 24 tokens; the second row has 20 of them, 5 tokens."""
    mask = torch.ones(2, 96, dtype=torch.int64)
    mask[1, 20:] = 0
    features = torch.randn(2, 96, 10, generator=torch.Generator().manual_seed(3)) * mask[..., None]
    return {
        "input_features": features,
        "attention_mask": mask,
        "decoder_input_ids": torch.tensor([[1, 2], [3, 4]]),
        "use_cache": False,
    }  # type: ignore[dict-item]


@pytest.mark.parametrize("name", members(["class_attention", "patch_random"], ["class_attention"]))
def test_a_mask_follows_the_frames(speech_to_text: Any, name: str) -> None:
    """Padding is dropped before frames, and hidden from the encoder and from the decoder where it is left."""
    model, inputs = optimized(speech_to_text, name), padded()
    with torch.no_grad(), tokcompile.record(model) as recording:
        found = model(**inputs).logits
    assert recording.kept[0].indices[1, :5].tolist() == [0, 1, 2, 3, 4]
    assert (recording.kept[1].indices[1, :5] == torch.arange(5)).all()
    dropped = hidden(recording, 24, 4)
    base = speech_to_text.model
    with torch.no_grad():
        with oracle.hidden_keys(base.encoder.layers, dropped, [base.config]):
            encoded = base.encoder(inputs["input_features"], attention_mask=inputs["attention_mask"])[0]
        seen = torch.ones(2, 24)
        seen[1, 5:] = 0
        wanted = base.decoder(
            inputs["decoder_input_ids"],
            encoder_hidden_states=encoded,
            encoder_attention_mask=seen * ~dropped[3],
            use_cache=False,
        )[0]
        close(found, speech_to_text.lm_head(wanted))


def test_a_mask_is_refused_where_it_cannot_follow(speech_to_text: Any) -> None:
    inputs = padded()
    for name in ("patch_pool", "patch_merge"):
        with pytest.raises(NoMatchError, match="means would mix padding"):
            optimized(speech_to_text, name)(**inputs)
    model = optimized(speech_to_text, "patch_random")
    with torch.no_grad(), pytest.raises(TokcompileError, match=r"masks the tokens of an encoder that ran before it"):
        model.generate(inputs["input_features"], attention_mask=inputs["attention_mask"], max_new_tokens=2)


# ------------------------------------------------------------------------------------------------- other encoders


def test_samples_instead_of_mel_frames() -> None:
    """wav2vec 2.0: a convolution adds the positions, above the layers."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    dense = randomize(Wav2Vec2Model(config).eval())
    model, samples = optimized(dense, "class_attention"), torch.randn(2, 485)
    with torch.no_grad(), tokcompile.record(model) as recording:
        found = model(input_values=samples).last_hidden_state
        count = dense(samples).last_hidden_state.shape[1]
    assert [entry.indices.shape[1] for entry in recording.kept] == [12, 6]
    last = recording.kept[-1].indices[..., None].expand(-1, -1, 32)
    with torch.no_grad(), oracle.hidden_keys(dense.encoder.layers, hidden(recording, count, 4), [dense.config]):
        close(found, dense(samples).last_hidden_state.gather(1, last))


class Between(nn.Module):
    """Convolutions, layers, and a convolution over the tokens behind them."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.stem, self.tail = nn.Conv1d(4, 16, 5, stride=3), nn.Conv1d(16, 16, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, samples: Tensor) -> Tensor:
        return self.tail(self.encoder(self.stem(samples).relu().transpose(1, 2)).transpose(1, 2))


def test_a_convolution_below_the_cut_is_refused() -> None:
    model = tokcompile.optimize(Between().eval(), recipe("patch_random", keep=[0.5], at=[0.5]), lowering="eager")
    with torch.no_grad(), pytest.raises(NoMatchError, match=r"conv1d works on neighbouring tokens"):
        model(samples=torch.randn(2, 4, 50))


def test_a_recipe_says_that_it_means_audio(whisper: Any) -> None:
    step = {"pass": "patch_random", "params": {"keep": [0.5], "at": [0.5]}}
    with pytest.raises(NoMatchError, match=r"found 1 audio_encoder.*say target: \{region: audio_encoder\}"):
        tokcompile.optimize(whisper, {"recipe_version": 1, "steps": [step]}, lowering="eager")(
            input_features=frames(2), decoder_input_ids=START.expand(2, -1)
        )
    wrong = {"recipe_version": 1, "steps": [{**step, "target": {"region": "moe"}}]}
    with pytest.raises(RecipeError, match="works on vision_encoder or audio_encoder, not on moe"):
        tokcompile.optimize(whisper, wrong)


def test_controls_are_those_of_patches() -> None:
    found = controls(Recipe.load(recipe("patch_merge")))
    assert [c.role for c in found] == ["random"] * 3 + ["pool"]
    assert {c.recipe.steps[0].region for c in found if c.recipe} == {"audio_encoder"}

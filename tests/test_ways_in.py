"""No way around: whatever method of an optimized model is called, the recipe is there, or somebody says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

import tokcompile
from tests.members import members
from tests.small_models import vit, vlm
from tokcompile.runtime.outer import running_methods

HALF = {"recipe_version": 1, "steps": [{"pass": "random", "params": {"keep": 0.5}}]}
PATCHES = {"recipe_version": 1, "steps": [{"pass": "class_attention", "params": {"keep": [0.5], "at": [0.5]}}]}
WINDOW = {"recipe_version": 1, "steps": [{"pass": "decode_control", "params": {
    "budget": 9, "sinks": 2, "recent": 3, "dense_below": 1, "choose": "window"}}]}  # fmt: skip
SHORT = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


class Passing(nn.Module):
    """A wrapper that hands everything on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        return self.model(**kwargs)

    def generate(self, **kwargs: Any) -> Any:
        return self.model.generate(**kwargs)


class Answering(nn.Module):
    """A wrapper whose forward generates."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.lm = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor) -> Any:
        return self.lm.generate(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, **SHORT)


class Past(nn.Module):
    """A wrapper that goes past the model's own forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.llm = model
        self.head = nn.Linear(model.config.text_config.hidden_size, 1)

    def forward(self, **kwargs: Any) -> torch.Tensor:
        score: torch.Tensor = self.head(self.llm.model(**kwargs, use_cache=False).last_hidden_state[:, -1])
        return score


@pytest.fixture(scope="module")
def answers() -> tuple[nn.Module, dict[str, Any], torch.Tensor]:
    model, inputs = vlm()
    with torch.no_grad():
        want = tokcompile.optimize(model, HALF, lowering="eager").generate(**inputs, **SHORT)
    return model, inputs, want


def test_a_wrapper_that_hands_on(answers: tuple[nn.Module, dict[str, Any], torch.Tensor]) -> None:
    model, inputs, want = answers
    fast = tokcompile.optimize(Passing(copy.deepcopy(model)), HALF, lowering="eager")
    with torch.no_grad(), tokcompile.record(fast) as record:
        assert torch.equal(fast.generate(**inputs, **SHORT), want)
        cache = fast(**inputs, use_cache=True).past_key_values
    assert len(record.kept) == 2
    assert min(layer.keys.shape[2] for layer in cache.layers) < cache.get_seq_length()
    again = copy.deepcopy(fast)
    with torch.no_grad():
        assert torch.equal(again.generate(**inputs, **SHORT), want)


def test_a_wrapper_whose_forward_generates(answers: tuple[nn.Module, dict[str, Any], torch.Tensor]) -> None:
    model, inputs, want = answers
    fast = tokcompile.optimize(Answering(copy.deepcopy(model)), HALF, lowering="eager")
    with torch.no_grad(), tokcompile.record(fast) as record:
        assert torch.equal(fast(**inputs), want)
    assert len(record.kept) == 1


def test_a_wrapper_that_goes_past_the_forward(answers: tuple[nn.Module, dict[str, Any], torch.Tensor]) -> None:
    model, inputs, _ = answers
    fast = tokcompile.optimize(Past(copy.deepcopy(model)), HALF, lowering="eager")
    with torch.no_grad(), tokcompile.record(fast) as record:
        fast(**inputs)
        fast(**inputs)
    assert len(record.kept) == 2


def test_a_wrapper_of_peft(answers: tuple[nn.Module, dict[str, Any], torch.Tensor]) -> None:
    peft = pytest.importorskip("peft")
    model, inputs, want = answers
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    fast = tokcompile.optimize(wrapped, HALF, lowering="eager")  # the adapter adds 0
    with torch.no_grad(), tokcompile.record(fast) as record:
        assert torch.equal(fast.generate(**inputs, **SHORT), want)
        fast(**inputs)
    assert len(record.kept) == 2


class Features(nn.Module):
    """A vision model in the style of timm."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.body = inner
        self.head = nn.Linear(inner.config.hidden_size, 5)

    def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.body(pixel_values=pixels).last_hidden_state
        return tokens

    def forward_head(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(tokens[:, 0])
        return logits

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(pixels))

    def size(self, pixels: torch.Tensor) -> int:
        return pixels.shape[-1]


def test_forward_features_is_pruned() -> None:
    model, pixels = vit()
    whole = Features(model).eval()
    assert running_methods(whole) == {"forward_features": {"body"}, "forward_head": {"head"}}
    fast = tokcompile.optimize(whole, PATCHES, lowering="eager")
    with torch.no_grad():
        features = fast.forward_features(pixels)
        assert tokcompile.report(fast).steps[0].status == "matched"
        assert features.shape[1] < whole.forward_features(pixels).shape[1]
        torch.testing.assert_close(fast.forward_head(features), fast(pixels))
        assert fast.size(pixels) == pixels.shape[-1]


def test_forward_features_without_a_match_says_so() -> None:
    fast = tokcompile.optimize(Features(vit()[0]).eval(), HALF, lowering="eager")
    with pytest.raises(tokcompile.NoMatchError, match="merge_point"), torch.no_grad():
        fast.forward_features(vit()[1])


def blip() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = T.BlipConfig(
        text_config={**sizes, "vocab_size": 100, "max_position_embeddings": 64, "encoder_hidden_size": 32,
                     "bos_token_id": 1, "sep_token_id": 2, "pad_token_id": 0, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 48, "patch_size": 8}, projection_dim=32)  # fmt: skip
    model = T.BlipForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.02)
    return model, {"pixel_values": torch.randn(1, 3, 48, 48), "input_ids": torch.tensor([[1, *range(5, 20), 2]])}


def test_a_caption_model_that_calls_the_models_inside() -> None:
    model, inputs = blip()
    fast = tokcompile.optimize(model, WINDOW, lowering="eager")
    with torch.no_grad():
        fast.generate(**inputs, max_new_tokens=12, min_new_tokens=12)
    report = tokcompile.report(fast)
    assert report.steps[0].status == "matched"
    assert {"encoder", "prefill", "decode"} <= {s.name for s in report.stages if s.captured}


@pytest.mark.parametrize("how", members(["error", "warn"], ["error"]))
def test_a_caption_model_without_visual_tokens_says_so(how: str) -> None:
    model, inputs = blip()
    fast = tokcompile.optimize(model, HALF, lowering="eager", on_no_match=how)
    with torch.no_grad():
        if how == "error":
            with pytest.raises(tokcompile.NoMatchError) as caught:
                fast.generate(**inputs, max_new_tokens=3)
            assert "call with an image" not in str(caught.value)
        else:
            with pytest.warns(UserWarning, match="no merge_point"):
                fast.generate(**inputs, max_new_tokens=3)


class Own(nn.Module):
    """A generate() of its own that runs layers and no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(20, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 20))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.mix(self.embed(input_ids))
        return logits

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int = 2) -> torch.Tensor:
        for _ in range(max_new_tokens):
            input_ids = torch.cat([input_ids, self.mix(self.embed(input_ids))[:, -1:].argmax(-1)], 1)
        return input_ids


@pytest.mark.parametrize("how", ["error", "warn", "ignore"])
def test_a_generate_that_reaches_no_graph_says_so(how: str, recwarn: pytest.WarningsRecorder) -> None:
    fast = tokcompile.optimize(Own(), HALF, lowering="eager", on_no_match=how)
    ids = torch.tensor([[1, 2, 3]])
    if how == "error":
        with pytest.raises(tokcompile.NoMatchError, match=r"generate\(\) of Own ran without step 'random'"):
            fast.generate(ids)
        return
    fast.generate(ids)
    told = [w for w in recwarn if "ran without step" in str(w.message)]
    assert len(told) == (how == "warn")


def merged(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings with the features of the image in their places, and where these are."""
    mask = inputs["input_ids"] == model.config.image_token_id
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    rows = torch.cat([f.reshape(-1, f.shape[-1]) for f in features])
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    return embeddings.masked_scatter(mask[..., None].expand_as(embeddings), rows), mask


def test_embeddings_that_were_merged_before(answers: tuple[nn.Module, dict[str, Any], torch.Tensor]) -> None:
    model, inputs, want = answers
    with torch.no_grad():
        embeddings, mask = merged(model, inputs)
        given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
        fast = tokcompile.optimize(model, HALF, lowering="eager")
        with tokcompile.record(fast) as record:
            found = fast.generate(**given, visual_mask=mask, **SHORT)
        assert len(record.kept) == 1
        assert torch.equal(found, want[:, -4:])
        always = tokcompile.optimize(model, HALF, lowering="eager", visual_mask=lambda call: mask)
        assert torch.equal(always.generate(**given, **SHORT), want[:, -4:])


def test_embeddings_without_a_mask_say_what_is_missing(
    answers: tuple[nn.Module, dict[str, Any], torch.Tensor],
) -> None:
    model, inputs, _ = answers
    with torch.no_grad():
        embeddings, mask = merged(model, inputs)
        fast = tokcompile.optimize(model, HALF, lowering="eager")
        with pytest.raises(tokcompile.NoMatchError, match="visual_mask"):
            fast(inputs_embeds=embeddings)
        for wrong, words in ((mask.long(), "bool tensor"), (mask[:, 1:], "visual_mask is"), ([True], "bool tensor")):
            with pytest.raises(tokcompile.TokcompileError, match=words):
                fast(inputs_embeds=embeddings, visual_mask=wrong)
        with pytest.raises(tokcompile.TokcompileError, match="this call has none"):
            fast(input_ids=inputs["input_ids"], visual_mask=mask)


@pytest.mark.parametrize("kind", members(["Blip2", "InstructBlip"], ["InstructBlip"]))  # asks for more than the other
def test_forward_keeps_the_arguments_that_it_requires(kind: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(T, f"{kind}Config")(
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        qformer_config={**sizes, "encoder_hidden_size": 32, "vocab_size": 320},
        text_config=T.OPTConfig(vocab_size=320, hidden_size=64, ffn_dim=128, num_hidden_layers=2, pad_token_id=0,
                                num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=64),
        num_query_tokens=8, image_token_index=300)  # fmt: skip
    model = getattr(T, f"{kind}ForConditionalGeneration")(config).eval()
    inputs = {"input_ids": torch.tensor([[300] * 8 + [5, 6, 7, 8]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    if kind == "InstructBlip":
        inputs |= {"qformer_input_ids": torch.tensor([[5, 6]]), "qformer_attention_mask": torch.ones(1, 2).long()}
    everything = {"recipe_version": 1, "steps": [{"pass": "random", "params": {"keep": 1.0}}]}
    fast = tokcompile.optimize(model, everything, lowering="eager")
    with torch.no_grad():
        torch.testing.assert_close(fast(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits)
    assert tokcompile.report(fast).steps[0].regions == [""]  # not those of the Q-Former
    assert any(region["kind"] == "merge_point" for region in tokcompile.explain(model, inputs).regions)


def test_continuous_batching_is_refused_by_name(answers: tuple[nn.Module, dict[str, Any], torch.Tensor]) -> None:
    model, inputs, _ = answers
    for optimized in (model, Passing(copy.deepcopy(model))):
        fast = tokcompile.optimize(optimized, HALF, lowering="eager")
        inner = getattr(fast, "model", fast) if isinstance(fast, Passing) else fast
        with pytest.raises(tokcompile.CacheError, match="generate_batch: continuous batching"):
            inner.generate_batch(inputs=[inputs["input_ids"][0].tolist()])
        with pytest.raises(tokcompile.TokcompileError, match="continuous batching"):
            inner.init_continuous_batching()

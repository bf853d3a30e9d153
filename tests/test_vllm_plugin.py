"""The plugin for vLLM as far as it goes without vLLM: what is asked for and refused, placeholders and positions."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokcompile.errors import NoMatchError, RecipeError, TokcompileError
from tokcompile.recipes import Budget
from tokcompile.vllm import settings as reading
from tokcompile.vllm.layout import AXES, Layout, Placed, read_columns, whole_prompt, write_columns
from tokcompile.vllm.model import PrunedModel
from tokcompile.vllm.processor import FIELD

SERVED = {"pass": "todre", "params": {"keep": 0.25, "drop_layer": None, "positions": "compact"}}


def asked(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"recipe": {"recipe_version": 1, "steps": list(steps)}}


def config(**changes: Any) -> Any:
    """The part of a ``VllmConfig`` that is looked at."""
    model = {
        "model": "a-model",
        "is_multimodal_model": True,
        "is_encoder_decoder": False,
        "uses_mrope": False,
        "multimodal_config": types.SimpleNamespace(is_multimodal_pruning_enabled=lambda: False),
    }
    whole = {
        "compilation_config": types.SimpleNamespace(cudagraph_mm_encoder=False),
        "speculative_config": None,
        "use_v2_model_runner": False,
    }
    model |= {name: value for name, value in changes.items() if name in model}
    whole |= {name: value for name, value in changes.items() if name in whole}
    return types.SimpleNamespace(model_config=types.SimpleNamespace(**model), **whole)


def test_importing_imports_no_vllm() -> None:
    code = "import sys, tokcompile.vllm.plugin, tokcompile.vllm.model; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    code = (
        "import sys, tokcompile; tokcompile.optimize, tokcompile.select; print([m for m in sys.modules if 'vllm' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(reading.VARIABLE, raising=False)
    assert reading.asked({}) is None
    assert reading.asked({"tokcompile": {"recipe": "a"}}) == {"recipe": "a"}
    monkeypatch.setenv(reading.VARIABLE, "vlm_random_90")
    assert reading.asked({}) == {"recipe": "vlm_random_90"}
    assert reading.asked({"tokcompile": {"recipe": "a"}}) == {"recipe": "a"}
    monkeypatch.setenv(reading.VARIABLE, json.dumps(asked(SERVED)))
    assert reading.read(reading.asked({})).keep == Budget.of(0.25)
    monkeypatch.setenv(reading.VARIABLE, "{")
    with pytest.raises(RecipeError, match="not JSON"):
        reading.asked({})


def test_changes_and_keys() -> None:
    plain = reading.read(asked(SERVED))
    assert plain.modalities == ("image", "video")
    assert plain.positions == "compact"
    changed = reading.read({**asked(SERVED), "set": ["steps[0].params.keep=0.5"]})
    assert changed.keep == Budget.of(0.5)
    assert changed.key != plain.key
    assert reading.read({**asked(SERVED), "set": {"steps[0].params.keep": 0.25}}).key == plain.key
    assert reading.read(asked({**SERVED, "target": {"modality": "video"}})).modalities == ("video",)
    shipped = {"recipe": "vlm_herd_90", "set": {"steps[0].params.drop_layer": None}}
    assert reading.read(shipped).method.params.criterion == "herding"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"recipe": "vlm_herd_90"}, "vlm_herd_90 cannot be served by vLLM: .*drop_layer: 0.875.*to null"),
        ({"recipe": "vlm_cls_90"}, "attention inside the image encoder, which vLLM does not give out"),
        ({"recipe": "llm_sparse_decode"}, r"steps\[0\] \(fasa|steps\[0\]"),
        (
            {"recipe": "vlm_prune_90_sparse", "set": {"steps[0].params.drop_layer": None}},
            r"steps\[1\] \(token_sparse\)",
        ),
    ],
)
def test_steps_that_are_refused(given: Any, words: str) -> None:
    with pytest.raises(NoMatchError, match=words):
        reading.read(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"recipes": "a"}, "expected"),
        ({**asked(SERVED), "sets": []}, "unknown key sets"),
        ({"recipe": "vlm_herd_9"}, "did you mean"),
    ],
)
def test_mistakes(given: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        reading.read(given)


def test_what_is_served() -> None:
    reading.check(reading.read(asked(SERVED)), config())
    several = {**SERVED, "params": {**SERVED["params"], "positions": "keep"}}  # type: ignore[dict-item]
    reading.check(reading.read(asked(several)), config(uses_mrope=True))


@pytest.mark.parametrize(
    ("positions", "changes", "words"),
    [
        ("compact", {"is_multimodal_model": False}, "a model of text alone"),
        ("compact", {"is_encoder_decoder": True}, "cross-attention"),
        (
            "compact",
            {"multimodal_config": types.SimpleNamespace(is_multimodal_pruning_enabled=lambda: True)},
            "--video-pruning-rate",
        ),
        ("compact", {"compilation_config": types.SimpleNamespace(cudagraph_mm_encoder=True)}, "CUDA graphs"),
        ("keep", {}, "counts positions of one axis without gaps; set .* to compact"),
        ("compact", {"uses_mrope": True}, "several axes .* set .* to keep"),
        ("keep", {"uses_mrope": True, "speculative_config": object()}, "speculative"),
        ("keep", {"uses_mrope": True, "use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
    ],
)
def test_models_that_are_refused(positions: str, changes: dict[str, Any], words: str) -> None:
    step = {**SERVED, "params": {**SERVED["params"], "positions": positions}}  # type: ignore[dict-item]
    with pytest.raises(TokcompileError, match=words):
        reading.check(reading.read(asked(step)), config(**changes))


def test_placeholders_of_one_image() -> None:
    layout = Layout([7, 9, 9, 9, 9, 5, 9, 9, 8], [False, True, True, True, True, False, True, True, False])
    assert layout.runs() == [4, 2]
    assert layout.kept(Budget.of(0.25)) == [1, 1]
    assert layout.pruned(Budget.of(0.25)) == [0, 1, 5, 6, 8]
    assert layout.pruned(Budget.of(1.0)) == list(range(9))
    assert Layout.read(layout.tensor()) == layout


@given(st.lists(st.tuples(st.integers(0, 4), st.lists(st.booleans(), min_size=1, max_size=9)), max_size=3), st.data())
def test_the_whole_prompt_again(parts: list[tuple[int, list[bool]]], data: st.DataObject) -> None:
    keep = Budget.of(data.draw(st.sampled_from([0.25, 0.5, 1.0, 1, 3])))
    whole: list[int] = []
    pruned: list[int] = []
    places: list[int] = []
    starts: list[int] = []
    items = []
    for text, flags in parts:
        for _ in range(text):
            places.append(len(whole))
            pruned.append(len(whole))
            whole.append(len(whole))
        layout = Layout([1000 if flag else 2000 + i for i, flag in enumerate(flags)], flags)
        left = layout.pruned(keep)
        items.append(Placed(len(pruned), len(left), layout))
        starts.append(len(whole))
        places += [len(whole) + place for place in left]
        pruned += [layout.ids[place] for place in left]
        whole += layout.ids
    assert whole_prompt(pruned, items, keep) == (whole, places, starts)


def test_a_prompt_that_does_not_fit() -> None:
    layout = Layout([9] * 4, [True] * 4)
    with pytest.raises(ValueError, match="an image has 3 tokens at 1 of the prompt, expected 2"):
        whole_prompt([1, 9, 9, 9], [Placed(1, 3, layout)], Budget.of(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_in_features(dtype: torch.dtype) -> None:
    features = torch.randn(6, 5).to(dtype)
    numbers = torch.randint(-(2**22), 2**22, (6, 1 + AXES))
    plain, found = read_columns(write_columns(features, numbers))
    assert torch.equal(plain, features)
    assert torch.equal(found, numbers)
    with pytest.raises(ValueError, match="out of range"):
        write_columns(features, numbers + 2**24)


class Encoder:
    """A model of vLLM as far as it matters: features that it was given."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        pass

    def embed_multimodal(self, **kwargs: Any) -> Any:
        return kwargs["pixel_values"]


def model(step: dict[str, Any] = SERVED) -> Any:
    """A pruned model whose language model has width 8."""
    made: Any = type("Pruned", (PrunedModel, Encoder), {"tokcompile": reading.read(asked(step))})
    size = types.SimpleNamespace(get_inputs_embeds_size=lambda: 8)
    return made(vllm_config=types.SimpleNamespace(model_config=size))


def test_features_behind_the_encoder() -> None:
    """The choice reads what the language model embeds; what follows for its further layers goes with the token."""
    from tokcompile import select

    one, two = torch.randn(12, 16), torch.randn(8, 16)
    tables = [
        Layout([9] * 12, [True] * 12).tensor(),
        Layout([9] * 4 + [5] + [9] * 4, [True] * 4 + [False] + [True] * 4).tensor(),
    ]
    found = model().embed_multimodal(pixel_values=[one, two], **{FIELD: tables})
    recipe = asked(SERVED)["recipe"]
    assert torch.equal(found[0], one[select(one[:, :8], recipe)])
    first, second = select([two[:4, :8], two[4:, :8]], recipe)
    assert torch.equal(found[1], torch.cat([two[:4][first], two[4:][second]]))


def test_never_dense_in_silence() -> None:
    with pytest.raises(TokcompileError, match="without a layout"):
        model().embed_multimodal(pixel_values=[torch.randn(4, 8)])
    with pytest.raises(TokcompileError, match="an image with 4 placeholders"):
        model().embed_multimodal(pixel_values=[torch.randn(5, 8)], **{FIELD: [Layout([9] * 4, [True] * 4).tensor()]})
    with pytest.raises(TokcompileError, match="of 1 items for 2"):
        model().embed_multimodal(pixel_values=[torch.randn(4, 8)], **{FIELD: [Layout([9], [True]).tensor()] * 2})


def test_a_mean_of_tokens_goes_on() -> None:
    step = {"pass": "pool", "params": {"keep": 2, "positions": "compact"}}
    features = torch.randn(8, 8)
    table = Layout([9] * 8, [True] * 8).tensor()
    (found,) = model(step).embed_multimodal(pixel_values=[features], **{FIELD: [table]})
    assert torch.allclose(found, torch.stack([features[:4].mean(0), features[4:].mean(0)]))

"""Pickles, copies and reprs of an optimized model, and what saves it without its recipe."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tokcompile
from tests.zoo.vlm import TEXT, VLMS, randomize, shallow
from tokcompile.demo import tiny_vit

TODRE = {"recipe_version": 1, "steps": [{"pass": "todre", "params": {"keep": 0.25, "drop_layer": 1}}]}
OPTIONS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


def tokens(model: Any, inputs: dict[str, Any]) -> tuple[Any, int]:
    with torch.no_grad(), tokcompile.record(model) as recording:
        found = model.generate(**inputs, **OPTIONS)
    return found.tolist(), len(recording.kept)


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, dict[str, Any], bytes, tuple[Any, int]]:
    """An optimized model, its inputs, a pickle from before its first call, and what it generates."""
    case = shallow(VLMS["llava"](), 3)
    fast, inputs = tokcompile.optimize(case.model, TODRE, lowering="eager"), case.inputs()
    cold = pickle.dumps(fast)
    return fast, inputs, cold, tokens(fast, inputs)


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


ROUNDS: dict[str, Callable[[Any, bytes], Any]] = {
    "pickled cold": lambda model, cold: pickle.loads(cold),
    "pickled warm": lambda model, cold: pickle.loads(pickle.dumps(model)),
    "saved, and pickled": lambda model, cold: pickle.loads(pickle.dumps(_saved(model))),
    "copied, and pickled": lambda model, cold: pickle.loads(pickle.dumps(copy.deepcopy(model))),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "pickled cold" else pytest.mark.slow) for name in ROUNDS]
)
def test_the_same_tokens_after_a_round_trip(name: str, vlm: tuple[Any, dict[str, Any], bytes, tuple[Any, int]]) -> None:
    fast, inputs, cold, wanted = vlm
    other = ROUNDS[name](fast, cold)
    assert type(other) is type(fast)
    assert wanted[1] == 2
    assert tokens(other, inputs) == wanted
    if name != "pickled cold":
        assert tokens(fast, inputs) == wanted  # the one that was pickled goes on


def test_hidden_states_are_recorded_after_a_round_trip() -> None:
    """The hooks of transformers that a pickle leaves out are there again."""
    with torch.random.fork_rng(devices=[]):
        model = randomize(LlamaForCausalLM(LlamaConfig(**TEXT | {"num_hidden_layers": 2})))
    ids = torch.randint(3, 200, (1, 20))
    recipe = {
        "recipe_version": 1,
        "steps": [{"pass": "token_sparse", "params": {"min_length": 0, "least": 0, "window": 4}}],
    }
    fast = tokcompile.optimize(model, recipe, lowering="eager")
    with torch.no_grad():
        wanted = fast(input_ids=ids, output_hidden_states=True).hidden_states
        found = pickle.loads(pickle.dumps(fast))(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 3
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def _answer(model: Any, pixels: torch.Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        queue.put(model(pixel_values=pixels).last_hidden_state.numpy())


@pytest.mark.slow
def test_another_process() -> None:
    model, inputs = tiny_vit()
    fast = tokcompile.optimize(model, "vit_prune_50", lowering="eager")
    with torch.no_grad():
        wanted = fast(**inputs).last_hidden_state
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_answer, args=(fast, inputs["pixel_values"], queue))
    process.start()
    found = torch.from_numpy(queue.get(timeout=300))
    process.join()
    torch.testing.assert_close(found, wanted)


def test_what_transformers_saves_is_dense(
    tmp_path: Any, vlm: tuple[Any, dict[str, Any], bytes, tuple[Any, int]]
) -> None:
    fast = vlm[0]
    with pytest.warns(UserWarning, match=r"the recipe stays behind; tokcompile\.save_pretrained\(model, folder\)"):
        fast.save_pretrained(tmp_path / "dense")
    dense = type(fast).from_pretrained(tmp_path / "dense")
    assert dense.state_dict().keys() == fast.state_dict().keys()


# ------------------------------------------------------------------------------------------------------------- reprs


def test_an_optimized_model_says_that_it_is_one(vlm: tuple[Any, dict[str, Any], bytes, tuple[Any, int]]) -> None:
    fast = vlm[0]
    assert "optimized by <tokcompile report" in repr(fast)
    assert "todre matched x1" in repr(fast)
    assert "optimized by &lt;tokcompile report" in fast._repr_html_()
    assert repr(fast).count("optimized by") == 1


def test_a_report_and_a_recipe_say_what_they_are(vlm: tuple[Any, dict[str, Any], bytes, tuple[Any, int]]) -> None:
    report = tokcompile.report(vlm[0])
    assert "\n" not in repr(report)
    assert "graphs: encoder, prefill, decode" in repr(report)
    assert report._repr_html_().startswith("<iframe ")
    recipe = tokcompile.Recipe.load("vit_prune_50")
    assert repr(recipe).startswith("<tokcompile recipe vit_prune_50: ")
    assert "keep=" in repr(recipe)
    assert "<b>vit_prune_50</b>" in recipe._repr_html_()
    assert repr(tokcompile.Recipe.load(TODRE)) == "<tokcompile recipe: todre(keep=0.25, drop_layer=1)>"


def test_dir_shows_the_public_names() -> None:
    assert dir(tokcompile) == sorted(tokcompile.__all__)
    assert all(hasattr(tokcompile, name) for name in dir(tokcompile))

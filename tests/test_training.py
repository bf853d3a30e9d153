"""An optimized model can be trained, copied and moved: gradients through rewritten graphs, modes, losses, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

import tokcompile
from tokcompile.state import NAMESPACE

from .members import members
from .zoo import decoders, encoders_for_pruning, vlm

STEM = {"recipe_version": 1, "description": "tables", "steps": [{"pass": "stem"}]}


def random_pruning(keep: float) -> dict[str, Any]:
    return {
        "recipe_version": 1,
        "description": "at random",
        "steps": [{"pass": "random", "params": {"keep": keep, "seed": 0}}],
    }


def class_pruning(keep: float) -> dict[str, Any]:
    return {
        "recipe_version": 1,
        "description": "patches",
        "steps": [{"pass": "class_attention", "params": {"keep": [keep], "at": [0.5]}}],
    }


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if not name.startswith(NAMESPACE)}


def llava(**kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    case = vlm.shallow(vlm.llava())
    return case.model, {**case.inputs(batch=2, **kwargs), "use_cache": False}


def stem(lowering: str = "eager") -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    dense, inputs = decoders.llama()
    ids = {"input_ids": inputs["input_ids"]}
    return dense, tokcompile.optimize(dense, STEM, lowering=lowering, calibration=[ids]), ids


@pytest.mark.parametrize("training", members([False, True], [True]))
def test_gradients_of_a_graph_that_keeps_everything_are_those_of_the_model(training: bool) -> None:
    dense, inputs = llava(left_padding=2)
    model = tokcompile.optimize(dense, random_pruning(1.0), lowering="eager")
    dense.train(training)
    model.train(training)
    expected = dense(**inputs).logits
    weight = torch.randn_like(expected)
    wanted = gradients(dense, (expected * weight).sum())
    logits = model(**inputs).logits
    found = gradients(model, (logits * weight).sum())
    assert torch.equal(logits, expected)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        other = found[name]
        assert (value is None) == (other is None), name
        assert value is None or other is None or torch.equal(value, other), name
    assert any(".vision_tower." in n and g is not None and g.abs().sum() > 0 for n, g in found.items())


def test_gradients_of_a_pruned_graph_reach_the_image_encoder() -> None:
    dense, inputs = llava()
    model = tokcompile.optimize(dense, random_pruning(0.25), lowering="eager")
    used = {n for n, g in gradients(dense, dense(**inputs).logits.sum()).items() if g is not None}
    found = gradients(model, model(**inputs).logits.sum())
    assert {n for n, g in found.items() if g is not None} == used
    assert all(float(found[n].abs().sum()) > 0 for n in used if n.endswith(("proj.weight", "linear_1.weight")))  # type: ignore[union-attr]


def test_gradients_of_tables() -> None:
    _, model, inputs = stem()
    model(**inputs).logits.square().sum().backward()
    tables = {n: p for n, p in model.named_parameters() if n.endswith(".table")}
    assert len(tables) == 2
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in tables.values())


@pytest.mark.inductor
def test_gradients_through_inductor_flow_on_to_what_made_the_inputs() -> None:
    """The features of an image encoder are no leaf of autograd; neither are these pixels."""
    case = encoders_for_pruning.fused_vit()
    model = tokcompile.optimize(case.model, class_pruning(1.0))
    pixels = case.inputs()["pixel_values"].requires_grad_()
    expected = case.model(pixel_values=pixels * 1.0)
    weight = torch.randn_like(expected)
    wanted = gradients(case.model, (expected * weight).sum())
    at_pixels, pixels.grad = pixels.grad, None
    found = gradients(model, (model(pixel_values=pixels * 1.0) * weight).sum())
    assert at_pixels is not None
    assert pixels.grad is not None
    torch.testing.assert_close(pixels.grad, at_pixels, rtol=1e-4, atol=1e-5)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.inductor
def test_freezing_and_thawing_tables_under_inductor() -> None:
    """Compiled without their gradients, then asked for them: the graph is compiled again."""
    _, model, inputs = stem("inductor")
    tables = [p for n, p in model.named_parameters() if n.startswith(NAMESPACE)]
    for table in tables:
        table.requires_grad_(False)
    model(**inputs).logits.sum().backward()
    assert all(t.grad is None for t in tables)
    for table in tables:
        table.requires_grad_(True)
    model(**inputs).logits.sum().backward()
    assert sum(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in tables) == 2


def test_dropout_follows_the_mode() -> None:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        hidden_dropout_prob=0.5,
        attention_probs_dropout_prob=0.0,
    )
    dense = ViTModel(config).eval()
    model = tokcompile.optimize(dense, class_pruning(1.0), lowering="eager")
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    calm = model(**inputs).last_hidden_state
    assert torch.equal(calm, dense(**inputs).last_hidden_state)
    model.train()
    assert not dense.training
    torch.manual_seed(1)
    noisy = model(**inputs).last_hidden_state
    dense.train()
    torch.manual_seed(1)
    assert torch.equal(noisy, dense(**inputs).last_hidden_state)
    assert not torch.equal(noisy, calm)
    assert torch.equal(model.eval()(**inputs).last_hidden_state, calm)


def test_gradient_checkpointing_is_refused() -> None:
    dense, inputs = decoders.llama()
    dense.gradient_checkpointing_enable()
    model = tokcompile.optimize(dense, STEM, lowering="eager", calibration=[{"input_ids": inputs["input_ids"]}])
    model(**inputs)
    with pytest.raises(tokcompile.CaptureError, match=r"gradient_checkpointing_disable\(\)"):
        model.train()(**inputs)


def _labels(inputs: dict[str, Any]) -> Tensor:
    ids = inputs["input_ids"]
    return torch.where((inputs["attention_mask"] == 0) | (ids == vlm.IMAGE), -100, ids)


@pytest.mark.parametrize("images", members([1, [1, 2]], [[1, 2]]), ids=["even", "ragged"])
def test_the_loss_of_a_pruned_forward_is_that_of_the_kept_positions(images: Any) -> None:
    dense, inputs = llava(images_per_row=images, left_padding=2)
    inputs["labels"] = _labels(inputs)
    model = tokcompile.optimize(dense, random_pruning(0.25), lowering="eager")
    with tokcompile.record(model) as record:
        output = model(**inputs)
    kept = record.kept[-1].indices
    assert bool((kept < 0).any()) == isinstance(images, list)
    following = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    target = torch.where(kept >= 0, following.gather(1, kept.clamp(min=0)), -100)
    assert torch.equal(output.loss, F.cross_entropy(output.logits.flatten(0, 1), target.flatten()))
    total = model(**inputs, num_items_in_batch=torch.tensor(3)).loss
    torch.testing.assert_close(total, output.loss * (target >= 0).sum() / 3)


def test_the_loss_of_a_forward_that_keeps_everything() -> None:
    dense, inputs = llava()
    inputs["labels"] = _labels(inputs)
    model = tokcompile.optimize(dense, random_pruning(1.0), lowering="eager")
    assert torch.equal(model(**inputs).loss, dense(**inputs).loss)


def test_a_copy_of_a_pruned_model_is_a_model_of_its_own() -> None:
    dense, inputs = llava()
    model = tokcompile.optimize(dense, random_pruning(0.25), lowering="eager")
    logits = model(**inputs).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).logits, logits)
    assert tokcompile.report(copied).steps[0].status == "matched"
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert not torch.equal(copied(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, logits)


def test_a_copy_of_a_model_with_tables_has_tables_of_its_own() -> None:
    _, model, inputs = stem()
    logits = model(**inputs).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**inputs).logits, logits)
    for name, parameter in copied.named_parameters():
        if name.startswith(NAMESPACE):
            parameter.data.mul_(2)
    assert not torch.equal(copied(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, logits)
    assert copied.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(copied(**inputs).logits, logits)


def test_a_pickle_holds_recipe_state_and_weights() -> None:
    case = encoders_for_pruning.fused_vit()
    model = tokcompile.optimize(case.model, class_pruning(0.5), lowering="eager")
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(**case.inputs()), model(**case.inputs()))
    assert loaded.forward.owner is loaded


def test_conversion_leaves_the_original_alone() -> None:
    dense, model, inputs = stem()
    logits = model(**inputs).logits
    model.to(torch.float64).requires_grad_(False)
    assert {p.dtype for p in dense.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in dense.parameters())
    found = model(**inputs).logits
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), logits, rtol=1e-5, atol=1e-5)
    assert [p.data_ptr() for p in tokcompile.optimize(dense, random_pruning(0.5)).parameters()] == [
        p.data_ptr() for p in dense.parameters()
    ]


def test_tied_parameters_stay_tied() -> None:
    dense, _ = decoders.gemma2()
    model = tokcompile.optimize(dense, random_pruning(0.5))
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert copy.deepcopy(model).lm_head.weight.data_ptr() != dense.lm_head.weight.data_ptr()

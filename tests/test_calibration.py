"""Calibration: observers in captured graphs, prepared state on the model, resuming; with a small pass made for it."""

from __future__ import annotations

import copy

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tokcompile
from tokcompile import registry
from tokcompile.errors import CalibrationError, RecipeError
from tokcompile.plan.pass_base import Pass
from tokcompile.registry import PassParams

VOCABULARY = 64


class MeanOut(Pass):
    """Replace the output of a feed-forward block by its mean over the calibration data, a trainable parameter."""

    name = "mean_out"
    regions = "feed_forward"
    calibration = "required"

    class Params(PassParams):
        scale: float = Field(1.0, description="Factor on the mean.")

    def observe(self, ctx, region, seen):
        seen.weights["down"] = ctx.real(region.roles["down_weight"]) if "down_weight" in region.roles else None

        def add(output: Tensor) -> None:
            rows = output.reshape(-1, output.shape[-1])
            seen.sums["sum"] = seen.sums.get("sum", 0) + rows.sum(0)
            seen.sums["count"] = seen.sums.get("count", 0) + len(rows)

        ctx.observe(add, region.output)

    def prepare(self, seen):
        return {
            key: ({"mean": nn.Parameter(self.params.scale * s.sums["sum"] / s.sums["count"])}, {"layer": s.layer})
            for key, s in seen.items()
        }

    def apply(self, ctx, region):
        state, facts = ctx.state(self.name, region)
        output = region.output
        users = list(output.users)
        new = ctx.emit(lambda o, m: m.expand_as(o), output, state["mean"], before=ctx.after(output))
        for user in users:
            user.replace_input_with(output, new)
        return {"layer": facts["layer"]}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    registry.pass_names()
    monkeypatch.setitem(registry._passes, "mean_out", MeanOut)


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        )
    ).eval()


def recipe(**target) -> dict:
    return {"recipe_version": 1, "description": "test", "steps": [{"pass": "mean_out", "target": target}]}


def batches(count: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(VOCABULARY, (2, 5 + i), generator=generator)} for i in range(count)]


def means(dense: nn.Module, data: list[dict]) -> dict[str, Tensor]:
    """The same by module hooks."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        m.register_forward_hook(lambda _m, _i, o, n=n: seen.setdefault(n, []).append(o.reshape(-1, 32)))
        for n, m in dense.named_modules()
        if n.endswith(".mlp")
    ]
    with torch.no_grad():
        for item in data:
            dense(**item)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows).mean(0) for name, rows in seen.items()}


def replaced(dense: nn.Module, values: dict[str, Tensor], inputs: dict) -> Tensor:
    dense = copy.deepcopy(dense)
    for name, value in values.items():
        dense.get_submodule(name).forward = lambda x, v=value: v.expand_as(x)
    with torch.no_grad():
        return dense(**inputs).logits


def test_state_comes_from_every_item_and_the_graph_uses_it():
    dense, data = model(), batches()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    optimized = tokcompile.optimize(dense, recipe(), calibration=iter(data), lowering="eager", inputs=data[0])
    expected = means(dense, data)
    names = {n: p for n, p in optimized.named_parameters() if n.startswith("tokcompile.")}
    assert set(names) == {f"tokcompile.mean_out.{path}.mean" for path in expected}
    for path, value in expected.items():
        torch.testing.assert_close(names[f"tokcompile.mean_out.{path}.mean"].data, value)
    with torch.no_grad():
        torch.testing.assert_close(optimized(**data[1]).logits, replaced(dense, expected, data[1]))
    step = tokcompile.report(optimized).steps[0]
    assert step.status == "matched"
    assert step.matches == 3
    assert step.details["layer"] == {f"model.layers.{i}.mlp": i for i in range(3)}
    assert set(dense.state_dict()) == set(before)
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


def test_state_is_live_trainable_and_moves_with_the_model():
    dense, data = model(), batches()
    optimized = tokcompile.optimize(dense, recipe(layers=[-1]), calibration=data, lowering="eager")
    name = "tokcompile.mean_out.model.layers.2.mlp.mean"
    parameter = dict(optimized.named_parameters())[name]
    optimized(**data[0]).logits.square().mean().backward()
    assert parameter.grad is not None
    assert parameter.grad.abs().sum() > 0
    with torch.no_grad():
        first = optimized(**data[0]).logits
        parameter.mul_(3)
        second = optimized(**data[0]).logits
    assert not torch.allclose(first, second)
    with torch.no_grad():
        torch.testing.assert_close(second, replaced(dense, {"model.layers.2.mlp": parameter.data}, data[0]))
    assert name in optimized.state_dict()
    state = dict(optimized.state_dict())
    state[name] = torch.zeros_like(state[name])
    optimized.load_state_dict(state)
    with torch.no_grad():
        zero = {"model.layers.2.mlp": torch.zeros(32)}
        torch.testing.assert_close(optimized(**data[0]).logits, replaced(dense, zero, data[0]))
    assert optimized.to(torch.float64).state_dict()[name].dtype == torch.float64


def test_a_state_serves_several_models(tmp_path):
    dense, data = model(), batches()
    state = tokcompile.calibrate(dense, recipe(), data)
    one = tokcompile.optimize(dense, recipe(), calibration=state, lowering="eager")
    two = tokcompile.optimize(dense, recipe(), calibration=data, lowering="eager")
    with torch.no_grad():
        torch.testing.assert_close(one(**data[0]).logits, two(**data[0]).logits, rtol=0, atol=0)


def test_calibration_goes_on_where_it_was_broken_off(tmp_path, monkeypatch):
    monkeypatch.setattr("tokcompile.prepare.calibrate._SAVE_EVERY", 2)
    dense, data, file = model(), batches(5), tmp_path / "sums.safetensors"

    def breaks():
        yield from data[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokcompile.calibrate(dense, recipe(), breaks(), resume=file)
    resumed = tokcompile.calibrate(dense, recipe(), data, resume=file)
    again = tokcompile.calibrate(dense, recipe(), data, resume=file)  # nothing left to do
    whole = tokcompile.calibrate(dense, recipe(), data)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)
        assert torch.equal(resumed.state_dict()[name], again.state_dict()[name])
    with pytest.raises(CalibrationError, match="another recipe"):
        tokcompile.calibrate(dense, recipe(layers=[0]), data, resume=file)
    file.write_bytes(b"nonsense")
    with pytest.raises(CalibrationError, match="delete it"):
        tokcompile.calibrate(dense, recipe(), data, resume=file)


def test_generated_text_is_calibration_data():
    dense = model()
    item = {"input_ids": torch.arange(4)[None], "max_new_tokens": 6, "do_sample": False}
    state = tokcompile.calibrate(dense, recipe(layers=[0]), [item])
    sequence = dense.generate(**item)
    expected = means(dense, [{"input_ids": sequence[:, :-1]}])["model.layers.0.mlp"]
    torch.testing.assert_close(state.state_dict()["mean_out.model.layers.0.mlp.mean"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is empty"),
        ([{"pixels": torch.zeros(1)}], r"item 0 has the keys \['pixels'\]"),
        ([{}], "has the keys"),
        (["text"], "is a str"),
    ],
)
def test_bad_data(data, message):
    dense = model()
    with pytest.raises(CalibrationError, match=message):
        tokcompile.optimize(dense, recipe(), calibration=data)
    assert not hasattr(dense, "tokcompile")


def test_calibration_is_asked_for_and_refused_where_nothing_takes_it():
    with pytest.raises(CalibrationError, match=r"steps\[0\] \(mean_out\): needs calibration"):
        tokcompile.optimize(model(), recipe())
    with pytest.raises(CalibrationError, match="leave calibration out"):
        tokcompile.optimize(model(), "vlm_prune_90", calibration=batches())
    with pytest.raises(RecipeError, match="outside a stack of 3 layers"):
        tokcompile.optimize(model(), recipe(layers=[7]), calibration=batches())
    with pytest.raises(CalibrationError, match="met no region"):
        tokcompile.optimize(model(), recipe(path="nowhere.*"), calibration=batches())


def test_explain_says_what_is_missing():
    report = tokcompile.explain(model(), batches()[0], recipe())
    assert report.steps[0].status == "condition_failed"
    assert "calibration=" in report.steps[0].reason

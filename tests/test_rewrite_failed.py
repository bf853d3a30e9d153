"""A pass that fails by an error of its own, after it has changed the graph: no half-rewritten graph runs.

And a step without a graph: it says that there was none, not that its region is missing.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

import tokcompile
from tests.small_models import vit, vlm
from tokcompile import registry
from tokcompile.authoring import Context, EncoderRegion, FeedForwardRegion, Pass, Seen, Taken, register
from tokcompile.cli.codes import NO_MATCH, exit_code
from tokcompile.passes.pruning.vtc_cls import VtcCls
from tokcompile.reporting.report import Report, StepReport


def llm() -> tuple[Any, dict[str, Any]]:
    """A random Llama of two layers and a prompt."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model, {"input_ids": torch.randint(10, 64, (1, 12))}


def picture() -> tuple[nn.Module, dict[str, Any]]:
    model, pixels = vit()
    return model, {"pixel_values": pixels}


def times(ctx: Context, region: FeedForwardRegion, factor: float) -> None:
    """Multiply what the layer gives."""
    node = region.output
    users = list(node.users)
    new = ctx.emit(lambda t: t * factor, node, before=ctx.after(node))
    for user in users:
        user.replace_input_with(node, new)


class Halve(Pass):
    """Works."""

    name, regions = "halve", "feed_forward"

    def apply(self, ctx: Context, region: FeedForwardRegion) -> dict[str, Any]:
        times(ctx, region, 0.5)
        return {}


class Third(Halve):
    """Works, too."""

    name = "third"

    def apply(self, ctx: Context, region: FeedForwardRegion) -> dict[str, Any]:
        times(ctx, region, 1 / 3)
        return {}


class Breaks(Pass):
    """Spoils two layers, and fails at the second."""

    name, regions = "breaks", "feed_forward"
    done = 0

    def apply(self, ctx: Context, region: FeedForwardRegion) -> dict[str, Any]:
        times(ctx, region, 1e9)
        type(self).done += 1
        if type(self).done % 2 == 0:
            raise KeyError("no such weight")
        return {}


class BreaksDecoding(Pass):
    """Works in a prefill, and spoils and fails at a decode step."""

    name, regions = "breaks_decoding", "feed_forward"

    def apply(self, ctx: Context, region: FeedForwardRegion) -> dict[str, Any]:
        if isinstance(region.tokens, int) and region.tokens == 1:
            times(ctx, region, 1e9)
            raise ZeroDivisionError
        times(ctx, region, 0.5)
        return {}


class BreaksPlanning(Halve):
    """Fails before anything is changed."""

    name = "breaks_planning"

    def plan(self, ctx: Context, region: FeedForwardRegion) -> Taken:
        raise IndexError("out of range")


class BreaksObserving(Halve):
    """Fails while it is calibrated."""

    name, calibration = "breaks_observing", "required"

    def observe(self, ctx: Context, region: FeedForwardRegion, seen: Seen) -> None:
        raise IndexError("out of range")


class BreaksLikeDynamo(Halve):
    """An error of a class that a capture that fails has, too."""

    name = "breaks_like_dynamo"

    def apply(self, ctx: Context, region: FeedForwardRegion) -> dict[str, Any]:
        times(ctx, region, 1e9)
        raise torch._dynamo.exc.Unsupported("mine")


class BreaksScoring(VtcCls):
    """Fails in the graph of the image encoder."""

    name = "breaks_scoring"

    def score_features(self, ctx: Context, features: fx.Node) -> fx.Node:
        [encoder] = ctx.regions.of(EncoderRegion)
        node = encoder.output
        users = list(node.users)
        new = ctx.emit(lambda t: t * 1e9, node, before=ctx.after(node))
        for user in users:
            user.replace_input_with(node, new)
        raise ValueError("no scores")


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.pass_names()
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))
    for method in (
        *(Halve, Third, Breaks, BreaksDecoding, BreaksPlanning, BreaksObserving, BreaksLikeDynamo),
        BreaksScoring,
    ):
        register(method)
    Breaks.done = 0


def recipe(*names: str, **params: Any) -> dict[str, Any]:
    steps = [{"pass": name, "params": params} for name in names]
    return {"recipe_version": 1, "description": "of a test", "steps": steps}


def generate(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Logits of a prefill and of some decode steps."""
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return out.logits


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


# .. a prefill and decode steps


def test_the_model_answers_as_without_the_step() -> None:
    model, inputs = llm()
    dense = generate(model, inputs)
    fast = tokcompile.optimize(model, recipe("breaks"), lowering="eager", on_no_match="warn")
    with pytest.warns(UserWarning, match="breaks") as caught:
        same(generate(fast, inputs), dense)
    texts = [str(warning.message) for warning in caught if "breaks" in str(warning.message)]
    assert len(texts) == 1  # in the prefill and in the decode steps alike
    assert "This graph runs as without that step" in texts[0]
    assert Breaks.done == 4  # two layers of two graphs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(generate(fast, inputs), dense)
    report = tokcompile.report(fast)
    [step] = report.steps
    assert (step.status, step.matches, step.regions) == ("rewrite_failed", 0, [])
    assert "step 'breaks' failed at feed_forward in the prefill graph" in step.reason
    assert "KeyError: 'no such weight'" in step.reason
    assert f"{Path(__file__)}:" in step.reason  # the line of the pass
    assert "node " in step.reason
    assert "model.layers.1.mlp" in step.reason
    assert "modeling_llama.py:" in step.reason
    assert step.reason in report.problems
    assert {stage.name for stage in report.stages if stage.captured} == {"prefill", "decode"}
    for plan in report.to_dict()["plans"]:
        assert plan["steps"][0]["regions"] == []
        assert "KeyError" in plan["steps"][0]["reason"]


@pytest.mark.parametrize("names", [("breaks", "halve", "third"), ("halve", "third", "breaks")])
def test_other_steps_stay(names: tuple[str, ...]) -> None:
    """Bit for bit the recipe without that step, wherever it stands."""
    model, inputs = llm()
    fast = tokcompile.optimize(model, recipe(*names), lowering="eager", on_no_match="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            found = fast(**inputs).logits
            wanted = tokcompile.optimize(model, recipe("halve", "third"), lowering="eager")(**inputs).logits
    assert torch.equal(found, wanted)
    steps = {step.pass_name: step for step in tokcompile.report(fast).steps}
    assert {name: str(step.status) for name, step in steps.items()} == {
        "breaks": "rewrite_failed",
        "halve": "matched",
        "third": "matched",
    }
    assert (steps["halve"].matches, steps["third"].matches) == (2, 2)


def test_it_raises_and_names_step_place_and_cause() -> None:
    model, inputs = llm()
    fast = tokcompile.optimize(model, recipe("halve", "breaks"), lowering="eager")
    for _ in range(2):  # not once only
        with pytest.raises(tokcompile.RewriteError, match="step 'breaks' failed at feed_forward") as caught:
            fast(**inputs)
    assert isinstance(caught.value, tokcompile.NoMatchError)
    assert isinstance(caught.value.__cause__, KeyError)
    assert (caught.value.step, caught.value.path) == (1, "model.layers.1.mlp")
    assert "modeling_llama.py:" in caught.value.source
    assert exit_code(caught.value) == NO_MATCH
    assert [str(step.status) for step in tokcompile.report(fast).steps] == ["matched", "rewrite_failed"]
    with pytest.raises(tokcompile.RewriteError):
        tokcompile.optimize(model, recipe("breaks"), inputs=inputs, lowering="eager")


def test_one_graph_of_several() -> None:
    """What worked in the prefill stays; the decode steps run as without the step, and the status says so."""
    model, inputs = llm()
    fast = tokcompile.optimize(model, recipe("breaks_decoding"), lowering="eager", on_no_match="warn")
    with torch.no_grad():
        first = fast(**inputs, use_cache=True)
        token = first.logits[:, -1:].argmax(-1)
        with pytest.warns(UserWarning, match="in the decode graph by an error of its own") as caught:
            found = fast(input_ids=token, past_key_values=first.past_key_values, use_cache=True).logits
    assert len([warning for warning in caught if "breaks_decoding" in str(warning.message)]) == 1
    with torch.no_grad():
        halved = tokcompile.optimize(model, recipe("halve"), lowering="eager")(**inputs, use_cache=True)
        torch.testing.assert_close(first.logits, halved.logits)
        wanted = model(input_ids=token, past_key_values=halved.past_key_values, use_cache=True).logits
    torch.testing.assert_close(found, wanted)
    [step] = tokcompile.report(fast).steps
    assert (step.status, step.matches) == ("rewrite_failed", 2)
    assert "ZeroDivisionError" in step.reason
    raising = tokcompile.optimize(model, recipe("breaks_decoding"), lowering="eager")
    with torch.no_grad():
        out = raising(**inputs, use_cache=True)
        with pytest.raises(tokcompile.RewriteError, match="in the decode graph"):
            raising(input_ids=token, past_key_values=out.past_key_values, use_cache=True)


# .. other ways to fail, and other ways in


@pytest.mark.parametrize("name", ["breaks", "breaks_planning", "breaks_like_dynamo"])
def test_explain_shows_it(name: str, tmp_path: Path) -> None:
    model, inputs = picture()
    report = tokcompile.explain(model, inputs, recipe=recipe(name, "halve"))
    assert [str(step.status) for step in report.steps] == ["rewrite_failed", "matched"]
    assert all(stage.captured for stage in report.stages)
    text = str(report)
    assert "rewrite_failed" in text
    assert f"steps[0] ({name}): step '{name}' failed at feed_forward in the forward graph" in text
    assert any(name in problem for problem in report.problems)
    report.to_html(tmp_path / "page.html")
    assert "the rewrite failed" in (tmp_path / "page.html").read_text()


def test_an_encoder_of_its_own() -> None:
    model, inputs = vlm()
    with torch.no_grad():
        dense = model(**inputs).logits
        fast = tokcompile.optimize(model, recipe("breaks_scoring", keep=0.25), lowering="eager", on_no_match="warn")
        with pytest.warns(UserWarning, match="no scores"):
            found = fast(**inputs).logits
    torch.testing.assert_close(found, dense)
    [step] = tokcompile.report(fast).steps
    assert (step.status, step.matches) == ("rewrite_failed", 0)
    assert "failed at features in the encoder graph" in step.reason


def test_the_backend_of_torch_compile() -> None:
    model, inputs = picture()
    options = {"recipe": recipe("breaks"), "lowering": "eager"}
    with torch.no_grad(), pytest.raises(tokcompile.RewriteError):
        torch.compile(model, backend="tokcompile", options={**options})(**inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="tokcompile", options={**options, "on_no_match": "warn"})
    with torch.no_grad():
        with pytest.warns(UserWarning, match="no such weight"):
            found = compiled(**inputs)
        torch.testing.assert_close(found.last_hidden_state, model(**inputs).last_hidden_state)


def test_calibration_does_not_go_on() -> None:
    model, inputs = llm()
    with pytest.raises(tokcompile.RewriteError, match=r"breaks_observing.*IndexError: out of range"):
        tokcompile.calibrate(model, recipe("breaks_observing"), [inputs])


def test_no_file_of_a_failed_step_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model, inputs = picture()
    with pytest.raises(tokcompile.RewriteError, match="step 'breaks' failed"):
        tokcompile.export_onnx(model, inputs, tmp_path / "out", recipe=recipe("breaks"))
    assert not list(tmp_path.rglob("*.onnx"))


# .. no graph


class Mute(nn.Module):
    """Dynamo can make one graph of it for a call that does not ask for more."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor, talk: bool = False) -> Tensor:
        hidden = self.inner(pixel_values=pixel_values).last_hidden_state
        if talk:
            torch._dynamo.graph_break()
        return hidden


def status(report: Report) -> StepReport:
    [step] = report.steps
    return step


def test_a_step_says_that_there_was_no_graph() -> None:
    inner, inputs = picture()
    fast = tokcompile.optimize(Mute(inner).eval(), recipe("halve"), lowering="eager", on_no_match="warn")
    step = status(tokcompile.report(fast))
    assert (step.status, step.reason) == ("not_captured", "no graph was captured yet")
    with torch.no_grad(), pytest.warns(UserWarning, match="stage 'forward' was not captured"):
        torch.testing.assert_close(fast(**inputs, talk=True), inner(**inputs).last_hidden_state)
    step = status(tokcompile.report(fast))
    assert (step.status, step.matches) == ("not_captured", 0)
    assert step.reason.startswith("stage 'forward' was not captured: ")
    assert "there was no graph" in status_words(tokcompile.report(fast))
    with torch.no_grad():
        fast(**inputs)
    assert status(tokcompile.report(fast)).status == "matched"


def test_a_region_that_is_missing_is_another_matter() -> None:
    """A graph without the region says ``structure_miss``, and goes on saying so when a later call has no graph."""
    inner, inputs = picture()
    steps = recipe("todre", keep=0.5)
    report = tokcompile.explain(Mute(inner).eval(), {**inputs, "talk": True}, recipe=steps)
    assert status(report).status == "not_captured"
    assert "no merge_point" not in status(report).reason
    report = tokcompile.explain(Mute(inner).eval(), inputs, recipe=steps)
    assert status(report).status == "structure_miss"
    assert "no merge_point in the forward graph" in status(report).reason


def status_words(report: Report) -> str:
    from tokcompile.reporting.html import page

    return page(report.to_dict())

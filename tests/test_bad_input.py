"""What cannot be done is one clear error that says what to do, and leaves the model as it was."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, SwinConfig, SwinModel

import tokcompile
from tests.pruning import RANDOM, TODRE, optimized, recipe
from tests.zoo.encoders_for_pruning import ENCODERS
from tests.zoo.vlm import TEXT, VLMS, randomize, shallow
from tokcompile.errors import NoMatchError, RecipeError, TokcompileError

CLASS_ATTENTION = [{"pass": "class_attention", "params": {"keep": [0.5], "at": [0.5]}}]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else next(iter(output.values()))


@contextlib.contextmanager
def untouched(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[None]:
    """What happens inside leaves ``model`` alone: its output, attributes, functions and configuration."""

    def state() -> Any:
        modules = list(model.modules())
        # transformers installs its recording hooks once, when they are first needed, and notes it on the module
        attributes = [
            {key: id(value) for key, value in vars(m).items() if key != "_output_capturing_hooks_installed"}
            for m in modules
        ]
        config = copy.deepcopy(vars(model.config)) if hasattr(model, "config") else None
        settings = torch._dynamo.config.capture_scalar_outputs, torch.backends.mha.get_fastpath_enabled()
        return attributes, str(config), [type(m).forward for m in modules], settings

    def output() -> Tensor:
        with torch.no_grad():
            return _first(model(**inputs))

    before, wanted = output(), state()
    yield
    assert state() == wanted
    assert torch.equal(output(), before)


def _text_model() -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(**TEXT | {"num_hidden_layers": 2}))
    return randomize(model), {"input_ids": torch.randint(3, 200, (2, 9))}


# --------------------------------------------------------------------------------------------------- no match


def test_a_text_model_has_no_merge_point() -> None:
    model, inputs = _text_model()
    with untouched(model, inputs), pytest.raises(NoMatchError) as caught:
        tokcompile.optimize(model, recipe(RANDOM), lowering="eager", inputs=inputs)
    text = str(caught.value)
    assert "step 'random' changed 0 region(s), expected at least 1" in text
    assert "no merge_point in the prefill graph" in text
    assert "call with an image (pixel_values), or use a recipe for models without images" in text
    assert "on_no_match='warn' or 'ignore'" in text


def test_without_inputs_the_first_call_says_so() -> None:
    model, inputs = _text_model()
    pruned = optimized(model, RANDOM)
    with untouched(model, inputs):
        for _ in range(2):  # the error does not go away by itself
            with pytest.raises(NoMatchError, match="no merge_point"), torch.no_grad():
                pruned(**inputs)


def test_a_vlm_called_without_an_image() -> None:
    case = shallow(VLMS["llava"](), 3)
    inputs = case.inputs()
    text = {"input_ids": torch.randint(3, 200, (1, 9))}
    pruned = optimized(case.model, TODRE)
    with untouched(case.model, inputs):
        with pytest.raises(NoMatchError, match=r"call with an image \(pixel_values\)"), torch.no_grad():
            pruned(**text)
        with torch.no_grad(), tokcompile.record(pruned) as recording:  # with an image it runs after all
            pruned(**inputs)
        assert len(recording.kept) == 2
        with torch.no_grad():  # and from then on text alone does, too
            found, wanted = pruned(**text).logits, case.model(**text).logits
        assert torch.equal(found, wanted)


def test_a_path_that_fits_no_region() -> None:
    case = ENCODERS["vit"]()
    steps = [CLASS_ATTENTION[0] | {"target": {"region": "vision_encoder", "path": "nowhere.*"}}]
    with untouched(case.model, case.inputs()), pytest.raises(NoMatchError) as caught:
        optimized(case.model, steps, inputs=case.inputs())
    assert "1 vision_encoder found ((model)), none fits the step's target filters" in str(caught.value)


def test_warn_and_ignore() -> None:
    model, inputs = _text_model()
    with torch.no_grad():
        wanted = model(**inputs).logits
    with untouched(model, inputs):
        pruned = optimized(model, RANDOM, on_no_match="warn")
        with pytest.warns(UserWarning, match="no merge_point in the prefill graph"), torch.no_grad():
            assert torch.equal(pruned(**inputs).logits, wanted)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            assert torch.equal(pruned(**inputs).logits, wanted)  # once is enough
            silent = optimized(model, RANDOM, on_no_match="ignore")
            assert torch.equal(silent(**inputs).logits, wanted)
    for each in (pruned, silent):
        step = tokcompile.report(each).steps[0]
        assert step.status == "structure_miss"
        assert step.matches == 0
        assert "no merge_point" in step.reason


# ------------------------------------------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"pass": "randon", "params": {"keep": 0.5}}], r"randon.*random"),
        ([{"pass": "random", "params": {"keep": 1.5}}], r"keep"),
        ([{"pass": "random", "params": {"keep": -0.1}}], r"keep"),
        ([{"pass": "random", "params": {}}], r"keep"),
        ([{"pass": "random", "params": {"keep": 0.5, "sede": 1}}], r"sede.*seed"),
        ([{"pass": "class_attention", "params": {"keep": [0.5, 0.5], "at": [0.5]}}], r"keep has 2 stages and at has 1"),
        ([{"pass": "class_attention", "params": {"keep": [0.5, 0.5], "at": [0.7, 0.2]}}], r"ascending fractions"),
    ],
)
def test_a_bad_recipe(steps: list[dict[str, Any]], says: str) -> None:
    model = nn.Linear(2, 2)
    with untouched(model, {"input": torch.ones(1, 2)}), pytest.raises(RecipeError, match=f"(?s){says}"):
        optimized(model, steps)


def test_bad_arguments() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TokcompileError, match=r"takes a torch\.nn\.Module, not int"):
        optimized(3, RANDOM)
    with pytest.raises(TokcompileError, match="choose one of inductor, eager"):
        optimized(model, RANDOM, lowering="onnx")
    with pytest.raises(TokcompileError, match="choose one of error, warn, ignore"):
        optimized(model, RANDOM, on_no_match="raise")
    with pytest.raises(TokcompileError, match=r"was not made by tokcompile\.optimize"):
        tokcompile.report(model)
    with pytest.raises(TokcompileError, match="optimized already; start from the original model"):
        optimized(optimized(model, RANDOM), RANDOM)


def test_bad_options_of_the_backend() -> None:
    model = nn.Linear(2, 2)
    for options in (None, {"recipe": recipe(RANDOM), "lowring": "eager"}):
        compiled = torch.compile(model, backend="tokcompile", options=options)
        with pytest.raises(Exception, match=r"takes options recipe, lowering, on_no_match and needs 'recipe'"):
            compiled(torch.ones(1, 2))
        torch._dynamo.reset()
    assert torch.isfinite(model(torch.ones(1, 2))).all()


# -------------------------------------------------------------------------------------- what cannot be narrowed


class _Layer(nn.Module):
    """A pre-norm layer; a subclass adds something that looks at neighbouring tokens."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, n, c))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class _ConvLayer(_Layer):
    """As in LocalViT and CvT: a depthwise convolution on the 4 x 4 grid of tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(width)
        self.local = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], 4, 4)
        return super().forward(x + self.local(grid).flatten(2).transpose(1, 2))


class _TokenMLPLayer(_Layer):
    """A token-mixing MLP next to the attention."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(width)
        self.mix = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.mix(x.transpose(1, 2)).transpose(1, 2))


class _Encoder(nn.Module):
    def __init__(self, layer: type[_Layer]) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 32, 8, 8)
        self.layers = nn.ModuleList(layer() for _ in range(4))
        self.norm = nn.LayerNorm(32)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (_ConvLayer, r"found kernel \[3, 3\]|a view splits the token axis of 16 .* folded to a grid or to windows"),
        (_TokenMLPLayer, r"a linear layer mixes the token axis \(a token-mixing MLP\)"),
    ],
)
def test_layers_that_need_every_token(layer: type[_Layer], says: str) -> None:
    with torch.random.fork_rng(devices=[]):
        model = randomize(_Encoder(layer))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with untouched(model, inputs), pytest.raises(NoMatchError, match=f"(?s){says}") as caught:
        optimized(model, CLASS_ATTENTION, inputs=inputs)
    text = str(caught.value)
    assert "step 'class_attention' changed 0 region(s)" in text
    assert "[node " in text
    assert "test_bad_input.py:" in text  # the line of the model's code


def test_a_window_model() -> None:
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
    with torch.random.fork_rng(devices=[]):
        model = randomize(SwinModel(config))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    with untouched(model, inputs), pytest.raises(NoMatchError) as caught:
        optimized(model, CLASS_ATTENTION, inputs=inputs)
    text = str(caught.value)
    assert "step 'class_attention' changed 0 region(s)" in text
    assert "a view splits the token axis of 64" in text
    assert "folded to a grid or to windows" in text
    assert "modeling_swin.py:" in text


class _ConvVLM(nn.Module):
    """A convolution over the sequence below the merge point."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = VLMS["plain_index_put"]().model
        self.conv = nn.Conv1d(64, 64, 3, padding=1)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.vlm.embed_inputs(input_ids, pixel_values)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.vlm.decode(x, attention_mask, position_ids)


def test_a_convolution_below_the_merge_point() -> None:
    model = randomize(_ConvVLM())
    inputs = VLMS["plain_index_put"]().inputs(batch=2)
    with untouched(model, inputs), pytest.raises(NoMatchError) as caught:
        optimized(model, RANDOM, inputs=inputs)
    text = str(caught.value)
    assert "works on neighbouring tokens" in text
    assert "conv" in text
    assert "cut below this node, or leave this region dense" in text


def test_in_place_is_undone_after_a_refusal() -> None:
    model, inputs = _text_model()
    with untouched(model, inputs), pytest.raises(NoMatchError):
        optimized(model, RANDOM, inputs=inputs, inplace=True)


# -------------------------------------------------------------------------------------------------------- explain


def test_explain_changes_nothing() -> None:
    case = shallow(VLMS["llava"](), 3)
    inputs = case.inputs(batch=2)
    with untouched(case.model, inputs):
        found = tokcompile.explain(case.model, inputs, recipe(TODRE))
    assert found.steps[0].status == "matched"
    assert found.steps[0].details["tokens_after"] < found.steps[0].details["tokens_before"]
    assert any(region["kind"] == "merge_point" for region in found.regions)


def test_explain_a_miss() -> None:
    model, inputs = _text_model()
    with untouched(model, inputs):
        found = tokcompile.explain(model, inputs, recipe(RANDOM))
    assert found.steps[0].status == "structure_miss"
    assert "no merge_point" in found.steps[0].reason

"""Pruned encoders equal the dense model with the dropped keys hidden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import tokcompile
from tests import oracle
from tests.members import members
from tests.pruning import close, hidden, optimized, recipe
from tests.zoo.encoders_for_pruning import ENCODERS, EncoderCase
from tokcompile.capture.capture import DYNAMO_CONFIG, from_dynamo
from tokcompile.capture.graph import module_path
from tokcompile.capture.trace import inline
from tokcompile.rewrite.narrow import Cut, check, narrow

VISION = [name for name in ENCODERS if name != "clip_text"]
#: After one and after three of the four layers.
TWO_STAGES = [{"pass": "class_attention", "params": {"keep": [0.75, 0.5], "at": [0.25, 0.75]}}]
ALL = [{"pass": "class_attention", "params": {"keep": [1.0, 1.0], "at": [0.25, 0.75]}}]


def rows(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def compare(case: EncoderCase, model: Any, batch: int) -> None:
    inputs = case.inputs(batch, seed=batch)
    with torch.no_grad(), tokcompile.record(model) as recording:
        found = case.output(model(**inputs))
    assert [(entry.layer, entry.indices.shape[1] - case.prefix_tokens) for entry in recording.kept] == [(1, 12), (3, 6)]
    for entry in recording.kept:
        assert torch.equal(entry.indices[:, : case.prefix_tokens], torch.arange(case.prefix_tokens).expand(batch, -1))
        assert (entry.indices.diff(dim=1) > 0).all()
    wanted = case.oracle(inputs, hidden(recording, case.tokens, len(case.layers)))
    close(found, rows(wanted, recording.kept[-1].indices))


@pytest.mark.parametrize(
    "name", members(VISION, ["vit", "siglip", "dinov2_registers", "torch_encoder_post_norm", "fused_vit"])
)
def test_two_stages_equal_masked_dense(name: str) -> None:
    """One compiled model for all batch sizes; the first fixes the sizes, the second makes the batch symbolic."""
    case = ENCODERS[name]()
    model = optimized(case.model, TWO_STAGES)
    for batch in (2, 5, 1, 7):
        compare(case, model, batch)
    assert model._tokcompile_session.compilations <= 3


@pytest.mark.parametrize("name", VISION)
def test_keeping_everything_changes_nothing(name: str) -> None:
    case = ENCODERS[name]()
    inputs = case.inputs(2)
    model = optimized(case.model, ALL)
    with torch.no_grad():
        found = case.output(model(**inputs))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path of nn.TransformerEncoder is another kernel
        wanted = case.run(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert torch.equal(found, wanted)


def test_rows_keep_their_own_tokens() -> None:
    case = ENCODERS["vit"]()
    model = optimized(case.model, TWO_STAGES)
    with torch.no_grad(), tokcompile.record(model) as recording:
        model(**case.inputs(5))
    assert len({tuple(row) for row in recording.kept[0].indices.tolist()}) > 1


@pytest.mark.parametrize("name", ["vit", "fused_vit"])
def test_the_backend_equals_optimize(name: str) -> None:
    case = ENCODERS[name]()
    inputs = case.inputs(2)
    compiled = torch.compile(
        case.model,
        backend="tokcompile",
        fullgraph=name == "fused_vit",
        options={"recipe": recipe(TWO_STAGES), "lowering": "eager"},
    )
    model = optimized(case.model, TWO_STAGES)
    with torch.no_grad():
        case.model(**inputs)  # transformers installs hooks under a lock at the first call
        found, wanted = case.output(compiled(**inputs)), case.output(model(**inputs))
    assert found.shape[1] == case.prefix_tokens + 6
    assert torch.equal(found, wanted)


# ---------------------------------------------------------------------------------- CLIP's text tower, cut by hand


def _cut_text(
    case: EncoderCase, inputs: dict[str, Tensor], kept: Tensor, layer: int, **known: int
) -> tuple[Any, Callable[..., Any]]:
    """Output of the text tower whose residual stream keeps only ``kept [B, K]`` after ``layer``."""

    def backend(graph_module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        captured = from_dynamo(graph_module)
        stream = [
            n
            for n in captured.graph.nodes
            if n.target is torch.ops.aten.add.Tensor
            and module_path(n).endswith(f"layers.{layer}")
            and n.meta["val"].dim() == 3
        ]
        index = inline(captured, lambda _: kept.clone(), [stream[-1]], stream[-1].next)
        check(captured, stream[-1], **known)
        narrow(captured, [Cut(stream[-1], index, kept.shape[1], **known)])
        return captured.graph_module

    def call(model: Any, inputs: dict[str, Tensor]) -> Any:
        return model(**inputs)

    case.run(inputs)
    with torch.no_grad(), torch._dynamo.config.patch(**DYNAMO_CONFIG):
        return torch.compile(call, backend=backend, dynamic=False, fullgraph=True)(case.model, inputs)


@pytest.mark.parametrize("layer", [0, 2])
def test_clip_text(layer: int) -> None:
    """Causal attention; the end-of-sequence token, whose place in the sequence differs by row, is read at the end."""
    case = ENCODERS["clip_text"]()
    inputs = case.inputs(3)
    ids = inputs["input_ids"]
    for row, end in enumerate((19, 11, 15)):
        ids[row, end:] = 98
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(3, 20, generator=generator)
    ends = ids.eq(98).int().argmax(-1)
    scores[:, 0] = 2
    scores.scatter_(1, ends[:, None], 2)
    kept = scores.topk(8).indices.sort().values
    assert len({tuple(row) for row in kept.tolist()}) == 3

    found = _cut_text(case, inputs, kept, layer)
    dropped = torch.ones(3, 20, dtype=torch.bool).scatter(1, kept, False)
    with case.hidden_keys(case.layers, oracle.hide_from(layer + 1, dropped, len(case.layers))), torch.no_grad():
        wanted = case.model(**inputs)
    close(found.last_hidden_state, rows(wanted.last_hidden_state, kept))
    close(found.pooler_output, wanted.pooler_output)


# ------------------------------------------------------------------------------------------------------- Inductor


@pytest.mark.inductor
def test_inductor() -> None:
    case = ENCODERS["vit"]()
    model = optimized(case.model, TWO_STAGES, lowering="inductor")
    for batch in (2, 5):
        compare(case, model, batch)

"""``torch.export`` programs come to the same form as Dynamo graphs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.zoo.encoders_for_pruning import ENCODERS
from tokcompile.capture.capture import from_export
from tokcompile.capture.graph import module_path, source_line
from tokcompile.capture.trace import inline
from tokcompile.regions import find_regions
from tokcompile.rewrite.narrow import Cut, narrow


@pytest.mark.parametrize("name", ["vit", "fused_vit"])
def test_export_program_runs_and_shows_its_regions(name: str) -> None:
    case = ENCODERS[name]()
    inputs = case.inputs(2)
    with torch.no_grad():
        program = torch.export.export(
            case.model, (), dict(inputs), dynamic_shapes={key: {0: torch.export.Dim.DYNAMIC} for key in inputs}
        )
    captured = from_export(program)
    regions = find_regions(captured.graph)
    layers = len(case.layers)
    assert Counter(r.kind for r in regions.regions) == {
        "vision_encoder": 1,
        "attention": layers,
        "feed_forward": layers,
    }
    attention = regions.of("attention")[0].output
    assert module_path(attention)
    assert source_line(attention)

    state = {**program.state_dict, **program.constants}
    for batch in (2, 5):
        inputs = case.inputs(batch)
        args = [
            state[spec.target] if spec.target else inputs[spec.arg.name] for spec in program.graph_signature.input_specs
        ]
        with torch.no_grad():
            found = captured.graph_module(*args)[0]
        assert torch.equal(found, case.run(inputs))

    # and it is narrowed like a Dynamo graph
    encoder = regions.of("vision_encoder")[0]
    cut = encoder.layers[1].output
    tokens = cut.meta["val"].shape[1]
    kept = [i for i in range(tokens) if i % 2 == 0]
    even = torch.arange(len(kept)) * 2
    index = inline(captured, lambda x: even[None].expand(x.shape[0], len(kept)), [cut], cut.next)
    narrow(captured, [Cut(cut, index, len(kept), prefix=case.prefix_tokens)])
    hidden = torch.ones(5, tokens, dtype=torch.bool)
    hidden[:, kept] = False
    with torch.no_grad():
        found = captured.graph_module(*args)[0]
    wanted = case.oracle(inputs, dict.fromkeys(range(2, layers), hidden))[:, kept]
    assert (found - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())

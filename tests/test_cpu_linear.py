"""Linear layers on the CPU: which product is taken, and that it is the same product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokcompile.capture.capture import from_dynamo
from tokcompile.lower import cpu_linear
from tokcompile.lower.inductor import lower

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


def _run(model: nn.Module, x: torch.Tensor, lowering: str) -> tuple[torch.Tensor, int]:
    found = 0

    def backend(graph_module, _inputs):  # type: ignore[no-untyped-def]
        def call(*args):  # type: ignore[no-untyped-def]
            nonlocal found
            captured = from_dynamo(graph_module)
            run, _ = lower(captured, lowering)
            found = len(
                captured.graph.find_nodes(op="call_function", target=torch.ops.tokcompile.measured_linear.default)
            )
            return run(*args)

        return call

    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)(x), found


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 64, bias=False)).eval()


@pytest.mark.inductor
def test_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "LEAST_FLOPS", 0)
    monkeypatch.setattr(
        cpu_linear,
        "_faster",
        {(256, 64, torch.get_num_threads()): {14: True}, (64, 256, torch.get_num_threads()): {14: True}},
    )
    model, x = _model(), torch.randn(2, 7, 64)
    with torch.no_grad():
        found, count = _run(model, x, "inductor")
        assert count == 2
        torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)


def test_small_layers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "_times_say", lambda *_: pytest.fail("timed"))
    with torch.no_grad():
        _, count = _run(_model(), torch.randn(2, 7, 64), "eager")
    assert count == 0


@pytest.mark.inductor
def test_with_gradients_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "LEAST_FLOPS", 0)
    monkeypatch.setattr(cpu_linear, "_is_faster", lambda *_: True)
    model, x = _model(), torch.randn(2, 7, 64, requires_grad=True)
    found, count = _run(model, x, "inductor")
    found.sum().backward()
    assert count == 0
    assert x.grad is not None


def test_a_shape_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "LEAST_FLOPS", 0)
    monkeypatch.setattr(cpu_linear, "_faster", {})
    calls: list[int] = []
    monkeypatch.setattr(cpu_linear, "_seconds", lambda call, weights: float(calls.append(1) or len(calls) % 2))
    state = torch.random.get_rng_state()
    assert cpu_linear._is_faster(4, 8, 16)
    assert cpu_linear._is_faster(4, 8, 16)
    assert len(calls) == 2 * cpu_linear.ROUNDS
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_number_of_rows_decides_when_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    onednn = cpu_linear._onednn_linear
    monkeypatch.setattr(cpu_linear, "_onednn_linear", lambda x, w, b: (ran.append(x.shape[0]), onednn(x, w, b))[1])
    monkeypatch.setattr(cpu_linear, "_faster", {(8, 16, torch.get_num_threads()): {4: True, 64: False}})
    weight, bias = torch.randn(8, 16), torch.randn(8)
    for rows in (4, 64, 6, 100, 0):  # known, known, and what is nearer to one of them; no rows
        x = torch.randn(rows, 16)
        found = torch.ops.tokcompile.measured_linear(x, weight, bias)
        # two libraries add in different orders
        torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-6)
    assert ran == [4, 6]

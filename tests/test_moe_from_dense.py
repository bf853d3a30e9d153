"""Experts made of a dense layer: all active equals the dense layer; fewer equal the masked dense layer; bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokcompile
from tests.members import members
from tests.test_stem import close, gated, output
from tests.zoo import decoders, encoders, vision
from tokcompile.errors import CalibrationError, NoMatchError, RecipeError
from tokcompile.families.moe import experts
from tokcompile.families.moe import split as moe_split
from tokcompile.kernels.activation import activate

FAMILIES = {
    "llama": decoders.llama,
    "qwen3": decoders.qwen3,
    "gemma2": decoders.gemma2,
    "gpt2": decoders.gpt2,
    "vit": vision.vit,
    "hand_written_gated": gated,
    "hand_written_plain": encoders.hand_written,
}
CMOE = {"split": "activity", "choice": "analytic"}
ROUTERS = ["top_k", "relu"]
WAYS = {"energy": {}, "cmoe": CMOE}


def recipe(target: dict | None = None, **params) -> dict:
    return {
        "recipe_version": 1,
        "description": "test",
        "steps": [{"pass": "moe_from_dense", "target": target or {}, "params": {"gate": "off"} | params}],
    }


def result(model: nn.Module, inputs: dict) -> Tensor:
    with torch.no_grad():
        found = model(**inputs)
    return (
        found
        if isinstance(found, Tensor)
        else next(v for v in (getattr(found, n, None) for n in ("logits", "last_hidden_state")) if v is not None)
    )


@pytest.mark.parametrize(
    ("family", "way", "router"),
    members(
        itertools.product(FAMILIES, WAYS, ROUTERS),
        [
            ("llama", "energy", "top_k"),
            ("gemma2", "cmoe", "relu"),
            ("gpt2", "energy", "relu"),
            ("vit", "cmoe", "top_k"),
            ("hand_written_gated", "energy", "top_k"),
            ("hand_written_plain", "cmoe", "relu"),
        ],
    ),
)
def test_all_experts_active_equal_the_dense_layer(family, way, router):
    dense, inputs = FAMILIES[family]()
    optimized = tokcompile.optimize(
        dense,
        recipe(experts=8, shared=2, active=6, router=router, **WAYS[way]),
        calibration=[inputs],
        lowering="eager",
        inputs=inputs,
    )
    step = tokcompile.report(optimized).steps[0]
    assert step.status == "matched"
    assert step.matches == 2
    assert step.details["neurons_active"] == 1
    close(result(optimized, inputs), result(dense, inputs), 2e-6)


def test_all_experts_active_in_bf16():
    dense, inputs = decoders.llama()
    exact = output(dense, inputs)
    optimized = tokcompile.optimize(
        dense.bfloat16(), recipe(experts=8, shared=2, active=6), calibration=[inputs], lowering="eager", inputs=inputs
    )
    # sums of the experts round in another order than one product does: as far from fp32 as dense bf16 is
    dense_error = float((output(dense, inputs) - exact).norm() / exact.norm())
    close(output(optimized, inputs), exact, 1.5 * dense_error)
    assert dense_error < 1.5e-2


def masked(layer: nn.Module, tensors: dict[str, Tensor], split: tuple[int, int], act: str, router: str):
    """The oracle: a dense layer whose neurons are multiplied by the weights of their experts, by hooks."""
    _, active = split
    gate = getattr(layer, "gate_proj", None)
    down = getattr(layer, "down_proj", None) or layer.c_proj
    up = getattr(layer, "up_proj", None) or layer.c_fc
    row = lambda m: m.weight if isinstance(m, nn.Linear) else m.weight.T  # noqa: E731
    own = tensors["gate_up"].chunk(2, 1)[1] if gate is not None else tensors["gate_up"]
    # each neuron of the layer, found again among the experts by its row
    expert = torch.full((row(up).shape[0],), -1)
    for number, rows in enumerate(own):
        expert[(row(up)[:, None] == rows).all(-1).any(1)] = number

    def hook(_module, args):
        (inner,) = args
        x = hook.x.reshape(-1, hook.x.shape[-1])
        index, weight = experts.route(x, tensors, act, router, active)
        chosen = torch.zeros(len(x), len(own) + 1)
        chosen.scatter_(1, torch.where(index < 0, len(own), index), weight.masked_fill(index < 0, 0))
        chosen[:, -1] = 1  # shared
        return (inner * chosen[:, expert].reshape(inner.shape),)

    def keep(_module, args):
        hook.x = args[0]

    return up.register_forward_pre_hook(keep), down.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("family", "way", "router"),
    members(
        itertools.product(["llama", "gpt2"], WAYS, ROUTERS), [("llama", "energy", "relu"), ("gpt2", "cmoe", "top_k")]
    ),
)
def test_some_experts_equal_the_dense_layer_with_the_other_neurons_masked(family, way, router):
    dense, inputs = FAMILIES[family]()
    optimized = tokcompile.optimize(
        dense,
        recipe(experts=8, shared=2, active=2, router=router, **WAYS[way]),
        calibration=[inputs],
        lowering="eager",
        inputs=inputs,
    )
    state = optimized.tokcompile
    with torch.no_grad():
        for key in state.keys("moe_from_dense"):
            state.tensors("moe_from_dense", key)["scale"].fill_(0.3)  # weights other than one, too
    act = "silu" if family == "llama" else "gelu_tanh"
    hooks = [
        h
        for key in state.keys("moe_from_dense")
        for h in masked(dense.get_submodule(key), state.tensors("moe_from_dense", key), (2, 2), act, router)
    ]
    expected = output(dense, inputs)
    for hook in hooks:
        hook.remove()
    close(output(optimized, inputs), expected, 3e-6)
    assert not torch.allclose(expected, output(dense, inputs), atol=1e-3)
    step = tokcompile.report(optimized).steps[0]
    assert step.details["split"] == "S2A2E8"
    density = step.details["neurons_active"]
    densities = [density] if isinstance(density, float) else list(density.values())
    assert all(abs(d - 0.5) < (1e-6 if router == "top_k" else 0.06) for d in densities)
    if router == "top_k":  # how many experts a threshold leaves is known at run time only; all are counted
        assert step.flop_ratio > 1.1


def test_neurons_are_split_and_not_changed():
    dense, inputs = decoders.llama()
    split = recipe(experts=7, shared=3, active=2)
    optimized = tokcompile.optimize(dense, split, calibration=[inputs], lowering="eager")
    for number, layer in enumerate(dense.model.layers):
        t = optimized.tokcompile.tensors("moe_from_dense", f"model.layers.{number}.mlp")
        assert t["gate_up"].shape == (4, 2 * 13, 64)
        assert t["shared_in"].shape == (2 * (96 - 4 * 13), 64)  # the remainder of the division is shared
        for place, name in enumerate(("gate_proj", "up_proj")):
            rows = torch.cat([t["shared_in"].chunk(2)[place], *t["gate_up"].chunk(2, 1)[place]])
            order = torch.cdist(rows, getattr(layer.mlp, name).weight).argmin(1)
            assert torch.equal(order.sort().values, torch.arange(96))
            assert torch.equal(rows, getattr(layer.mlp, name).weight[order])


@pytest.mark.parametrize("router", members(ROUTERS, ["relu"]))
def test_a_batch_equals_its_rows_and_cached_decoding_one_forward(router):
    dense, inputs = decoders.llama()
    ids = inputs["input_ids"]
    optimized = tokcompile.optimize(dense, recipe(router=router), calibration=[inputs], lowering="eager")
    whole = output(optimized, {"input_ids": ids, "use_cache": False})
    for row in range(2):
        close(output(optimized, {"input_ids": ids[row : row + 1], "use_cache": False}), whole[row : row + 1], 2e-6)
    with torch.no_grad():
        out = optimized(input_ids=ids[:, :6], use_cache=True)
        for place in range(6, 9):
            out = optimized(input_ids=ids[:, place : place + 1], past_key_values=out.past_key_values, use_cache=True)
            close(out.logits[:, -1], whole[:, place], 2e-6)


@pytest.mark.parametrize("router", members(ROUTERS, ["top_k"]))
def test_gradients_reach_the_prepared_parameters_and_training_lowers_a_loss(router):
    dense, inputs = decoders.llama()
    optimized = tokcompile.optimize(dense, recipe(router=router, active=2), calibration=[inputs], lowering="eager")
    target = output(dense, inputs)
    named = {n: p for n, p in optimized.named_parameters() if n.startswith("tokcompile.")}
    assert set(named) <= set(optimized.state_dict())
    before = F.mse_loss(optimized(**inputs).logits, target)
    before.backward()
    for name, parameter in named.items():
        if not name.endswith((".router", "router_offset", "threshold")):  # act through scale, which starts at zero
            assert parameter.grad is not None, name
            assert float(parameter.grad.abs().sum()) > 0, name
    optimizer = torch.optim.Adam(named.values(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(optimized(**inputs).logits, target).backward()
        optimizer.step()
    assert float(F.mse_loss(optimized(**inputs).logits, target)) < 0.8 * float(before)
    assert float(named["tokcompile.moe_from_dense.model.layers.0.mlp.router"].grad.abs().sum()) > 0


@pytest.mark.inductor
def test_inductor_computes_the_same_and_trains():
    dense, inputs = decoders.llama()
    state = tokcompile.calibrate(dense, recipe(), [inputs])
    eager, compiled = (
        tokcompile.optimize(dense, recipe(), calibration=state, lowering=how) for how in ("eager", "inductor")
    )
    close(output(compiled, inputs), output(eager, inputs))
    name = "tokcompile.moe_from_dense.model.layers.0.mlp.gate_up"
    grads = []
    for model in (eager, compiled):
        model.zero_grad()
        model(**inputs).logits.square().mean().backward()
        grads.append(dict(model.named_parameters())[name].grad.clone())
    close(grads[1], grads[0], 1e-4)


@pytest.mark.slow
def test_layers_that_change_least_are_converted_and_the_controls_do_worse():
    torch.manual_seed(0)
    dense, inputs = decoders.llama(4)
    data = [inputs | {"input_ids": torch.randint(4, 120, (4, 16))} | {"attention_mask": torch.ones(4, 16)}]
    errors = {}
    for name, params in (
        ("energy", {}),
        ("energy split", {"split": "random"}),
        ("energy choice", {"choice": "random"}),
        ("cmoe", CMOE),
        ("split", CMOE | {"split": "random"}),
        ("choice", CMOE | {"choice": "random"}),
    ):
        state = tokcompile.calibrate(dense, recipe(convert=0.5, active=2, **params), data)
        facts = list(state.facts.values())
        errors[name] = sum(f["error"] for f in facts)
        assert sum(f["converted"] for f in facts) == 2
        assert max(f["error"] for f in facts if f["converted"]) <= min(f["error"] for f in facts if not f["converted"])
    assert errors["cmoe"] < errors["choice"]
    assert errors["cmoe"] < errors["split"]
    assert errors["energy"] < min(errors["energy split"], errors["energy choice"], errors["cmoe"])


def test_samples_are_spread_over_the_stream_and_do_not_depend_on_its_pieces():
    rows = torch.arange(1000)[:, None]
    one, many = {}, {}
    experts.sample(one, "x", rows, 64)
    for piece in rows.split([1, 7, 300, 92, 600]):
        experts.sample(many, "x", piece, 64)
    assert torch.equal(one["x"], many["x"])
    assert torch.equal(one["x"][:, 0], torch.arange(0, 1000, 16))


def test_a_split_that_does_not_pay_leaves_the_layer_dense_and_says_so(monkeypatch):
    dense, inputs = decoders.llama()
    monkeypatch.setattr(experts, "speedup", lambda *args: 0.5)
    optimized = tokcompile.optimize(dense, recipe(gate="auto"), calibration=[inputs], lowering="eager", inputs=inputs)
    step = tokcompile.report(optimized).steps[0]
    assert step.status == "unprofitable"
    assert "0.5 times as fast" in step.reason
    assert "gate: off" in step.reason
    close(output(optimized, inputs), output(dense, inputs), 1e-6)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"experts": 7, "shared": 0, "active": 2}, "7 experts do not divide 96 neurons.*divisor"),
        ({"experts": 97}, "97 experts do not divide 96 neurons"),
    ],
)
def test_a_split_that_does_not_divide_the_width(params, message):
    dense, inputs = decoders.llama()
    before = {k: v.clone() for k, v in dense.state_dict().items()}
    with pytest.raises(CalibrationError, match=message):
        tokcompile.optimize(dense, recipe(**params), calibration=[inputs])
    assert all(torch.equal(v, before[k]) for k, v in dense.state_dict().items())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"active": 0}, "active"),
        ({"experts": 1}, "experts"),
        ({"shared": 8}, "shared .8. must be less than experts"),
        ({"active": 6}, "active .6. must be at most"),
        ({"convert": 0}, "convert"),
        ({"router": "soft"}, "router"),
    ],
)
def test_bad_parameters(params, message):
    dense, inputs = decoders.llama()
    with pytest.raises(RecipeError, match=message):
        tokcompile.optimize(dense, recipe(**params), calibration=[inputs])


def test_bad_calibration_and_models_without_feed_forward_layers():
    dense, inputs = decoders.llama()
    with pytest.raises(CalibrationError, match="needs calibration"):
        tokcompile.optimize(dense, recipe())
    with pytest.raises(CalibrationError, match="is empty"):
        tokcompile.optimize(dense, recipe(), calibration=[])
    with pytest.raises(CalibrationError, match="has the keys"):
        tokcompile.optimize(dense, recipe(), calibration=[{"pixels": torch.zeros(1)}])
    with pytest.raises(CalibrationError, match="met no region"):
        tokcompile.optimize(nn.Linear(4, 4), recipe(), calibration=[{"input": torch.zeros(2, 4)}])
    state = tokcompile.calibrate(dense, recipe(), [inputs])
    other, _ = decoders._build("LlamaConfig", "LlamaForCausalLM", **decoders.GROUPED | {"intermediate_size": 128})
    optimized = tokcompile.optimize(other, recipe(), calibration=state, lowering="eager")
    with pytest.raises(NoMatchError, match=r"96 neurons.*128"):
        output(optimized, inputs)


@pytest.mark.parametrize("name", ["silu", "relu2"])
def test_the_router_reads_the_typical_neuron_of_each_expert(name):
    torch.manual_seed(0)
    weights = {"gate": torch.randn(12, 8), "up": torch.randn(12, 8), "down": torch.randn(8, 12)}
    from tokcompile.families.moe.split import split

    x = torch.randn(50, 8)
    inner = activate(x @ weights["gate"].T, name) * (x @ weights["up"].T)
    found = split(inner.abs().topk(3, -1).indices, 12, 4, 1, weights["gate"])
    t = experts.parts(weights, found)
    close(experts.logits(x, t, name), inner[:, found.typical].abs(), 1e-6)
    index, weight = experts.route(x, t, name, "top_k", 2)
    assert torch.equal(index.sort(-1).values, inner[:, found.typical].abs().topk(2, -1).indices.sort(-1).values)
    assert torch.equal(weight, torch.ones(50, 2))


@pytest.mark.parametrize("gated_layer", [True, False])
def test_energy_is_what_each_neuron_adds_to_the_output(gated_layer):
    torch.manual_seed(0)
    weights = {"up": torch.randn(12, 8), "up_bias": torch.randn(12), "down": torch.randn(8, 12)}
    if gated_layer:
        weights |= {"gate": torch.randn(12, 8), "gate_bias": torch.randn(12)}
    x = torch.randn(5, 8)
    whole = experts.dense(x, weights, "silu")
    added = []
    for neuron in range(12):  # the layer without this neuron
        down = weights["down"].clone()
        down[:, neuron] = 0
        added.append((whole - experts.dense(x, weights | {"down": down}, "silu")).square().sum(-1))
    expected = torch.stack(added, 1)
    close(experts.energy(x, weights, "silu"), expected / expected.sum(1, keepdim=True), 1e-5)


def test_a_fitted_router_is_the_ridge_regression_of_the_roots_of_the_energies():
    torch.manual_seed(0)
    x = torch.randn(60, 8) * torch.rand(8) + torch.randn(8)
    energy = torch.rand(60, 12)
    groups = torch.randperm(12).reshape(4, 3)
    weight, offset = moe_split.Routers(x, energy).fit(groups)
    wanted = torch.stack([energy[:, g].sum(1).sqrt() for g in groups], 1).double()
    columns = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    penalty = (0.1 * 60) ** 0.5 * torch.eye(8, dtype=torch.float64)
    targets = torch.cat([wanted - wanted.mean(0), torch.zeros(8, 4, dtype=torch.float64)])
    found = torch.linalg.lstsq(torch.cat([columns, penalty]), targets).solution
    close(x @ weight.T + offset, (columns @ found + wanted.mean(0)).float(), 1e-5)


def test_an_energy_split_finds_the_groups_that_the_input_tells_apart():
    torch.manual_seed(0)
    kind = torch.randint(4, (400,))
    x = F.one_hot(kind, 8).float() + 0.1 * torch.randn(400, 8)
    group = torch.arange(20) % 4
    group = group[torch.randperm(20)]
    energy = 0.01 * torch.rand(400, 24)
    energy[:, :20] += (group == kind[:, None]).float() * (1 + torch.rand(400, 20))
    energy[:, 20:] += 2  # always active: to be shared
    routers = moe_split.Routers(x, energy)
    found = moe_split.energy_split(routers, experts=6, shared=1, active=1)
    assert set(found.shared.tolist()) == {20, 21, 22, 23}
    # five experts of four neurons for four groups of five: no expert can hold a group, four hold one group alone
    owners = [group[e].unique() for e in found.experts]
    assert sum(len(o) == 1 for o in owners) >= 3
    weight, offset = routers.fit(found.experts)
    chosen = found.experts[(x @ weight.T + offset).argmax(1)]
    mine = energy.gather(1, chosen).sum(1).mean()
    assert float(mine) > 0.95 * float(energy[:, :20].topk(4, 1).values.sum(1).mean())


@pytest.mark.slow
def test_rounds_raise_the_energy_that_a_fitted_router_chooses():
    dense, inputs = decoders.llama()
    torch.manual_seed(0)
    data = [inputs | {"input_ids": torch.randint(4, 120, (4, 16)), "attention_mask": torch.ones(4, 16)}]
    errors = [
        sum(f["error"] for f in tokcompile.calibrate(dense, recipe(active=1, rounds=r), data).facts.values())
        for r in (1, 8)
    ]
    assert errors[1] < errors[0]

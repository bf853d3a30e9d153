"""Rows of tables in host memory: the operations against plain loops, and models whose tables stay there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tokcompile
from tests.members import members
from tests.test_stem import close, output, recipe, tables
from tests.triton_tools import needs_cuda
from tests.zoo import decoders
from tokcompile.capture.ops import op_name
from tokcompile.errors import RecoveryError
from tokcompile.kernels.host_rows import DECOMPOSITIONS, await_rows, fetch_rows, side_stream, unique_ids

OPS = torch.ops.tokcompile


def make(
    sizes: tuple[int, ...] = (2, 5),
    count: int = 6,
    vocabulary: int = 12,
    width: int = 4,
    seed: int = 0,
    least: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Table, remap with ids that have no row, and ids, some of them behind the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(least, vocabulary + 2, sizes, generator=g)
    return (torch.randn(count, width, generator=g), torch.randint(-1, count, (vocabulary,), generator=g).int(), ids)


def loops(table: Tensor, remap: Tensor, ids: Tensor) -> list[Tensor | None]:
    """The row of each id, one by one."""
    found: list[Tensor | None] = []
    for number in ids.reshape(-1).tolist():
        row = int(remap[number]) if 0 <= number < len(remap) else -1
        found.append(table[row] if row >= 0 else None)
    return found


def agree(rows: Tensor, index: Tensor, expected: list[Tensor | None]) -> None:
    for place, row in zip(index.tolist(), expected, strict=True):
        assert (place < 0) == (row is None)
        assert row is None or torch.equal(rows[place].cpu(), row)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([(1,), (7,), (2, 5), (3, 2, 2)]), st.integers(1, 6), st.integers(0, 1000))
def test_every_form_gives_the_row_of_each_id(sizes: tuple[int, ...], count: int, seed: int) -> None:
    table, remap, ids = make(sizes, count, seed=seed)
    expected = loops(table, remap, ids)
    unique, place = unique_ids(ids)
    assert [i for i in unique.tolist() if i >= 0] == sorted({i for i in ids.reshape(-1).tolist() if i >= 0})
    assert all(
        int(unique[p]) == i if p >= 0 else i < 0 for p, i in zip(place.tolist(), ids.reshape(-1).tolist(), strict=True)
    )
    rows, index = fetch_rows(table, remap, unique, place, ids)
    assert rows.shape == (ids.numel(), table.shape[1])
    agree(rows, await_rows(rows, index), expected)
    used = index[index >= 0].unique().tolist()
    assert used == list(range(len(used)))  # each row is brought once
    one, two, three = (DECOMPOSITIONS[n] for n in ("unique_ids", "fetch_rows", "await_rows"))
    rows, index = two(table, remap, *one(ids), ids)
    agree(rows, three(rows, index), expected)


def test_opcheck() -> None:
    table, remap, ids = make()
    unique, place = unique_ids(ids)
    torch.library.opcheck(OPS.unique_ids.default, (ids,))
    torch.library.opcheck(OPS.fetch_rows.default, (table, remap, unique, place, ids))
    torch.library.opcheck(OPS.await_rows.default, (table, place))


def test_errors_say_what_was_found() -> None:
    table, remap, ids = make()
    unique, place = unique_ids(ids)
    with pytest.raises(ValueError, match="ids must be int64"):
        unique_ids(ids.int())
    with pytest.raises(ValueError, match="table must be in host memory"):
        fetch_rows(table.to("meta"), remap, unique, place, ids)
    with pytest.raises(ValueError, match="integer remap"):
        fetch_rows(table, remap.float(), unique, place, ids)


# .. models


def pair(dense: nn.Module, inputs: dict[str, Any], lowering: str = "eager", **params: Any) -> list[nn.Module]:
    """The same tables with the model, and in host memory."""
    return [made(dense, inputs, table, lowering, **params) for table in ("model", "host")]


def made(dense: nn.Module, inputs: dict[str, Any], table: str, lowering: str = "eager", **params: Any) -> nn.Module:
    return tokcompile.optimize(dense, recipe(table=table, **params), calibration=[inputs], lowering=lowering)


def graph_of(model: nn.Module) -> list[str]:
    """Names of the operations of the graph that ran first, in order."""
    module = model._tokcompile_session.graphs[0].variants[0].run
    return [op_name(node) for node in module.graph.nodes]


@pytest.mark.parametrize(
    "params",
    members(
        [{}, {"fallback": "mean", "dense_first": 1}, {"fallback": "mean"}], [{"fallback": "mean", "dense_first": 1}]
    ),
)
def test_tables_in_host_memory_compute_the_same(params: dict[str, Any]) -> None:
    dense, inputs = decoders.llama()
    inputs["attention_mask"][0, :3] = 0
    seen = {k: v[:, :5] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    one, other = pair(dense, seen, **params)
    mixed = inputs | {"input_ids": inputs["input_ids"].roll(2, 1)}
    mixed["input_ids"][1, 3:6] = mixed["input_ids"][1, 2]
    assert torch.equal(output(one, mixed), output(other, mixed))
    assert not torch.allclose(output(other, mixed), output(dense, mixed), atol=1e-4)
    step = tokcompile.report(other).steps[0]
    assert (step.matches, step.details["table"]) == (2, "host")
    assert [graph_of(other).count(name) for name in ("unique_ids", "fetch_rows", "await_rows")] == [1, 2, 2]
    rest = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompt = {k: v for k, v in mixed.items() if k != "use_cache"}
    assert torch.equal(one.generate(**prompt, **rest), other.generate(**prompt, **rest))


@pytest.mark.parametrize("params", members([{}, {"dense_first": 1}], [{"dense_first": 1}]))
def test_rows_start_where_the_ids_are_known(params: dict[str, Any]) -> None:
    dense, inputs = decoders.llama()
    inputs["attention_mask"][0, :3] = 0
    model = made(dense, inputs, "host", **params)
    output(model, inputs)
    order = graph_of(model)
    linears, fetches, waits = (
        [i for i, name in enumerate(order) if name == wanted] for wanted in ("linear", "fetch_rows", "await_rows")
    )
    assert len(fetches) == len(waits) == 2
    assert fetches[-1] < linears[0] < waits[0]
    assert len([i for i in linears if i < waits[0]]) == 5  # attention and gate of the first layer
    assert len([i for i in linears if waits[0] < i < waits[1]]) == 6  # its down-projection, and those of the second


def test_a_moved_model_leaves_its_tables_where_they_are() -> None:
    dense, inputs = decoders.llama()
    model = made(dense, inputs, "host")
    model.to(torch.bfloat16)
    for tensors in tables(model).values():
        assert tensors["table"].dtype == torch.bfloat16
        assert not isinstance(tensors["table"], nn.Parameter)
    before = {key: tensors["table"] for key, tensors in tables(model).items()}
    scope = model.tokcompile.scope("stem", "model.layers.0.mlp")
    moved: list[tuple[int, ...]] = []

    def elsewhere(tensor: Tensor) -> Tensor:  # what .to("cuda") does, noted
        moved.append(tuple(tensor.shape))
        return tensor

    scope._apply(elsewhere)
    assert tuple(scope.table.shape) not in moved
    assert scope.table is before["model.layers.0.mlp"]
    assert output(model, inputs).dtype == torch.bfloat16
    assert "tokcompile.stem.model.layers.0.mlp.table" in model.state_dict()


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_computes_the_same() -> None:
    dense, inputs = decoders.llama()
    one = made(dense, inputs, "model", dense_first=1)
    other = made(dense, inputs, "host", "inductor", dense_first=1)
    mixed = inputs | {"input_ids": inputs["input_ids"] + 5}
    close(output(other, mixed), output(one, mixed))


def test_a_saved_model_keeps_its_tables_in_host_memory(tmp_path: Path) -> None:
    dense, inputs = decoders.llama()
    model = made(dense, inputs, "host", dense_first=1)
    expected = output(model, inputs)
    tokcompile.save_pretrained(model, tmp_path / "saved")
    again = tokcompile.load(tmp_path / "saved", lowering="eager")
    assert torch.equal(output(again, inputs), expected)
    assert again.tokcompile.scope("stem", "model.layers.0.mlp").host_buffers == ("table", "remap")
    assert tokcompile.report(again).steps[0].details["table"] == "host"


def test_an_edit_reaches_them() -> None:
    dense, inputs = decoders.llama()
    one, other = pair(dense, inputs)
    a, b = (int(t) for t in inputs["input_ids"][0, [2, 5]])
    before = output(other, inputs)
    with tokcompile.stem.edit(one, a, like=b), tokcompile.stem.edit(other, a, like=b):
        assert torch.equal(output(one, inputs), output(other, inputs))
        assert not torch.equal(output(other, inputs), before)
    assert torch.equal(output(other, inputs), before)


def test_they_are_not_trained() -> None:
    pytest.importorskip("accelerate")
    dense, inputs = decoders.llama()
    model = made(dense, inputs, "host")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    choices: list[Any] = ["prepared", "all", ["norms", "tokcompile.stem.*.table"]]
    for trainable in choices:
        with pytest.raises(RecoveryError, match=r"model\.layers\.0\.mlp\.table.*table: model"):
            tokcompile.recover(model, dense, [inputs], steps=1, trainable=trainable)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    output(model, inputs)
    model(**inputs).logits.sum().backward()  # what is not a table has its gradient
    assert model.model.layers[0].mlp.gate_proj.weight.grad is not None


@pytest.mark.slow
def test_an_exported_file_gathers_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from tests.pruning import recipe as steps
    from tests.test_onnx_generation import llama, prompt

    report = tokcompile.export_onnx(
        llama(),
        prompt(),
        tmp_path / "out",
        recipe=steps([{"pass": "stem", "params": {"convert": 1, "table": "host", "dense_first": 2}}]),
        calibration=[prompt(4, 32, 0, seed) for seed in range(6)],
    )
    assert [row.tokens_equal for row in report.parity] == [True] * 8
    assert max(row.relative for row in report.parity) < 1e-5


# .. on a GPU


@pytest.mark.gpu
@needs_cuda
def test_the_copy_runs_on_another_stream() -> None:
    table, remap, ids = make((4, 50), 60, 90, 256)
    expected = loops(table, remap, ids)
    ids = ids.cuda()
    unique, place = unique_ids(ids)
    assert unique.device.type == place.device.type == "cpu"
    stream, current = side_stream(ids.device), torch.cuda.current_stream()
    assert stream != current
    await_rows(*fetch_rows(table, remap, unique, place, ids))
    torch.cuda.synchronize()  # from here on no memory is allocated, which would wait for the device
    with torch.cuda.stream(stream):
        torch.cuda._sleep(500_000_000)  # a fraction of a second: the copy queues up behind it
    rows, index = fetch_rows(table, remap, unique, place, ids)
    total = (ids + 1).sum()
    current.synchronize()  # the current stream has not waited for the copy
    assert not stream.query()
    ready = await_rows(rows, index)
    current.synchronize()  # and now it has
    assert stream.query()
    agree(rows, ready, expected)
    assert int(total) == int((ids + 1).cpu().sum())


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_models_on_a_gpu_compute_the_same(lowering: str) -> None:
    dense, inputs = decoders.llama()
    inputs["attention_mask"][0, :3] = 0
    one, other = (model.to("cuda") for model in pair(dense, inputs, lowering, dense_first=1))
    for tensors in tables(other).values():
        assert tensors["table"].device.type == tensors["remap"].device.type == "cpu"
        assert tensors["mean"].is_cuda
    for shift in (2, 5):
        mixed = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        mixed["input_ids"] = mixed["input_ids"].roll(shift, 1)
        real = mixed["attention_mask"].bool()
        close(output(other, mixed)[real], output(one, mixed)[real])
    prompt = {k: v for k, v in mixed.items() if k != "use_cache"}
    rest = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(one.generate(**prompt, **rest), other.generate(**prompt, **rest))

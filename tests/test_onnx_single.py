"""ONNX export of models that are one graph: parity, files, refusals."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra: onnx)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: onnx)")
import onnx
import transformers as tr

import tokcompile
from tests.pruning import recipe
from tests.zoo import encoders, encoders_for_pruning
from tests.zoo.vlm import randomize
from tokcompile import ExportError, OnnxModel
from tokcompile.onnx_export import decompose, export, lowering, repairs

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ONE_STAGE = recipe([{"pass": "class_attention", "params": {"keep": [0.5], "at": [0.5]}}])


def vit(layers: int = 2) -> nn.Module:
    settings = SMALL | {"num_hidden_layers": layers}
    return randomize(tr.ViTForImageClassification(tr.ViTConfig(**settings, image_size=32, patch_size=8, num_labels=7)))


def pixels(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def relative(found: Any, wanted: Tensor) -> float:
    assert found.shape == tuple(wanted.shape)
    return float(np.linalg.norm(found - wanted.numpy()) / np.linalg.norm(wanted.numpy()))


class Small(nn.Module):
    """One linear layer; exported in a second."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def small(path: Path, **options: Any) -> tokcompile.ExportReport:
    return tokcompile.export_onnx(Small().eval(), {"x": torch.randn(3, 8)}, path, **options)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, tokcompile.ExportReport]:
    model = vit()
    return model, tokcompile.export_onnx(model, {"pixel_values": pixels(2)}, tmp_path_factory.mktemp("vit") / "out")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, tokcompile.ExportReport]:
    model = vit()
    return model, tokcompile.export_onnx(
        model, {"pixel_values": pixels(1)}, tmp_path_factory.mktemp("vit") / "pruned", recipe=ONE_STAGE
    )


# ------------------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_dense_vit_equals_torch_at_other_batch_sizes(dense: Any, batch: int) -> None:
    model, report = dense
    with torch.no_grad():
        wanted = model(pixels(batch, seed=7)).logits
    found = OnnxModel.from_pretrained(report.directory)(pixel_values=pixels(batch, seed=7).numpy())
    assert relative(found["logits"], wanted) < 1e-5


def test_pruned_vit_equals_the_optimized_model_at_other_batch_sizes(pruned: Any) -> None:
    model, report = pruned
    reference = tokcompile.optimize(vit(), ONE_STAGE, lowering="eager")
    found = OnnxModel.from_pretrained(report.directory)(pixel_values=pixels(3, seed=7).numpy())["logits"]
    with torch.no_grad():
        assert relative(found, reference(pixels(3, seed=7)).logits) < 1e-5
        assert relative(found, model(pixels(3, seed=7)).logits) > 1e-2, "pruning changes something"
    assert [item["tokens"] for item in report.manifest["kept"]] == [9]
    assert report.manifest["kept"][0]["of"] == 17


def test_report_compares_the_given_inputs_and_three_other_batch_sizes(dense: Any) -> None:
    _, report = dense
    assert [row.inputs for row in report.parity] == ["given", "batch_size 1", "batch_size 2", "batch_size 5"]
    assert max(row.relative for row in report.parity) < 1e-5
    assert "relative" in str(report)
    assert "model.onnx" in str(report)
    json.dumps(report.to_dict())


def test_bert_with_padding_and_other_lengths(tmp_path: Path) -> None:
    model, inputs = encoders.bert()
    randomize(model)
    report = tokcompile.export_onnx(model, {n: inputs[n] for n in ("input_ids", "attention_mask")}, tmp_path / "bert")
    shapes = {tuple(v["shape"]) for v in report.manifest["files"]["model"]["inputs"]}
    assert shapes == {("batch_size", "sequence_length")}
    ids = torch.randint(3, 100, (3, 14))
    mask = torch.ones_like(ids)
    mask[0, 9:] = mask[1, 5:] = 0
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
    found = OnnxModel.from_pretrained(report.directory)(input_ids=ids.numpy(), attention_mask=mask.numpy())
    assert relative(found["logits"][mask.bool().numpy()], wanted[mask.bool()]) < 1e-5


def test_an_axis_of_size_one_is_doubled_in_every_input_that_has_it() -> None:
    inputs = {"a": torch.tensor([[1, 2]]), "b": torch.tensor([[3], [4]]), "c": torch.tensor([[5, 6]])}
    found = lowering.doubled(inputs, {"a": {0: "rows"}, "b": {0: "columns", 1: "rows"}})
    assert {n: v.tolist() for n, v in found.items()} == {"a": [[1, 2], [1, 2]], "b": [[3, 3], [4, 4]], "c": [[5, 6]]}


# ------------------------------------------------------------------------------------------------------------- files


def test_manifest_says_what_was_made(pruned: Any) -> None:
    _, report = pruned
    manifest = json.loads((report.directory / "manifest.json").read_text())
    assert manifest == report.manifest
    assert manifest["kind"] == "single"
    assert manifest["opset"] == 20
    assert manifest["dtype"] == "float32"
    assert manifest["recipe"]["steps"][0]["pass"] == "class_attention"
    assert manifest["recipe"]["source"]["steps"][0]["params"]["keep"]
    assert {"torch", "transformers", "onnx", "onnxruntime", "tokcompile"} <= set(manifest["versions"])
    entry = manifest["files"]["model"]
    assert [v["name"] for v in entry["inputs"]] == ["pixel_values"]
    assert entry["inputs"][0]["shape"] == ["batch_size", 3, 32, 32]
    assert [(v["name"], v["shape"]) for v in entry["outputs"]] == [("logits", ["batch_size", 7])]


def test_files_follow_the_conventions_and_carry_no_path(dense: Any) -> None:
    _, report = dense
    assert sorted(p.name for p in report.directory.iterdir()) == ["config.json", "manifest.json", "model.onnx"]
    config = json.loads((report.directory / "config.json").read_text())
    assert config["model_type"] == "vit"
    data = (report.directory / "model.onnx").read_bytes()
    assert str(Path(__file__).parents[1]).encode() not in data
    assert b"site-packages" not in data
    proto = onnx.load(str(report.directory / "model.onnx"))
    onnx.checker.check_model(proto)
    assert [(o.domain, o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")] == [("", 20)]
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}


def test_large_weights_go_into_a_file_of_their_own(tmp_path: Path) -> None:
    model = Small(width=512).eval()
    report = tokcompile.export_onnx(model, {"x": torch.randn(3, 512)}, tmp_path / "out", inline_bytes=100)
    assert report.manifest["files"]["model"]["external_data"] == "model.onnx_data"
    assert (tmp_path / "out" / "model.onnx_data").stat().st_size >= 4 * 512 * 4
    assert (tmp_path / "out" / "model.onnx").stat().st_size < 4 * 512
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    x = torch.randn(2, 512)
    assert relative(OnnxModel.from_pretrained(moved)(x=x.numpy())["output"], model(x).detach()) < 1e-6


def test_overwrite_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    small(out)
    with pytest.raises(ExportError, match="overwrite=True"):
        small(out)
    (out / "stale").write_text("of before")
    small(out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "model.onnx"]
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    with pytest.raises(ExportError, match="holds other files"):
        small(other, overwrite=True)
    assert (other / "thesis.txt").read_text() == "years"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


class Attention(nn.Module):
    """Attention under a mask; the first row of it has no key at all."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = x.reshape(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads * 0.5, heads + 1, attn_mask=mask[:, None] > 0)


def masked() -> dict[str, Tensor]:
    mask = torch.randint(0, 2, (2, 5, 5), generator=torch.Generator().manual_seed(0))
    mask[0, 0] = 0
    return {"x": torch.randn(2, 5, 8), "mask": mask}


@pytest.mark.parametrize("opset", [18, 20, 23, 24])
@pytest.mark.parametrize("target", ["standard", "contrib"])
def test_attention_of_rows_without_a_key(tmp_path: Path, opset: int, target: str) -> None:
    report = tokcompile.export_onnx(Attention().eval(), masked(), tmp_path / "out", opset=opset, target=target)
    proto = onnx.load(str(tmp_path / "out" / "model.onnx"))
    fused = [n for n in proto.graph.node if n.op_type == "MultiHeadAttention" and n.domain == "com.microsoft"]
    assert len(fused) == (target == "contrib")
    assert next(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")) == opset
    assert max(row.relative for row in report.parity) < 1e-6


# ----------------------------------------------------------------------------------------------------------- repairs


ROWS = {"x": {0: "batch_size"}, "index": {0: "batch_size"}}


class Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, index: Tensor) -> Any:
        return self.function(x, index)


def _mean(x: Tensor, index: Tensor) -> Tensor:
    return torch.ones_like(x).scatter_reduce(1, index, x, "mean", include_self=False)


def _mean_with_self(x: Tensor, index: Tensor) -> Tensor:
    return torch.ones_like(x).scatter_reduce(1, index, x, "mean")


def _divide(x: Tensor, index: Tensor) -> Tensor:
    return torch.div(index * 33_554_433 - 50_000_001, 3, rounding_mode="floor")


def _divide_to_zero(x: Tensor, index: Tensor) -> Tensor:
    return torch.div(index * 33_554_433 - 50_000_001, 7, rounding_mode="trunc")


def _scatter(x: Tensor, index: Tensor) -> Tensor:
    return x.masked_scatter(index > 2, x * 10)


def _put(x: Tensor, index: Tensor) -> Tensor:
    x = x.clone()
    x[index > 2] = 0.5
    return x


def _sort(x: Tensor, index: Tensor) -> Tensor:
    return torch.sort(index, stable=True, dim=1).indices


@pytest.mark.parametrize("function", [_mean, _mean_with_self, _divide, _divide_to_zero, _scatter, _put, _sort])
def test_operations_that_the_exporter_gets_wrong_are_repaired(tmp_path: Path, function: Callable[..., Any]) -> None:
    inputs = {"x": torch.randn(2, 6), "index": torch.randint(0, 6, (2, 6), generator=torch.Generator().manual_seed(0))}
    report = tokcompile.export_onnx(Function(function).eval(), inputs, tmp_path / "out", tolerance=1e-6, axes=ROWS)
    assert len(report.parity) == 4


class Mean(nn.Module):
    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        base = torch.ones_like(x)
        means = base.scatter_reduce(1, index, x * 2, "mean", include_self=False)
        return torch.exp(means).sum(1)


def test_a_defect_in_the_file_is_caught_and_the_node_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its repair the exporter writes an overwrite for a mean, and says nothing."""
    monkeypatch.delitem(repairs.REPAIRS, torch.ops.aten.scatter_reduce.two)
    inputs = {"x": torch.randn(2, 6), "index": torch.zeros(2, 6, dtype=torch.int64)}

    model = Mean().eval()
    with pytest.raises(ExportError) as caught:
        tokcompile.export_onnx(model, inputs, tmp_path / "out", axes=ROWS)
    text = str(caught.value)
    assert "first node that is off: model: node scatter_reduce" in text
    assert _place(Mean.forward, 2) in text
    assert "Nothing was written" in text
    assert list(tmp_path.iterdir()) == []
    tokcompile.export_onnx(model, inputs, tmp_path / "out", axes=ROWS, check=False)  # it is what the check is for


def test_nothing_half_written_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    small(tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_text()
    monkeypatch.setattr(export, "save_manifest", fail)
    for options in ({"overwrite": True}, {}):
        with pytest.raises(OSError if options else ExportError):
            small(tmp_path / "out", **options)
    assert (tmp_path / "out" / "manifest.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---------------------------------------------------------------------------------------------------------- refusals


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class KthValue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.kthvalue(x, 2, dim=1).values


def _place(function: Callable[..., Any], offset: int = 1) -> str:
    return f"test_onnx_single.py:{inspect.getsourcelines(function)[1] + offset}"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Branch, ["torch.where for a branch", "node gt (aten.gt.Scalar)"]),
        (KthValue, ["aten.kthvalue", "node kthvalue", "topk"]),
    ],
)
def test_what_has_no_onnx_form_is_named_with_its_line_and_the_way_out(
    tmp_path: Path, model: type[nn.Module], words: list[str]
) -> None:
    with pytest.raises(ExportError) as caught:
        tokcompile.export_onnx(model().eval(), {"x": torch.randn(2, 6)}, tmp_path / "out")
    for word in [*words, _place(model.forward)]:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments(tmp_path: Path) -> None:
    out, inputs = tmp_path / "out", {"x": torch.randn(3, 8)}
    for options, word in [
        ({"opset": 17}, "opset 17"),
        ({"target": "fast"}, "standard, contrib"),
        ({"logits": "some"}, "'last' or 'all'"),
        ({"calibration": {}}, "without a recipe"),
        ({"axes": {"y": {0: "batch_size"}}}, "axes name"),
    ]:
        with pytest.raises(ExportError, match=word):
            small(out, **options)
    with pytest.raises(ExportError, match=r"model\.eval\(\)"):
        tokcompile.export_onnx(Small().train(), inputs, out)
    with pytest.raises(ExportError, match="no tensor"):
        tokcompile.export_onnx(Small().eval(), {"x": 3}, out)
    with pytest.raises(ExportError, match=r"torch\.nn\.Module"):
        tokcompile.export_onnx(torch.sin, inputs, out)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="optimized already"):
        tokcompile.export_onnx(tokcompile.optimize(vit(), ONE_STAGE), {"pixel_values": pixels(1)}, out)


def test_a_recipe_that_changes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(tokcompile.NoMatchError):
        small(tmp_path / "out", recipe="vit_prune_50")
    assert list(tmp_path.iterdir()) == []


def test_calls_with_wrong_inputs_and_folders(dense: Any, tmp_path: Path) -> None:
    _, report = dense
    model = OnnxModel.from_pretrained(report.directory)
    with pytest.raises(ExportError, match="pixel_values"):
        model(pixels=pixels(1).numpy())
    with pytest.raises(ExportError, match="does not generate"):
        model.generate(np.ones((1, 3)))
    with pytest.raises(ExportError, match="export_onnx"):
        OnnxModel.from_pretrained(tmp_path)
    with pytest.raises(ExportError, match="has no NoSuchProvider"):
        OnnxModel.from_pretrained(report.directory, providers=["NoSuchProvider"])


# ------------------------------------------------------------------------------------------------------ whole matrix


def _clip() -> tuple[nn.Module, dict[str, Any]]:
    config = tr.CLIPConfig(
        text_config={**SMALL, "vocab_size": 99, "max_position_embeddings": 32, "eos_token_id": 98},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    ids = torch.randint(3, 90, (3, 12))
    ids[:, -1] = 98
    return randomize(tr.CLIPModel(config)), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels(2),
    }


def _siglip() -> tuple[nn.Module, dict[str, Any]]:
    config = tr.SiglipConfig(
        text_config={**SMALL, "vocab_size": 99, "max_position_embeddings": 12, "projection_size": 32},
        vision_config={**SMALL, "image_size": 32, "patch_size": 8},
    )
    return randomize(tr.SiglipModel(config)), {"input_ids": torch.randint(3, 90, (3, 12)), "pixel_values": pixels(2)}


@pytest.mark.slow
@pytest.mark.parametrize("make", [_clip, _siglip])
def test_dual_encoders(tmp_path: Path, make: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    model, inputs = make()
    axes = None
    if make is _siglip:  # its learned positions are as long as its prompts
        axes = {"input_ids": {0: "batch_size"}, "pixel_values": {0: "pixel_values_batch_size"}}
    report = tokcompile.export_onnx(model, inputs, tmp_path / "out", axes=axes)
    assert len({row.output for row in report.parity}) >= 4
    assert max(row.relative for row in report.parity) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("recipe_name", [None, "vit_prune_30", "vit_prune_50"])
@pytest.mark.parametrize("name", sorted(encoders_for_pruning.ENCODERS))
def test_encoders(tmp_path: Path, name: str, recipe_name: str | None) -> None:
    case = encoders_for_pruning.ENCODERS[name]()
    if name == "clip_text" and recipe_name is not None:
        pytest.skip("a text encoder has no patches")
    axes = {"pixel_values": {0: "batch_size"}} if name != "clip_text" else None
    report = tokcompile.export_onnx(case.model, case.inputs(2), tmp_path / "out", recipe=recipe_name, axes=axes)
    print(name, recipe_name, max(row.relative for row in report.parity))
    assert max(row.relative for row in report.parity) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_encoders_that_merge_tokens(tmp_path: Path, name: str) -> None:
    case = encoders_for_pruning.ENCODERS[name]()
    recipe = {
        "recipe_version": 1,
        "steps": [{"pass": "patch_merge", "params": {"keep": [0.56, 0.56, 0.56], "at": [0.25, 0.5, 0.75]}}],
    }
    report = tokcompile.export_onnx(
        case.model, case.inputs(2), tmp_path / "out", recipe=recipe, axes={"pixel_values": {0: "batch_size"}}
    )
    assert [item["tokens"] for item in report.manifest["kept"][:2]] == [10, 7]
    assert max(row.relative for row in report.parity) < 1e-5


def test_every_kernel_says_how_it_lowers() -> None:
    """Found by name: a kernel without an ``onnx.py`` would be refused at export."""
    found = {str(op) for op in decompose.decompositions()}
    kernels = {p.parent.name for p in (Path(__file__).parents[1] / "kernels").glob("*/op.py")}
    assert kernels
    # folders that hold several operations, or one of another name
    several = {
        "gather_rows": {"gather_rows", "scatter_rows"},
        "host_rows": {"unique_ids", "fetch_rows", "await_rows"},
        "token_sparse_attention": set(),  # not exported: a recipe with this pass is refused there
    }
    assert found == {f"tokcompile.{op}.default" for name in kernels for op in several.get(name, {name})}


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_files_ask_for_no_newer_runtime_than_their_operations(opset: int, tmp_path: Path) -> None:
    """An older runtime reads them, and a folder may be moved: weights beside the file are named without a place."""
    small(tmp_path / "a", opset=opset, inline_bytes=0)
    (tmp_path / "a").rename(tmp_path / "b c")
    file = onnx.load(tmp_path / "b c" / "model.onnx", load_external_data=False)
    assert file.ir_version <= max(10, onnx.helper.find_min_ir_version_for(list(file.opset_import), True))
    beside = {
        entry.value for tensor in file.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert all(Path(name).name == name for name in beside)
    x = torch.randn(2, 8)
    found = OnnxModel.from_pretrained(tmp_path / "b c")(x=x.numpy())
    assert len(found) == 1

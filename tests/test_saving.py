"""Saved models: a fresh process computes the same, damage is named, and a folder runs no code."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tokcompile
from tests.members import members
from tests.pruning import RANDOM, close, recipe
from tests.small_models import demo_vlm
from tokcompile import demo
from tokcompile.errors import RecipeError, SavedModelError, TokcompileError
from tokcompile.save import format as form
from tokcompile.save import save as saving

HALF = [{"pass": "class_attention", "params": {"keep": [0.5], "at": [0.25]}}]
STEM = [{"pass": "stem", "params": {"convert": 2}}]
MOE = [{"pass": "moe_from_dense", "params": {"experts": 8, "shared": 2, "active": 2, "gate": "off"}}]


class Plain(nn.Module):
    """A transformer encoder in plain torch, with a buffer that ``state_dict`` leaves out and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.cls = nn.Parameter(torch.zeros(1, 1, 32))
        self.register_buffer("scale", torch.full((1,), 1.5), persistent=False)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0) for _ in range(4)
        )
        self.head = nn.Linear(32, 32)
        self.again = nn.Linear(32, 32)
        self.again.weight = self.head.weight

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2) * self.scale
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x)
        return self.again(self.head(x[:, 0]))


def plain() -> nn.Module:
    """For ``"tests.test_saving:plain"``."""
    return Plain().eval()


def _vlm() -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = demo_vlm()
    return tokcompile.optimize(model, "vlm_prune_75", lowering="eager"), inputs


def _vit() -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = demo.tiny_vit()
    return tokcompile.optimize(model, recipe(HALF), inputs=inputs, lowering="eager"), inputs


def _stem(steps: list[dict[str, Any]] = STEM) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = demo.tiny_llm()
    data = [{"input_ids": torch.randint(10, 128, (2, 24))} for _ in range(4)]
    return tokcompile.optimize(model, recipe(steps), calibration=data, inputs=inputs, lowering="eager"), inputs


def _moe() -> tuple[nn.Module, dict[str, Tensor]]:
    return _stem(MOE)


def _plain() -> tuple[nn.Module, dict[str, Tensor]]:
    model = plain()
    with torch.no_grad():
        model.scale.fill_(0.75)  # what __init__ makes is another value
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = {"pixels": torch.randn(2, 3, 32, 32)}
    return tokcompile.optimize(model, recipe(HALF), inputs=inputs, lowering="eager"), inputs


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "vlm": _vlm,
    "vit": _vit,
    "stem": _stem,
    "moe": _moe,
    "plain": _plain,
}


def _first(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def _results(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        if hasattr(model, "generate"):
            made = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            found = {"tokens": made.sequences} | {f"logits{i}": step for i, step in enumerate(made.logits)}
        else:
            found = {"output": _first(model(**inputs))}
    return {name: value.contiguous().clone() for name, value in found.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each of MODELS, with the inputs and results beside it."""
    root = tmp_path_factory.mktemp("saved")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        model, inputs = make()
        save_file({key: value.contiguous() for key, value in inputs.items()}, root / f"{name}_inputs.safetensors")
        save_file(_results(model, inputs), root / f"{name}_results.safetensors")
        tokcompile.save_pretrained(model, root / name)
    return root


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    import shutil

    return Path(shutil.copytree(saved / "stem", tmp_path / "model"))


# ------------------------------------------------------------------------------------------------------ round trips

FRESH = """
import sys
from safetensors.torch import load_file, save_file
import torch, tokcompile
from tests.test_saving import _results
root, names = sys.argv[1], sys.argv[2:]
for name in names:
    torch._dynamo.reset()
    given = "tests.test_saving:plain" if name == "plain" else None
    model = tokcompile.load(f"{root}/{name}", given, lowering="eager")
    assert not model.training
    save_file(_results(model, load_file(f"{root}/{name}_inputs.safetensors")), f"{root}/{name}_fresh.safetensors")
"""


@pytest.mark.parametrize("names", members([["vlm", "stem", "plain"], ["vit", "moe"]], [["vlm", "stem", "plain"]]))
def test_a_fresh_process_computes_the_same(names: list[str], saved: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(saved), *names],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        wanted, found = (load_file(saved / f"{name}_{kind}.safetensors") for kind in ("results", "fresh"))
        assert wanted.keys() == found.keys()
        for key in wanted:
            if key == "tokens":
                assert torch.equal(wanted[key], found[key])
            else:  # not bit by bit: tensors of a file lie elsewhere in memory, and kernels go by alignment
                close(found[key], wanted[key])


def test_only_safetensors_and_json(saved: Path) -> None:
    for name in MODELS:
        files = [file for file in (saved / name).rglob("*") if file.is_file()]
        assert {file.suffix for file in files} == {".safetensors", ".json"}
        manifest = json.loads((saved / name / "tokcompile.json").read_text())
        listed = {"tokcompile.json", *manifest["files"]}
        assert {file.relative_to(saved / name).as_posix() for file in files} == listed
        assert set(manifest["versions"]) == {"tokcompile", "torch", "transformers", "python"}
        report = json.loads((saved / name / "report.json").read_text())
        assert report["steps"][0]["status"] == "matched"
        assert report["regions"]


def test_state_is_restored_with_its_facts(saved: Path) -> None:
    torch.manual_seed(0)
    original, _ = _stem()
    model = tokcompile.load(saved / "stem", lowering="eager")
    wanted, found = original.tokcompile, model.tokcompile
    assert found.facts == wanted.facts
    assert sum(facts["converted"] for facts in found.facts.values()) == 2
    assert {n: (type(t), t.requires_grad) for n, t in found.state_dict(keep_vars=True).items()} == {
        n: (type(t), t.requires_grad) for n, t in wanted.state_dict(keep_vars=True).items()
    }
    assert tokcompile.report(model).recipe == ""
    assert tokcompile.report(tokcompile.load(saved / "vlm", lowering="eager")).recipe == "vlm_prune_75"


def test_saving_again_writes_the_same(saved: Path, tmp_path: Path) -> None:
    model = tokcompile.load(saved / "stem", lowering="eager")
    tokcompile.save_pretrained(model, tmp_path / "again")
    for name in ("state.safetensors", "model/model.safetensors", "buffers.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / "stem" / name).read_bytes()


def test_mixed_dtypes_and_attention_come_back(tmp_path: Path) -> None:
    model, _ = demo_vlm()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    model.to(torch.bfloat16)
    for layer in model.model.language_model.layers:  # type: ignore[union-attr, operator]
        layer.input_layernorm.to(torch.float32)
        layer.input_layernorm.weight.data += 1e-4  # lost in bfloat16
    optimized = tokcompile.optimize(model, recipe(RANDOM), lowering="eager")
    tokcompile.save_pretrained(optimized, tmp_path / "m")
    loaded = tokcompile.load(tmp_path / "m", lowering="eager")
    own, other = (
        dict(loaded.named_parameters()) | dict(loaded.named_buffers()),
        {**dict(optimized.named_parameters()), **dict(optimized.named_buffers())},
    )
    assert own.keys() == other.keys()
    for name, tensor in other.items():
        assert own[name].dtype == tensor.dtype, name
        assert torch.equal(own[name], tensor), name
    assert loaded.config._attn_implementation == "eager"


def test_weights_can_stay_away(tmp_path: Path) -> None:
    model, inputs = demo.tiny_llm()
    optimized = tokcompile.optimize(model, recipe(STEM), calibration=[inputs], lowering="eager")
    place = tokcompile.save_pretrained(optimized, tmp_path / "m", weights=False)
    assert not (place / "model").exists()
    with pytest.raises(SavedModelError, match=r"does not hold the weights.*model=.*LlamaForCausalLM as it was before"):
        tokcompile.load(place)
    loaded = tokcompile.load(place, "tokcompile.demo:tiny_llm", lowering="eager")
    own, other = loaded.state_dict(), optimized.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    other, _ = demo.tiny_llm()
    with torch.no_grad():
        other.lm_head.weight[3, 4] += 1  # type: ignore[union-attr, index, operator]
    with pytest.raises(SavedModelError, match=r"other weights .* first that differs is lm_head\.weight"):
        tokcompile.load(place, other)


# ---------------------------------------------------------------------------------------------------- restore_dense


@pytest.mark.parametrize(("name", "make"), [("vlm", demo_vlm), ("stem", demo.tiny_llm), ("moe", demo.tiny_llm)])
def test_restore_dense(name: str, make: Callable[[], Any], saved: Path) -> None:
    dense = make()[0].state_dict()
    found = tokcompile.restore_dense(tokcompile.load(saved / name, lowering="eager"))
    assert found.keys() == dense.keys()
    assert all(torch.equal(found[key], dense[key]) for key in dense)


def test_restore_dense_of_a_model_in_plain_torch(saved: Path) -> None:
    torch.manual_seed(0)
    model, _ = _plain()
    found, again = tokcompile.restore_dense(model), plain()
    again.load_state_dict(found)
    assert torch.equal(again.head.weight, model.head.weight)
    loaded = tokcompile.restore_dense(tokcompile.load(saved / "plain", again, lowering="eager"))
    assert all(torch.equal(found[key], loaded[key]) for key in again.state_dict())


def test_trained_weights_cannot_be_restored(saved: Path, tmp_path: Path) -> None:
    model, inputs = tokcompile.load(saved / "stem", lowering="eager"), load_file(saved / "stem_inputs.safetensors")
    table = next(p for n, p in model.named_parameters() if n.startswith("tokcompile."))
    with torch.no_grad():
        table.add_(1)
    tokcompile.restore_dense(model)  # training the prepared state alone changes nothing of the dense model
    optimizer = torch.optim.SGD([model.lm_head.weight], lr=0.1)  # type: ignore[union-attr, list-item]
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    why = r"1 of \d+ tensors were changed after tokcompile.optimize, first lm_head.weight \(changed in place\)"
    with pytest.raises(TokcompileError, match=why):
        tokcompile.restore_dense(model)
    loaded = tokcompile.load(tokcompile.save_pretrained(model, tmp_path / "m"), lowering="eager")
    with pytest.raises(TokcompileError, match=why):  # known in the next process, too
        tokcompile.restore_dense(loaded)
    own, other = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in other)


def test_a_converted_model_cannot_be_restored(saved: Path) -> None:
    model = tokcompile.load(saved / "vit", lowering="eager")
    model.half()
    with pytest.raises(TokcompileError, match="converted from float32 to float16"):
        tokcompile.restore_dense(model)


def test_what_is_no_optimized_model() -> None:
    for function in (tokcompile.restore_dense, lambda m: tokcompile.save_pretrained(m, "nowhere")):
        with pytest.raises(TokcompileError, match=r"not made by tokcompile\.optimize"):
            function(plain())
    assert not Path("nowhere").exists()


# ----------------------------------------------------------------------------------------------------------- damage


def _refused(place: Path, text: str, *, model: Any = None, error: type[Exception] = SavedModelError) -> None:
    with pytest.raises(error, match=text) as caught:
        tokcompile.load(place, model)
    assert str(place) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_no_folder_and_foreign_folders(tmp_path: Path) -> None:
    _refused(tmp_path / "none", "no such folder")
    (tmp_path / "a").mkdir()
    _refused(tmp_path / "a", r"was not written by tokcompile\.save_pretrained \(no tokcompile\.json\)")
    (tmp_path / "a" / "config.json").write_text("{}")
    _refused(tmp_path / "a", "It holds a dense model: load that with transformers")


@pytest.mark.parametrize("name", ["state.safetensors", "model/model.safetensors", "report.json", "tokcompile.json"])
def test_a_truncated_file(folder: Path, name: str) -> None:
    file = folder / name
    file.write_bytes(file.read_bytes()[:-20])
    _refused(folder, "is damaged" if name == "tokcompile.json" else "cut off or replaced")


@pytest.mark.parametrize("name", ["state.safetensors", "model/model.safetensors", "model/config.json"])
def test_a_flipped_bit(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)
    _refused(folder, f"{name}: its checksum does not fit")


def test_a_file_that_is_missing(folder: Path) -> None:
    (folder / "state.safetensors").unlink()
    _refused(folder, "is missing; the folder was not copied whole")


def test_without_verification_bad_bytes_are_still_an_error(folder: Path) -> None:
    file = folder / "state.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(SavedModelError, match="cannot be read"):
        tokcompile.load(folder, verify=False)


def _edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, and its checksum with it."""
    manifest = json.loads((folder / "tokcompile.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (folder / "tokcompile.json").write_text(json.dumps(manifest | {"sha256": form.manifest_digest(manifest)}))


def _rehash(folder: Path, name: str) -> None:
    file = folder / name
    _edit(folder, lambda m: m["files"].__setitem__(name, {"bytes": file.stat().st_size, "sha256": form.sha256(file)}))


def test_a_changed_manifest(folder: Path) -> None:
    text = (folder / "tokcompile.json").read_text()
    (folder / "tokcompile.json").write_text(text.replace('"convert": 2', '"convert": 1'))
    _refused(folder, "its own checksum does not fit")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"format_version": "1"}', '{"format_version": true}', "[" * 100_000, "\x00"]
)
def test_what_is_no_manifest(folder: Path, text: str) -> None:
    (folder / "tokcompile.json").write_text(text)
    _refused(folder, r"tokcompile\.json is damaged")


def test_a_manifest_without_a_part(folder: Path) -> None:
    text = (folder / "tokcompile.json").read_text()
    for key in json.loads(text):
        if key in ("format_version", "sha256"):
            continue
        for value in (None, 3, "x"):
            (folder / "tokcompile.json").write_text(text)
            _edit(folder, lambda m, key=key, value=value: m.__setitem__(key, value))
            _refused(folder, f"{key} is missing, or no ")
    (folder / "tokcompile.json").write_text(text)
    _edit(folder, lambda m: m["state"][0].__setitem__("tensors", 3))
    _refused(folder, "has not the form that save_pretrained writes")


def test_a_newer_format(folder: Path) -> None:
    _edit(folder, lambda m: m.update(format_version=7, versions={"tokcompile": "9.1"}))
    _refused(folder, r"has format 7, written by tokcompile 9\.1; .* reads formats up to 1: update it")


def test_older_formats(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (form, saving):
        monkeypatch.setattr(module, "FORMAT", 2)
    _refused(folder, r"has format 1, which tokcompile .* cannot read any more; load and save it with tokcompile 0\.1")
    _edit(folder, lambda m: m.__setitem__("prescription", m.pop("recipe")))
    monkeypatch.setitem(form.UPGRADES, 1, lambda m: m | {"recipe": m["prescription"]})
    tokcompile.load(folder, lowering="eager")


def test_the_wrong_model(saved: Path, tmp_path: Path) -> None:
    _refused(saved / "plain", r"not the class that they belong to; call load\(folder, model=\.\.\.\)")
    wrong = Plain()
    wrong.head = nn.Linear(32, 16)
    _refused(saved / "plain", r"the shape of head\.weight is \[32, 32\] here and \[16, 32\] there", model=wrong)
    with pytest.raises(SavedModelError, match="belongs to another model than the one that was given: it has no weight"):
        tokcompile.load(saved / "plain", nn.Linear(3, 3))
    with pytest.raises(SavedModelError, match="not int"):
        tokcompile.load(saved / "plain", 3)  # type: ignore[arg-type]
    with pytest.raises(SavedModelError, match="write 'module:function'"):
        tokcompile.load(saved / "plain", "plain")
    _refused(saved / "vit", "holds a Dinov2Model of transformers with its weights; leave model= out", model=plain())


def test_a_pass_that_is_not_installed(folder: Path) -> None:
    _edit(folder, lambda m: m["recipe"]["data"]["steps"][0].__setitem__("pass", "sten"))
    with pytest.raises(RecipeError, match=r"unknown pass 'sten' \(did you mean 'stem'\?\)") as caught:
        tokcompile.load(folder)
    assert "load its file with tokcompile.registry.load_file" in str(caught.value)


# -------------------------------------------------------------------------------------------- complete, or not at all


def test_a_failure_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tokcompile.load(saved / "stem", lowering="eager")
    tokcompile.save_pretrained(model, tmp_path / "m")
    before = {file: file.read_bytes() for file in (tmp_path / "m").rglob("*") if file.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("_write_tensors", "_put"):
        with monkeypatch.context() as patch:
            patch.setattr(saving, name, full)
            with pytest.raises(OSError, match="No space left"):
                tokcompile.save_pretrained(model, tmp_path / "m")
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    rename = os.rename

    def second_fails(source: Any, target: Any) -> None:
        if str(source).endswith(".part"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
        with pytest.raises(OSError, match="Input/output"):
            tokcompile.save_pretrained(model, tmp_path / "m")
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_what_may_be_replaced(saved: Path, tmp_path: Path) -> None:
    model = tokcompile.load(saved / "vit", lowering="eager")
    place = tmp_path / "deep" / "m"
    tokcompile.save_pretrained(model, place)
    (place / "report.html").write_text("a page")
    tokcompile.save_pretrained(model, place)
    (place / "notes.txt").write_text("mine")
    tokcompile.load(place, lowering="eager")  # a file beside them is no harm
    with pytest.raises(SavedModelError, match=r"holds notes\.txt, which save_pretrained did not write"):
        tokcompile.save_pretrained(model, place)
    assert (place / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(SavedModelError, match="is not empty, and was not written by save_pretrained"):
        tokcompile.save_pretrained(model, tmp_path / "other")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SavedModelError, match="is no folder"):
        tokcompile.save_pretrained(model, tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "file", "other"]


# ---------------------------------------------------------------------------------------------------- runs no code


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(
    "name", ["model/pytorch_model.bin", "model/adapter_config.json", "model/modeling_x.py", "model/chat_template.jinja"]
)
def test_files_that_transformers_might_run(folder: Path, name: str) -> None:
    (folder / name).write_text("import os")
    _refused(folder, "was not written by save_pretrained; remove it")
    _rehash(folder, name)  # even where the manifest was made to list it
    _refused(folder, "which save_pretrained does not write")


def test_a_pickle_in_the_place_of_weights(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name in ("state.safetensors", "model/model.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
        _rehash(folder, name)
        with pytest.raises(SavedModelError):
            tokcompile.load(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}},
        {"attn_implementation": "evil/kernel"},
        {"attn_implementation": {"": "evil/kernel:forward"}},
        {"experts_implementation": "evil/kernel"},
    ],
)
def test_a_configuration_that_names_code(folder: Path, change: dict[str, Any]) -> None:
    file = folder / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    _rehash(folder, "model/config.json")
    _refused(folder, "names code outside of transformers, which load does not run")


def test_a_manifest_that_names_code(folder: Path) -> None:
    text = (folder / "tokcompile.json").read_text()
    for kind in ("os.system", "AutoModel", "pipeline", "GenerationMixin", "PreTrainedConfig", "Plain"):
        _edit(folder, lambda m, kind=kind: m["model"].__setitem__("class", kind))
        with pytest.raises(SavedModelError, match="transformers has no model class"):
            tokcompile.load(folder)
    (folder / "tokcompile.json").write_text(text)
    _edit(folder, lambda m: m["model"]["attention"].__setitem__("", "evil/kernel"))
    _refused(folder, "names code outside of transformers")
    (folder / "tokcompile.json").write_text(text)
    _edit(folder, lambda m: m["files"].__setitem__("../outside.json", {"bytes": 2, "sha256": ""}))
    _refused(folder, "which save_pretrained does not write")
    for name in ("__class__", "a.b", "forward", ""):
        (folder / "tokcompile.json").write_text(text)
        _edit(folder, lambda m, name=name: m["state"][0].__setitem__("pass", name))
        with pytest.raises(TokcompileError):
            tokcompile.load(folder)


def test_a_recipe_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    call = f"!!python/object/apply:os.system ['touch {mark}']"
    start = "recipe_version: 1\nsteps:\n"
    texts = [
        call,
        f"recipe_version: {call}",
        f"{start}  - pass: todre\n    params: {call}",
        f"{start}  - {call}",
        f"{start}  - pass: !!python/name:os.system\n    params: {{keep: 0.1}}",
        f"{start}  - pass: todre\n    params: {{keep: !!python/object/new:os.system ['touch {mark}']}}",
        f"%TAG ! tag:yaml.org,2002:python/\n---\n{start}  - pass: !object/apply:os.system ['touch {mark}']",
    ]
    for text in texts:
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError, match="not allowed in a recipe"):
            tokcompile.Recipe.load(tmp_path / "r.yaml")
    assert not mark.exists()

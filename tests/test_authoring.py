"""The authors' door: the passes of ``docs/write_a_pass.md`` are short, need one import, and are exact.

Each is loaded as a user does it (``load_file``) and held against an equal that knows nothing of it.
"""

from __future__ import annotations

import ast
import copy
import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokcompile
from tests.members import members
from tests.pruning import check, close
from tests.test_one_file_pass import block
from tests.test_sparse_decode import BUDGET, MODELS, SHARED, Masked, assert_same, generate, masked, prompt
from tests.zoo.vlm import VLMS, shallow
from tokcompile import authoring, registry
from tokcompile.demo import tiny_llm, tiny_vit
from tokcompile.errors import CalibrationError, NarrowError
from tokcompile.registry import load_file

#: File of the page -> how many lines it may have.
LINES = {"norm.py": 40, "small_keys.py": 40, "asked.py": 60, "neurons.py": 100}
#: What a pass imports besides tokcompile.authoring.
OTHERS = {"__future__", "collections.abc", "typing", "pydantic", "torch", "torch.nn.functional"}


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry.pass_names()
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))
    yield
    for name in LINES:
        sys.modules.pop(f"tokcompile_pass_{Path(name).stem}", None)


def load(name: str, folder: Path) -> str:
    """The pass of that file of the page, as a user loads it."""
    (folder / name).write_text(block(name), encoding="utf-8")
    return load_file(folder / name)[0]


def recipe(name: str, **params: Any) -> dict[str, Any]:
    return {"recipe_version": 1, "description": "test", "steps": [{"pass": name, "params": params}]}


# .. what a file needs


@pytest.mark.parametrize("name", LINES)
def test_a_pass_is_short_and_has_one_import(name: str) -> None:
    code = block(name)
    assert len(code.splitlines()) <= LINES[name]
    modules = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    assert modules - OTHERS == {"tokcompile.authoring"}


def test_the_example_package_has_one_import() -> None:
    source = Path(__file__).resolve().parents[1] / "examples/third_party_pass/src/tokcompile_uniform/__init__.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name and name.startswith("tokcompile")} == {"tokcompile.authoring"}


def test_all_that_is_exported_is_there_and_documented() -> None:
    assert sorted(set(authoring.__all__)) == authoring.__all__
    for name in authoring.__all__:
        value = getattr(authoring, name)
        assert (value.__doc__ or "").strip(), name
    public = {name for name in vars(authoring) if not name.startswith("_")} - {"annotations"}
    assert public == set(authoring.__all__)


def test_the_import_is_light() -> None:
    """No model library, compiler front, exporter or command line is loaded, and no pass."""
    program = (
        "import sys, tokcompile.authoring\n"
        "heavy = ('transformers', 'onnx', 'onnxscript', 'onnxruntime', 'rich', 'typer', 'tokcompile.runtime', "
        "'tokcompile.onnx_export', 'tokcompile.api', 'tokcompile.cli', 'tokcompile.passes.pruning')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# .. a choice of visual tokens (which tokens it keeps: tests/test_one_file_pass.py)


def test_visual_selector(tmp_path: Path) -> None:
    """Equal to the dense model with the dropped keys hidden, in the prefill and in each decode step."""
    case = shallow(VLMS["llava"]())
    model = tokcompile.optimize(case.model, recipe(load("norm.py", tmp_path), keep=0.25), lowering="eager")
    recording = check(model, case, case.inputs(batch=2, images_per_row=[2, 1], left_padding=2), 3)
    assert len(recording.kept) == 1


def test_staged_selector(tmp_path: Path) -> None:
    """Two cuts between the layers, the second with the score that the first carried on: as dense with keys hidden."""
    case = shallow(VLMS["llava"](), 3)
    name = load("asked.py", tmp_path)
    model = tokcompile.optimize(case.model, recipe(name, keep=[0.5, 0.25], at=[1, 2]), lowering="eager")
    recording = check(model, case, case.inputs(batch=2, images_per_row=[2, 1], left_padding=2), 3)
    assert [(entry.name, entry.layer) for entry in recording.kept] == [("asked", 1), ("asked", 2)]


# .. a decode attention


class SmallKeys(Masked):
    """Scores by hand, one key at a time."""

    def scores(self, module: nn.Module, query: Tensor, key: Tensor, seen: Tensor, kwargs: dict[str, Any]) -> Tensor:
        lists = [[[-sum(float(c) ** 2 for c in one) for one in head] for head in row] for row in key]
        return torch.tensor(lists)


def test_decode_attention(tmp_path: Path) -> None:
    """Equal to dense attention under the mask of the choice; padding is never chosen.

    In a model with learned positions: where they are rotated, keys of equal tokens have equal norms but for rounding.
    """
    name = load("small_keys.py", tmp_path)
    model, inputs = MODELS["gpt2"](), prompt()
    fast = tokcompile.optimize(model, recipe(name, budget=BUDGET, **SHARED), lowering="eager")
    result = generate(fast, inputs, 8)
    with masked(model, SmallKeys(name, {})):
        expected = generate(model, inputs, 8)
    assert_same(result, expected)
    step = tokcompile.report(fast).steps[0]
    assert (step.status, step.matches) == ("matched", 2)
    dense = generate(model, inputs, 8)
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(result.logits, dense.logits, strict=True))


def test_decode_attention_to_all_keys_is_the_original(tmp_path: Path) -> None:
    name = load("small_keys.py", tmp_path)
    model, inputs = MODELS["llama"](), prompt()
    fast = tokcompile.optimize(model, recipe(name, budget=1.0, **SHARED), lowering="eager")
    assert_same(generate(fast, inputs, 4), generate(model, inputs, 4), 1e-5)


# .. a pass with calibration


def without(model: nn.Module, inputs: dict[str, Tensor], keep: float, names: tuple[str, ...], down: str) -> nn.Module:
    """``model`` with all weights of the neurons set to zero that add least to the output on ``inputs``."""
    energy: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, path=path: energy.__setitem__(path, args[0].flatten(0, -2).double().square().sum(0))
        )
        for path, module in model.named_modules()
        if path.endswith(f".{down}")
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    changed = copy.deepcopy(model)
    for path, value in energy.items():
        mlp = changed.get_submodule(path.rpartition(".")[0])
        out = getattr(mlp, down).weight
        adds = (value * out.double().square().sum(0)).tolist()
        ranked = sorted(range(len(adds)), key=lambda i: -adds[i])
        gone = ranked[-(-len(adds) * int(keep * 100) // 100) :]
        with torch.no_grad():
            out[:, gone] = 0
            for name in names:
                linear = getattr(mlp, name)
                linear.weight[gone] = 0
                if linear.bias is not None:
                    linear.bias[gone] = 0
    assert energy
    return changed


@pytest.mark.parametrize(
    ("make", "names", "down"),
    members(
        [(tiny_llm, ("gate_proj", "up_proj"), "down_proj"), (tiny_vit, ("fc1",), "fc2")],
        [(tiny_llm, ("gate_proj", "up_proj"), "down_proj")],
    ),
    ids=["gated", "plain with biases"],
)
def test_calibrated_pass(make: Any, names: tuple[str, ...], down: str, tmp_path: Path) -> None:
    name = load("neurons.py", tmp_path)
    model, inputs = make()
    wanted = without(model, inputs, 0.5, names, down)
    with torch.no_grad():
        dense, expected = model(**inputs)[0], wanted(**inputs)[0]
    small = tokcompile.optimize(
        make()[0], recipe(name, keep=0.5), inputs=inputs, calibration=[inputs], lowering="eager"
    )
    with torch.no_grad():
        found = small(**inputs)[0]
    close(found, expected)
    assert (found - dense).abs().max() > 1e-3
    (entry,) = tokcompile.report(small).steps
    assert entry.status == "matched"
    assert entry.flop_ratio is not None
    assert entry.flop_ratio > 1.2
    prepared = [key for key in small.state_dict() if key.startswith("tokcompile.neurons.")]
    assert len(prepared) == entry.matches * 3


def test_calibrated_pass_with_all_neurons_is_the_original(tmp_path: Path) -> None:
    name = load("neurons.py", tmp_path)
    model, inputs = tiny_llm()
    with torch.no_grad():
        expected = model(**inputs)[0]
        same = tokcompile.optimize(model, recipe(name, keep=1.0), inputs=inputs, calibration=[inputs], lowering="eager")
        assert torch.equal(same(**inputs)[0], expected)


def test_calibrated_pass_without_calibration_says_so(tmp_path: Path) -> None:
    name = load("neurons.py", tmp_path)
    model, inputs = tiny_llm()
    with pytest.raises(CalibrationError, match=r"steps\[0\] \(neurons\): needs calibration; pass calibration="):
        tokcompile.optimize(model, recipe(name, keep=0.5), inputs=inputs, lowering="eager")


# .. names of the first releases


@pytest.mark.parametrize("old", ["plan", "pruning", "sparse_decode", "selection"])
def test_old_names_warn_and_give_the_same_object(old: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # the import alone does not warn
        module = importlib.import_module(f"tokcompile.{old}")
    assert module._MOVED
    for name, new in module._MOVED.items():
        with pytest.warns(DeprecationWarning, match=rf"tokcompile\.{old}\.{name} moved to {new}\.{name};"):
            value = getattr(module, name)
        assert value is getattr(importlib.import_module(new), name)
    with pytest.raises(AttributeError, match=rf"module 'tokcompile\.{old}' has no attribute 'nothing'"):
        _ = module.nothing


def test_what_the_first_passes_imported_is_still_found() -> None:
    """The imports of a pass written for the first release, as it wrote them."""
    first = {
        "plan": ("Pass", "Context", "Seen"),
        "pruning": ("VisualParams", "VisualSelection", "PatchParams", "PatchSelection", "drop_visual"),
        "sparse_decode": ("SparseDecode", "SparseDecodeParams"),
        "selection": ("segments", "segment_sizes", "segment_positions", "budgets", "keep_mask", "random_scores"),
    }
    for old, names in first.items():
        for name in names:
            with pytest.warns(DeprecationWarning, match="moved"):
                value = getattr(importlib.import_module(f"tokcompile.{old}"), name)
            assert value is getattr(authoring, name)
    from tokcompile.registry import PassParams, about, register

    assert (PassParams, about, register) == (authoring.PassParams, authoring.about, authoring.register)
    assert authoring.NarrowError is NarrowError

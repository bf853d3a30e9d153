"""The command line as a new user meets it: results, exit codes, JSON, and never a traceback for a user's mistake."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tokcompile
from tokcompile import registry
from tokcompile.cli import DEFECT, MISSING, NO_MATCH, OK, RECIPE, REFUSED, USAGE, main
from tokcompile.errors import TokcompileError
from tokcompile.recipes import Recipe, shipped

VLM, VIT, LLM = (f"tokcompile.demo:tiny_{kind}" for kind in ("vlm", "vit", "llm"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line: (exit code, standard output, standard error)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


# --------------------------------------------------------------------------------------------------------- recipes


def test_list_and_show(call: Any) -> None:
    code, out, _ = call("recipes", "list")
    assert code == OK
    assert all(name in out for name in shipped())
    data = json.loads(call("recipes", "list", "--json")[1])
    assert [entry["name"] for entry in data["recipes"]] == shipped()
    assert {entry["name"] for entry in data["passes"]} >= {"todre", "random"}

    code, out, _ = call("recipes", "show", "vlm_prune_90", "--set", "steps[0].params.keep=0.2")
    assert code == OK
    text = " ".join(out.split())
    for part in ("keep: 0.2", "drop_layer", "paper: 7/8", "arXiv 2505.18757", "required", "fraction of the depth"):
        assert part in text, part
    assert Recipe.parse(out.split("\ntodre:")[0]).steps[0].params.keep.value == 0.2
    data = json.loads(call("recipes", "show", "todre", "--json")[1])
    assert data["recipe"] is None
    assert [p["name"] for p in data["passes"]["todre"]["parameters"]] == [
        "keep",
        "positions",
        "criterion",
        "drop_layer",
    ]
    code, _, err = call("recipes", "show", "vlm_prune_09")
    assert (code, "did you mean 'vlm_prune_90'?" in err) == (RECIPE, True)


def test_new_writes_a_recipe_that_lints_and_a_schema(call: Any, tmp_path: Path) -> None:
    file = tmp_path / "sub" / "mine.yaml"
    code, out, err = call("recipes", "new", file, "--from", "vlm_random_90", "--set", "steps[0].params.seed=7")
    assert (code, out) == (OK, "")
    assert f"tokcompile lint {file}" in err
    assert call("lint", file)[0] == OK
    assert Recipe.load(file).steps[0].params.seed == 7
    assert file.read_text().startswith("# yaml-language-server: $schema=tokcompile.schema.json\n")
    schema = json.loads((file.parent / "tokcompile.schema.json").read_text())
    assert schema == json.loads(call("recipes", "schema")[1])
    code, _, err = call("recipes", "new", file)
    assert (code, "--force" in err) == (REFUSED, True)
    assert call("recipes", "new", file, "--force")[0] == OK
    assert call("recipes", "new", tmp_path / "mine.txt")[0] == USAGE


def test_three_mistakes_three_messages_in_one_go(call: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("""\
recipe_version: 1
steps:
  - pass: tordre
  - pass: todre
    params: {keep: 10%}
    expects: {min_matches: 1}
""")
    code, out, err = call("lint", file)
    assert code == RECIPE
    assert err == ""
    assert out.splitlines() == [
        f"{file}:3:11: steps[0].pass: unknown pass 'tordre' (did you mean 'todre'?)",
        f"{file}:5:20: steps[1].params.keep: should be a ratio in (0, 1] or a whole number of tokens, found '10%'; "
        "write 0.1",
        f"{file}:6:5: steps[1].expects: unknown key (did you mean 'expect'?)",
    ]
    code, out, _ = call("lint", file, "vlm_prune_90", "--json")
    bad, good = json.loads(out)
    assert code == RECIPE
    assert [(m["line"], m["column"]) for m in bad["mistakes"]] == [(3, 11), (5, 20), (6, 5)]
    assert (bad["ok"], good["ok"], good["mistakes"]) == (False, True, [])


def test_lint_says_what_no_pass_acts_on(call: Any) -> None:
    code, out, _ = call("lint", "vit_prune_50", "--set", "steps[0].target.modality=video")
    assert code == RECIPE
    assert "modality" in out
    code, out, _ = call("lint", "none.yaml")
    assert code == RECIPE
    assert "none.yaml: cannot be read" in out


TEXT = "recipe_version: 1\ndescription: x\nsteps:\n  - pass: todre\n    params: {keep: 0.5, criterion: max_sum}\n"


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, len(TEXT)),
    st.integers(0, 9),
    st.text(max_size=8) | st.sampled_from(["!!python/name:os.system ''", "&a ", "*a", "{", "[[", "\0", "- - -"]),
)
def test_any_file_is_ok_or_has_mistakes(tmp_path: Path, capsys: Any, at: int, removed: int, added: str) -> None:
    """Fuzz: exit code 0 with a recipe that loads, or 3 with a line and a column; never anything else."""
    file = tmp_path / "fuzz.yaml"
    file.write_bytes((TEXT[:at] + added + TEXT[at + removed :]).encode("utf-8", "surrogatepass"))
    code = main(["lint", str(file), "--json"])
    out, err = capsys.readouterr()
    [entry] = json.loads(out)
    assert err == ""
    if code == OK:
        assert Recipe.load(file).steps
    else:
        assert code == RECIPE
        assert all(m["what"] and (m["line"] or "cannot be read" in m["what"]) for m in entry["mistakes"])
        assert entry["mistakes"]


# ---------------------------------------------------------------------------------------------------------- models


def test_explain(call: Any, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code, out, err = call("explain", VLM, "--recipe", "vlm_prune_90", "--html", page)
    assert code == OK
    assert "72 -> 15" in out
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert str(page) in err
    data = json.loads(call("explain", VIT, "--json")[1])
    assert {region["kind"] for region in data["regions"]} == {"vision_encoder", "attention", "feed_forward"}


def test_a_recipe_that_changes_nothing_has_its_own_exit_code(call: Any, tmp_path: Path) -> None:
    code, out, err = call("explain", VIT, "--recipe", "vlm_prune_90")
    assert code == NO_MATCH
    assert "no merge_point" in out
    assert "expected at least 1" in err
    code, out, err = call("optimize", LLM, "--recipe", "vlm_prune_90", "--out", tmp_path / "out")
    assert (code, out) == (NO_MATCH, "")
    assert "no merge_point" in err
    assert not (tmp_path / "out").exists()


def test_optimize(call: Any, tmp_path: Path) -> None:
    code, out, _ = call("optimize", VIT, "--recipe", "vit_prune_50", "--dry-run", "--json")
    assert code == OK
    assert json.loads(out)["report"]["steps"][0]["status"] == "matched"
    assert call("optimize", VIT, "--recipe", "vit_prune_50")[0] == USAGE
    for _ in range(2):  # the second replaces the first
        assert call("optimize", VIT, "--recipe", "vit_prune_50", "--out", tmp_path / "saved")[0] == OK
    assert (tmp_path / "saved" / "report.html").is_file()
    assert tokcompile.report(tokcompile.load(tmp_path / "saved", lowering="eager")).recipe == "vit_prune_50"
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    code, _, err = call("optimize", "no:model", "--recipe", "vit_prune_50", "--out", tmp_path / "saved")
    assert code == REFUSED  # before the model is loaded
    assert "holds notes.txt, which save_pretrained did not write" in err
    code, _, err = call("explain", tmp_path / "saved")
    assert code == MISSING
    assert "load it with tokcompile.load" in err


def test_bench(call: Any, tmp_path: Path) -> None:
    code, out, _ = call(
        "bench",
        VLM,
        "-r",
        "vlm_random_90",
        "--no-compile",
        "--lowering",
        "eager",
        "--rounds",
        2,
        "--new-tokens",
        2,
        "--json",
        "--out",
        tmp_path,
    )
    assert code == OK
    rows = json.loads(out)["rows"]
    assert [row["name"] for row in rows] == ["dense eager", "vlm_random_90"]
    assert rows[1]["ttft"]["median"] > 0
    assert {"bench.csv", "bench.json", "report_vlm_random_90.html"} <= {path.name for path in tmp_path.iterdir()}


def test_export_hands_everything_over(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_: dict[str, Any] = {}

    def export_onnx(model: Any, inputs: Any, out: Any, **rest: Any) -> str:
        given_.update(rest, out=out, inputs=inputs)
        return "max error 1e-6"

    monkeypatch.setattr(tokcompile, "export_onnx", export_onnx, raising=False)
    code, out, _ = call(
        "export",
        VIT,
        "--recipe",
        "vit_prune_50",
        "--out",
        tmp_path,
        "--no-check",
        "--opset",
        18,
        "--target",
        "contrib",
        "--all-logits",
        "--overwrite",
    )
    assert code == OK
    assert "max error 1e-6" in out
    assert (given_["recipe"].name, given_["check"], given_["out"]) == ("vit_prune_50", False, tmp_path)
    assert (given_["opset"], given_["target"], given_["logits"], given_["overwrite"]) == (18, "contrib", "all", True)


@pytest.mark.slow
def test_export_writes_files_that_equal_the_model(call: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra: onnx)")
    code, out, err = call("export", VIT, "--out", tmp_path / "vit", "--json")
    assert code == OK, err
    result = json.loads(out)
    assert max(row["relative"] for row in result["parity"]) < 1e-5
    assert {path.name for path in (tmp_path / "vit").iterdir()} >= {"model.onnx", "manifest.json"}
    code, _, err = call("export", VIT, "--out", tmp_path / "vit")
    assert code == REFUSED
    assert "overwrite" in err


@pytest.mark.slow
def test_a_folder_of_transformers(call: Any, tmp_path: Path) -> None:
    """A text model, an encoder and a model with images, each saved by save_pretrained; inputs are made up."""
    from tokcompile.demo import tiny_llm, tiny_vit, tiny_vlm

    for name, make, kinds in (
        ("llm", tiny_llm, {"decoder_stack"}),
        ("vit", tiny_vit, {"vision_encoder"}),
        ("vlm", tiny_vlm, {"vision_encoder", "merge_point", "decoder_stack"}),
    ):
        make()[0].save_pretrained(tmp_path / name)
        code, out, err = call("explain", tmp_path / name, "--tokens", 16, "--batch", 2, "--json")
        assert code == OK, err
        assert kinds <= {region["kind"] for region in json.loads(out)["regions"]}
    (tmp_path / "llm" / "model.safetensors").unlink()
    code, _, err = call("explain", tmp_path / "llm")
    assert code == MISSING
    assert "cannot be loaded" in err
    assert call("explain", tmp_path / "llm", "--random-weights", "--dtype", "bfloat16")[0] == OK


@pytest.mark.slow
def test_demo(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call("demo", "--tiny", "--json")
    assert code == OK
    assert json.loads(out)["steps"][0]["pass_name"] == "todre"
    assert call("demo", "--json")[0] == USAGE
    monkeypatch.setattr("tokcompile.demo.full_demo", lambda: None)
    code, _, err = call("demo")
    assert (code, "demo --tiny" in err) == (REFUSED, True)


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["explain", "tokcompile.demo:tiny_vti"], MISSING, "did you mean 'tiny_vit'?"),
        (["explain", "no_such_module:make"], MISSING, "there is no module 'no_such_module' to import"),
        (["explain", "nothing.py:make"], MISSING, "nothing.py: no such file"),
        (["explain", "json:dumps"], MISSING, "json:dumps failed: TypeError"),
        (["explain", "os:getcwd"], MISSING, "should return (model, inputs)"),
        (["explain", "./no/such/folder"], MISSING, "no such folder"),
        (["explain", VIT, "--image", "none.png"], MISSING, "none.png: no such picture"),
        (["explain", VIT, "--html", "no/such/folder/page.html"], MISSING, "no/such/folder: no such folder"),
        (["optimize", VIT, "-r", "vit_prune_50", "--out", "/dev/null/x"], REFUSED, "/dev/null is not a folder"),
        (["explain", VIT, "--dtype", "int9"], REFUSED, "write float32"),
        (["explain", VIT, "--device", "nonsense"], REFUSED, "--device nonsense"),
        (["explain", VIT, "--recipe", "vit_prune_05"], RECIPE, "did you mean 'vit_prune_50'?"),
        (["explain", VIT, "--recipe", "vit_prune_50", "--set", "steps[0]"], RECIPE, "should be PLACE=VALUE"),
        (["optimize", VIT, "-r", "vit_prune_50", "--dry-run", "--lowering", "x"], REFUSED, "choose one of inductor"),
        (["bench", VIT, "--calibration", "x", "-r", "vit_prune_50"], USAGE, "module:function"),
        (["--passes", "none.py", "recipes", "list"], REFUSED, "none.py: not a Python file"),
        (["explain"], USAGE, "Missing argument"),
        (["lnit"], USAGE, "lnit"),
        (["explain", VIT, "--colour"], USAGE, "--colour"),
    ],
)
def test_a_mistake_is_one_message_and_an_exit_code(call: Any, arguments: list[str], code: int, message: str) -> None:
    found, out, err = call(*arguments)
    assert found == code
    assert out == ""
    assert message in " ".join(err.replace("│", " ").split())


def test_a_missing_package_and_a_defect(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> Any:
        def raising(*_: Any, **__: Any) -> None:
            raise error

        return raising

    for error, code, message in (
        (ModuleNotFoundError("x", name="onnxscript"), MISSING, "pip install onnxscript"),
        (PermissionError(13, "Permission denied", "/x"), MISSING, "/x: Permission denied"),
        (ZeroDivisionError("by zero"), DEFECT, "a defect of tokcompile"),
        (TokcompileError("no [bold] way"), REFUSED, "no [bold] way"),
        (KeyboardInterrupt(), 130, ""),
    ):
        monkeypatch.setattr(tokcompile, "export_onnx", fail(error), raising=False)
        found, _, err = call("export", VIT)
        assert found == code
        assert message in err
    monkeypatch.setattr(tokcompile, "export_onnx", fail(ZeroDivisionError()), raising=False)
    with pytest.raises(ZeroDivisionError):
        main(["export", VIT, "--debug"])


def test_a_function_in_a_file_and_a_pass_in_a_file(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))
    (tmp_path / "make.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(3, 3), {'input': torch.ones(1, 3)}\n"
    )
    code, out, _ = call("explain", f"{tmp_path / 'make.py'}:make")
    assert code == OK
    assert "No region found." in out
    (tmp_path / "mine.py").write_text("raise RuntimeError('mine')\n")
    code, _, err = call("--passes", tmp_path / "mine.py", "recipes", "list")
    assert (code, "RuntimeError: mine" in err) == (REFUSED, True)


def test_passes_anywhere_on_the_line(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_passes", dict(registry._passes))
    (tmp_path / "mine.py").write_text(
        "from pydantic import Field\n"
        "from tokcompile.authoring import PassParams, register\n"
        "@register\nclass Mine:\n    'Mine.'\n    name, regions = 'mine', 'merge_point'\n"
        "    class Params(PassParams):\n        keep: int = Field(3, description='Tokens.')\n"
    )
    (tmp_path / "mine.yaml").write_text("recipe_version: 1\nsteps: [{pass: mine}]\n")
    assert call("lint", tmp_path / "mine.yaml")[0] == RECIPE
    for words in (
        ("lint", "--passes", tmp_path / "mine.py", tmp_path / "mine.yaml"),
        ("lint", tmp_path / "mine.yaml", f"--passes={tmp_path / 'mine.py'}"),
    ):
        registry._passes.pop("mine", None)
        code, out, _ = call(*words)
        assert (code, "ok" in out) == (OK, True)


def test_a_budget_of_one_token_is_a_warning(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("recipe_version: 1\nsteps:\n  - pass: random\n    params: {keep: 1}\n")
    code, out, _ = call("lint", path)
    assert code == OK
    warning, ok = out.strip().split("\n")
    assert warning == f"{path}:4:20: steps[0].params.keep: 1 keeps one token; write 1.0 to keep all (warning)"
    assert ok == f"{path}: ok"
    [entry] = json.loads(call("lint", path, "--json")[1])
    assert (entry["ok"], [w["line"] for w in entry["warnings"]]) == (True, [4])
    path.write_text("recipe_version: 1\nsteps:\n  - pass: random\n    params: {keep: 1.0}\n")
    assert call("lint", path)[1] == f"{path}: ok\n"


def test_what_is_missing_is_said_before_the_work(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every package of an extra at once; a plot that is left out is said; nothing is loaded before."""
    from importlib.util import find_spec

    def gone(*names: str) -> None:
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name, *rest: None if name in names else find_spec(name, *rest)
        )

    gone("onnx", "onnxruntime", "PIL")
    monkeypatch.setattr("tokcompile.model_source.load", lambda request: pytest.fail("loaded a model first"))
    code, _, err = call("export", VIT, "--out", tmp_path / "out")
    assert (code, err) == (MISSING, "error: export needs onnx, onnxruntime: pip install 'tokcompile[onnx]'\n")
    (tmp_path / "cat.png").write_bytes(b"")
    code, _, err = call("explain", VLM, "--image", tmp_path / "cat.png")
    assert (code, err) == (MISSING, "error: --image needs PIL: pip install 'tokcompile[demo]'\n")


def test_a_plot_that_is_left_out_is_said(call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokcompile.reporting.bench_result import BenchResult

    def no_plot(*_: Any) -> None:
        raise TokcompileError("a plot needs matplotlib: pip install matplotlib")

    monkeypatch.setattr(BenchResult, "plot", no_plot)
    result = BenchResult("Tiny", "cpu", 1, 2, "dense eager", [])
    monkeypatch.setattr("tokcompile.measure.bench.bench", lambda *_, **__: result)
    code, _, err = call("bench", VIT, "--out", tmp_path, "--json")
    assert code == OK
    assert "bench.png is left out: a plot needs matplotlib: pip install matplotlib" in err
    assert "bench.csv" in err


@pytest.mark.parametrize("answer", ["y", "n"])
def test_overwriting_asks_whoever_sits_there(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    assert call("recipes", "new", path)[0] == REFUSED  # nobody sits there
    assert path.read_text() == "mine"
    monkeypatch.setattr("sys.stdin", Terminal(f"{answer}\n"))
    code, _, err = call("recipes", "new", path)
    assert f"{path} exists. Replace it?" in err
    assert (code, path.read_text() == "mine") == ((OK, False) if answer == "y" else (REFUSED, True))


class Terminal(io.StringIO):
    """Standard input at which somebody sits."""

    def isatty(self) -> bool:
        return True


def test_explain_takes_calibration(call: Any, tmp_path: Path) -> None:
    (tmp_path / "make.py").write_text(
        "import torch\nfrom tokcompile.demo import tiny_llm\n"
        "def make():\n    return tiny_llm()\n"
        "def data():\n    return [tiny_llm()[1]]\n"
    )
    (tmp_path / "mine.yaml").write_text("recipe_version: 1\nsteps: [{pass: moe_from_dense}]\n")
    model, recipe = f"{tmp_path / 'make.py'}:make", tmp_path / "mine.yaml"
    code, out, _ = call("explain", model, "-r", recipe, "--json")
    assert (code, json.loads(out)["steps"][0]["status"]) == (NO_MATCH, "condition_failed")
    code, out, err = call("explain", model, "-r", recipe, "--json", "--calibration", f"{tmp_path / 'make.py'}:data")
    assert (code, json.loads(out)["steps"][0]["status"]) == (OK, "unprofitable"), err


def test_every_command_has_help_with_an_example(call: Any) -> None:
    for command in (
        ["recipes", "list"],
        ["recipes", "show"],
        ["recipes", "new"],
        ["recipes", "schema"],
        ["lint"],
        ["explain"],
        ["optimize"],
        ["bench"],
        ["export"],
        ["demo"],
    ):
        code, out, _ = call(*command, "--help")
        assert code == OK
        assert "Example" in out
    code, out, _ = call("--help")
    assert "Exit codes" in out
    assert call("--version")[1] == f"tokcompile {tokcompile.__version__}\n"


def test_as_a_program(tmp_path: Path) -> None:
    """In a process of its own: results on one stream, messages on the other, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "tokcompile.cli", "lint", "vlm_prune_90"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (OK, "vlm_prune_90: ok\n", "")
    done = subprocess.run(
        [sys.executable, "-m", "tokcompile.cli", "explain", "./nothing"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (MISSING, "")
    assert done.stderr == "error: ./nothing: no such folder\n"

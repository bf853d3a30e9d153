"""Recipes: every mistake is named, with its place, in one error; what is accepted says exactly what it means."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import re
import sys
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from ruamel.yaml import YAML

from tokcompile import registry
from tokcompile.errors import RecipeError
from tokcompile.recipe import overrides as recipe_overrides
from tokcompile.recipe import yaml as recipe_yaml
from tokcompile.recipe.parameters import parameters, pass_parameters, pass_source
from tokcompile.recipe.schema import EDITOR_LINE, FILE, shipped_schema
from tokcompile.recipes import Budget, Recipe, Step, Target, json_schema, shipped
from tokcompile.registry import PassParams, get_pass, load_failures, pass_names, register

GOOD: dict[str, Any] = {
    "recipe_version": 1,
    "description": "For the tests.",
    "steps": [
        {
            "pass": "sample_keep",
            "target": {"region": "merge_point", "path": "model.*", "modality": "image"},
            "params": {"keep": 0.1, "criterion": "max_sum"},
            "expect": {"min_matches": 1, "max_matches": 3},
        },
        {"pass": "sample_stages", "params": {"keep": [0.7, 0.5], "at": [0.25, 0.5]}},
        {"pass": "sample_layers", "target": {"layers": [0, "2-4", -1]}, "params": {"share": 0.5}},
    ],
    "protect": {"paths": ["lm_head*"], "leading_tokens": 5},
}


class SampleKeep:
    """Keeps something."""

    name = "sample_keep"
    regions = "merge_point"

    class Params(PassParams):
        keep: Budget = Field(description="Ratio or count.")
        criterion: Literal["max_sum", "k_center"] = Field("max_sum", description="Which rule.")
        drop_layer: float | None = Field(0.5, gt=0, lt=1, description="Fraction of depth; null for never.")


class SampleStages:
    """Keeps something in stages."""

    name = "sample_stages"
    regions = "vision_encoder"
    protects_leading = True

    class Params(PassParams):
        keep: list[float] = Field(description="Ratios.")
        at: list[float] = Field(description="Fractions of depth.")


class SampleLayers:
    """Changes layers, one by one."""

    name = "sample_layers"
    regions = "attention"

    class Params(PassParams):
        share: float = Field(description="Of something.")


@pytest.fixture(autouse=True, scope="module")
def _sample_passes():
    pass_names()  # load the real ones first
    known = dict(registry._passes)
    register(SampleKeep)
    register(SampleStages)
    register(SampleLayers)
    yield
    registry._passes.clear()
    registry._passes.update(known)


def mistakes(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "r.yaml")
    return str(caught.value).split("\n")


def mistakes_of_params(params: str) -> list[str]:
    return mistakes(f"recipe_version: 1\nsteps:\n  - pass: sample_keep\n    params: {params}\n")


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_all_mistakes_in_one_error_with_their_places():
    text = """\
recipe_version: 1
steps:
  - pass: sample_kepe
  - pass: sample_keep
    target: {region: merge_pont}
    params: {keep: 10%, critreion: max_sum}
"""
    assert mistakes(text) == [
        "r.yaml:3:11: steps[0].pass: unknown pass 'sample_kepe' (did you mean 'sample_keep'?)",
        "r.yaml:5:22: steps[1].target.region: unknown region kind 'merge_pont' (did you mean 'merge_point'?)",
        "r.yaml:6:20: steps[1].params.keep: should be a ratio in (0, 1] or a whole number of tokens, found '10%'; "
        "write 0.1",
        "r.yaml:6:25: steps[1].params.critreion: unknown key (did you mean 'criterion'?)",
    ]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("0", "a count of tokens should be at least 1, found 0"),
        ("-3", "a count of tokens should be at least 1, found -3"),
        ("0.0", "a ratio should be in (0, 1], found 0.0"),
        ("1.5", "a ratio should be in (0, 1], found 1.5"),
        ("64.0", "a ratio should be in (0, 1], found 64.0; for a count write 64"),
        (".nan", "a ratio should be in (0, 1], found nan"),
        (".inf", "a ratio should be in (0, 1], found inf"),
        ("1e-9", "a ratio should be at least 0.000001, found 1e-09"),
        ("'10%'", "should be a ratio in (0, 1] or a whole number of tokens, found '10%'; write 0.1"),
        ("true", "should be a ratio in (0, 1] or a whole number of tokens, found true"),
        ("null", "should be a ratio in (0, 1] or a whole number of tokens, found null"),
        ("[1]", "should be a ratio in (0, 1] or a whole number of tokens, found a list"),
    ],
)
def test_bad_budget(written, message):
    assert mistakes_of_params(f"{{keep: {written}}}") == [f"r.yaml:4:20: steps[0].params.keep: {message}"]


def test_messages_of_parameters():
    assert mistakes_of_params("{}") == ["r.yaml:4:13: steps[0].params: key 'keep' is missing"]
    assert mistakes_of_params("3") == ["r.yaml:4:13: steps[0].params: should be a mapping of parameters, found 3"]
    assert mistakes_of_params("{keep: 2, criterion: maxsum}") == [
        "r.yaml:4:34: steps[0].params.criterion: should be 'max_sum' or 'k_center', found 'maxsum' "
        "(did you mean 'max_sum'?)"
    ]
    [line] = mistakes_of_params("{keep: 2, drop_layer: 1.5}")
    assert line == "r.yaml:4:35: steps[0].params.drop_layer: should be less than 1, found 1.5"
    [line] = mistakes("recipe_version: 1\nsteps:\n  - pass: sample_keep\n")  # nothing given: same, at the step
    assert line == "r.yaml:3:5: steps[0].params: key 'keep' is missing"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "r.yaml:1:1: the file is empty"),
        ("3\n", "r.yaml:1:1: should be a mapping, found 3"),
        ("null\n", "r.yaml:1:1: should be a mapping, found null"),
        ("[1, 2\n", "r.yaml:2:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("recipe_version: 2\nextends: vlm_pool_90\n", "r.yaml:1:17: recipe_version: should be 1, found 2"),
        ("recipe_version: true\nextends: vlm_pool_90\n", "r.yaml:1:17: recipe_version: should be 1, found true"),
        ("recipe_version: 1.0\nextends: vlm_pool_90\n", "r.yaml:1:17: recipe_version: should be 1, found 1.0"),
        ("recipe_version: 1\n", "r.yaml:1:1: steps: a recipe needs at least one step"),
        ("recipe_version: 1\nsteps: []\n", "r.yaml:2:8: steps: a recipe needs at least one step"),
        ("recipe_version: 1\nextends: vlm_pool_09\n", "r.yaml:2:10: extends: unknown recipe 'vlm_pool_09' "
         "(did you mean 'vlm_pool_90'?); a path ends in .yaml"),
        ("recipe_version: 1\nextends: vlm_pool_90\nsteps: []\n", "r.yaml:3:8: steps: a recipe needs at least one step; "
         "leave the key out to keep those of the recipe that it extends"),
        ("recipe_version: 1\nextends: vlm_pool_90\ndescription: a\ndescription: b\n",
         "r.yaml:4:1: description: duplicate key, first on line 3"),
        ("recipe_version: 1\nextends: vlm_pool_90\n1: 2\n", "r.yaml:3:1: a key should be plain text"),
        ("recipe_version: 1\nextends: vlm_pool_90\n<<: {a: 1}\n", "r.yaml:3:1: a key should be plain text"),
        ("recipe_version: 1\nextends: &a vlm_pool_90\ndescription: *a\n",
         "r.yaml:2:10: description: anchors and aliases (& and *) are not allowed in a recipe"),
    ],
)  # fmt: skip
def test_one_mistake(text, line):
    assert line in mistakes(text)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['false']", "!!python/name:os.system ''", "!x 1", "!x {}"]
)
def test_tags_are_refused(tag):
    [line] = mistakes(f"recipe_version: 1\nextends: vlm_pool_90\ndescription: {tag}\n")[:1]
    assert line.startswith("r.yaml:3:14: description: tag '!")
    assert line.endswith("is not allowed in a recipe")


def test_alias_bomb_is_refused_quickly():
    text = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
    )
    assert any("anchors and aliases" in line for line in mistakes(text))


def test_deep_nesting_is_a_recipe_error():
    assert "nested too deeply" in mistakes("[" * 2_000)[0]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("[]", "an empty list selects no layer; leave the key out for all layers"),
        ("[true]", 'should hold whole numbers and ranges such as "4-8", found true'),
        ('["4..8"]', "should hold whole numbers and ranges such as \"4-8\", found '4..8'"),
        ('["8-4"]', "range '8-4' runs backwards"),
    ],
)
def test_bad_layers(layers, message):
    text = (
        f"recipe_version: 1\nsteps:\n  - pass: sample_keep\n    params: {{keep: 1}}\n    target: {{layers: {layers}}}\n"
    )
    assert mistakes(text) == [f"r.yaml:5:22: steps[0].target.layers: {message}"]


def test_what_a_pass_does_not_look_at_comes_with_the_other_mistakes():
    text = """\
recipe_version: 1
steps:
  - pass: sample_keep
    target: {region: attention, layers: [1]}
    params: {keep: 10%}
  - pass: sample_layers
    target: {modality: image}
    params: {share: 0.5}
"""
    assert mistakes(text) == [
        "r.yaml:4:22: steps[0].target.region: sample_keep works on merge_point, not on attention; leave target.region "
        "out",
        "r.yaml:4:41: steps[0].target.layers: sample_keep takes no target.layers; its own parameters say at which "
        "depth it acts",
        "r.yaml:5:20: steps[0].params.keep: should be a ratio in (0, 1] or a whole number of tokens, found '10%'; "
        "write 0.1",
        "r.yaml:7:24: steps[1].target.modality: images and video are told apart at merge points only; leave "
        "target.modality out",
    ]
    text = "recipe_version: 1\nextends: vlm_prune_90\nprotect: {leading_tokens: 3}\n"
    assert mistakes(text) == [
        "r.yaml:3:27: protect.leading_tokens: no pass of this recipe removes tokens inside an encoder; leave it out"
    ]


def test_extends_and_single_values(tmp_path):
    base = Recipe.load("vlm_prune_90")
    text = "recipe_version: 1\nextends: vlm_prune_90\nset:\n  steps[0].params.keep: 0.25\n"
    recipe = Recipe.parse(text, "mine.yaml")
    assert recipe.to_dict() == base.override({"steps[0].params.keep": 0.25}).to_dict()
    assert recipe.steps[0].params.keep == Budget(1, 4)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    again = Recipe.load({"recipe_version": 1, "extends": str(tmp_path / "mine.yaml"), "description": "Other."})
    assert (again.description, again.steps) == ("Other.", recipe.steps)
    wrong = text + "  steps[0].params.kep: 0.3\n  steps[3].pass: random\n"
    assert mistakes(wrong) == [
        "r.yaml:5:24: set['steps[0].params.kep']: unknown key (did you mean 'keep'?)",
        "r.yaml:6:18: set['steps[3].pass']: steps has 1 entries, numbered from 0",
    ]
    assert mistakes(
        "recipe_version: 1\nset: {'steps[0].pass': random}\nsteps: [{pass: random, params: {keep: 2}}]\n"
    ) == ["r.yaml:2:6: set: changes values of the recipe that `extends` names, and there is none"]


def test_a_dict_has_no_lines_but_all_mistakes():
    data = copy.deepcopy(GOOD)
    data["steps"][0]["params"]["keep"] = True
    data["step"] = []
    with pytest.raises(RecipeError) as caught:
        Recipe.load(data)
    assert sorted(str(caught.value).split("\n")) == [
        "recipe: step: unknown key (did you mean 'steps'?)",
        "recipe: steps[0].params.keep: should be a ratio in (0, 1] or a whole number of tokens, found true",
    ]


# --- where a recipe comes from ---------------------------------------------------------------------------------------


def _yaml(data: Any) -> str:
    yaml, stream = YAML(typ="rt", pure=True), io.StringIO()  # keeps the order of keys, one on a line
    yaml.dump(data, stream)
    return stream.getvalue()


def write(path: Path, **content: Any) -> Path:
    path.write_text(_yaml({"recipe_version": 1, **content}), encoding="utf-8")
    return path


def test_load_by_name_path_dict_and_recipe(tmp_path):
    recipe = Recipe.load("vlm_random_90")
    assert recipe.name == "vlm_random_90"
    assert recipe.steps[0].params.keep == Budget(1, 10)
    assert Recipe.load(recipe) is recipe
    path = write(tmp_path / "mine.yaml", **{k: v for k, v in GOOD.items() if k != "recipe_version"})
    for source in (path, str(path)):
        assert Recipe.load(source).to_dict() == Recipe.load(GOOD).to_dict()
    with pytest.raises(RecipeError, match=r"unknown recipe 'vlm_randm_90' \(did you mean 'vlm_random_90'\?\)"):
        Recipe.load("vlm_randm_90")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="found int"):
        Recipe.load(3)
    (tmp_path / "latin.yaml").write_bytes("description: caf\xe9".encode("latin-1"))
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="unknown recipe"):
        Recipe.load("a\0b")


def test_extends_replaces_what_is_given(tmp_path):
    base = write(tmp_path / "base.yaml", **{k: v for k, v in GOOD.items() if k != "recipe_version"})
    (tmp_path / "sub").mkdir()
    only_text = Recipe.load(write(tmp_path / "sub" / "a.yaml", extends="../base.yaml", description="Other."))
    assert only_text.description == "Other."
    assert only_text.extends is None
    assert only_text.to_dict() == {**Recipe.load(base).to_dict(), "description": "Other."}
    steps = [{"pass": "sample_keep", "params": {"keep": 7}}]
    other = Recipe.load(write(tmp_path / "sub" / "b.yaml", extends="a.yaml", steps=steps, protect=None))
    assert [step.params.keep for step in other.steps] == [Budget(7, 1, is_count=True)]
    assert other.description == "Other."
    assert other.protect is None
    assert Recipe.load({"recipe_version": 1, "extends": "vlm_random_90"}).steps == Recipe.load("vlm_random_90").steps


def test_extends_in_a_circle(tmp_path):
    write(tmp_path / "a.yaml", extends="b.yaml")
    write(tmp_path / "b.yaml", extends="./a.yaml")
    with pytest.raises(RecipeError, match=r"b\.yaml:2:10: extends: .* in a circle: a\.yaml -> b\.yaml -> a\.yaml$"):
        Recipe.load(tmp_path / "a.yaml")
    write(tmp_path / "self.yaml", extends="self.yaml")
    with pytest.raises(RecipeError, match=r"in a circle: self\.yaml -> self\.yaml$"):
        Recipe.load(tmp_path / "self.yaml")


def test_mistakes_of_both_files_are_named(tmp_path):
    write(tmp_path / "base.yaml", steps=[{"pass": "nothing_like_it"}])
    path = write(tmp_path / "top.yaml", extends="base.yaml", descripton="x")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    top, base = str(caught.value).split("\n")
    assert "top.yaml:3:1: descripton: unknown key (did you mean 'description'?)" in top
    assert "base.yaml:" in base
    assert "unknown pass 'nothing_like_it' (known: " in base


# --- what ships ------------------------------------------------------------------------------------------------------


def test_every_pass_loads():
    assert load_failures() == {}


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipe(name):
    recipe = Recipe.load(name)
    assert recipe.description
    again = Recipe.load(json.loads(json.dumps(recipe.to_dict())))
    assert again.to_dict() == recipe.to_dict()
    assert [step.params for step in again.steps] == [step.params for step in recipe.steps]


def test_the_readme_shows_what_ships():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    example = readme.split("```yaml\n")[1].split("```")[0]
    assert Recipe.parse(example).steps == Recipe.load("vlm_prune_90").steps
    table = readme.split("| recipe |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == shipped()


@pytest.mark.parametrize(("name", "saved"), [("vit_prune_30", 0.30), ("vit_prune_50", 0.50)])
@pytest.mark.parametrize("depth", [12, 24])
def test_flops_that_the_vit_recipes_state(name, saved, depth):
    def layer(tokens: int, width: int = 384) -> int:
        return 12 * tokens * width**2 + 2 * tokens**2 * width

    params = Recipe.load(name).steps[0].params
    cuts = {math.floor(at * depth): keep for at, keep in zip(params.at, params.keep, strict=True)}
    patches, total = 256, 0
    for index in range(depth):
        if index in cuts:
            patches = Budget.of(cuts[index]).count(patches)
        total += layer(1 + patches)
    assert abs(1 - total / (depth * layer(257)) - saved) < 0.005


def test_json_schema_covers_every_pass():
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["$defs"]["Step"]["properties"]["pass"]["enum"]) == set(pass_names())
    assert schema["additionalProperties"] is False
    for name in pass_names():
        fields = get_pass(name).Params.model_fields
        assert set(schema["$defs"][f"{name}_params"]["properties"]) == set(fields)
    references = [value for key, value in _items(schema) if key == "$ref"]
    assert references
    assert all(reference.removeprefix("#/$defs/") in schema["$defs"] for reference in references)


def _items(value: Any):
    if isinstance(value, dict):
        for key, entry in value.items():
            yield key, entry
            yield from _items(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _items(entry)


# --- registry --------------------------------------------------------------------------------------------------------


def test_register_checks_the_contract():
    def broken(**parts: Any) -> type:
        return type(
            "Broken", (), {"__doc__": "Doc.", "name": "broken", "regions": "moe", "Params": PassParams, **parts}
        )

    class Lax(BaseModel):
        pass

    class Bare(PassParams):
        keep: int

    for parts, message in [
        ({"name": "not a name"}, "expected an identifier"),
        ({"regions": "attn"}, "expected one of vision_encoder"),
        ({"Params": dict}, "expected a pydantic model"),
        ({"Params": Lax}, "forbid unknown keys"),
        ({"Params": Bare}, "no description on keep"),
        ({"__doc__": ""}, "docstring"),
        ({"name": "sample_keep"}, "is taken by"),
    ]:
        with pytest.raises(TypeError, match=message):
            register(broken(**parts))
    assert "broken" not in pass_names()
    assert register(SampleKeep) is SampleKeep  # the same class again is no clash


def test_a_pass_of_another_package(monkeypatch):
    class Point:
        name, value = "extra", "elsewhere:Extra"

        def __init__(self, load):
            self.load = load

    class Extra(SampleKeep):
        """Brought by another package."""

        name = "sample_extra"

    def fail():
        raise ImportError("no such library")

    monkeypatch.setattr(registry, "_passes", dict(registry._passes))
    monkeypatch.setattr(registry, "_failures", {})
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "entry_points", lambda group: [Point(lambda: Extra), Point(fail)])
    assert get_pass("sample_extra") is Extra
    with pytest.raises(
        RecipeError, match=r"unknown pass 'xyz'.*elsewhere:Extra did not load: ImportError: no such lib"
    ):
        get_pass("xyz")


def test_importing_the_package_imports_no_pass():
    import subprocess
    import sys

    code = "import sys, tokcompile.recipes; sys.exit(any(m.startswith('tokcompile.passes.') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- budgets and targets ---------------------------------------------------------------------------------------------

RATIOS = [k / 100 for k in range(1, 101)] + [1 / 3, 2 / 3, 0.125, 0.333, 0.1234567, 1e-6, 0.999999]


@pytest.mark.parametrize("ratio", RATIOS)
def test_count_is_the_exact_rational_ceiling(ratio):
    budget = Budget.of(ratio)
    exact = Fraction(budget.num, budget.den)
    assert abs(exact - Fraction(str(ratio))) <= Fraction(1, 10**6)
    if round(ratio, 6) == ratio:
        assert exact == Fraction(str(ratio))
    for n in range(1, 2001):
        assert budget.count(n) == max(1, math.ceil(n * exact))
    assert budget.count(0) == 0


def test_count_budget_is_capped():
    budget = Budget.of(64)
    assert [budget.count(n) for n in (0, 1, 63, 64, 65, 2000)] == [0, 1, 63, 64, 64, 64]
    assert (Budget.of(1), Budget.of(1.0)) == (Budget(1, 1, is_count=True), Budget(1, 1, is_count=False))
    assert (str(Budget.of(0.125)), str(budget)) == ("12.5 %", "64")


@given(st.one_of(st.floats(1e-6, 1), st.integers(1, 10**9)))
def test_budget_survives_being_written(value):
    budget = Budget.of(value)
    assert type(budget.value) is type(value)
    assert Budget.of(budget.value) == budget


@pytest.mark.parametrize("value", [0.3, 40])
def test_count_of_a_symbolic_size(value):
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    symbol = env.create_symbol(197, ConstantSource("n"), dynamic_dim=DimDynamic.DYNAMIC)
    kept = Budget.of(value).count(env.create_symintnode(symbol, hint=197))
    assert isinstance(kept, torch.SymInt)
    assert kept.node.hint == Budget.of(value).count(197)
    assert env.guards == []


def test_layers_of_a_stack():
    target = Target(layers=[0, "2-4", 3, -1, "-3--2"])
    assert target.layer_indices(12) == [0, 2, 3, 4, 9, 10, 11]
    assert Target().layer_indices(3) == [0, 1, 2]
    for entry in (12, -13, "10-12", "6--8"):
        with pytest.raises(RecipeError, match="outside a stack of 12 layers"):
            Target(layers=[entry]).layer_indices(12)


def test_paths_and_protection():
    assert Target(path="model.*.self_attn").matches_path("model.layers.3.self_attn")
    assert not Target(path="model.*.self_attn").matches_path("vision.layers.3.self_attn")
    assert Target().matches_path("anything")
    protect = Recipe.load(GOOD).protect
    assert protect is not None
    assert protect.covers("lm_head")
    assert not protect.covers("model.lm_head")


def test_region_defaults_to_that_of_the_pass():
    recipe = Recipe.load(GOOD)
    assert [step.region for step in recipe.steps] == ["merge_point", "vision_encoder", "attention"]
    assert isinstance(recipe.steps[0], Step)


def test_a_null_parameter_is_kept():
    recipe = Recipe.load(
        {"recipe_version": 1, "steps": [{"pass": "sample_keep", "params": {"keep": 1.0, "drop_layer": None}}]}
    )
    assert recipe.steps[0].params.drop_layer is None
    again = Recipe.load(json.loads(json.dumps(recipe.to_dict())))
    assert again.steps[0].params == recipe.steps[0].params


# --- changing single values ------------------------------------------------------------------------------------------


def test_overrides_change_the_complete_recipe():
    recipe = Recipe.load(
        "vlm_prune_90",
        {
            "steps[0].params.keep": 64,
            "steps[-1].expect.max_matches": 1,
            "protect.paths": ["lm_head"],
            "description": "Mine.",
        },
    )
    step = recipe.steps[0]
    assert (step.params.keep, step.params.criterion) == (Budget(64, 1, is_count=True), "max_sum")
    assert (step.expect.min_matches, step.expect.max_matches) == (1, 1)
    assert (recipe.protect.paths, recipe.description, recipe.name) == (["lm_head"], "Mine.", "vlm_prune_90")
    assert Recipe.load("vlm_prune_90").steps[0].params.keep == Budget(1, 10)  # the one that ships is left alone
    assert Recipe.load("vlm_prune_90", {"steps[0].params.drop_layer": None}).steps[0].params.drop_layer is None
    assert Recipe.load(recipe, {}) is recipe


def test_settings_of_the_command_line_are_yaml():
    settings = ["steps[0].params.keep=0.2", "protect.paths=[a, 'b=c']", "description=", "a.b=null", "c='1'"]
    assert recipe_overrides.parse(settings[:2] + settings[3:]) == {
        "steps[0].params.keep": 0.2, "protect.paths": ["a", "b=c"], "a.b": None, "c": "1"
    }  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        recipe_overrides.parse(["steps[0]", "a=!!python/name:os.system x", "b=1", "b=2", "c=[1", settings[2]])
    assert str(caught.value).split("\n") == [
        "override: steps[0]: should be PLACE=VALUE, such as steps[0].params.keep=0.2",
        "override: a: tag '!!python/name:os.system' is not allowed in a recipe",
        "override: b: is set twice",
        "override: c: not valid YAML: expected ',' or ']', but got '<stream end>'",
        "override: description: the file is empty",
    ]


def test_every_mistake_of_overrides_is_named():
    with pytest.raises(RecipeError) as caught:
        Recipe.load(
            "vlm_prune_90",
            {
                "steps[0].params.keep": "10%",
                "steps[0].params.criterion": "k_centre",
                "steps[0].params.drop_layer": 1.5,
                "steps[3].params.keep": 1,
                "steps.params": 2,
                "descripton": 3,
                "steps[0].target.regon": "merge_point",
                "extends": "vlm_random_90",
                "steps[0].pass.x": 3,
                "a..b": 1,
            },
        )
    assert str(caught.value).split("\n") == [
        "override: steps[3].params.keep: steps has 1 entries, numbered from 0",
        "override: steps.params: steps is a list; say which entry: steps[0].params",
        "override: extends: cannot be changed here; name the other recipe instead",
        "override: steps[0].pass.x: steps[0].pass is a single value and has no 'x' in it",
        "override: a..b: is not a place in a recipe; write it like steps[0].params.keep",
        "override: steps[0].target.regon: unknown key (did you mean 'region'?)",
        "override: steps[0].params.keep: should be a ratio in (0, 1] or a whole number of tokens, found '10%'; "
        "write 0.1",
        "override: steps[0].params.criterion: should be 'max_sum', 'k_center' or 'herding', found 'k_centre' "
        "(did you mean 'k_center'?)",
        "override: steps[0].params.drop_layer: should be less than or equal to 1, or a valid integer, found 1.5",
        "override: descripton: unknown key (did you mean 'description'?)",
    ]


def test_an_even_width_has_no_middle():
    text = "recipe_version: 1\nsteps:\n  - pass: token_sparse\n    params: {pool: 4, select: chance}\n"
    assert mistakes(text) == [
        "r.yaml:4:20: steps[0].params.pool: should be odd, so that the average has a middle, found 4",
        "r.yaml:4:31: steps[0].params.select: should be 'attention' or 'random', found 'chance'",
    ]


def test_mistakes_are_data_too():
    with pytest.raises(RecipeError) as caught:
        Recipe.parse("recipe_version: 1\nsteps:\n  - pass: sample_kepe\n", "r.yaml")
    [mistake] = caught.value.mistakes
    assert (mistake.file, mistake.line, mistake.column, mistake.where) == ("r.yaml", 3, 11, "steps[0].pass")
    assert str(mistake) == str(caught.value)


# --- schema and description of parameters ----------------------------------------------------------------------------


def test_the_schema_file_is_current():
    text = files("tokcompile.recipes").joinpath(FILE).read_text(encoding="utf-8")
    assert json.loads(text) == shipped_schema(), "run `python docs/generate.py`"


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_fit_the_schema_and_name_it(name):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    text = files("tokcompile.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith(EDITOR_LINE.format(FILE) + "\n"), "the first line tells editors which schema to use"
    data = recipe_yaml.read(text)[0]
    assert list(validator(shipped_schema()).iter_errors(data)) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("steps[0].params.keep", 0),
        ("steps[0].params.keep", "10%"),
        ("steps[0].params.kepe", 1),
        ("steps[0].params.criterion", "k_centre"),
        ("steps[0].params.drop_layer", -1),
        ("steps[0].pass", "tordre"),
        ("steps[0].target.region", "merge_pont"),
        ("steps[0].target.layers", ["4..8"]),
        ("steps[0].expect.min_matches", 0),
        ("recipe_version", 2),
        ("descripton", "x"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(place, value):
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    data, wrong = recipe_overrides.apply(Recipe.load("vlm_prune_90").to_dict(), {place: value})
    assert wrong == []
    assert list(validator(shipped_schema()).iter_errors(data))
    with pytest.raises(RecipeError):
        Recipe.load(data)


def test_parameters_say_type_bounds_unit_default_and_source():
    keep, positions, criterion, drop = pass_parameters("todre")
    assert (positions.type, positions.default) == ("keep | compact", "keep")
    assert (keep.type, keep.required, keep.unit) == (
        "ratio > 0, ≤ 1 or count ≥ 1", True, "share of the tokens, or tokens")  # fmt: skip
    assert (criterion.type, criterion.default, criterion.required) == ("max_sum | k_center | herding", "max_sum", False)
    assert (drop.type, drop.default) == ("number ≥ 0, ≤ 1 or whole number ≥ 0 or null", 0.875)
    assert (drop.unit, drop.source) == ("fraction of the depth, or layer number from 0", "paper: 7/8")
    assert pass_source("todre").endswith("arXiv 2505.18757.")
    assert pass_source("sample_keep") == ""
    [entry] = [p for p in parameters(Target) if p.name == "layers"]
    assert entry.type.startswith("list of (whole number or text")


# --- fuzzing ---------------------------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["4-8", "vlm_pool_90", "a.yaml"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, here: tuple[Any, ...] = ()):
    yield here
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in pairs:
        yield from _places(entry, (*here, key))


def outcome(load: Callable[[], Recipe]) -> tuple[Recipe | None, str]:
    """The recipe or the text of the RecipeError; any other exception is a failure."""
    try:
        return load(), ""
    except RecipeError as error:
        return None, str(error)


@st.composite
def mutated(draw):
    data = copy.deepcopy(GOOD)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(list(_places(data))))
        if not place:
            continue
        parent = data
        for key in place[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "remove", "rename"])):
            case "replace":
                parent[place[-1]] = draw(JUNK)
            case "remove":
                del parent[place[-1]]
            case "rename" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = parent.pop(place[-1])
    return data


def _lost(given: Any, kept: Any, here: str = "recipe") -> list[str]:
    """Places of ``given`` that ``kept`` (the recipe written out) does not hold: what was silently passed over."""
    if isinstance(given, dict):
        pairs = [(key, value, kept.get(key) if isinstance(kept, dict) else None) for key, value in given.items()]
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = list(zip(range(len(given)), given, kept, strict=True))
    else:
        same = given == kept or (isinstance(given, float) and isinstance(kept, float) and abs(given - kept) < 1e-6)
        kinds = type(given), type(kept)  # a whole number where only a ratio can stand is that ratio
        return [] if same and (kinds[0] is kinds[1] or kinds == (int, float)) else [here]
    return [place for key, value, other in pairs for place in _lost(value, other, f"{here}.{key}")]


@contextlib.contextmanager
def nothing_runs() -> Iterator[None]:
    """Fails if code is compiled, run or imported, a process started or a file written while a recipe is read."""
    seen, thread = _events, threading.get_ident()
    if not _hooked:
        sys.addaudithook(_watch)
        _hooked.append(True)
    seen.clear()
    _watched.append(thread)
    try:
        yield
    finally:
        _watched.clear()
    assert seen == []


_events: list[str] = []
_watched: list[int] = []
_hooked: list[bool] = []
_DANGEROUS = ("exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
              "pickle.find_class", "socket.connect", "ctypes.dlopen")  # fmt: skip


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if _watched and _watched[0] == threading.get_ident():
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if event in _DANGEROUS or writes:
            _events.append(f"{event} {args[:2]}")


def test_the_watch_sees_code_run():
    with pytest.raises(AssertionError, match="compile"), nothing_runs():
        exec("1")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(mutated())
def test_a_mutated_dict_parses_or_is_a_recipe_error(data):
    recipe, error = outcome(lambda: Recipe.load(data))
    assert all(line.startswith("recipe: ") or ".yaml" in line for line in error.split("\n") if line)
    if recipe is None:
        assert error
        return
    assert Recipe.load(recipe.to_dict()).to_dict() == recipe.to_dict()
    if data.get("extends") is None:
        ignorable = {k: v for k, v in data.items() if v is not None}
        assert _lost(_without_defaults(ignorable), recipe.to_dict()) == []


def _without_defaults(value: Any, params: bool = False) -> Any:
    """Without keys that are null and mean "left out" (a parameter that is null means null)."""
    if isinstance(value, dict):
        return {k: _without_defaults(v, params or k == "params") for k, v in value.items() if params or v is not None}
    return [_without_defaults(v, params) for v in value] if isinstance(value, list) else value


TEXT = _yaml(GOOD)
TOKENS = ["&a ", "*a", "!!int ", "!x ", "<<: ", "? ", "{", "]", "\t", "|", "---\n", "%YAML 9\n",
          "!!python/object/apply:os.system ['false']", "!!python/name:os.system ", "__import__('os').system('false')",
          "{{ 1 }}", "${HOME}", "$(false)"]  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, len(TEXT)), st.integers(0, 12), st.text(max_size=6) | st.sampled_from(TOKENS))
def test_mutated_text_parses_or_is_a_recipe_error(at, removed, added):
    text = TEXT[:at] + added + TEXT[at + removed :]
    outcome(lambda: Recipe.parse(TEXT, "r.yaml"))  # imports what reading imports
    outcome(lambda: Recipe.parse("[", "r.yaml"))
    with nothing_runs():
        recipe, error = outcome(lambda: Recipe.parse(text, "r.yaml"))
    if recipe is None:
        assert all(re.match(r"r\.yaml:\d+:\d+: .", line) for line in error.split("\n"))
    else:
        assert _lost(recipe_yaml.read(text)[0], {"protect": None, **recipe.to_dict()}) == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_any_text_parses_or_is_a_recipe_error(text):
    with pytest.raises(RecipeError):
        Recipe.parse(text, "r.yaml")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(["steps", "steps[0]", "steps[0].params", "steps[0].params.keep", "steps[-1].target", "protect"])
    | st.text("steps[0].params-_1 x", max_size=24),
    JUNK,
)
def test_any_override_holds_or_is_a_recipe_error(place, value):
    recipe, error = outcome(lambda: Recipe.load(GOOD, {place: value}))
    assert recipe is not None or all(line.startswith("override: ") for line in error.split("\n"))

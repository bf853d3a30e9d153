"""The command line: ``tokcompile recipes|lint|explain|optimize|bench|export|demo``.

Results go to standard output (one JSON value with ``--json``), everything else to standard error.

Exit codes: 0 done; 1 a defect of tokcompile (``--debug`` shows it); 2 wrong usage; 3 a recipe is not valid; 4 a recipe
changes nothing, or less than it expects; 5 a model, a file or an optional package is missing; 6 anything else that
tokcompile refuses; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tokcompile.errors import CaptureError, NoMatchError, RecipeError, TokcompileError
from tokcompile.version import __version__

OK, DEFECT, USAGE, RECIPE, NO_MATCH, MISSING, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130

_EPILOG = """
MODEL is a folder that transformers' save_pretrained wrote, a name on the hub, or module:function (file.py:function)
that returns (model, inputs).

Exit codes: 0 done, 2 wrong usage, 3 recipe not valid, 4 recipe changes nothing, 5 model, file or package missing,
6 refused, 1 a defect of tokcompile.
"""

app = typer.Typer(
    name="tokcompile",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    add_completion=False,
    epilog=_EPILOG,
    help="Compress models inside the graph that torch.compile captures.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The recipes that ship, what is in them, and a start for your own.",
)
app.add_typer(recipes_app, name="recipes")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub name, or module:function.")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", metavar="R", help="Shipped name or YAML file.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="PLACE=VALUE", help="Change a value of the recipe: steps[0].params.keep=0.2. Repeatable."
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write one JSON value to standard output.")]
Prompt = Annotated[str, typer.Option(help="Text of the input, read with the model's tokenizer or processor.")]
Images = Annotated[list[Path] | None, typer.Option("--image", metavar="FILE", help="Picture of the input. Repeatable.")]
Tokens = Annotated[int, typer.Option(min=1, help="Length of a random prompt, where none is given.")]
Batch = Annotated[int, typer.Option(min=1, help="Rows of random inputs.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16; left out, as stored.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="Build the model from its config.json alone.")]
Lowering = Annotated[str, typer.Option(help="inductor (fast code) or eager (no code generation).")]
Calibration = Annotated[
    str,
    typer.Option(
        metavar="MODULE:FUNCTION", help="Function that returns calibration inputs, for recipes that need them."
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tokcompile {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error (works anywhere).")] = False,
    passes: Annotated[
        list[Path] | None,
        typer.Option("--passes", metavar="FILE", help="Python file with passes of your own; it is run. Repeatable."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    from tokcompile.registry import load_file

    for path in passes or []:
        load_file(path)


# --------------------------------------------------------------------------------------------------------- recipes


@recipes_app.command("list", epilog="Example: tokcompile recipes list")
def recipes_list(as_json: AsJson = False) -> None:
    """The recipes that ship and the passes that are installed."""
    from tokcompile.recipe.parameters import pass_source, pass_summary
    from tokcompile.recipes import Recipe, shipped
    from tokcompile.registry import get_pass, load_failures, pass_names

    recipes = [Recipe.load(name) for name in shipped()]
    passes = [
        {"name": n, "region": get_pass(n).regions, "summary": pass_summary(n), "source": pass_source(n)}
        for n in pass_names()
    ]
    if as_json:
        _json(
            {
                "recipes": [{"name": r.name, **r.to_dict()} for r in recipes],
                "passes": passes,
                "failures": load_failures(),
            }
        )
        return
    table = _table("recipe", "passes", "what it does")
    for recipe in recipes:
        table.add_row(recipe.name, ", ".join(step.pass_ for step in recipe.steps), _sentence(recipe.description))
    _out().print(table)
    table = _table("pass", "works on", "what it does")
    for entry in passes:
        table.add_row(entry["name"], entry["region"], entry["summary"])
    _out().print()
    _out().print(table)
    for place, why in load_failures().items():
        _err().print(f"{place} did not load: {why}", markup=False)


@recipes_app.command("show", epilog="Examples: tokcompile recipes show vlm_prune_90 · tokcompile recipes show todre")
def recipes_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Recipe (shipped name or file), or name of a pass.")],
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """A recipe with everything filled in, and the parameters of its passes: type, bounds, unit, default, source."""
    from tokcompile.recipe.parameters import pass_parameters, pass_source, pass_summary
    from tokcompile.recipes import shipped
    from tokcompile.registry import pass_names

    recipe = None if name in pass_names() and name not in shipped() and not Path(name).exists() else _load(name, sets)
    passes = [name] if recipe is None else list(dict.fromkeys(step.pass_ for step in recipe.steps))
    if as_json:
        _json(
            {
                "recipe": recipe.to_dict() if recipe else None,
                "passes": {
                    p: {
                        "summary": pass_summary(p),
                        "source": pass_source(p),
                        "parameters": [vars(q) for q in pass_parameters(p)],
                    }
                    for p in passes
                },
            }
        )
        return
    out = _out()
    if recipe is not None:
        out.print(_yaml(recipe.to_dict()), markup=False, soft_wrap=True)
    for entry in passes:
        source = pass_source(entry)
        out.print(Text.assemble((entry, "bold"), ": ", pass_summary(entry)), soft_wrap=True)
        if source:
            out.print(Text(f"Source: {source}"), soft_wrap=True)
        table = _table("parameter", "type", "default", "unit", "source", "meaning")
        for parameter in pass_parameters(entry):
            default = "required" if parameter.required else json.dumps(parameter.default)
            table.add_row(
                parameter.name, parameter.type, default, parameter.unit, parameter.source, parameter.description
            )
        out.print(table)


@recipes_app.command("new", epilog="Example: tokcompile recipes new mine.yaml --from vlm_prune_90")
def recipes_new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file to write.")],
    base: Annotated[str, typer.Option("--from", metavar="RECIPE", help="Recipe to start from.")] = "vlm_prune_90",
    sets: Sets = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write a recipe to edit, and the JSON Schema beside it that lets editors check and complete it."""
    from tokcompile.recipe.schema import EDITOR_LINE, json_schema

    recipe = _load(base, sets)
    if file.suffix not in (".yaml", ".yml"):
        raise typer.BadParameter(f"{file}: a recipe ends in .yaml")
    schema = file.with_name("tokcompile.schema.json")
    if file.exists() and not force:
        raise TokcompileError(f"{file} exists; choose another name, or --force to overwrite it")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{EDITOR_LINE.format(schema.name)}\n{_yaml(recipe.to_dict())}", encoding="utf-8")
    schema.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
    _err().print(f"wrote {file} and {schema}; check it with: tokcompile lint {file}", markup=False, soft_wrap=True)


@recipes_app.command("schema", epilog="Example: tokcompile recipes schema > tokcompile.schema.json")
def recipes_schema() -> None:
    """The JSON Schema of a recipe file, with the parameters of every installed pass."""
    from tokcompile.recipe.schema import json_schema

    _json(json_schema())


@app.command(epilog="Examples: tokcompile lint mine.yaml · tokcompile lint recipes/*.yaml --json")
def lint(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Recipe files (or shipped names).")],
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Check recipes; every mistake at once, with its line and column. Exit code 3 if there is one."""
    from tokcompile.runtime.session import Session

    found: list[dict[str, Any]] = []
    for name in files:
        mistakes: list[dict[str, Any]] = []
        try:
            Session(_load(name, sets))  # with what no pass acts on
        except RecipeError as error:
            mistakes = [vars(m) for m in error.mistakes] or [
                {"file": name, "line": None, "column": None, "where": "", "what": line}
                for line in str(error).split("\n")
            ]
            if not as_json:
                prefix = "" if error.mistakes else f"{name}: "
                for line in str(error).split("\n"):
                    _out().print(prefix + line, markup=False, soft_wrap=True, highlight=False)
        else:
            if not as_json:
                _out().print(f"{name}: ok", markup=False, soft_wrap=True, highlight=False)
        found.append({"file": name, "ok": not mistakes, "mistakes": mistakes})
    if as_json:
        _json(found)
    if not all(entry["ok"] for entry in found):
        raise typer.Exit(RECIPE)


# ---------------------------------------------------------------------------------------------------------- models


def _request(
    model: Model,
    prompt: Prompt = "",
    images: Images = None,
    tokens: Tokens = 64,
    batch: Batch = 1,
    dtype: Dtype = "",
    device: Device = "",
    random_weights: RandomWeights = False,
) -> Any:
    """The options that every command with a MODEL has, as a :class:`tokcompile.model_source.Request`."""
    from tokcompile.model_source import Request

    missing = [path for path in images or [] if not path.is_file()]
    if missing:
        raise FileNotFoundError(2, "no such picture", str(missing[0]))
    return Request(model, prompt, list(images or []), tokens, batch, dtype, device, random_weights)


def _takes_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of :func:`_request`; what they say is its argument ``request``."""
    own, shared = (inspect.signature(function, eval_str=True).parameters for function in (command, _request))

    @functools.wraps(command)
    def run_command(**given: Any) -> None:
        command(request=_request(**{name: given.pop(name) for name in shared}), **given)

    merged = [*(parameter for name, parameter in own.items() if name != "request"), *shared.values()]
    merged = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in merged]
    run_command.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
    return run_command


@app.command(
    epilog="Examples: tokcompile explain tokcompile.demo:tiny_vlm · "
    "tokcompile explain ./my-model --recipe vlm_prune_90 --image cat.png --html report.html"
)
@_takes_model
def explain(
    request: Any,
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="R", help="Left out, only what is found.")] = "",
    sets: Sets = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as a page, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """What is found in MODEL, and what a recipe would change and why not. Changes nothing."""
    import tokcompile

    loaded = _load(recipe, sets) if recipe else None
    if html is not None and not html.absolute().parent.is_dir():  # now rather than after the work
        raise FileNotFoundError(2, "no such folder", str(html.parent))
    with _working("loading the model") as say:
        module, inputs = _model(request)
        say("capturing, finding regions")
        report = tokcompile.explain(module, inputs, loaded)
    if html is not None:
        report.to_html(html)
        _err().print(f"wrote {html}", markup=False)
    _json(report.to_dict()) if as_json else _out().print(Text(str(report)), soft_wrap=True)
    if report.problems:
        _err().print(Text("the recipe and the model do not fit:", style="yellow"))
        for problem in report.problems:
            _err().print(Text(problem), soft_wrap=True)
        raise typer.Exit(NO_MATCH)
    uncaptured = [stage for stage in report.stages if not stage.captured]
    if not report.regions and uncaptured:
        raise CaptureError(f"nothing was captured: {uncaptured[0].reason}")


@app.command(
    epilog="Example: tokcompile optimize ./my-model --recipe vlm_prune_90 --set steps[0].params.keep=0.2 "
    "--out my-model-pruned"
)
@_takes_model
def optimize(
    request: Any,
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.")] = None,
    sets: Sets = None,
    lowering: Lowering = "eager",
    calibration: Calibration = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Match and rewrite, write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Apply a recipe to MODEL and save it: weights, recipe, prepared state, report. Load it with tokcompile.load(DIR).

    Compilation belongs to the process that runs the model, so nothing is compiled here unless --lowering inductor.
    """
    import tokcompile
    from tokcompile.save.format import PAGE
    from tokcompile.save.save import check_place

    if out is None and not dry_run:
        raise typer.BadParameter("give --out DIR, or --dry-run", param_hint="--out")
    if out is not None and not dry_run:
        check_place(out)  # now rather than after the work
    loaded = _load(recipe, sets)
    with _working("loading the model") as say:
        module, inputs = _model(request)
        say("calibrating, rewriting" if calibration else "capturing, rewriting")
        optimized = tokcompile.optimize(
            module, loaded, inputs=inputs, lowering=lowering, calibration=_calibration(calibration)
        )
        report = tokcompile.report(optimized)
        if out is not None and not dry_run:
            say(f"saving to {out}")
            tokcompile.save_pretrained(optimized, out)
            report.to_html(out / PAGE)
    _json({"out": None if dry_run else str(out), "report": report.to_dict()}) if as_json else _out().print(
        Text(str(report)), soft_wrap=True
    )
    if out is not None and not dry_run:
        _err().print(f"wrote {out}; the report is {out / PAGE}", markup=False, soft_wrap=True)


@app.command(epilog="Example: tokcompile bench ./my-model -r vlm_prune_90 -r vlm_random_90 --image cat.png --out bench")
@_takes_model
def bench(
    request: Any,
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r", metavar="R", help="Repeatable.")] = None,
    sets: Sets = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="DIR", help="Folder for bench.csv, bench.json, bench.png, report pages."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 10,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated in each round.")] = 16,
    lowering: Lowering = "inductor",
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave plain torch.compile out.")] = False,
    calibration: Calibration = "",
    as_json: AsJson = False,
) -> None:
    """Time to first token, prefill, decode and memory: dense, dense with torch.compile, and with each recipe."""
    from tokcompile.measure.bench import bench as measure

    loaded = [_load(name, sets) for name in recipe or []]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with _working("loading the model") as say:
        module, inputs = _model(request)
        result = measure(
            module,
            inputs,
            loaded,
            rounds=rounds,
            new_tokens=new_tokens,
            lowering=lowering,
            compiled_baseline=not no_compile,
            progress=say,
            calibration=_calibration(calibration),
        )
    if out is not None:
        result.to_csv(out / "bench.csv")
        (out / "bench.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        for name, report in result.reports.items():
            report.to_html(out / f"report_{name}.html", bench=result)
        with contextlib.suppress(TokcompileError):  # matplotlib is optional
            result.plot(out / "bench.png")
        _err().print(f"wrote {', '.join(sorted(str(path) for path in out.iterdir()))}", markup=False, soft_wrap=True)
    _json(result.to_dict()) if as_json else _out().print(Text(str(result)), soft_wrap=True)


@app.command(epilog="Example: tokcompile export ./my-model --recipe vlm_prune_90 --out my-model-onnx")
@_takes_model
def export(
    request: Any,
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="R", help="Left out, dense.")] = "",
    out: Out = Path("onnx"),
    sets: Sets = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not compare onnxruntime with PyTorch.")] = False,
    opset: Annotated[int, typer.Option(help="Of the standard operations, 18 to 24.")] = 20,
    target: Annotated[str, typer.Option(help="standard, or contrib: fused operations of onnxruntime.")] = "standard",
    all_logits: Annotated[bool, typer.Option("--all-logits", help="Logits of every position, not the last.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write ONNX files that onnxruntime runs, and compare both."""
    import tokcompile

    loaded = _load(recipe, sets) if recipe else None
    with _working("loading the model") as say:
        module, inputs = _model(request)
        say("exporting" if no_check else "exporting, comparing with onnxruntime")
        result = tokcompile.export_onnx(
            module,
            inputs,
            out,
            recipe=loaded,
            check=not no_check,
            opset=opset,
            target=target,
            logits="all" if all_logits else "last",
            overwrite=overwrite,
        )
    if as_json:
        _json(result.to_dict() if hasattr(result, "to_dict") else {"out": str(out), "report": str(result)})
        return
    _out().print(Text(str(result)), soft_wrap=True)
    _err().print(f"wrote {out}", markup=False)


@app.command(epilog="Examples: tokcompile demo --tiny · tokcompile demo --out pictures")
def demo(
    tiny: Annotated[bool, typer.Option("--tiny", help="A random model, seconds; no weights needed.")] = False,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of pictures.")] = Path("out"),
    fast: Annotated[bool, typer.Option("--fast", help="Compile nothing: quick, times mean nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --tiny: one JSON value to standard output.")] = False,
) -> None:
    """A small vision-language model, dense and pruned, with pictures of what was kept."""
    import tokcompile
    from tokcompile import demo as tried

    if not tiny and tried.full_demo() is None:
        raise TokcompileError(
            "the full demonstration is part of the repository, not of the installed package: clone "
            "it and run `make demo`; or run `tokcompile demo --tiny`"
        )
    if as_json and not tiny:
        raise typer.BadParameter("give --tiny, too; the full demonstration writes pictures", param_hint="--json")
    if not tiny:
        raise typer.Exit(tried.run_full(["--out", str(out), *(["--fast"] if fast else [])]))
    model, inputs = tried.tiny_vlm()
    with _working("rewriting a tiny random LLaVA"):
        pruned = tokcompile.optimize(model, "vlm_prune_90", inputs=inputs, lowering="eager")
    if as_json:
        _json(tokcompile.report(pruned).to_dict())
        return
    _out().print(Text(str(tokcompile.report(pruned))), soft_wrap=True)
    _out().print("\nNext: tokcompile explain MODEL --recipe vlm_prune_90, with a model of your own.", highlight=False)


# --------------------------------------------------------------------------------------------------------- helpers


def _load(name: str, sets: Sequence[str] | None) -> Any:
    from tokcompile.recipe import overrides as recipe_overrides
    from tokcompile.recipes import Recipe

    return Recipe.load(name, recipe_overrides.parse(sets or []))


def _model(request: Any) -> Any:
    from tokcompile.model_source import load

    return load(request)


def _calibration(name: str) -> Any:
    if not name:
        return None
    module, colon, function = name.rpartition(":")
    if not colon:
        raise typer.BadParameter("write module:function", param_hint="--calibration")
    from tokcompile.model_source import call_function

    return call_function(module, function)


@contextlib.contextmanager
def _working(text: str) -> Iterator[Callable[..., None]]:
    """A progress line on standard error, where that is a terminal; gives a function that says what is being done."""
    console = _err()
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(text, total=None)

        def say(what: str, done: int = 0, total: int | None = None) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield say


def _out() -> Console:
    width = None if sys.stdout.isatty() else 120
    return Console(file=sys.stdout, width=width)


def _err() -> Console:
    return Console(file=sys.stderr)


def _json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _sentence(text: str) -> str:
    flat = " ".join(text.split())
    return flat.split(". ")[0].rstrip(".") + "." if flat else ""


def _yaml(data: dict[str, Any]) -> str:
    import io

    from ruamel.yaml import YAML

    stream, yaml = io.StringIO(), YAML(typ="rt", pure=True)
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.width = 110
    yaml.dump(data, stream)
    return stream.getvalue()


def exit_code(error: BaseException) -> int:
    """The exit code that stands for an error."""
    from tokcompile.model_source import ModelNotFoundError

    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, RecipeError):
        return RECIPE
    if isinstance(error, NoMatchError):
        return NO_MATCH
    if isinstance(error, ModelNotFoundError | ImportError | OSError):
        return MISSING
    return REFUSED if isinstance(error, TokcompileError) else DEFECT


def _message(error: BaseException) -> str:
    if isinstance(error, TokcompileError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed: pip install {error.name.split('.')[0]}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError | ImportError):
        return str(error)
    first = " ".join(str(error).split())[:300]
    return f"a defect of tokcompile, or of the model's code: {type(error).__name__}: {first}\n(--debug shows where)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Gives the exit code; prints no traceback without ``--debug``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)  # what cannot be captured is in the report
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a hub that does not answer is one error
    try:
        app(given, prog_name="tokcompile")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK if stop.code is None else DEFECT
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        _err().print(Text.assemble(("error: ", "bold red"), _message(error) or type(error).__name__), soft_wrap=True)
        return exit_code(error)
    return OK


def run() -> None:
    """Console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()

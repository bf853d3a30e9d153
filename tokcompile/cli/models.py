"""The commands that take a model: ``tokcompile explain|optimize|bench|export``, and ``demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tokcompile.cli.app import app
from tokcompile.cli.codes import NO_MATCH
from tokcompile.cli.options import (
    AsJson,
    Calibration,
    Lowering,
    Out,
    RecipeName,
    Sets,
    load_calibration,
    load_model,
    load_recipe,
    may_replace,
    need,
    takes_model,
)
from tokcompile.cli.output import stderr, stdout, working, write_json
from tokcompile.errors import CaptureError, TokcompileError


@app.command(
    epilog="Examples: tokcompile explain tokcompile.demo:tiny_vlm · "
    "tokcompile explain ./my-model --recipe vlm_prune_90 --image cat.png --html report.html"
)
@takes_model
def explain(
    request: Any,
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="R", help="Left out, only what is found.")] = "",
    sets: Sets = None,
    calibration: Calibration = "",
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as a page, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """What is found in MODEL, and what a recipe would change and why not. Changes nothing."""
    import tokcompile

    loaded = load_recipe(recipe, sets) if recipe else None
    if html is not None and not html.absolute().parent.is_dir():  # now rather than after the work
        raise FileNotFoundError(2, "no such folder", str(html.parent))
    with working("loading the model") as say:
        module, inputs = load_model(request)
        say("calibrating, finding regions" if calibration else "capturing, finding regions")
        report = tokcompile.explain(module, inputs, loaded, calibration=load_calibration(calibration))
    if html is not None:
        report.to_html(html)
        stderr().print(f"wrote {html}", markup=False)
    write_json(report.to_dict()) if as_json else stdout().print(Text(str(report)), soft_wrap=True)
    if report.problems:
        stderr().print(Text("the recipe and the model do not fit:", style="yellow"))
        for problem in report.problems:
            stderr().print(Text(problem), soft_wrap=True)
        raise typer.Exit(NO_MATCH)
    uncaptured = [stage for stage in report.stages if not stage.captured]
    if not report.regions and uncaptured:
        raise CaptureError(f"nothing was captured: {uncaptured[0].reason}")


@app.command(
    epilog="Example: tokcompile optimize ./my-model --recipe vlm_prune_90 --set steps[0].params.keep=0.2 "
    "--out my-model-pruned"
)
@takes_model
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
    loaded = load_recipe(recipe, sets)
    with working("loading the model") as say:
        module, inputs = load_model(request)
        say("calibrating, rewriting" if calibration else "capturing, rewriting")
        optimized = tokcompile.optimize(
            module, loaded, inputs=inputs, lowering=lowering, calibration=load_calibration(calibration)
        )
        report = tokcompile.report(optimized)
        if out is not None and not dry_run:
            say(f"saving to {out}")
            tokcompile.save_pretrained(optimized, out)
            report.to_html(out / PAGE)
    write_json({"out": None if dry_run else str(out), "report": report.to_dict()}) if as_json else stdout().print(
        Text(str(report)), soft_wrap=True
    )
    if out is not None and not dry_run:
        stderr().print(f"wrote {out}; the report is {out / PAGE}", markup=False, soft_wrap=True)


@app.command(epilog="Example: tokcompile bench ./my-model -r vlm_prune_90 -r vlm_random_90 --image cat.png --out bench")
@takes_model
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

    loaded = [load_recipe(name, sets) for name in recipe or []]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with working("loading the model") as say:
        module, inputs = load_model(request)
        result = measure(
            module,
            inputs,
            loaded,
            rounds=rounds,
            new_tokens=new_tokens,
            lowering=lowering,
            compiled_baseline=not no_compile,
            progress=say,
            calibration=load_calibration(calibration),
        )
    if out is not None:
        result.to_csv(out / "bench.csv")
        (out / "bench.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
        for name, report in result.reports.items():
            report.to_html(out / f"report_{name}.html", bench=result)
        try:
            result.plot(out / "bench.png")
        except TokcompileError as error:
            stderr().print(f"bench.png is left out: {error}", markup=False, soft_wrap=True)
        stderr().print(f"wrote {', '.join(sorted(str(path) for path in out.iterdir()))}", markup=False, soft_wrap=True)
    write_json(result.to_dict()) if as_json else stdout().print(Text(str(result)), soft_wrap=True)


@app.command(epilog="Example: tokcompile export ./my-model --recipe vlm_prune_90 --out my-model-onnx")
@takes_model
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

    need("export", ["onnx", "onnxscript", *([] if no_check else ["onnxruntime"])], "onnx")
    loaded = load_recipe(recipe, sets) if recipe else None
    if out.exists() and any(out.iterdir()):  # now rather than after the work
        overwrite = may_replace(out, overwrite)
    with working("loading the model") as say:
        module, inputs = load_model(request)
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
        write_json(result.to_dict() if hasattr(result, "to_dict") else {"out": str(out), "report": str(result)})
        return
    stdout().print(Text(str(result)), soft_wrap=True)
    stderr().print(f"wrote {out}", markup=False)


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
    with working("rewriting a tiny random LLaVA"):
        pruned = tokcompile.optimize(model, "vlm_prune_90", inputs=inputs, lowering="eager")
    if as_json:
        write_json(tokcompile.report(pruned).to_dict())
        return
    stdout().print(Text(str(tokcompile.report(pruned))), soft_wrap=True)
    stdout().print("\nNext: tokcompile explain MODEL --recipe vlm_prune_90, with a model of your own.", highlight=False)

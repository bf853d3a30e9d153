"""Options that several commands have, and what they stand for: a recipe, a model with inputs, calibration inputs."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

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
    if images:
        need("--image", ["PIL"], "demo")
    return Request(model, prompt, list(images or []), tokens, batch, dtype, device, random_weights)


def takes_model(command: Callable[..., None]) -> Callable[..., None]:
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


def load_recipe(name: str, sets: Sequence[str] | None) -> Any:
    from tokcompile.recipe import overrides as recipe_overrides
    from tokcompile.recipes import Recipe

    return Recipe.load(name, recipe_overrides.parse(sets or []))


def need(what: str, packages: Sequence[str], extra: str) -> None:
    """Refuse a command at once where it would miss packages after its work, all of them named.

    Raises:
        ImportError: some of ``packages`` are not installed.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{what} needs {', '.join(missing)}: pip install 'tokcompile[{extra}]'")


def may_replace(place: Path, given: bool) -> bool:
    """Whether to overwrite ``place``: as the option says, else asked of whoever sits at a terminal."""
    return given or (sys.stdin.isatty() and typer.confirm(f"{place} exists. Replace it?", err=True))


def load_model(request: Any) -> Any:
    from tokcompile.model_source import load

    return load(request)


def load_calibration(name: str) -> Any:
    if not name:
        return None
    module, colon, function = name.rpartition(":")
    if not colon:
        raise typer.BadParameter("write module:function", param_hint="--calibration")
    from tokcompile.model_source import call_function

    return call_function(module, function)

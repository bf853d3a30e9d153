"""``torch.compile(model, backend="tokcompile", options={"recipe": ...})``, through the entry point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from tokcompile.errors import RecipeError

OPTIONS = ("recipe", "lowering", "on_no_match")


def tokcompile(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Any:
    """The backend. Options: ``recipe`` (required), ``lowering`` ("inductor" or "eager"), ``on_no_match``.

    Raises:
        RecipeError: no recipe, an unknown option, or an invalid recipe.
    """
    from tokcompile.recipes import Recipe
    from tokcompile.runtime.session import Session

    options = options if options is not None else {}
    # the options dict is one object for the life of a torch.compile call, so the session lives in it
    session = options.get("_session")
    if session is None:
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown or "recipe" not in options:
            raise RecipeError(
                f"the tokcompile backend takes options {', '.join(OPTIONS)} and needs 'recipe'"
                + (f"; unknown: {', '.join(unknown)}" if unknown else "")
            )
        session = options["_session"] = Session(
            Recipe.load(options["recipe"]),
            lowering=options.get("lowering", "inductor"),
            on_no_match=options.get("on_no_match", "error"),
        )
    return session.backend(graph_module, example_inputs)

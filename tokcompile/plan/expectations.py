"""What a recipe asks for and no pass gives is refused."""

from __future__ import annotations

from tokcompile.errors import RecipeError
from tokcompile.plan.apply import LOCAL
from tokcompile.recipes import Recipe
from tokcompile.registry import get_pass


def check_supported(recipe: Recipe) -> None:
    """Refuse what a recipe may say and no pass of this version acts on: nothing is ignored silently."""
    problems = []
    for number, step in enumerate(recipe.steps):
        where, method = f"steps[{number}] ({step.pass_})", get_pass(step.pass_)
        if step.region not in (method.regions, *method.also):
            known = " or ".join((method.regions, *method.also))
            problems.append(f"{where}: works on {known}, not on {step.region}; leave target.region out")
        if step.target.layers is not None and method.regions not in LOCAL:
            problems.append(f"{where}: takes no target.layers; its own parameters say at which depth it acts")
        if step.target.modality is not None and method.regions != "merge_point":
            problems.append(f"{where}: images and video are told apart at merge points only; leave target.modality out")
    for name in ("leading_tokens", "trailing_tokens"):
        if getattr(recipe.protect, name, None) is not None and not any(
            get_pass(step.pass_).protects_leading for step in recipe.steps
        ):
            problems.append(f"protect.{name}: no pass of this recipe removes tokens inside an encoder; leave it out")
    if problems:
        raise RecipeError("\n".join(problems))

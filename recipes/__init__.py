"""The recipes that ship, as package data, and the names to read them with (defined in ``tokcompile.recipe``)."""

from tokcompile.recipe.budget import Budget
from tokcompile.recipe.recipe import Recipe
from tokcompile.recipe.schema import json_schema
from tokcompile.recipe.source import shipped
from tokcompile.recipe.steps import Expect, Protect, Step, Target

__all__ = ["Budget", "Expect", "Protect", "Recipe", "Step", "Target", "json_schema", "shipped"]

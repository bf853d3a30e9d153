"""The recipes that ship, as package data, and the names to read them with (defined in ``tokcompile.recipe``)."""

from tokcompile.recipe import Budget, Expect, Protect, Recipe, Step, Target, shipped
from tokcompile.recipe_schema import json_schema

__all__ = ["Budget", "Expect", "Protect", "Recipe", "Step", "Target", "json_schema", "shipped"]

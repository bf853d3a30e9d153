"""The recipes that ship, as package data, and the names to read them with (defined in ``tokcompile.recipe``)."""

from tokcompile.recipe import Budget, Expect, Protect, Recipe, Step, Target, json_schema, shipped

__all__ = ["Budget", "Expect", "Protect", "Recipe", "Step", "Target", "json_schema", "shipped"]

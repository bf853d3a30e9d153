"""Recipes: which passes to run on which regions, with which parameters. Data, never code."""

"""Lookups by token id."""

"""Passes that attend to a part of the keys."""

"""Passes that choose, merge or drop tokens."""

"""Optimized models as folders: write, read, and tell what changed."""

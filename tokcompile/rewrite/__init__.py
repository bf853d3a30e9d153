"""Remove tokens from a graph: the token axis, its labels and rules, and what a pass works with."""

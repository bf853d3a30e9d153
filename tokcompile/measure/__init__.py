"""Time and quality of models: benchmarks, evaluation, paired comparisons."""

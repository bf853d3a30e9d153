"""An optimized model at work: its stages, the graphs compiled for them, caches and recordings."""

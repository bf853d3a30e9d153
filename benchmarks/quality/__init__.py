"""Quality on real weights and real data: loaders, tasks, the run, the page. See ``docs/quality.md``."""

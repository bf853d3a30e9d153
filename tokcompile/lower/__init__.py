"""Turn a rewritten graph into something that runs: eager, or Inductor."""

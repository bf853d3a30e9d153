"""What passes share that attend to a part of the keys."""

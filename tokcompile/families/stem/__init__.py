"""What passes share that look a token up by its id."""

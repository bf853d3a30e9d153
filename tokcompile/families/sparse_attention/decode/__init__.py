"""What passes share that choose keys in a decode step."""

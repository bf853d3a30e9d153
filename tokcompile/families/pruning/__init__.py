"""What passes share that choose, merge or drop tokens."""

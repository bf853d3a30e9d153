"""What passes share that give each block of queries a list of blocks of keys."""

"""What passes share that split feed-forward layers into experts."""

"""What passes of one kind share."""

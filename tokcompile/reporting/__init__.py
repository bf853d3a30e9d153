"""What was found, changed and left alone, and measured: as objects, text and one HTML page."""

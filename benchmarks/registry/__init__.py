"""What tokcompile finds, prunes and gives back exactly in every model family of transformers."""

"""``python -m tokcompile.cli``."""

from tokcompile.cli.entry import run

if __name__ == "__main__":
    run()

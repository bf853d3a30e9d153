"""The command line: ``tokcompile recipes|lint|explain|optimize|bench|export|demo``.

Results go to standard output (one JSON value with ``--json``), everything else to standard error.

Exit codes: 0 done; 1 a defect of tokcompile (``--debug`` shows it); 2 wrong usage; 3 a recipe is not valid; 4 a recipe
changes nothing, or less than it expects; 5 a model, a file or an optional package is missing; 6 anything else that
tokcompile refuses; 130 interrupted.
"""

from tokcompile.cli.codes import DEFECT, INTERRUPTED, MISSING, NO_MATCH, OK, RECIPE, REFUSED, USAGE, exit_code
from tokcompile.cli.entry import main, run

__all__ = [
    "DEFECT",
    "INTERRUPTED",
    "MISSING",
    "NO_MATCH",
    "OK",
    "RECIPE",
    "REFUSED",
    "USAGE",
    "exit_code",
    "main",
    "run",
]

"""Uses an installed tokcompile from outside of its checkout: ``python use_package.py OUT``; prints what it saw as JSON.

Imports every module, optimizes a tiny vision encoder and writes it as ONNX files below OUT. Run by test_package.py in
an environment of its own.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
import warnings
from pathlib import Path

sys.path.pop(0)  # the folder of this file


def fail(name: str) -> None:
    raise ImportError(name)


def main(out: Path) -> None:
    import torch

    import tokcompile
    from tokcompile.demo import tiny_vit

    warnings.simplefilter("ignore")  # modules of old names say so
    modules = [found.name for found in pkgutil.walk_packages(tokcompile.__path__, "tokcompile.", onerror=fail)]
    modules = [name for name in modules if not name.endswith(".__main__")]
    for name in modules:
        importlib.import_module(name)

    model, inputs = tiny_vit()
    pruned = tokcompile.optimize(model, "vit_prune_50", inputs=inputs, lowering="eager")
    with torch.no_grad():
        pruned(**inputs)
    tokcompile.export_onnx(torch.nn.Linear(8, 4).eval(), {"input": torch.randn(3, 8)}, out, check=True)
    seen = {
        "place": tokcompile.__file__,
        "modules": modules,
        "status": [step.status for step in tokcompile.report(pruned).steps],
        "exported": sorted(path.name for path in out.iterdir()),
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

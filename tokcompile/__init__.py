"""tokcompile: compress models inside the graph that ``torch.compile`` captures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokcompile.version import __version__

if TYPE_CHECKING:
    from tokcompile import stem
    from tokcompile.api import explain, optimize, record, report
    from tokcompile.errors import (
        CacheError,
        CalibrationError,
        CaptureError,
        ExportError,
        NarrowError,
        NoMatchError,
        RecipeError,
        RecoveryError,
        RewriteError,
        SavedModelError,
        TokcompileError,
    )
    from tokcompile.families.pruning.select import select
    from tokcompile.measure.bench import bench
    from tokcompile.measure.evaluate import evaluate
    from tokcompile.onnx_export.export import ExportReport, export_onnx
    from tokcompile.onnx_export.serving import OnnxModel
    from tokcompile.prepare.calibrate import calibrate
    from tokcompile.recipes import Recipe
    from tokcompile.recovery.recover import recover
    from tokcompile.recovery.report import RecoveryReport
    from tokcompile.reporting.report import Report
    from tokcompile.save.load import load, restore_dense
    from tokcompile.save.save import save_pretrained

#: Public name -> the module that has it, imported when the name is first used.
_EXPORTS = {
    "explain": "api",
    "optimize": "api",
    "record": "api",
    "report": "api",
    "bench": "measure.bench",
    "calibrate": "prepare.calibrate",
    "evaluate": "measure.evaluate",
    "ExportReport": "onnx_export.export",
    "export_onnx": "onnx_export.export",
    "OnnxModel": "onnx_export.serving",
    "CacheError": "errors",
    "CalibrationError": "errors",
    "CaptureError": "errors",
    "ExportError": "errors",
    "NarrowError": "errors",
    "NoMatchError": "errors",
    "RecipeError": "errors",
    "RecoveryError": "errors",
    "RewriteError": "errors",
    "SavedModelError": "errors",
    "TokcompileError": "errors",
    "RecoveryReport": "recovery.report",
    "recover": "recovery.recover",
    "load": "save.load",
    "restore_dense": "save.load",
    "save_pretrained": "save.save",
    "select": "families.pruning.select",
    "Recipe": "recipes",
    "Report": "reporting.report",
}

#: Public modules, imported when they are first named.
_MODULES = ("stem",)

__all__ = [
    "CacheError",
    "CalibrationError",
    "CaptureError",
    "ExportError",
    "ExportReport",
    "NarrowError",
    "NoMatchError",
    "OnnxModel",
    "Recipe",
    "RecipeError",
    "RecoveryError",
    "RecoveryReport",
    "Report",
    "RewriteError",
    "SavedModelError",
    "TokcompileError",
    "__version__",
    "bench",
    "calibrate",
    "evaluate",
    "explain",
    "export_onnx",
    "load",
    "optimize",
    "record",
    "recover",
    "report",
    "restore_dense",
    "save_pretrained",
    "select",
    "stem",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"tokcompile.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"tokcompile.{name}")
    raise AttributeError(f"module 'tokcompile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""tokcompile: compress models inside the graph that ``torch.compile`` captures."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokcompile import stem
    from tokcompile.api import explain, optimize, record, report
    from tokcompile.benching import bench
    from tokcompile.calibration import calibrate
    from tokcompile.errors import (
        CacheError,
        CalibrationError,
        CaptureError,
        ExportError,
        NarrowError,
        NoMatchError,
        RecipeError,
        RecoveryError,
        SavedModelError,
        TokcompileError,
    )
    from tokcompile.evaluation import evaluate
    from tokcompile.onnx_export import ExportReport, export_onnx
    from tokcompile.recipes import Recipe
    from tokcompile.recovery import RecoveryReport, recover
    from tokcompile.reporting import Report
    from tokcompile.saving import load, restore_dense, save_pretrained
    from tokcompile.serving import OnnxModel

__version__ = "0.1.0"

_EXPORTS = {
    "explain": "api", "optimize": "api", "record": "api", "report": "api",
    "bench": "benching", "calibrate": "calibration", "evaluate": "evaluation",
    "ExportReport": "onnx_export", "export_onnx": "onnx_export", "OnnxModel": "serving",
    "CacheError": "errors", "CalibrationError": "errors", "CaptureError": "errors", "ExportError": "errors",
    "NarrowError": "errors",
    "NoMatchError": "errors", "RecipeError": "errors", "RecoveryError": "errors", "SavedModelError": "errors",
    "TokcompileError": "errors",
    "RecoveryReport": "recovery", "recover": "recovery",
    "load": "saving", "restore_dense": "saving", "save_pretrained": "saving",
    "Recipe": "recipes", "Report": "reporting",
}

#: Public modules, imported when they are first named.
_MODULES = ("stem",)

__all__ = ["CacheError", "CalibrationError", "CaptureError", "ExportError", "ExportReport", "NarrowError",
           "NoMatchError", "OnnxModel", "Recipe", "RecipeError", "RecoveryError", "RecoveryReport", "Report",
           "SavedModelError", "TokcompileError", "bench", "calibrate", "evaluate", "explain", "export_onnx", "load",
           "optimize", "record", "recover", "report", "restore_dense", "save_pretrained", "stem"]


def __getattr__(name: str) -> Any:
    # `tokcompile.reporting` is the function; the module of that name is imported by its full path only
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"tokcompile.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"tokcompile.{name}")
    raise AttributeError(f"module 'tokcompile' has no attribute {name!r}")

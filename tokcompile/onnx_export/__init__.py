"""Write a model as ONNX files that onnxruntime runs: :func:`export_onnx`."""

from .export import ExportReport, export_onnx

__all__ = ["ExportReport", "export_onnx"]

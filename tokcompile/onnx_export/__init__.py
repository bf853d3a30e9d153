"""Write a model as ONNX files that onnxruntime runs, and run them without torch."""

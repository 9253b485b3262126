"""ONNX Runtime on the CPU."""

from torchferry.backends.onnxruntime.compile import OnnxRuntime

BACKEND = OnnxRuntime()

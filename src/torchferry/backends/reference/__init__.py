"""onnx's own evaluator in numpy: slow, and independent of every engine."""

from torchferry.backends.reference.compile import Reference

BACKEND = Reference()

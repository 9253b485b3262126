"""TensorRT in its two flavours, each of which is a backend: ``full`` and ``rtx``."""

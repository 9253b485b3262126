"""TensorRT, which builds for the GPU at hand."""

from torchferry.backends.tensorrt.compile import TensorRt
from torchferry.backends.tensorrt.library import Flavour

BACKEND = TensorRt(Flavour("tensorrt", library="tensorrt", builds_ahead=False))

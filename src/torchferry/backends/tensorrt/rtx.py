"""TensorRT for RTX, which builds for any RTX GPU on any machine."""

from torchferry.backends.tensorrt.compile import TensorRt
from torchferry.backends.tensorrt.library import Flavour

BACKEND = TensorRt(Flavour("tensorrt-rtx", library="tensorrt_rtx", builds_ahead=True))

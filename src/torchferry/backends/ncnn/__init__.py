"""ncnn on the CPU."""

from torchferry.backends.ncnn.compile import Ncnn

BACKEND = Ncnn()

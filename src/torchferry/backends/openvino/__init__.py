"""OpenVINO on the CPU."""

from torchferry.backends.openvino.compile import OpenVino

BACKEND = OpenVino()

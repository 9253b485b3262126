"""``DeformConv`` for OpenVINO, which has the operator and does not read it in ONNX files."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from torchferry.backends.openvino.library import openvino
from torchferry.core.errors import BackendError


def add_deform_conv(core: Any) -> None:
    """Let an ``openvino.Core`` read ``DeformConv`` in ONNX files; what it then saves needs no such help."""
    frontend = importlib.import_module("openvino.frontend.onnx")
    core.add_extension(frontend.ConversionExtension("DeformConv", "", _converted))


def _converted(node: Any) -> list[Any]:
    given = [node.get_input(place) for place in range(node.get_input_size())]
    x, weights, offset, bias, mask = [*given, None, None][:5]
    operators = openvino().opset15
    rank = weights.get_partial_shape().rank
    if rank.is_static and rank.get_length() != 4:
        raise BackendError("it has DeformConv for two spatial axes alone")
    pads = _attribute(node, "pads", [0, 0, 0, 0])
    result = openvino().opset8.deformable_convolution(
        x,
        offset,
        weights,
        _attribute(node, "strides", [1, 1]),
        pads[:2],
        pads[2:],
        _attribute(node, "dilations", [1, 1]),
        mask=None if _is_left_out(mask) else mask,
        group=_attribute(node, "group", 1),
        deformable_group=_attribute(node, "offset_group", 1),
        bilinear_interpolation_pad=True,  # half of a sample may lie beyond the picture, as ONNX has it
    )
    if not _is_left_out(bias):
        axes = operators.constant(np.array([0, 2, 3], np.int64))
        result = operators.add(result, operators.unsqueeze(bias, axes))
    return [result.output(0)]


def _attribute(node: Any, name: str, default: Any) -> Any:
    return node.get_attribute(name) if node.has_attribute(name) else default


def _is_left_out(value: Any) -> bool:
    return value is None or value.get_node().get_type_name() == "NullNode"

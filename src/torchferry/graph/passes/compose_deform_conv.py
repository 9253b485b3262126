"""Deformable convolution as a sampling and a convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from torchferry.graph.passes.declined import decline

if TYPE_CHECKING:
    from collections.abc import Sequence

_LINEAR_OPSET = 20  # from which on GridSample's mode is called "linear"


def apply(model: ir.Model) -> int:
    """Write every ``DeformConv`` of pictures as a ``GridSample`` of all taps and a ``Conv`` over them.

    ``y = DeformConv(x, w, offset)`` → ``y = Conv(GridSample(x, places of the taps), w as taps x 1)``. The places are
    computed in float32, in which a number of float16 could not say where in a large picture it is.

    Returns:
        The number of nodes replaced; one that has not two spatial axes, or whose weights' shape is not known, stays.
    """
    opset = model.opset_imports.get("", 0)
    found = [
        (graph, node)
        for graph in list(model.graphs())
        for node in list(graph)
        if (node.domain, node.op_type) == ("", "DeformConv")
    ]
    return sum(_replace(graph, node, opset) for graph, node in found)


@dataclass(frozen=True)
class _Numbers:
    """What the attributes and the weights' shape say; pairs are vertical, horizontal."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    begins: tuple[int, int]
    dilations: tuple[int, int]
    group: int
    offset_group: int
    channels: int
    out_channels: int
    dtype: ir.DataType

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


def _numbers(node: ir.Node) -> _Numbers | str:
    """Return the numbers, or why they cannot be told."""
    x, weight = node.inputs[0], node.inputs[1]
    assert x is not None
    assert weight is not None
    shape = weight.shape.numpy() if weight.shape is not None and weight.shape.is_static() else None
    if shape is None:
        return "the shape of its weights is not known"
    if len(shape) != 4:
        return f"it has {len(shape) - 2} spatial axes, and only two can be written with GridSample"
    if x.dtype is None:
        return "the type of its input is not known"
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    group = int(values.get("group", 1))
    return _Numbers(
        kernel=(shape[2], shape[3]),
        strides=_pair(values.get("strides", (1, 1))),
        begins=_pair(values.get("pads", (0, 0))),
        dilations=_pair(values.get("dilations", (1, 1))),
        group=group,
        offset_group=int(values.get("offset_group", 1)),
        channels=shape[1] * group,
        out_channels=shape[0],
        dtype=x.dtype,
    )


def _pair(values: Sequence[Any]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _replace(graph: ir.Graph, node: ir.Node, opset: int) -> bool:
    numbers = _numbers(node)
    if isinstance(numbers, str):
        decline(node, numbers)
        return False
    writer = _Writer(numbers, opset)
    result = writer.written([*node.inputs, None, None, None][:5])
    for made in writer.tape.nodes:
        made.metadata_props.update(node.metadata_props)
    old = node.outputs[0]
    result.shape, result.dtype = old.shape, numbers.dtype
    ir.convenience.replace_nodes_and_values(graph, node, [node], writer.tape.nodes, [old], [result])
    return True


class _Writer:
    """Writes the nodes for one convolution.

    Args:
        numbers: What it is.
        opset: In which to write.
    """

    def __init__(self, numbers: _Numbers, opset: int) -> None:
        self.tape = ir.tape.Tape()
        self._numbers = numbers
        self._mode = "linear" if opset >= _LINEAR_OPSET else "bilinear"
        # Of the places and the samples.
        self._dtype = ir.DataType.DOUBLE if numbers.dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT

    def written(self, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Write it; the inputs are those of ``DeformConv``, None where there is none."""
        x, weight, offset, bias, mask = inputs
        assert x is not None
        assert weight is not None
        assert offset is not None
        it, op = self._numbers, self._op
        sizes = op("Shape", offset)
        batch, rows, columns = (self._entry(sizes, axis) for axis in (0, 2, 3))
        height, width = (self._entry(op("Shape", x), axis) for axis in (2, 3))
        parts = op("Mul", batch, self._ints(it.offset_group))  # pictures whose channels all share one set of offsets
        tall = op("Mul", rows, self._ints(it.taps))

        grid = self._grid(offset, (parts, rows, columns), (height, width))
        grid = op("Reshape", grid, self._shape(parts, tall, columns, 2))
        picture = op("Reshape", self._cast(x), self._shape(parts, it.channels // it.offset_group, height, width))
        # (parts, channels of a part, taps x rows, columns)
        samples = op("GridSample", picture, grid, mode=self._mode, padding_mode="zeros", align_corners=0)
        if mask is not None:
            samples = op("Mul", samples, op("Reshape", self._cast(mask), self._shape(parts, 1, tall, columns)))
        if it.dtype != self._dtype:
            samples = op("Cast", samples, to=it.dtype)
        area = op("Mul", rows, columns)
        samples = op("Reshape", samples, self._shape(batch, it.channels, it.taps, area))
        kernel = self._shape(it.out_channels, it.channels // it.group, it.taps, 1)
        given = [samples, op("Reshape", weight, kernel), *([bias] if bias is not None else [])]
        flat = op("Conv", *given, group=it.group, kernel_shape=[it.taps, 1])
        return op("Reshape", flat, self._shape(batch, it.out_channels, rows, columns))

    def _grid(
        self, offset: ir.Value, shape: tuple[ir.Value, ir.Value, ir.Value], picture: tuple[ir.Value, ir.Value]
    ) -> ir.Value:
        """Return where each tap reads, (parts, taps, rows, columns, 2), in GridSample's units, x before y."""
        parts, rows, columns = shape
        it, op = self._numbers, self._op
        moves = op("Reshape", self._cast(offset), self._shape(parts, it.taps, 2, rows, columns))
        down, right = np.divmod(np.arange(it.taps), it.kernel[1])
        axes = []
        for axis, (taps, count, size) in enumerate(zip((down, right), (rows, columns), picture, strict=True)):
            every = op("Range", self._int(0), op("Squeeze", count), self._int(1))
            starts = op("Mul", self._cast(every), self._number(it.strides[axis]))
            if axis == 0:
                starts = op("Unsqueeze", starts, self._ints(1))
            first = (taps * it.dilations[axis] - it.begins[axis]).reshape(it.taps, 1, 1)
            move = op("Gather", moves, self._int(axis), axis=2)
            place = op("Add", move, op("Add", starts, self._number(first)))
            pixels = self._cast(size)
            # Beyond the picture all is zero; a place far beyond would lose its meaning as an integer.
            place = op("Min", op("Max", place, self._number(-2)), op("Add", pixels, self._number(1)))
            place = op("Div", op("Add", op("Mul", place, self._number(2)), self._number(1)), pixels)
            axes.append(op("Unsqueeze", op("Sub", place, self._number(1)), self._ints(-1)))
        return op("Concat", *reversed(axes), axis=-1)

    def _op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.tape.op(kind, inputs, attributes)

    def _cast(self, value: ir.Value) -> ir.Value:
        return value if value.dtype == self._dtype else self._op("Cast", value, to=self._dtype)

    def _entry(self, shape: ir.Value, axis: int) -> ir.Value:
        return self._op("Slice", shape, self._ints(axis), self._ints(axis + 1))

    def _shape(self, *sizes: ir.Value | int) -> ir.Value:
        return self._op("Concat", *(self._ints(size) if isinstance(size, int) else size for size in sizes), axis=0)

    def _int(self, value: int) -> ir.Value:
        return self._constant(np.array(value, np.int64))

    def _ints(self, *values: int) -> ir.Value:
        return self._constant(np.array(values, np.int64))

    def _number(self, values: Any) -> ir.Value:
        return self._constant(np.asarray(values, self._dtype.numpy()))

    def _constant(self, array: Any) -> ir.Value:
        return self._op("Constant", value=ir.tensor(array))

"""The numbers of FP16, and rounding to them: of arrays, and as nodes of a graph.

Two roundings, both to nearest with ties to even:

- ``fp16``: to IEEE half precision. What rounds beyond 65504 becomes infinite; below 2⁻¹⁴ the step stays 2⁻²⁴.
- ``ideal``: to the 11 bits of FP16's mantissa with an exponent that does not end: the error that no scaling can mend.

The ideal one in double precision: for a float x, ``m = 2⁴²·x`` is exact, and ``x + m`` is rounded to 53 bits, whose
last is the 11th bit of x, since m is an even multiple of it and x too small to carry; ``(x + m) - m`` is then exact.
Zeros and infinities, for which m is x, stay as they are; in a graph a zero may lose its sign.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
import torch

from torchferry.precision.nodes import new_node

if TYPE_CHECKING:
    from torchferry.core.engine import Array

Rounding = Literal["fp16", "ideal"]

FP16_MAX = 65504.0
FP16_OVERFLOW = 65520.0  # the least number that is rounded to infinity
FP16_NORMAL = 2.0**-14  # the least number with all 11 bits
_SHIFT = 2.0**42


def rounded(array: Array, rounding: Rounding) -> Array:
    """Return a float array rounded, in its own dtype; doubles are rounded to float first."""
    if rounding == "fp16":  # torch converts many times faster than numpy
        return torch.tensor(array).to(torch.float16).to(torch.float32).numpy().astype(array.dtype, copy=False)
    wide = array.astype(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        moved = wide * _SHIFT
        nearest = (wide + moved) - moved
        result: Array = np.where(wide == moved, wide, nearest).astype(array.dtype)
    return result


def rounding_nodes(x: ir.Value, rounding: Rounding) -> tuple[list[ir.Node], ir.Value]:
    """Return the nodes that round a tensor, in order, and the rounded tensor; nothing is inserted.

    Args:
        x: A float or double tensor.
        rounding: To what.
    """
    assert x.dtype is not None  # only tensors of known dtype are rounded
    nodes: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value, dtype: ir.DataType, **attributes: Any) -> ir.Value:
        nodes.append(new_node(op_type, inputs, f"{x.name}/{rounding}_{len(nodes)}", dtype, attributes, x.shape))
        return nodes[-1].outputs[0]

    if rounding == "fp16":
        half = op("Cast", x, dtype=ir.DataType.FLOAT16, to=ir.DataType.FLOAT16)
        return nodes, op("Cast", half, dtype=x.dtype, to=x.dtype)
    single = x
    if x.dtype != ir.DataType.FLOAT:
        single = op("Cast", x, dtype=ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    double = ir.DataType.DOUBLE
    wide = op("Cast", single, dtype=double, to=double)
    shift_value = ir.tensor(np.array(_SHIFT, np.float64))
    shift = op("Constant", dtype=double, value=shift_value)
    shift.shape = ir.Shape(())
    moved = op("Mul", wide, shift, dtype=double)
    nearest = op("Sub", op("Add", wide, moved, dtype=double), moved, dtype=double)
    narrow = op("Cast", nearest, dtype=x.dtype, to=x.dtype)
    is_kept = op("Equal", wide, moved, dtype=ir.DataType.BOOL)
    return nodes, op("Where", is_kept, x, narrow, dtype=x.dtype)

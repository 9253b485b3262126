"""Changes on the way to a newer opset; see ``adapters.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto

from torchferry.graph.forms.adapters import adapter

if TYPE_CHECKING:
    from onnx import NodeProto

    from torchferry.graph.forms.adapters import Adapters, Rewrite

UP: Adapters = {}


@adapter(UP, 6, "Cast")
def _cast_by_name(at: Rewrite) -> list[NodeProto]:
    """Cast(to="FLOAT") → Cast(to=1)."""
    return at.result(at.inputs, to=TensorProto.DataType.Value(at.given["to"].decode()))


@adapter(UP, 7, "Add", "And", "Div", "Equal", "Greater", "Less", "Mul", "Or", "Pow", "Sub", "Xor")
def _limited_broadcast(at: Rewrite) -> list[NodeProto]:
    """Add(a, b, broadcast=1, axis=1) → Add(a, Unsqueeze(b, [1, 2])): b's first axis is a's axis 1."""
    axis = at.given.get("axis")
    a, b = at.inputs
    if axis is None:
        return at.result([a, b])
    shape_a, shape_b = at.scope.shape(a), at.scope.shape(b)
    if shape_a is None or shape_b is None:
        missing = a if shape_a is None else b
        raise at.refusal(f"its 'axis' needs the rank of '{missing}', which is not known")
    behind = len(shape_a) - axis % len(shape_a) - len(shape_b)
    if not behind:
        return at.result([a, b])
    axes = list(range(len(shape_b), len(shape_b) + behind))
    aligned = at.add("Unsqueeze", [b], "aligned", axes=axes)
    return at.result([a, aligned])


@adapter(UP, 7, "Gemm")
def _gemm_broadcast(at: Rewrite) -> list[NodeProto]:
    """Gemm(a, b, c, broadcast=1) → Gemm(a, b, c), which always broadcasts."""
    at.given.pop("broadcast", None)
    return at.result(at.inputs, **at.given)


@adapter(UP, 10, "Upsample")
def _upsample_as_resize(at: Rewrite) -> list[NodeProto]:
    """Upsample(x, scales) → Resize(x, scales)."""
    return at.result(at.inputs, "Resize", **at.given)


@adapter(UP, 11, "Clip")
def _clip_bounds(at: Rewrite) -> list[NodeProto]:
    """Clip(x, min=0, max=6) → Clip(x, 0, 6), the bounds in the dtype of x."""
    x = at.inputs[0]
    bounds = [at.scalar_like(at.given[bound], x, bound) if bound in at.given else "" for bound in ("min", "max")]
    return at.result([x, *bounds] if bounds[1] else [x, bounds[0]] if bounds[0] else [x])


@adapter(UP, 11, "Pad")
def _pad_amounts(at: Rewrite) -> list[NodeProto]:
    """Pad(x, pads=[0, 1, 0, 1], value=2) → Pad(x, [0, 1, 0, 1], 2), the value in the dtype of x."""
    given = at.given
    x = at.inputs[0]
    inputs = [x, at.constant(given.pop("pads"), np.int64, "pads")]
    value = given.pop("value", 0.0)
    if value:
        inputs.append(at.scalar_like(value, x, "value"))
    return at.result(inputs, **given)


@adapter(UP, 11, "Resize")
def _resize_with_floor(at: Rewrite) -> list[NodeProto]:
    """Resize(x, scales) → Resize(x, no roi, scales, asymmetric), nearest by floor where it enlarges, ceil elsewhere."""
    x, scales = at.inputs
    mode = at.given.get("mode", b"nearest")
    roi = at.constant([], np.float32, "roi")
    given = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
    if mode != b"nearest":
        return at.result([x, roi, scales], **given)
    factors = at.scope.constant(scales)
    if factors is not None and ((factors >= 1).all() or (factors <= 1).all()):
        rounding = "floor" if (factors >= 1).all() else "ceil"
        return at.result([x, roi, scales], nearest_mode=rounding, **given)
    # Which axes are enlarged shows only when the graph runs, so those go first.
    one = at.constant(1, np.float32, "one")
    up = at.add("Max", [scales, one], "enlarging")
    down = at.add("Min", [scales, one], "reducing")
    larger = at.add("Resize", [x, roi, up], "enlarged", nearest_mode="floor", **given)
    return at.result([larger, roi, down], nearest_mode="ceil", **given)


@adapter(UP, 13, "Hardmax")
def _hardmax_of_flattened(at: Rewrite) -> list[NodeProto]:
    """Hardmax(x, axis=1) over all axes from 1 on → Reshape(Hardmax(Flatten(x, 1), -1), Shape(x))."""
    x = at.inputs[0]
    size = at.add("Shape", [x], "shape")
    flat = at.add("Flatten", [x], "flat", axis=at.given.get("axis", 1))
    found = at.add("Hardmax", [flat], "hardmax", axis=-1)
    return at.result([found, size], "Reshape")


@adapter(UP, 21, "GroupNormalization")
def _scale_of_each_channel(at: Rewrite) -> list[NodeProto]:
    """GroupNormalization(x, scale, bias) with a number for each group → with that number for each of its channels."""
    given = at.given
    x, *numbers = at.inputs
    channels = at.add("Shape", [x], "channels", start=1, end=2)
    groups = at.constant([given["num_groups"]], np.int64, "groups")
    one, column = (at.constant(v, np.int64, r) for v, r in (([1], "one"), ([-1, 1], "column")))
    repeats = at.add("Concat", [one, at.add("Div", [channels, groups], "repeats")], "sizes", axis=0)
    flat = at.constant([-1], np.int64, "flat")
    spread = [
        at.add("Reshape", [at.add("Expand", [at.add("Reshape", [n, column], r), repeats], r), flat], r)
        for n, r in zip(numbers, ("scale", "bias"), strict=True)
    ]
    return at.result([x, *spread], **given)


@adapter(UP, 16, "RoiAlign")
def _roi_align_by_half_pixel(at: Rewrite) -> list[NodeProto]:
    """RoiAlign() → RoiAlign(coordinate_transformation_mode="output_half_pixel")."""
    mode = {"coordinate_transformation_mode": "output_half_pixel"}
    return at.result(at.inputs, **at.given, **mode)


@adapter(UP, 19, "AveragePool")
def _average_of_what_is_there(at: Rewrite) -> list[NodeProto]:
    """AveragePool(x) → AveragePool(x), unless it counts the padding that rounding up adds."""
    if at.given.get("ceil_mode") and at.given.get("count_include_pad"):
        raise at.refusal("it does not count the padding that 'ceil_mode' adds there")
    return at.result(at.inputs, **at.given)

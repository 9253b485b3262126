"""Changes on the way to an older opset; see ``adapters.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, numpy_helper

from torchferry.graph.forms.adapters import adapter
from torchferry.graph.forms.schemas import RENAMED_VALUES

if TYPE_CHECKING:
    from onnx import NodeProto

    from torchferry.graph.forms.adapters import Adapters, Rewrite

DOWN: Adapters = {}
_INTEGERS = (TensorProto.INT32, TensorProto.INT64)
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


@adapter(DOWN, 20, "GridSample")
def _old_mode_names(at: Rewrite) -> list[NodeProto]:
    """GridSample(mode="linear") → GridSample(mode="bilinear")."""
    old = {new.encode(): old for old, new in RENAMED_VALUES["GridSample", "mode"][1].items()}
    mode = at.given.pop("mode", b"linear")
    return at.result(at.inputs, mode=old.get(mode, mode), **at.given)


@adapter(DOWN, 19, "AveragePool")
def _average_without_dilations(at: Rewrite) -> list[NodeProto]:
    """AveragePool(x, dilations=[1, 1]) → AveragePool(x)."""
    if max(at.given.pop("dilations", [1])) > 1:
        raise at.refusal("it has no dilations there")
    if at.given.get("ceil_mode") and at.given.get("count_include_pad"):
        raise at.refusal("it counts the padding that 'ceil_mode' adds there")
    return at.result(at.inputs, **at.given)


@adapter(DOWN, 10, "MaxPool")
def _max_without_dilations(at: Rewrite) -> list[NodeProto]:
    """MaxPool(x, dilations=[1, 1], ceil_mode=0) → MaxPool(x)."""
    if max(at.given.pop("dilations", [1])) > 1 or at.given.pop("ceil_mode", 0):
        raise at.refusal("it has neither dilations nor 'ceil_mode' there")
    return at.result(at.inputs, **at.given)


@adapter(DOWN, 18, *(f"Reduce{kind}" for kind in _REDUCTIONS))
@adapter(DOWN, 13, "ReduceSum")
def _reduce_by_attribute(at: Rewrite) -> list[NodeProto]:
    """ReduceMean(x, [1]) → ReduceMean(x, axes=[1])."""
    axes = at.settled(1, "axes")
    is_noop = at.given.pop("noop_with_empty_axes", 0)
    if axes is not None and axes.size:
        at.given["axes"] = axes.tolist()
    elif is_noop:
        raise at.refusal("it cannot reduce no axis at all there")
    return at.result([at.inputs[0]], **at.given)


@adapter(DOWN, 18, "Split")
def _split_into_sizes(at: Rewrite) -> list[NodeProto]:
    """Split(x, num_outputs=2) → Split(x, [3, 2]) for five elements."""
    given = at.given
    parts = given.pop("num_outputs", None)
    if parts is None:
        return at.result(at.inputs, **given)
    shape = at.scope.shape(at.inputs[0])
    size = shape[given.get("axis", 0)] if shape else None
    if size is None:
        raise at.refusal(f"'num_outputs' needs the size of '{at.inputs[0]}', which is not known")
    whole = -(-size // parts)
    if whole * (parts - 1) > size:
        raise at.refusal(f"{size} elements do not make {parts} parts of {whole}")
    sizes = at.constant([whole] * (parts - 1) + [size - whole * (parts - 1)], np.int64, "sizes")
    return at.result([at.inputs[0], sizes], **given)


@adapter(DOWN, 13, "Split")
def _split_by_attribute(at: Rewrite) -> list[NodeProto]:
    """Split(x, [3, 2]) → Split(x, split=[3, 2])."""
    sizes = at.settled(1, "split")
    given = {} if sizes is None else {"split": sizes.tolist()}
    return at.result([at.inputs[0]], **at.given, **given)


@adapter(DOWN, 13, "Squeeze", "Unsqueeze")
def _axes_by_attribute(at: Rewrite) -> list[NodeProto]:
    """Squeeze(x, [0]) → Squeeze(x, axes=[0])."""
    axes = at.settled(1, "axes")
    given = {} if axes is None else {"axes": axes.tolist()}
    return at.result([at.inputs[0]], None, **given)


@adapter(DOWN, 18, "Pad")
def _pad_every_axis(at: Rewrite) -> list[NodeProto]:
    """Pad(x, [1, 1], value, axes=[1]) → Pad(x, [0, 1, 0, 1], value)."""
    axes = at.settled(3, "axes")
    inputs = at.inputs[:3]
    if axes is not None:
        pads, rank = at.settled(1, "pads"), at.rank()
        assert pads is not None
        every = np.zeros((2, rank), np.int64)
        every[:, axes] = pads.reshape(2, -1)
        inputs[1] = at.constant(every.ravel(), np.int64, "pads")
    return at.result(inputs, **at.given)


@adapter(DOWN, 16, "RoiAlign")
def _roi_align_by_output(at: Rewrite) -> list[NodeProto]:
    """RoiAlign(coordinate_transformation_mode="output_half_pixel") → RoiAlign()."""
    given = at.given
    if given.pop("coordinate_transformation_mode", b"half_pixel") != b"output_half_pixel":
        raise at.refusal("it has no half-pixel coordinates there")
    return at.result(at.inputs, **given)


@adapter(DOWN, 15, "Shape")
def _slice_of_shape(at: Rewrite) -> list[NodeProto]:
    """Shape(x, start=0, end=1) → Slice(Shape(x), [0], [1])."""
    if not at.given:
        return at.result(at.inputs)
    whole = at.add("Shape", at.inputs, "whole")
    start = at.constant([at.given.get("start", 0)], np.int64, "start")
    end = at.constant([at.given.get("end", np.iinfo(np.int64).max)], np.int64, "end")
    axes = at.constant([0], np.int64, "axes")
    return at.result([whole, start, end, axes], "Slice")


@adapter(DOWN, 14, "Reshape")
def _reshape_without_zero(at: Rewrite) -> list[NodeProto]:
    """Reshape(x, shape, allowzero=1) → Reshape(x, shape), where a size of 0 would be copied from x.

    A computed size is taken not to be 0: there the old form copies that of x, or fails.
    """
    shape = at.scope.constant(at.inputs[1])
    if at.given.get("allowzero") and shape is not None and (shape == 0).any():
        raise at.refusal("it cannot make an axis of size 0 there")
    return at.result(at.inputs)


@adapter(DOWN, 13, "Hardmax", "LogSoftmax", "Softmax")
def _softmax_of_last_axis(at: Rewrite) -> list[NodeProto]:
    """Softmax(x, axis=1) over this axis alone → Transpose(Softmax(Transpose(x))), for it goes over all from it on."""
    rank = at.rank()
    axis = at.given.get("axis", -1) % rank
    if axis == rank - 1:
        return at.result(at.inputs, axis=axis)
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    turned = at.add("Transpose", [at.inputs[0]], "turned", perm=order)
    result = at.add(at.node.op_type, [turned], "result", axis=rank - 1)
    return at.result([result], "Transpose", perm=order)


@adapter(DOWN, 13, "Resize")
def _resize_with_roi(at: Rewrite) -> list[NodeProto]:
    """Resize(x, , scales) → Resize(x, empty, scales)."""
    inputs = [at.inputs[0]]
    for index, role in ((1, "roi"), (2, "scales")):
        inputs.append(at.input(index) or at.constant([], np.float32, role))
    return at.result([*inputs, *at.inputs[3:]], **at.given)


@adapter(DOWN, 11, "Resize")
def _resize_by_default(at: Rewrite) -> list[NodeProto]:
    """Resize(x, roi, scales, asymmetric, floor) → Resize(x, scales)."""
    given = at.given
    mode = given.get("mode", b"nearest")
    scales = at.scope.constant(at.inputs[2])
    is_old = given.get("coordinate_transformation_mode") == b"asymmetric" and mode != b"cubic"
    if mode == b"nearest":
        enlarges = scales is not None and scales.size > 0 and bool((scales >= 1).all())
        is_old &= given.get("nearest_mode") == b"floor" and enlarges
    if not is_old or any(at.inputs[3:]):
        raise at.refusal("it takes scales and asymmetric coordinates there, and nearest only by floor when it enlarges")
    return at.result([at.inputs[0], at.inputs[2]], mode=mode)


@adapter(DOWN, 10, "Resize")
def _resize_as_upsample(at: Rewrite) -> list[NodeProto]:
    """Resize(x, scales) → Upsample(x, scales)."""
    scales = at.scope.constant(at.inputs[1])
    if scales is None or (scales < 1).any():
        raise at.refusal("'Upsample', which it is there, only enlarges")
    return at.result(at.inputs, "Upsample", **at.given)


@adapter(DOWN, 12, "Max", "Min")
def _extreme_of_integers(at: Rewrite) -> list[NodeProto]:
    """Max(a, b) of integers → Where(Greater(a, b), a, b)."""
    if at.scope.dtype(at.inputs[0]) not in _INTEGERS:
        return at.result(at.inputs)
    comparison = "Greater" if at.node.op_type == "Max" else "Less"
    extreme, *others = at.inputs
    for number, other in enumerate(others, 1):
        inputs = [at.add(comparison, [extreme, other], "better"), extreme, other]
        if number == len(others):
            return at.result(inputs, "Where")
        extreme = at.add("Where", inputs, "best")
    return at.result([extreme], "Identity")


@adapter(DOWN, 11, "TopK")
def _topk_of_largest(at: Rewrite) -> list[NodeProto]:
    """TopK(x, k, largest=1, sorted=1) → TopK(x, k)."""
    if not at.given.pop("largest", 1):
        raise at.refusal("it finds the largest alone there")
    at.given.pop("sorted", None)
    return at.result(at.inputs, **at.given)


@adapter(DOWN, 11, "Clip")
def _clip_by_attributes(at: Rewrite) -> list[NodeProto]:
    """Clip(x, 0, 6) → Clip(x, min=0, max=6)."""
    bounds = {role: at.settled(index, role) for index, role in ((1, "min"), (2, "max"))}
    given = {role: float(bound) for role, bound in bounds.items() if bound is not None}
    if given.get("min", -np.inf) > given.get("max", np.inf):
        raise at.refusal("its 'min' may not be above its 'max' there")
    return at.result([at.inputs[0]], None, **given)


@adapter(DOWN, 11, "DepthToSpace")
def _depth_by_rows(at: Rewrite) -> list[NodeProto]:
    """DepthToSpace(x, mode="DCR") → DepthToSpace(x)."""
    if at.given.pop("mode", b"DCR") != b"DCR":
        raise at.refusal("it has no mode 'CRD' there")
    return at.result(at.inputs, **at.given)


@adapter(DOWN, 11, "Pad")
def _pad_by_attributes(at: Rewrite) -> list[NodeProto]:
    """Pad(x, [0, 1, 0, 1], 2) → Pad(x, pads=[0, 1, 0, 1], value=2)."""
    pads, value = at.settled(1, "pads"), at.settled(2, "value")
    assert pads is not None
    if value is not None:
        at.given["value"] = float(value)
    return at.result([at.inputs[0]], pads=pads.tolist(), **at.given)


@adapter(DOWN, 11, "Gemm")
def _gemm_with_addend(at: Rewrite) -> list[NodeProto]:
    """Gemm(a, b) → Gemm(a, b, 0)."""
    inputs = [name for name in at.inputs if name]
    if len(inputs) < 3:
        inputs.append(at.scalar_like(0.0, inputs[0], "zero"))
    return at.result(inputs, **at.given)


@adapter(DOWN, 10, "Slice")
def _slice_by_attributes(at: Rewrite) -> list[NodeProto]:
    """Slice(x, [0], [2], [1]) → Slice(x, starts=[0], ends=[2], axes=[1])."""
    roles = ("starts", "ends", "axes", "steps")
    given = {role: at.settled(index, role) for index, role in enumerate(roles, 1)}
    steps = given.pop("steps")
    if steps is not None and (steps != 1).any():
        raise at.refusal("it has no steps there")
    return at.result([at.inputs[0]], **{r: v.tolist() for r, v in given.items() if v is not None})


@adapter(DOWN, 12, "Constant")
def _constant_tensor(at: Rewrite) -> list[NodeProto]:
    """Constant(value_ints=[1, 2]) → Constant(value=[1, 2])."""
    ((name, value),) = at.given.items()
    if name in ("value", "sparse_value"):
        return at.result([], **{name: value})
    dtype = np.float32 if "float" in name else np.int64 if "int" in name else np.object_
    return at.result([], value=numpy_helper.from_array(np.asarray(value, dtype)))

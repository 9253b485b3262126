r"""Operators with sums inside, opened: every inner tensor of a norm, a mean or a softmax becomes a tensor of the graph.

An engine may hold the inner tensors of a fused operator in FP16, where a sum of squares overflows long before its
operands do. Opened, they can be seen, rounded and scaled like any other tensor. Written out, from ONNX's definitions:

=============================  =====================================================================
operator                       becomes
=============================  =====================================================================
ReduceMean, GlobalAveragePool  sum(x) · 1/n
AveragePool                    (AveragePool(x) · n) · 1/n, n the window's size
ReduceL1, ReduceSumSquare      sum(\|x\|), sum(x²)
ReduceL2, ReduceLogSum         sqrt(sum(x²)), log(sum(x))
LayerNormalization             d = x - mean(x); d / sqrt(sum(d²)·1/n + eps) · scale + bias
InstanceNormalization          the same over each channel, GroupNormalization over each group,
                               MeanVarianceNormalization without scale and bias
BatchNormalization             (x - mean) / sqrt(var + eps) · scale + bias
RMSNormalization               x / sqrt(sum(x²)·1/n + eps) · scale
LpNormalization                x / sum(\|x\|), x / sqrt(sum(x²))
Softmax, LogSoftmax            d = x - max(x); exp(d) / sum(exp(d)); d - log(sum(exp(d)))
ReduceLogSumExp                max(x) + log(sum(exp(x - max(x))))
Gelu, HardSwish, Swish         0.5x · (1 + erf(x/√2)) or its tanh form; x · gate(x)
Softplus, Mish                 max(x, 0) + log(1 + exp(-\|x\|)); x · tanh(softplus(x))
=============================  =====================================================================

What stays closed is returned: recurrent operators, Attention, LRN, LpPool, operators of other domains, training mode,
and what has no known rank where the rank is needed. Convolutions and products of matrices are no tensors inside but
accumulators, and stay as they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from torchferry.core.errors import FormatError
from torchferry.precision.inside import EXACT, ROLE_KEY, SATURATES, Inside

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EXACT", "ROLE_KEY", "SATURATES", "inline_functions", "open_sums"]

# fmt: off
_CLOSED = frozenset((
    "Attention", "DFT", "GRU", "GlobalLpPool", "LRN", "LSTM", "LpPool", "NegativeLogLikelihoodLoss", "RNN",
    "STFT", "SoftmaxCrossEntropyLoss",
))
# fmt: on


def inline_functions(model: ir.Model) -> None:
    """Put the bodies of the model's own functions (Marks among them) in place of their calls; changes the model.

    Raises:
        FormatError: If a function calls itself or needs another opset than the graph.
    """
    if not model.functions:
        return
    try:
        InlinePass()(model)
    except Exception as exc:  # the pass raises ValueError or its own errors, by what is wrong
        raise FormatError(f"the functions of the graph cannot be inlined: {exc}") from exc


def open_sums(model: ir.Model, only: Callable[[ir.Node], bool] | None = None) -> tuple[ir.Node, ...]:
    """Open every operator of the table above, in all graphs of a model.

    New nodes carry the metadata of the node that they stand for, so its module and source line are known.

    Args:
        model: Changed in place; functions are inlined first. Its values must have types, and norms their rank.
        only: Which nodes to open; all that can be if None.

    Returns:
        The nodes with sums inside that stay closed.

    Raises:
        FormatError: If its functions cannot be inlined.
    """
    inline_functions(model)
    closed: list[ir.Node] = []
    for graph in [*model.graphs()]:
        for node in [*graph]:
            if only is not None and not only(node):
                continue
            if node.domain not in ("", "ai.onnx"):
                closed.append(node)
                continue
            opener = _OPENERS.get(node.op_type)
            if opener is None or not _is_float(node):
                closed += [node] if node.op_type in _CLOSED else []
                continue
            inside = Inside(node, model.graph, model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1)))
            outputs = opener(inside)
            if outputs is None or any(output.uses() for output in node.outputs[len(outputs) :]):
                inside.discard()
                closed.append(node)
                continue
            inside.replace(outputs)
    return tuple(closed)


def _is_float(node: ir.Node) -> bool:
    x = node.inputs[0]
    return x is not None and (x.dtype is None or x.dtype.is_floating_point())


def _reduce_mean(i: Inside) -> list[ir.Value] | None:
    if i.attribute("noop_with_empty_axes", 0):
        return None
    return [i.mean(i.x, i.own_axes(), i.attribute("keepdims", 1))]


def _reduce_sum_of(*inner: str, then: str = "") -> Callable[[Inside], list[ir.Value] | None]:
    """Make an opener for the sum of something of x, and something of that."""

    def opener(i: Inside) -> list[ir.Value] | None:
        if i.attribute("noop_with_empty_axes", 0):
            return None
        x = i.x
        for op_type in inner:
            x = i.op("Mul", x, x) if op_type == "Square" else i.op(op_type, x)
        total = i.reduce("ReduceSum", x, i.own_axes(), i.attribute("keepdims", 1))
        return [i.op(then, total) if then else total]

    return opener


def _log_sum_exp(i: Inside) -> list[ir.Value] | None:
    if i.attribute("noop_with_empty_axes", 0):
        return None
    axes, keepdims = i.own_axes(), i.attribute("keepdims", 1)
    largest = i.reduce("ReduceMax", i.x, axes)
    exponential = i.op("Exp", i.op("Sub", i.x, largest, role=SATURATES))
    logarithm = i.op("Log", i.reduce("ReduceSum", exponential, axes, keepdims))
    return [i.op("Add", logarithm, largest if keepdims else i.reduce("ReduceMax", i.x, axes, keepdims))]


def _global_average_pool(i: Inside) -> list[ir.Value] | None:
    return None if i.rank is None else [i.mean(i.x, range(2, i.rank))]


def _average_pool(i: Inside) -> list[ir.Value]:
    count = math.prod(i.node.attributes["kernel_shape"].as_ints())
    attributes = {name: attribute.value for name, attribute in i.node.attributes.items()}
    total = i.op("Mul", i.op("AveragePool", i.x, role=EXACT, **attributes), i.number(count))
    return [i.op("Mul", total, i.number(1 / count))]


def _layer_normalization(i: Inside) -> list[ir.Value] | None:
    axis = i.attribute("axis", -1)
    if axis >= 0 and i.rank is None:
        return None
    axes = range(axis if axis < 0 else axis - (i.rank or 0), 0)
    y, mean, std = i.normalised(i.x, axes, i.attribute("epsilon", 1e-5))
    outputs = [i.scaled(y, i.input(1), i.input(2))]
    if len(i.node.outputs) > 1:
        assert mean is not None  # it is centred
        outputs += [mean, i.op("Reciprocal", std)][: len(i.node.outputs) - 1]
    return outputs


def _rms_normalization(i: Inside) -> list[ir.Value] | None:
    axis = i.attribute("axis", -1)
    if axis >= 0 and i.rank is None:
        return None
    axes = range(axis if axis < 0 else axis - (i.rank or 0), 0)
    y, _, _ = i.normalised(i.x, axes, i.attribute("epsilon", 1e-5), centred=False)
    return [i.scaled(y, i.input(1), None)]


def _instance_normalization(i: Inside) -> list[ir.Value]:
    y, _, _ = i.normalised(i.reshape(i.x, [0, 0, -1]), [-1], i.attribute("epsilon", 1e-5))
    scale, bias = (None if value is None else i.reshape(value, [-1, 1]) for value in (i.input(1), i.input(2)))
    return [i.reshape_like(i.scaled(y, scale, bias), i.x)]


def _group_normalization(i: Inside) -> list[ir.Value] | None:
    groups = i.attribute("num_groups", None)
    y, _, _ = i.normalised(i.reshape(i.x, [0, groups, -1]), [-1], i.attribute("epsilon", 1e-5))
    scale, bias = i.input(1), i.input(2)
    if i.opset >= 21:  # one scale a channel; before, one a group
        if scale is None or scale.shape is None or not isinstance(scale.shape[0], int):
            return None
        y = i.reshape(y, [0, scale.shape[0], -1])
    columns = (None if value is None else i.reshape(value, [-1, 1]) for value in (scale, bias))
    return [i.reshape_like(i.scaled(y, *columns), i.x)]


def _mean_variance_normalization(i: Inside) -> list[ir.Value]:
    axes = i.attribute("axes", (0, 2, 3))
    d = i.op("Sub", i.x, i.mean(i.x, axes))
    d.shape = i.x.shape
    std = i.op("Sqrt", i.mean(i.square(d), axes))
    return [i.op("Div", d, i.op("Add", std, i.number(1e-9)))]


def _batch_normalization(i: Inside) -> list[ir.Value] | None:
    if i.rank is None or i.attribute("training_mode", 0):
        return None
    given = [i.input(index) for index in (1, 2, 3, 4)]
    column = [-1, *[1] * (i.rank - 2)]
    scale, bias, mean, variance = (None if v is None else i.reshape(v, column) for v in given)
    std = i.op("Sqrt", i.op("Add", variance, i.number(i.attribute("epsilon", 1e-5))))
    return [i.scaled(i.op("Div", i.op("Sub", i.x, mean), std), scale, bias)]


def _lp_normalization(i: Inside) -> list[ir.Value]:
    axes = [i.attribute("axis", -1)]
    if i.attribute("p", 2) == 1:
        norm = i.reduce("ReduceSum", i.op("Abs", i.x), axes)
    else:
        norm = i.op("Sqrt", i.reduce("ReduceSum", i.op("Mul", i.x, i.x), axes))
    zero = i.number(0)  # a vector of zeros stays one
    is_zero = i.op("Equal", i.x, zero, dtype=ir.DataType.BOOL)
    return [i.op("Where", is_zero, zero, i.op("Div", i.x, i.op("Where", is_zero, i.number(1), norm)))]


def _softmax(i: Inside) -> list[ir.Value] | None:
    if i.opset < 13:  # there it flattens its input first
        return None
    axes = [i.attribute("axis", -1)]
    d = i.op("Sub", i.x, i.reduce("ReduceMax", i.x, axes), role=SATURATES)
    exponential = i.op("Exp", d)
    total = i.reduce("ReduceSum", exponential, axes)
    if i.node.op_type == "LogSoftmax":
        return [i.op("Sub", d, i.op("Log", total))]
    return [i.op("Div", exponential, total)]


def _gelu(i: Inside) -> list[ir.Value]:
    half = i.op("Mul", i.x, i.number(0.5))
    if i.attribute("approximate", "none") == "tanh":
        cube = i.op("Mul", i.op("Mul", i.x, i.x, role=SATURATES), i.x, role=SATURATES)
        inner = i.op("Add", i.x, i.op("Mul", cube, i.number(0.044715), role=SATURATES), role=SATURATES)
        gate = i.op("Tanh", i.op("Mul", inner, i.number(math.sqrt(2 / math.pi)), role=SATURATES))
    else:
        gate = i.op("Erf", i.op("Div", i.x, i.number(math.sqrt(2))))
    return [i.op("Mul", half, i.op("Add", gate, i.number(1)))]


def _hard_swish(i: Inside) -> list[ir.Value]:
    return [i.op("Mul", i.x, i.op("HardSigmoid", i.x, alpha=1 / 6, beta=0.5))]


def _swish(i: Inside) -> list[ir.Value]:
    return [i.op("Mul", i.x, i.op("Sigmoid", i.op("Mul", i.x, i.number(i.attribute("alpha", 1.0)))))]


def _log_one_plus_exp(i: Inside) -> ir.Value:
    exponential = i.op("Exp", i.op("Neg", i.op("Abs", i.x)))
    return i.op("Add", i.op("Relu", i.x), i.op("Log", i.op("Add", exponential, i.number(1))))


def _softplus(i: Inside) -> list[ir.Value]:
    return [_log_one_plus_exp(i)]


def _mish(i: Inside) -> list[ir.Value]:
    return [i.op("Mul", i.x, i.op("Tanh", _log_one_plus_exp(i)))]


_OPENERS: dict[str, Callable[[Inside], list[ir.Value] | None]] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Gelu": _gelu,
    "GlobalAveragePool": _global_average_pool,
    "GroupNormalization": _group_normalization,
    "HardSwish": _hard_swish,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _softmax,
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
    "Mish": _mish,
    "RMSNormalization": _rms_normalization,
    "ReduceL1": _reduce_sum_of("Abs"),
    "ReduceL2": _reduce_sum_of("Square", then="Sqrt"),
    "ReduceLogSum": _reduce_sum_of(then="Log"),
    "ReduceLogSumExp": _log_sum_exp,
    "ReduceMean": _reduce_mean,
    "ReduceSumSquare": _reduce_sum_of("Square"),
    "Softmax": _softmax,
    "Softplus": _softplus,
    "Swish": _swish,
}

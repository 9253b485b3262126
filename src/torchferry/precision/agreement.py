"""The first check of a certificate: every node of the repaired graph, given the true operands, gives the true result.

One graph holds both: the user's, as it is, in FP32, and each node of the repaired one in FP32 too, with constants
unrounded, fed with the user's tensors / 2**k. What it gives is compared, bit for bit, with the user's tensor / 2**k. A
node is judged alone, so an exception stays where it is; that all agree is, step by step, that the whole does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from torchferry.precision.degrees import FLOAT, constant, rule_of
from torchferry.precision.nodes import new_node
from torchferry.precision.prepare import bounded_mask, has_body, mask_path, prepare, values
from torchferry.precision.ranges import run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchferry.graph import Exported
    from torchferry.precision.apply import ConstantRecord
    from torchferry.precision.ranges import Feeds

_HALF = ir.DataType.FLOAT16
_PREFIX = "repaired/"
_ULPS = 2.0**-20  # what an operator's own rounding may differ by where its rule is not exact
_TINY = 2.0**-100  # below it a shift may round, since FP32 ends too
_SHIFTS = ("Mul", "Cast", "Clip")  # what the repair adds that changes no bit
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_datatype")


@dataclass(frozen=True)
class Agreement:
    """What the comparison found.

    Attributes:
        compared: Number of tensors that were compared.
        different: Tensors that differ, with the largest difference relative to the tensor's largest value.
        excused: Those among the compared that may differ by their own rounding, and did, with the same figure.
        skipped: Nodes that could not be compared, with the reason.
        passed_over: Tensors of the user's graph between a mask and its softmax, compared only at its end.
        missing: Outputs that nothing was compared with.
    """

    compared: int
    different: dict[str, float]
    excused: dict[str, float]
    skipped: dict[str, str]
    passed_over: tuple[str, ...]
    missing: tuple[str, ...]


def compare_nodes(
    original: Exported,
    fixed: Exported,
    scales: Mapping[str, tuple[str, int]],
    constants: Mapping[str, ConstantRecord],
    raised: Mapping[str, float],
    masks: Sequence[str],
    data: Sequence[Feeds],
) -> Agreement:
    """Compare node by node.

    Args:
        original: The user's graph.
        fixed: The repaired one.
        scales: For tensors of ``fixed`` the tensor of ``original`` that they stand for, and k.
        constants: For constants of ``fixed`` where they come from.
        raised: What constants and attributes were before they were raised to FP16's smallest number.
        masks: Constants of ``fixed`` that are bounded masks.
        data: Inputs of ``original``.
    """
    return _Joint(original, fixed, scales, constants, raised, masks).compare(data)


class _Joint:
    def __init__(
        self,
        original: Exported,
        fixed: Exported,
        scales: Mapping[str, tuple[str, int]],
        constants: Mapping[str, ConstantRecord],
        raised: Mapping[str, float],
        masks: Sequence[str],
    ) -> None:
        self._signature = original.signature
        prepared = prepare(original, split=False, bound_masks=False)
        self._model, self._graph = prepared.model, prepared.model.graph
        self._own = {value.name or "": value for value in values(self._graph)}
        self._fixed = fixed.model.clone()
        self._constants, self._raised = constants, raised
        self._scaled: dict[tuple[str, int], ir.Value] = {}
        hidden: set[str] = set()
        for name in masks:
            hidden |= mask_path(self._fixed.graph.initializers[name]) or set()
        self._passed_over = tuple(sorted(hidden & scales.keys()))
        self._scales = {name: entry for name, entry in scales.items() if name not in hidden and entry[0] in self._own}
        others = (v.name or "" for v in values(self._fixed.graph) if v.dtype not in (_HALF, FLOAT))
        self._scales.update(
            {name: (name, 0) for name in others if name in self._own and not _is_constant(self._own[name])}
        )
        self._figures: list[tuple[str, bool, tuple[ir.Value, ir.Value, ir.Value]]] = []
        self._skipped: dict[str, str] = {}
        self._made: dict[ir.Value, ir.Value] = {}
        self._join()

    def compare(self, data: Sequence[Feeds]) -> Agreement:
        flat = [value for _, _, figures in self._figures for value in figures]
        different: dict[str, float] = {}
        excused: dict[str, float] = {}
        for row in run(self._model, self._signature, flat, data):
            for name, is_exact, figures in self._figures:
                unequal, gap, size = (float(row[value.name or ""]) for value in figures)
                if not unequal or (gap <= _TINY and size < np.inf):
                    continue
                relative = gap / size if size else np.inf
                into = excused if not is_exact and relative <= _ULPS else different
                into[name] = max(relative, into.get(name, 0.0)) if relative == relative else np.nan
        compared = {name for name, _, _ in self._figures}
        given = {v.name or "" for v in self._fixed.graph.inputs} | self._fixed.graph.initializers.keys()
        missing = tuple(
            name for v in self._fixed.graph.outputs if (name := v.name or "") not in compared and name not in given
        )
        return Agreement(len(compared), different, excused, self._skipped, self._passed_over, missing)

    def _join(self) -> None:
        for name, value in self._fixed.graph.initializers.items():
            self._made[value] = self._register(f"{_PREFIX}{name}", self._unrounded(name, value))
        for node in list(self._fixed.graph):
            if has_body(node):
                self._skipped[node.name or ""] = "its body is not looked into"
                for output in node.outputs:
                    self._made[output] = self._true(output)
                continue
            self._add(node)

    def _add(self, node: ir.Node) -> None:
        operands = [None if value is None else self._operand(value) for value in node.inputs]
        attributes = [self._attribute(node, a) for a in node.attributes.values()]
        outputs = [
            ir.Value(name=f"{_PREFIX}{v.name}" if v.name else "", type=_wide(v), shape=v.shape) for v in node.outputs
        ]
        self._graph.append(ir.Node(node.domain, node.op_type, operands, attributes, outputs=outputs,
                                   name=f"{_PREFIX}{node.name}"))  # fmt: skip
        rule = rule_of(node)
        for value, output in zip(node.outputs, outputs, strict=True):
            self._made[value] = output
            if value.name in self._scales:
                is_exact = (rule is None or rule.is_exact) and not self._is_composite(node)
                self._figures.append((value.name or "", is_exact, self._difference(output, self._true(value))))

    def _is_composite(self, node: ir.Node) -> bool:
        """Tell whether a tensor with no counterpart is among the operands: the formula is another there."""
        return any(
            v is not None and not v.is_initializer() and v.name not in self._scales and not self._is_shift(v)
            for v in node.inputs
        )

    def _is_shift(self, value: ir.Value) -> bool:
        producer = value.producer()
        return producer is not None and producer.op_type in _SHIFTS and value.name not in self._own

    def _operand(self, value: ir.Value) -> ir.Value:
        return self._true(value) if value.name in self._scales else self._made[value]

    def _true(self, value: ir.Value) -> ir.Value:
        """Return the user's tensor as this one stores it."""
        name, k = self._scales.get(value.name or "", (value.name or "", 0))
        own = self._own[name]
        if k == 0 or own.dtype != FLOAT:
            return own
        if (name, k) not in self._scaled:
            factor = self._register(f"{_PREFIX}2**{-k}", np.array(2.0**-k, np.float32))
            self._scaled[name, k] = self._op("Mul", own, factor)
        return self._scaled[name, k]

    def _unrounded(self, name: str, value: ir.Value) -> Any:
        array = constant(value)
        record = self._constants.get(name)
        if record is None:
            return array
        if record.source:
            source = constant(self._own.get(record.source))
            if source is None:
                raise KeyError(record.source)
            true = bounded_mask(source) if record.is_mask else source
        else:
            true = np.full(array.shape, record.value)
        return (true.astype(np.float64) / 2.0**record.k).astype(np.float32)

    def _attribute(self, node: ir.Node, attribute: ir.Attr) -> ir.Attr:
        if attribute.name in _DTYPE_ATTRIBUTES and attribute.value == _HALF:
            return ir.AttrInt64(attribute.name, FLOAT)
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _HALF:
            return ir.AttrTensor(attribute.name, ir.Tensor(attribute.as_tensor().numpy().astype(np.float32)))
        key = f"{node.name}.{attribute.name}"
        return ir.AttrFloat32(attribute.name, self._raised[key]) if key in self._raised else attribute

    def _difference(self, got: ir.Value, want: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        equal = self._op("Cast", self._op("Not", self._op("Equal", got, want)), to=FLOAT)
        got, want = (v if v.dtype in (FLOAT, None) else self._op("Cast", v, to=FLOAT) for v in (got, want))
        gap = self._op("Abs", self._op("Sub", got, want))
        unequal, gap, size = (self._op("ReduceMax", v, keepdims=0) for v in (equal, gap, self._op("Abs", want)))
        return unequal, gap, size

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        dtype = ir.DataType.BOOL if op_type in ("Equal", "Not") else FLOAT
        node = new_node(op_type, inputs, f"{_PREFIX}{op_type}.{len(self._graph)}", dtype, attributes)
        self._graph.append(node)
        return node.outputs[0]

    def _register(self, name: str, array: Any) -> ir.Value:
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self._graph.register_initializer(value)
        return value


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _wide(value: ir.Value) -> Any:
    return ir.TensorType(FLOAT) if value.dtype == _HALF else value.type

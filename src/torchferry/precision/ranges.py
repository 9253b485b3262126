"""How large every tensor of a graph gets on data, with what is inside norms, means and products."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from torchferry.core.engine import get_backend
from torchferry.core.signature import Signature, TensorSpec
from torchferry.core.target import DEFAULT_BACKEND, Target
from torchferry.graph import Exported
from torchferry.precision.accumulators import accumulator_bound
from torchferry.precision.degrees import is_float
from torchferry.precision.prepare import values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchferry.core.engine import Array

    Feeds = Mapping[str, Array]

DENOMINATORS = {"Div": 1, "Reciprocal": 0, "Log": 0, "Sqrt": 0, "Pow": 0}
"""Operators that suffer from small operands, and which operand that is."""
STATISTIC = "torchferry.statistic."
_NO_DIMS = (ir.AttrInt64("keepdims", 0),)


@dataclass(frozen=True)
class Range:
    """What a tensor's magnitudes were on the data.

    Attributes:
        largest: The largest.
        typical: The square of the mean root: what most elements are like, whatever the outliers.
        smallest: The smallest, where something divides by the tensor; else infinity.
        any_order: The largest that a sum of the same terms can reach in whatever order; 0 where nothing is summed.
    """

    largest: float
    typical: float
    smallest: float = np.inf
    any_order: float = 0.0

    def joined(self, other: Range) -> Range:
        """Return the range over both sets of data."""
        return Range(
            max(self.largest, other.largest),
            max(self.typical, other.typical),
            min(self.smallest, other.smallest),
            max(self.any_order, other.any_order),
        )


def measure(model: ir.Model, signature: Signature, *data: Sequence[Feeds]) -> list[dict[str, Range]]:
    """Run a graph and measure every float tensor of its main graph, constants apart.

    Args:
        model: Changed by nobody; a copy with reductions at every tensor is run, and only scalars leave it.
        signature: Of the graph's inputs.
        *data: Sets of inputs by name.

    Returns:
        For each set the range of each tensor over all of it.
    """
    copy = model.clone()
    measured_values = [v for v in values(copy.graph) if is_float(v) and not v.is_initializer()]
    names = [value.name or "" for value in measured_values]
    statistics = _Statistics(copy.graph)
    outputs = [statistics.add(value) for value in measured_values]
    flat = {value.name: value for each in outputs for value in each.values()}
    rows = iter(run(copy, signature, list(flat.values()), [feeds for each in data for feeds in each]))
    result = []
    for each_set in data:
        found: dict[str, Range] = {}
        for row in itertools.islice(rows, len(each_set)):
            for name, each in zip(names, outputs, strict=True):
                measured = Range(**{key: float(row[value.name or ""]) for key, value in each.items()})
                found[name] = found[name].joined(measured) if name in found else measured
        result.append(found)
    return result


def run(
    model: ir.Model, signature: Signature, outputs: Sequence[ir.Value], data: Sequence[Feeds]
) -> list[dict[str, Array]]:
    """Run a graph as it stands, without optimisation, for chosen outputs.

    Args:
        model: Its outputs are replaced.
        signature: Of its inputs; outputs are taken as they come.
        outputs: Values of the graph.
        data: Inputs by name.
    """
    model.graph.outputs[:] = outputs
    specs = tuple(TensorSpec(value.name or "", "float32", None) for value in outputs)
    graph = Exported(model, Signature(signature.inputs, specs, signature.dims, signature.relations), Target())
    with (
        tempfile.TemporaryDirectory() as folder,
        get_backend(DEFAULT_BACKEND).trial(graph, Path(folder)) as session,
        np.errstate(all="ignore"),
    ):
        return [session.run(feeds) for feeds in data]


def constant_range(array: Array) -> Range:
    """Measure a constant; infinities do not count, since FP16 has them."""
    magnitudes = np.abs(array[np.isfinite(array)].astype(np.float64))
    magnitudes = magnitudes[magnitudes > 0]
    if not magnitudes.size:
        return Range(0.0, 0.0)
    return Range(float(magnitudes.max()), float(np.sqrt(magnitudes).mean() ** 2), float(magnitudes.min()))


class _Statistics:
    """Adds reductions to a graph, each right behind what it looks at, so that no tensor lives longer than before."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._place: ir.Node | None = None
        self._numbers = itertools.count()

    def add(self, value: ir.Value) -> dict[str, ir.Value]:
        """Add what ``Range`` wants to know of one tensor; its fields by name."""
        node = self._place = value.producer()
        uses = list(value.uses())
        magnitude = self._op("Abs", value)
        root = self._op("ReduceMean", self._op("Sqrt", magnitude), attributes=_NO_DIMS)
        found = {
            "largest": self._op("ReduceMax", magnitude, attributes=_NO_DIMS),
            "typical": self._op("Mul", root, root),
        }
        if any(DENOMINATORS.get(user.op_type) == index for user, index in uses):
            found["smallest"] = self._op("ReduceMin", magnitude, attributes=_NO_DIMS)
        if node is not None:
            nodes, bound = accumulator_bound(node)
            for each in nodes:
                self._insert(each)
            if bound is not None:
                found["any_order"] = bound
        return found

    def _op(self, op_type: str, *inputs: ir.Value | None, attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        node = ir.Node("", op_type, inputs, attributes)
        self._insert(node)
        output = node.outputs[0]
        output.name = f"{STATISTIC}{next(self._numbers)}"
        return output

    def _insert(self, node: ir.Node) -> None:
        if self._place is None:
            first = next(iter(self._graph), None)
            if first is None:
                self._graph.append(node)
            else:
                self._graph.insert_before(first, node)
        else:
            self._graph.insert_after(self._place, node)
        self._place = node

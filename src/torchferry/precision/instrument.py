"""A graph that computes as FP16 would: every float tensor rounded, and what was seen of each given as an output.

The graph is computed in FP32. A graph that has FP16 tensors already is computed in FP32 too, with just these tensors
rounded, so that a file of another tool is run as it was meant.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from torchferry.core.signature import Signature, TensorSpec
from torchferry.graph.provenance import Provenance, provenance
from torchferry.precision.accumulators import accumulator_bound
from torchferry.precision.captured import PARAMETERS, graphs_of, size_arithmetic, taken
from torchferry.precision.nodes import new_node
from torchferry.precision.opened import EXACT, ROLE_KEY, SATURATES, inline_functions, open_sums
from torchferry.precision.rounding import FP16_NORMAL, Rounding, rounded, rounding_nodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchferry.core.engine import Array
    from torchferry.graph import Exported

Kind = Literal["input", "constant", "tensor"]

# They hand on what they are given, so that a rounded tensor stays one.
# fmt: off
_MOVES = frozenset((
    "Abs", "Ceil", "Clip", "Compress", "Concat", "DepthToSpace", "Expand", "Flatten", "Floor", "Gather",
    "GatherElements", "GatherND", "GlobalMaxPool", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad",
    "ReduceMax", "ReduceMin", "Relu", "Reshape", "Round", "Sign", "Slice", "SpaceToDepth", "Split", "Squeeze",
    "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
))
# fmt: on
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class Seen:
    """A tensor whose range is watched.

    Attributes:
        name: As in the graph.
        kind: An input of the graph, a constant, or the output of a node.
        operator: Of the node that makes it; of a constant, of the first that takes it.
        provenance: Of this node.
        sources: Places in the list of the tensors that it is computed from.
        range: A constant's largest magnitude, and whether rounding made it infinite.
    """

    name: str
    kind: Kind
    operator: str
    provenance: Provenance
    sources: frozenset[int]
    range: tuple[float, bool] | None = None


@dataclass(frozen=True)
class Instrumented:
    """A graph that tells what it sees.

    Attributes:
        exported: The graph; besides its own outputs it gives, in order, largest, smallest and sum of every tensor that
            is seen; its subnormal share, if asked for; and the bound of every accumulator.
        outputs: Number of its own outputs.
        seen: Watched tensors, in the order in which they are computed.
        accumulators: Nodes whose sums were bounded.
        closed: Nodes with sums inside that could not be opened.
        unrounded: Tensors of unknown dtype, left as they are.
        is_half: The graph had FP16 tensors already.
    """

    exported: Exported
    outputs: int
    seen: tuple[Seen, ...]
    accumulators: tuple[Seen, ...]
    closed: tuple[Seen, ...]
    unrounded: tuple[str, ...]
    is_half: bool


def instrument(
    exported: Exported, rounding: Rounding | None, *, opened: bool = False, watched: bool = True, census: bool = False
) -> Instrumented:
    """Return a graph that computes with rounded tensors; the given one stays as it is.

    Args:
        exported: The graph.
        rounding: To what; None leaves every tensor as it is, to see the same graph in FP32.
        opened: Open the sums inside operators, and bound accumulators.
        watched: Give the range of every tensor.
        census: Give the share of subnormal numbers of every tensor.

    Raises:
        FormatError: If the graph's functions cannot be inlined.
    """
    model = exported.model.clone()
    inline_functions(model)
    if any(output.dtype is None for graph in model.graphs() for node in graph for output in node.outputs):
        ShapeInferencePass(check_type=False, strict_mode=False)(model)
    closed = open_sums(model) if opened else ()
    held, is_half = _retyped(model)
    instrumenting = _Instrumenting(model, rounding, held, watched=watched, census=census)
    instrumenting.round_constants(is_half)
    nodes = [*model.graph]  # before nodes that round stand among them
    instrumenting.round_inputs()
    for node in nodes:
        instrumenting.round_node(node)
    accumulators = instrumenting.bound_accumulators() if opened and watched else ()
    model.graph.outputs.extend(instrumenting.figures)
    given = exported.signature
    inputs = tuple(
        dataclasses.replace(spec, dtype="float32") if spec.dtype == "float16" else spec for spec in given.inputs
    )
    outputs = tuple(_spec(value) for value in model.graph.outputs)
    return Instrumented(
        exported.replace(model=model, signature=Signature(inputs, outputs, given.dims, given.relations)),
        len(given.outputs),
        tuple(instrumenting.seen),
        accumulators,
        tuple(_node_seen(node) for node in closed),
        tuple(instrumenting.unrounded),
        is_half,
    )


def _masks(array: Array) -> bool:
    """Tell whether an array has only what masks are made of: zeros and negative infinity."""
    return bool(np.all((array == 0) | (array == -np.inf)))


def _spec(value: ir.Value) -> TensorSpec:
    return TensorSpec(value.name or "", value.dtype.numpy().name if value.dtype is not None else "float32", None)


def _node_seen(node: ir.Node) -> Seen:
    return Seen(node.outputs[0].name or "", "tensor", node.op_type, provenance(node), frozenset())


def _retyped(model: ir.Model) -> tuple[set[ir.Value], bool]:
    """Turn all FP16 into FP32.

    Returns:
        The values to round, which are those that were FP16, or all floats if there were none; whether there were.
    """
    values = [v for graph in model.graphs() for v in _values(graph) if isinstance(v.type, ir.TensorType)]
    halves = {value for value in values if value.dtype == ir.DataType.FLOAT16}
    for value in halves:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        if value.const_value is not None:
            value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for graph in model.graphs() if halves else ():
        for node in graph:
            _retype_attributes(node)
    return halves or {value for value in values if value.dtype in _FLOATS}, bool(halves)


def _retype_attributes(node: ir.Node) -> None:
    for name, attribute in [*node.attributes.items()]:
        if name in _DTYPE_ATTRIBUTES and attribute.value == ir.DataType.FLOAT16:
            node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
        elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.FLOAT16:
            wide = attribute.as_tensor().numpy().astype(np.float32)
            node.attributes[name] = ir.AttrTensor(name, ir.Tensor(wide))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


class _Instrumenting:
    """Rounds one model in place.

    Attributes:
        seen: What is watched so far.
        figures: The outputs that tell of it.
        unrounded: Tensors of unknown dtype.
    """

    def __init__(
        self, model: ir.Model, rounding: Rounding | None, held: set[ir.Value], *, watched: bool, census: bool
    ) -> None:
        self.seen: list[Seen] = []
        self.figures: list[ir.Value] = []
        self.unrounded: list[str] = []
        self._model = model
        self._graph = model.graph
        self._rounding = rounding
        self._watched = watched
        self._census = census
        self._sizes = size_arithmetic(model)
        self._held = held - self._sizes
        self._rounded: set[ir.Value] = set()  # those that hold rounded numbers already
        self._sources: dict[ir.Value, frozenset[int]] = {}
        self._constants: dict[ir.Value, tuple[float, bool]] = {}  # to be noted where they are used first

    def round_constants(self, is_half: bool) -> None:
        """Round every float initializer; its numbers are shared where rounding changes nothing.

        Args:
            is_half: They are in FP16 already, so that an infinity was made when they were converted, unless it masks.
        """
        for graph in self._model.graphs():
            for value in graph.initializers.values():
                tensor = value.const_value
                if value not in self._held or tensor is None:
                    continue
                array = tensor.numpy()
                if self._rounding is not None:
                    fresh = rounded(array, self._rounding)
                    if not np.array_equal(fresh, array, equal_nan=True):
                        value.const_value = ir.Tensor(fresh, name=value.name)
                else:
                    fresh = array
                largest = float(np.max(np.abs(array), initial=0))
                made = not np.isfinite(fresh).all() and (np.isfinite(array).all() or (is_half and not _masks(array)))
                self._constants[value] = (largest, made)
                self._rounded.add(value)

    def round_inputs(self) -> None:
        """Round every float input of the graph."""
        for value in self._graph.inputs:
            if value in self._held and value.name not in self._graph.initializers:
                self._round(value, Seen(value.name or "", "input", "", Provenance(), frozenset()), None)

    def round_node(self, node: ir.Node) -> None:
        """Round what a node of the main graph gives, and what is inside its subgraphs."""
        self._note_constants(node)
        inner = [graph for attribute in node.attributes.values() for graph in graphs_of(attribute)]
        for graph in inner:
            self._round_inside(graph)
        nothing: frozenset[int] = frozenset()
        sources = nothing.union(*(self._sources.get(value, nothing) for value in taken(node)))
        role = node.metadata_props.get(ROLE_KEY)
        for output in [*node.outputs]:
            self._sources[output] = sources
            if not output.name:
                continue
            if output.dtype is None and output.uses():
                self.unrounded.append(output.name)
            if output not in self._held or role == EXACT:
                continue
            if node.op_type in _MOVES and not inner and self._are_rounded(node):
                self._rounded.add(output)
                continue
            seen = Seen(output.name, "tensor", node.op_type, provenance(node), sources)
            self._round(output, seen if role != SATURATES else None, node)

    def _are_rounded(self, node: ir.Node) -> bool:
        return all(value in self._rounded for value in node.inputs if value is not None and value in self._held)

    def _note_constants(self, node: ir.Node) -> None:
        for value in taken(node):
            if value not in self._constants:
                continue
            largest, is_bad = self._constants.pop(value)
            if node.op_type == "Clip":  # a bound beyond all numbers is no bound
                continue
            self._sources[value] = frozenset([len(self.seen)])
            where = provenance(node)
            self._note(Seen(value.name or "", "constant", node.op_type, where, frozenset(), (largest, is_bad)))

    def _note(self, seen: Seen, *figures: ir.Value) -> None:
        if self._watched:
            self.seen.append(seen)
            self.figures += figures

    def _round_inside(self, graph: ir.Graph) -> None:
        """Round in a branch or the body of a loop, where ranges are seen only of what leaves it."""
        self._rounded.update(graph.inputs)
        for node in [*graph]:
            for attribute in node.attributes.values():
                for inner in graphs_of(attribute):
                    self._round_inside(inner)
            for output in [*node.outputs]:
                if output in self._held and node.metadata_props.get(ROLE_KEY) != EXACT:
                    self._round(output, None, node)

    def _round(self, value: ir.Value, seen: Seen | None, maker: ir.Node | None) -> None:
        graph = self._graph if maker is None else maker.graph
        assert graph is not None  # it was found in one
        users = [*value.uses()]
        nodes: list[ir.Node] = []
        result = value
        if self._rounding is not None:
            nodes, result = rounding_nodes(value, self._rounding)
            for user, index in users:
                if (user.op_type, index) not in PARAMETERS:
                    user.replace_input_with(index, result)
            for place, output in enumerate(graph.outputs):
                if output is value:
                    graph.outputs[place] = result
        self._held.add(result)
        self._rounded.add(result)
        self._sources[result] = self._sources.get(value, frozenset())
        if seen is not None and self._watched:
            self._sources[result] = frozenset([len(self.seen)])
            watching, figures = _watching(value, result, census=self._census)
            self._note(seen, *figures)
            nodes += watching
        if maker is not None:
            graph.insert_after(maker, nodes)
        elif len(graph):
            graph.insert_before(graph[0], nodes)
        else:
            graph.extend(nodes)

    def bound_accumulators(self) -> tuple[Seen, ...]:
        """Add the bound of every convolution, product and sum of the main graph."""
        bounded: list[Seen] = []
        for node in [*self._graph]:
            if node.outputs[0] not in self._held:
                continue
            nodes, bound = accumulator_bound(node)
            if bound is None:
                continue
            self._graph.insert_after(node, nodes)
            self.figures.append(bound)
            bounded.append(_node_seen(node))
        return tuple(bounded)


def _watching(before: ir.Value, after: ir.Value, *, census: bool) -> tuple[list[ir.Node], list[ir.Value]]:
    """Return nodes for the range of a tensor before rounding, whether it is finite after, and its subnormal share."""
    nodes: list[ir.Node] = []

    def op(op_type: str, *inputs: ir.Value, dtype: ir.DataType | None, **attributes: Any) -> ir.Value:
        name = f"{before.name}/seen_{len(nodes)}"
        nodes.append(new_node(op_type, inputs, name, dtype or ir.DataType.FLOAT, attributes))
        return nodes[-1].outputs[0]

    figures = [
        op("ReduceMax", before, dtype=before.dtype, keepdims=0),
        op("ReduceMin", before, dtype=before.dtype, keepdims=0),
        op("ReduceSum", after, dtype=before.dtype, keepdims=0),  # finite if and only if every number is
    ]
    if census:
        assert before.dtype is not None  # only tensors of known dtype are seen
        least = op("Constant", dtype=before.dtype, value=ir.tensor(np.array(FP16_NORMAL, before.dtype.numpy())))
        is_small = op("Less", op("Abs", before, dtype=before.dtype), least, dtype=ir.DataType.BOOL)
        not_zero = op("Cast", before, dtype=ir.DataType.BOOL, to=int(ir.DataType.BOOL))
        both = op("And", is_small, not_zero, dtype=ir.DataType.BOOL)
        counted = op("Cast", both, dtype=None, to=int(ir.DataType.FLOAT))
        figures.append(op("ReduceMean", counted, dtype=None, keepdims=0))
    return nodes, figures

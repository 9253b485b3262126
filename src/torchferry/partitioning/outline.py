"""A graph in a file as far as a cut needs it: which node computes what from what.

onnx-ir makes an object of everything in a file, which takes most of the time and memory of a cut. Here only what goes
into a part becomes onnx-ir's; the rest stays a protobuf message with a thin object per node and tensor. These have the
names that ``ir.Model``, ``ir.Graph``, ``ir.Node`` and ``ir.Value`` have, as far as planning a cut asks for them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import onnx
import onnx_ir as ir

from torchferry.core.target import Target
from torchferry.graph import Exported
from torchferry.graph.marks import MARK_DOMAIN
from torchferry.graph.reading import check_locations, read_proto, signature_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

# Operators of ONNX itself that may hold subgraphs.
_WITH_SUBGRAPHS = frozenset(("If", "Loop", "Scan", "SequenceMap"))
_INNER = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


class OutlineValue:
    """A tensor; see ``ir.Value``."""

    __slots__ = ("_graph", "_producer", "name", "weight")

    def __init__(self, name: str, graph: OutlineGraph) -> None:
        self.name = name
        self._graph = graph
        self._producer: OutlineNode | None = None
        self.weight: int | None = None

    @property
    def meta(self) -> Mapping[str, Any]:
        """Nothing: a graph with annotations has no outline."""
        return {}

    def producer(self) -> OutlineNode | None:
        """Return the node that computes it."""
        return self._producer

    def is_initializer(self) -> bool:
        """Tell whether it is a weight."""
        return self.weight is not None

    @property
    def const_value(self) -> ir.TensorProtocol | None:
        """The weight, its data unread."""
        return None if self.weight is None else ir.serde.deserialize_tensor(self._graph.proto.initializer[self.weight])

    @property
    def type(self) -> ir.TypeProtocol | None:
        """The type, as far as the file tells it."""
        info = self._graph.info(self.name)
        return ir.serde.deserialize_type_proto_for_type(info.type) if info is not None else None

    @property
    def shape(self) -> ir.Shape | None:
        """The shape, as far as the file tells it."""
        info = self._graph.info(self.name)
        return ir.serde.deserialize_type_proto_for_shape(info.type) if info is not None else None

    @property
    def dtype(self) -> ir.DataType | None:
        """The type's dtype."""
        return self.type.dtype if self.type is not None else None


class OutlineNode:
    """A node; see ``ir.Node``."""

    __slots__ = ("_graph", "domain", "index", "inputs", "op_type", "outputs")

    def __init__(self, proto: onnx.NodeProto, index: int, graph: OutlineGraph) -> None:
        self._graph = graph
        self.index = index
        self.domain = proto.domain
        self.op_type = proto.op_type
        self.inputs = tuple(graph.value(name) if name else None for name in proto.input)
        self.outputs = tuple(graph.made_by(self, name) for name in proto.output)

    @property
    def name(self) -> str:
        """Its name."""
        return self._proto.name

    @property
    def attributes(self) -> Mapping[str, ir.Attr]:
        """What a mark says; a node with subgraphs has no outline, and nothing else is asked for."""
        if self.domain != MARK_DOMAIN:
            return {}
        return {each.name: ir.serde.deserialize_attribute(each) for each in self._proto.attribute}

    @property
    def metadata_props(self) -> Mapping[str, str]:
        """Its metadata."""
        return {each.key: each.value for each in self._proto.metadata_props}

    def op_identifier(self) -> ir.OperatorIdentifier:
        """Return domain, type and overload."""
        return self.domain, self.op_type, self._proto.overload

    @property
    def _proto(self) -> onnx.NodeProto:
        # Looked up each time: an object of protobuf's for every node would take more memory than all of ours.
        proto: onnx.NodeProto = self._graph.proto.node[self.index]
        return proto


class OutlineGraph:
    """The nodes of a graph in its order; see ``ir.Graph``.

    Raises:
        ValueError: If a tensor is computed twice.
    """

    def __init__(self, proto: onnx.GraphProto) -> None:
        self.proto = proto
        self._values: dict[str, OutlineValue] = {}
        self.inputs = [self.value(each.name) for each in proto.input]
        for at, weight in enumerate(proto.initializer):
            self.value(weight.name).weight = at
        self.initializers = {weight.name: self.value(weight.name) for weight in proto.initializer}
        given = {*self.inputs, *self.initializers.values()}
        self._nodes = [OutlineNode(each, at, self) for at, each in enumerate(proto.node)]
        if any(value.producer() for value in given):
            raise ValueError("a tensor is given and computed")
        self.outputs = [self.value(each.name) for each in proto.output]

    def __iter__(self) -> Iterator[OutlineNode]:
        return iter(self._nodes)

    def value(self, name: str) -> OutlineValue:
        """Return the tensor of this name."""
        known = self._values.get(name)
        if known is None:
            known = self._values[name] = OutlineValue(name, self)
        return known

    def made_by(self, node: OutlineNode, name: str) -> OutlineValue:
        """Return the tensor of this name and note who computes it."""
        value = self.value(name) if name else OutlineValue(name, self)
        if value._producer is not None:
            raise ValueError(f"'{name}' is computed twice")
        value._producer = node
        return value

    def info(self, name: str) -> onnx.ValueInfoProto | None:
        """Return what the file says about the type of a tensor."""
        at = self._infos.get(name)
        return None if at is None else at[0][at[1]]

    @functools.cached_property
    def _infos(self) -> dict[str, tuple[Any, int]]:
        places = (self.proto.value_info, self.proto.output, self.proto.input)
        return {info.name: (infos, at) for infos in places for at, info in enumerate(infos)}


class Outline:
    """What a cut needs of a model in a file; see ``ir.Model``.

    Args:
        proto: The model, without external data; kept.
        folder: Where its external data is.

    Raises:
        ValueError: If it has something that an outline does not show; see ``outlined``.
    """

    functions: Mapping[ir.OperatorIdentifier, ir.Function] = {}  # other than marks

    def __init__(self, proto: onnx.ModelProto, folder: Path) -> None:
        self.proto = proto
        self._folder = folder
        self.graph = OutlineGraph(proto.graph)
        head = onnx.ModelProto()
        for field, value in proto.ListFields():
            if field.name not in ("graph", "functions"):
                _set(head, field.name, value)
        for field, value in proto.graph.ListFields():
            if field.name in ("name", "doc_string", "metadata_props"):
                _set(head.graph, field.name, value)
        self._head = ir.from_proto(head)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._head, name)  # versions, producer, metadata

    def clone(self) -> ir.Model:
        """Return the whole as onnx-ir's."""
        model = ir.from_proto(self.proto)
        ir.external_data.set_base_dir(model.graph, self._folder)
        return model

    def part(
        self,
        name: str,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        nodes: Sequence[Any],
        weights: Sequence[Any],
    ) -> ir.Graph:
        """Return a part as a graph of onnx-ir's.

        Args:
            name: The graph's.
            inputs: Tensors of the outline, as ``outputs`` and ``weights`` are.
            outputs: What the part gives.
            nodes: Nodes of the outline, in its order.
            weights: What the nodes need of them.
        """
        model = onnx.ModelProto(ir_version=self.proto.ir_version, opset_import=self.proto.opset_import)
        whole, graph = self.proto.graph, model.graph
        graph.name, graph.doc_string = name, whole.doc_string
        graph.metadata_props.extend(whole.metadata_props)
        for values, into in ((inputs, graph.input), (outputs, graph.output)):
            for value in values:
                into.append(self.graph.info(value.name) or onnx.ValueInfoProto(name=value.name))
        graph.initializer.extend(whole.initializer[value.weight] for value in weights if value.weight is not None)
        graph.node.extend(whole.node[node.index] for node in nodes)
        known = {each.name for each in (*graph.input, *graph.output)}
        values = (*weights, *(out for node in nodes for out in node.outputs))
        infos = (self.graph.info(value.name) for value in values if value.name not in known)
        graph.value_info.extend(info for info in infos if info is not None)
        made = ir.from_proto(model).graph
        ir.external_data.set_base_dir(made, self._folder)
        return made


def outlined(path: Path) -> Exported | None:
    """Return an ONNX file with an outline as its model; None if it needs more, as for subgraphs and functions.

    Raises:
        MissingFileError: If the path leads nowhere.
        FormatError: If the file is not a whole ONNX model.
    """
    proto = read_proto(path)
    outline = _outline(proto, path.parent)
    if outline is None:
        return None
    check_locations(path, _locations(proto.graph))
    model = cast("ir.Model", outline)
    return Exported(model, signature_of(model), Target())


def _locations(graph: onnx.GraphProto) -> dict[str, str]:
    """Return where external data is, and the first weight that is there."""
    found: dict[str, str] = {}
    for weight in graph.initializer:
        if weight.data_location == onnx.TensorProto.EXTERNAL:
            for entry in weight.external_data:
                if entry.key == "location":
                    found.setdefault(entry.value, weight.name)
    return found


def _outline(proto: onnx.ModelProto, folder: Path) -> Outline | None:
    graph = proto.graph
    if graph.sparse_initializer or graph.quantization_annotation or proto.configuration:
        return None
    if any(function.domain != MARK_DOMAIN for function in proto.functions) or any(map(_has_subgraphs, graph.node)):
        return None
    try:
        return Outline(proto, folder)
    except ValueError:
        return None  # the reader of the whole says what is wrong


def _has_subgraphs(node: onnx.NodeProto) -> bool:
    return (bool(node.domain) or node.op_type in _WITH_SUBGRAPHS) and any(a.type in _INNER for a in node.attribute)


def _set(message: Any, field: str, value: Any) -> None:
    if isinstance(value, str | int | bytes):
        setattr(message, field, value)
    else:
        getattr(message, field).extend(value)

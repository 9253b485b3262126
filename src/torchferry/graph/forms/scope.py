"""What is known about the values around a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, TypeProto, ValueInfoProto, helper, numpy_helper

from torchferry.graph.forms.schemas import is_standard, subgraphs

if TYPE_CHECKING:
    from collections.abc import Iterable

# The one-node models are never stored, so any version that has what the converter needs will do.
_IR_VERSION = 8
# Constants up to this size may be axes, sizes or pads, which operators had as attributes once; others are weights.
SMALL_BYTES = 4096
# The attributes of a Constant that hold numbers.
_NUMBERS = {
    "value": None,
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


@dataclass
class Scope:
    """What is known about the values around a node.

    Attributes:
        types: Types by name, as far as they are known.
        constants: Values that are known, small ones alone.
        taken: Names in use, which new values must not take.
    """

    types: dict[str, TypeProto] = field(default_factory=dict)
    constants: dict[str, TensorProto] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def fresh(self, name: str) -> str:
        """Return a name that nothing has yet, and take it."""
        number = 0
        unique = name
        while unique in self.taken:
            number += 1
            unique = f"{name}_{number}"
        self.taken.add(unique)
        return unique

    def type_of(self, name: str) -> TypeProto | None:
        """Return the type of a value; None if it is not known."""
        return self.types.get(name)

    def constant(self, name: str) -> np.ndarray | None:
        """Return the value that a name stands for; None if it is not known."""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def dtype(self, name: str) -> int:
        """Return the ``TensorProto`` element type of a value; 0 if it is not known."""
        known = self.type_of(name)
        return known.tensor_type.elem_type if known is not None else 0

    def shape(self, name: str) -> list[int | None] | None:
        """Return the sizes of a value, None for each that is not known, or None if the rank is not known."""
        known = self.type_of(name)
        if known is None or not known.tensor_type.HasField("shape"):
            return None
        return [d.dim_value if d.HasField("dim_value") else None for d in known.tensor_type.shape.dim]

    def hold(self, name: str, tensor: TensorProto) -> None:
        """Record a constant: its value if it is small, else its type."""
        self.types.setdefault(name, helper.make_tensor_type_proto(tensor.data_type, tensor.dims))
        if tensor.ByteSize() <= SMALL_BYTES:
            self.constants[name] = tensor

    def learn(self, nodes: Iterable[NodeProto], opset: int) -> None:
        """Record what ONNX infers about the outputs of nodes that are valid at an opset."""
        computed = []
        for node in nodes:
            value = constant_value(node)
            if value is None:
                computed.append(node)
            else:
                self.hold(node.output[0], value)
        model = self.model(computed, opset)
        # Graph outputs without a type would be refused as such; what is no output gets its type in value_info.
        del model.graph.output[:]
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        for info in inferred.graph.value_info:
            if info.type.WhichOneof("value") is not None:
                self.types.setdefault(info.name, info.type)

    def model(self, nodes: list[NodeProto], opset: int) -> onnx.ModelProto:
        """Make a model of some nodes, whose inputs are all that they take from outside."""
        made = {name for node in nodes for name in node.output}
        used = dict.fromkeys(name for node in nodes for name in used_names(node) if name not in made)
        domains = {node.domain for node in nodes if not is_standard(node)}
        initializers = [_named(self.constants[name], name) for name in used if name in self.constants]
        model = helper.make_model(
            helper.make_graph(
                nodes,
                "nodes",
                [self._info(name) for name in used if name not in self.constants],
                [self._info(name) for node in nodes for name in node.output if name],
                initializers,
            ),
            opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in sorted(domains))],
        )
        model.ir_version = _IR_VERSION
        return model

    def _info(self, name: str) -> ValueInfoProto:
        return ValueInfoProto(name=name, type=self.types.get(name))


def constant_value(node: NodeProto) -> TensorProto | None:
    """Return the value of a Constant of numbers; None for any other node."""
    if node.op_type != "Constant" or not is_standard(node) or len(node.attribute) != 1:
        return None
    (attribute,) = node.attribute
    if attribute.ref_attr_name or attribute.name not in _NUMBERS:
        return None
    if attribute.name == "value":
        tensor: TensorProto = attribute.t
        return tensor
    return numpy_helper.from_array(np.asarray(helper.get_attribute_value(attribute), _NUMBERS[attribute.name]))


def used_names(node: NodeProto) -> list[str]:
    """Return the values that a node uses, those that its subgraphs take from outside too."""
    names = [name for name in node.input if name]
    for graph in subgraphs(node):
        own = {i.name for i in graph.input} | {i.name for i in graph.initializer}
        own |= {name for inner in graph.node for name in inner.output}
        used = [name for inner in graph.node for name in used_names(inner)] + [o.name for o in graph.output]
        names += [name for name in used if name not in own]
    return names


def _named(tensor: TensorProto, name: str) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy

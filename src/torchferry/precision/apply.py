"""Writing a graph in FP16 at the scales that were solved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from torchferry.core.signature import Signature
from torchferry.core.target import Target
from torchferry.graph.reading import tensor_spec
from torchferry.precision.degrees import FLOAT, Slot, constant, is_float, relations_of
from torchferry.precision.prepare import has_body, values

if TYPE_CHECKING:
    from torchferry.graph import Exported
    from torchferry.precision.prepare import Prepared
    from torchferry.precision.problem import Problem
    from torchferry.precision.scales import Solution

HALF = ir.DataType.FLOAT16
SMALLEST = 2.0**-24
"""The smallest number above 0 that FP16 holds."""
CLIP_AT = 2.0**15
"""Where a saturating operator's input is clipped, in true units."""
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_datatype")
_DEFAULT_FLOAT = frozenset(
    ("RandomNormal", "RandomUniform", "HannWindow", "HammingWindow", "BlackmanWindow", "EyeLike")
)


@dataclass(frozen=True)
class Added:
    """A node that the repair put into the graph.

    Attributes:
        name: The node's name.
        operator: ``Mul``, ``Clip``, ``Cast``, or ``Add`` behind a logarithm.
        tensor: What it acts on.
        why: What for.
    """

    name: str
    operator: str
    tensor: str
    why: str


@dataclass(frozen=True)
class ConstantRecord:
    """Where a constant of the repaired graph comes from: it is the source's value / 2**k, rounded.

    Attributes:
        k: Its scale.
        source: The constant of the user's graph; empty if the repair added this one.
        value: The value of an added one, in true units.
        is_mask: True if it was bounded; see ``prepare.MASK_BECOMES``.
    """

    k: int
    source: str = ""
    value: float | None = None
    is_mask: bool = False


@dataclass
class Repaired:
    """A graph in FP16 with the story of its tensors.

    Attributes:
        exported: The graph.
        scales: For each of its tensors that stands for one of the user's graph: that one's name, and k.
        constants: Where each float constant comes from.
        added: Nodes that were added.
        raised: Attributes and constants that would have become 0, with what would have been stored.
    """

    exported: Exported
    scales: dict[str, tuple[str, int]] = field(default_factory=dict)
    constants: dict[str, ConstantRecord] = field(default_factory=dict)
    added: list[Added] = field(default_factory=list)
    raised: dict[str, float] = field(default_factory=dict)


Form = tuple[Literal["fp16", "fp32"], int]
"""How a tensor is stored: its type, and k."""


def apply_scales(
    exported: Exported, prepared: Prepared, problem: Problem, solution: Solution, *, keep_io_types: bool = False
) -> Repaired:
    """Write a graph in FP16.

    Args:
        exported: The user's graph, for what is not the model.
        prepared: Its prepared copy, which is changed into the result.
        problem: What was solved.
        solution: Its scales.
        keep_io_types: Let inputs and outputs stay FP32.
    """
    return _Writer(exported, prepared, problem, solution, keep_io_types).result


def attribute_scales(node: ir.Node, scale_in: dict[Slot, int]) -> dict[str, int]:
    """Return the k of each float attribute that absorbs one, from those of the node's operands."""
    known = dict(scale_in)
    for _ in range(2):  # an attribute may follow from a number that another relation settles
        for relation in relations_of(node):
            open_slots = [slot for slot in relation if slot not in known]
            if len(open_slots) == 1:
                rest = sum(c * known[slot] for slot, c in relation.items() if slot in known)
                known[open_slots[0]] = -rest // relation[open_slots[0]]
    return {str(at): k for (kind, at), k in known.items() if kind == "attr"}


class _Writer:
    def __init__(
        self, exported: Exported, prepared: Prepared, problem: Problem, solution: Solution, keep_io_types: bool
    ) -> None:
        self._model, self._graph = prepared.model, prepared.model.graph
        self._prepared, self._problem, self._solution = prepared, problem, solution
        self._clips = {(e.tensor, e.reader) for e in problem.edges if e.kind == "clip"}
        self._logs = {(e.tensor, e.reader) for e in problem.edges if e.kind == "log"}
        self._converted: dict[Any, ir.Value] = {}
        self._scale_of: dict[ir.Value, int] = {}
        self._taken = {value.name for value in values(self._graph)}
        self._shifts = dict(solution.shifts)
        self.result = Repaired(exported)
        for node in [node for node in self._graph if node.op_type == "Log"]:
            self._shift_logarithm(node)
        in_fp32 = {v.name for v in (*self._graph.inputs, *self._graph.outputs)} if keep_io_types else set()
        in_fp32.update(problem.outside)
        nodes = list(self._graph)
        self._forms = {value: self._form(value, in_fp32) for value in values(self._graph) if is_float(value)}
        for node in nodes:
            self._rewire(node)
        for node in nodes:
            if self._unit(node) not in solution.islands:
                self._retype(node)
        for index, value in enumerate(list(self._graph.outputs)):
            if value in self._forms and not value.is_initializer():
                self._finish_output(index, value, ("fp32" if value.name in in_fp32 else "fp16", 0))
        for value, form in self._forms.items():
            if value.is_initializer() and not value.is_graph_input():
                self._store_constant(value, form)
            elif form[0] == "fp16":
                value.type = ir.TensorType(HALF)
            if value.name and not value.is_initializer():
                original = value.name.removesuffix(_STORED)
                self.result.scales[value.name] = (original, form[1])
        self._sign(exported)

    def _shift_logarithm(self, node: ir.Node) -> None:
        """Take the logarithm of what is stored, and add that of its scale: log(t) = log(t / 2**k) + k ln 2."""
        x, y = node.inputs[0], node.outputs[0]
        edge = (x.name or "" if x is not None else "", self._unit(node))
        bits = self._shifts.pop(edge, 0) if edge in self._logs else 0
        if not bits:
            return
        name = y.name or ""
        tensor = ir.Tensor(np.array(bits * math.log(2), np.float32), name=self._name(f"{name}/shift"))
        shift = ir.Value(name=tensor.name, type=y.type, shape=tensor.shape, const_value=tensor)
        self._graph.register_initializer(shift)
        self._prepared.made.add(shift.name or "")
        add = ir.node("Add", [y, shift], name=self._name(f"{name}/add"))
        add.outputs[0].type, add.outputs[0].shape = y.type, y.shape
        add.metadata_props.update(node.metadata_props)
        y.replace_all_uses_with(add.outputs[0], replace_graph_outputs=True)
        add.replace_input_with(0, y)
        self._graph.insert_after(node, add)
        y.name, add.outputs[0].name = self._name(f"{name}/unshifted"), name
        self.result.added.append(Added(add.name or "", "Add", name, f"log(t) = log(t / 2**{bits}) + {bits} ln 2"))

    def _form(self, value: ir.Value, in_fp32: set[str | None]) -> Form:
        name = value.name or ""
        k = self._solution.scales.get(name, 0)
        if value.is_graph_input():
            return ("fp32" if name in in_fp32 else "fp16", 0)
        if value.is_initializer():
            users = [node for node, _ in value.uses()]
            stays = name in self._problem.kept or (users and all(self._is_island(node) for node in users))
            return ("fp32", 0) if stays else ("fp16", k)
        producer = value.producer()
        return ("fp32", 0) if producer is not None and self._is_island(producer) else ("fp16", k)

    def _is_island(self, node: ir.Node) -> bool:
        # a node of a body belongs to the node that holds the body
        return node.graph is not self._graph or self._unit(node) in self._solution.islands

    def _unit(self, node: ir.Node) -> str:
        return self._problem.unit(node.name or "")

    def _rewire(self, node: ir.Node) -> None:
        """Give a node each operand as it wants it."""
        for index, value in enumerate(node.inputs):
            if value is not None and value in self._forms:
                node.replace_input_with(index, self._as_wanted(value, node))
        if has_body(node):
            inner = [n for attribute in node.attributes.values() for g in _bodies(attribute) for n in g.all_nodes()]
            for body_node in inner:
                for index, value in enumerate(body_node.inputs):
                    if value is not None and value in self._forms:
                        body_node.replace_input_with(index, self._convert(value, ("fp32", 0), node))

    def _as_wanted(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        name, reader_name = value.name or "", self._unit(reader)
        if name in self._problem.kept and value.is_initializer():
            return value
        if self._is_island(reader):
            return self._convert(value, ("fp32", 0), reader)
        k = self._solution.scales.get(name, 0) - self._shifts.get((name, reader_name), 0)
        return self._convert(value, ("fp16", k), reader, clip=(name, reader_name) in self._clips)

    def _convert(self, value: ir.Value, wanted: Form, reader: ir.Node | None, *, clip: bool = False) -> ir.Value:
        """Return a tensor in another form, with as few nodes as it takes."""
        dtype, k = self._forms[value]
        if (dtype, k) == wanted and not clip:
            return value
        key = (value, wanted, clip)
        if key in self._converted:
            return self._converted[key]
        current = value
        why = f"for '{reader.name}'" if reader is not None else "for the output"
        if clip:
            bound = CLIP_AT / 2.0**k
            low, high = self._constant(-CLIP_AT, k, dtype), self._constant(CLIP_AT, k, dtype)
            current = self._add("Clip", current, [low, high], f"{why}, which is flat beyond {CLIP_AT:g} ({bound:g})")
        if wanted[0] == "fp32" and dtype == "fp16":
            current = self._add("Cast", current, [], why, to=FLOAT)
        if wanted[1] != k:
            kind = "fp32" if "fp32" in (dtype, wanted[0]) else "fp16"
            factor = self._constant(2.0 ** (k - wanted[1]), 0, kind)
            current = self._add("Mul", current, [factor], f"{why}: 2**{k - wanted[1]}")
        if wanted[0] == "fp16" and dtype == "fp32":
            current = self._add("Cast", current, [], why, to=HALF)
        self._converted[key] = current
        self._scale_of[current] = wanted[1]
        return current

    def _add(self, op_type: str, x: ir.Value, others: list[ir.Value], why: str, **attributes: Any) -> ir.Value:
        root = x
        while root not in self._forms:
            root = root.producer().inputs[0]  # type: ignore[union-attr, assignment]
        name = self._name(f"{root.name}/{op_type.lower()}")
        dtype = attributes.get("to") or (_dtype(self._forms[x]) if x in self._forms else x.dtype or FLOAT)
        output = ir.Value(name=name, type=ir.TensorType(dtype), shape=x.shape)
        node = ir.node(op_type, [x, *others], attributes or None, outputs=[output], name=name)
        producer = x.producer()
        if producer is not None:
            node.metadata_props.update(producer.metadata_props)
            self._graph.insert_after(producer, node)
        elif len(self._graph):
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.append(node)
        self.result.added.append(Added(name, op_type, root.name or "", why))
        return output

    def _constant(self, value: float, k: int, kind: str) -> ir.Value:
        key = (value, k, kind)
        if key not in self._converted:
            name = self._name(f"fp16.{value:g}" + (f".{k}" if k else ""))
            tensor = ir.Tensor(np.array(value / 2.0**k, np.float16 if kind == "fp16" else np.float32), name=name)
            self._converted[key] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
            )
            self._graph.register_initializer(self._converted[key])
            self.result.constants[name] = ConstantRecord(k, value=value)
        return self._converted[key]

    def _name(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def _retype(self, node: ir.Node) -> None:
        """Make a node one of FP16: the types that it names, and the attributes that absorb scales."""
        if not any(value in self._forms for value in (*node.inputs, *node.outputs)):
            return
        if any(value in self._forms for value in node.outputs):
            for name in _DTYPE_ATTRIBUTES:
                if name in node.attributes and node.attributes[name].value == FLOAT:
                    node.attributes[name] = ir.AttrInt64(name, HALF)
            if node.op_type in _DEFAULT_FLOAT and "dtype" not in node.attributes:
                node.attributes["dtype"] = ir.AttrInt64("dtype", HALF)
        known: dict[Slot, int] = {("out", i): self._forms[v][1] for i, v in enumerate(node.outputs) if v in self._forms}
        for i, value in enumerate(node.inputs):
            if value is not None:
                known["in", i] = self._forms[value][1] if value in self._forms else self._scale_of.get(value, 0)
        for name, k in attribute_scales(node, known).items():
            self._scale_attribute(node, name, k)
        if node.op_type == "ConstantOfShape" and "value" not in node.attributes:
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(np.zeros(1, np.float16)))

    def _scale_attribute(self, node: ir.Node, name: str, k: int) -> None:
        found = node.attributes[name]
        if found.type == ir.AttributeType.TENSOR:
            array = (found.as_tensor().numpy().astype(np.float64) / 2.0**k).astype(np.float16)
            node.attributes[name] = ir.AttrTensor(name, ir.Tensor(array))
            return
        value = found.as_float()
        stored = value / 2.0**k
        if 0 < stored < SMALLEST:
            self.result.raised[f"{node.name}.{name}"] = stored
            stored = SMALLEST
        node.attributes[name] = ir.AttrFloat32(name, stored)

    def _store_constant(self, value: ir.Value, form: Form) -> None:
        array = constant(value)
        name = value.name or ""
        if array is None:
            return
        source = self._prepared.source.get(name, name)
        dtype, k = form
        if dtype == "fp16":
            stored = (array.astype(np.float64) / 2.0**k).astype(np.float16)
            if array.size == 1 and not stored.any() and array.any():
                stored = np.full_like(stored, np.copysign(SMALLEST, array.reshape(-1)[0]))
                self.result.raised[name] = float(array.reshape(-1)[0]) / 2.0**k
            value.const_value = ir.Tensor(stored, name=name)
            value.type = ir.TensorType(HALF)
        is_own = name in self._prepared.made
        self.result.constants[name] = ConstantRecord(
            k, "" if is_own else source, float(array.reshape(-1)[0]) if is_own else None, name in self._prepared.masks
        )

    def _finish_output(self, index: int, value: ir.Value, wanted: Form) -> None:
        converted = self._convert(value, wanted, None)
        if converted is value:
            return
        name = value.name or ""
        if value.is_graph_input():
            name = self._graph.outputs[index].name or ""
        else:
            value.name = self._name(f"{name}{_STORED}")
        self._graph.outputs[index] = converted
        converted.name = name
        self.result.scales[name] = (name, 0)

    def _sign(self, exported: Exported) -> None:
        signature = exported.signature
        outputs = tuple(tensor_spec(v) for v in self._graph.outputs)
        inputs = tuple(tensor_spec(v) for v in self._graph.inputs)
        self.result.exported = exported.replace(
            model=self._model,
            signature=Signature(
                tuple(_with_dtype(old, new.dtype) for old, new in zip(signature.inputs, inputs, strict=True)),
                tuple(_with_dtype(old, new.dtype) for old, new in zip(signature.outputs, outputs, strict=True)),
                signature.dims,
                signature.relations,
            ),
            target=Target(exported.target.backend, "fp16", exported.target.device, exported.target.opset),
        )


_STORED = "/stored"


def _with_dtype(spec: Any, dtype: str) -> Any:
    return type(spec)(spec.name, dtype, spec.shape)


def _dtype(form: Form) -> ir.DataType:
    return HALF if form[0] == "fp16" else FLOAT


def _bodies(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []

"""From a graph and its ranges to unknown scales, the relations between them, and their bounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torchferry.graph.forms.schemas import schema_at
from torchferry.precision.degrees import (
    Relation,
    constant,
    float_slots,
    is_float,
    relations_of,
    rule_of,
)
from torchferry.precision.limits import Limits, constant_limits
from torchferry.precision.opened import ROLE_KEY
from torchferry.precision.prepare import has_body
from torchferry.precision.ranges import constant_range

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import onnx_ir as ir

Unknown = tuple[str, ...]
"""``("t", tensor)``, ``("use", tensor, node)``, ``("attr", node, name)`` or ``("aux", node, name)``."""
OUTPUT = "<output>"
"""Stands for the caller where a use is by a graph's output."""
SATURATING = frozenset(("Sigmoid", "Tanh", "Erf", "Exp", "Softmax"))
"""Operators that are flat beyond 2**15 (softmax and exp on what is never above 0)."""

EdgeKind = Literal["candidate", "clip", "log", "boundary"]


@dataclass(frozen=True)
class Edge:
    """A place where a power-of-two multiplication may stand: between a tensor and one node that reads it.

    Attributes:
        tensor: What is read.
        reader: The unit's name, or ``OUTPUT``. Of a graph, each node is a unit; see ``ModuleLimits``.
        kind: ``candidate``: allowed, at the price of a node; ``clip``: certain, with a clip before it; ``log``:
            allowed, as an addition behind a logarithm, which need not hold the true operand; ``boundary``: an output
            of the graph that stays FP32.
    """

    tensor: str
    reader: str
    kind: EdgeKind

    @property
    def unknown(self) -> Unknown:
        """The scale behind the multiplication."""
        return ("use", self.tensor, self.reader)


@dataclass(frozen=True)
class Row:
    """A sum of unknowns that must be zero, on behalf of a node."""

    terms: Mapping[Unknown, int]
    owner: str


@dataclass(frozen=True)
class ModuleLimits:
    """What is different where not a graph but a module is repaired.

    Attributes:
        constants: Constants that cannot absorb a scale.
        attributes: Nodes whose float attributes cannot be set.
        tied: Groups of (node, constant) that are one number of the module, one of the two names empty.
        units: For each node the call of the module's program that it belongs to. A unit is what may be multiplied
            before, or stay FP32, as a whole. Where there are none, nothing may be added.
        between: The tensors between calls.
    """

    constants: frozenset[str]
    attributes: frozenset[str]
    tied: tuple[tuple[tuple[str, str], ...], ...]
    units: Mapping[str, str] = field(default_factory=dict)
    between: frozenset[str] = frozenset()


@dataclass
class Problem:
    """What the solver solves.

    Attributes:
        rows: The relations.
        limits: The bounds of each tensor that has some.
        edges: Where nodes may be added.
        islands: Units that stay FP32 from the start, with the reason.
        unknown_operators: Nodes without a rule, which got scale 1.
        outside: Inputs and outputs whose true values leave the range, so that they stay FP32.
        kept: Constants that stay FP32 because ONNX asks for it, such as the scales of a Resize.
        owners: The units that may become islands.
        inner: Tensors inside a unit of the repaired graph, and that unit.
        units: The units of nodes that are not one by themselves.
    """

    rows: list[Row] = field(default_factory=list)
    limits: dict[str, Limits] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list)
    islands: dict[str, str] = field(default_factory=dict)
    unknown_operators: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    kept: set[str] = field(default_factory=set)
    owners: list[str] = field(default_factory=list)
    inner: dict[str, str] = field(default_factory=dict)
    units: Mapping[str, str] = field(default_factory=dict)

    def unit(self, node: str) -> str:
        """Return the unit that a node belongs to."""
        return self.units.get(node, node)


def build(
    prepared: ir.Model,
    opened: ir.Model,
    tensor_limits: Mapping[str, Limits],
    module: ModuleLimits | None = None,
) -> Problem:
    """State the problem for a graph.

    Args:
        prepared: The graph that is repaired.
        opened: The same with sums opened; its inner tensors bring bounds of their own.
        tensor_limits: Of every tensor of ``opened`` that is not a constant.
        module: What is different where a module is repaired; without units, inputs and outputs cannot stay FP32.
    """
    return _Builder(prepared, opened, tensor_limits, module).problem


class _Builder:
    def __init__(
        self,
        prepared: ir.Model,
        opened: ir.Model,
        tensor_limits: Mapping[str, Limits],
        module: ModuleLimits | None,
    ) -> None:
        self.problem = Problem(units=module.units if module else {})
        self._module = module
        self._epsilons: dict[str, Unknown] = {}
        self._limits = tensor_limits
        self._opset = prepared.opset_imports.get("", prepared.opset_imports.get("ai.onnx", 1))
        self._own = {node.name or "" for node in prepared.graph}
        self._owner_of_output = {v.name or "": node.name or "" for node in prepared.graph for v in node.outputs}
        self._constants = constant_tensors(opened.graph)
        self._between = module.between if module and module.units else None
        self._sizes = Counter(self.problem.unit(node.name or "") for node in prepared.graph if float_slots(node))
        self.problem.owners += self._sizes
        self._edges: dict[tuple[str, str], Edge] = {}
        for node in prepared.graph:
            self._look_at(node)
        self.problem.edges += self._edges.values()
        for node in opened.graph:
            self._add_rows(node)
        self._add_boundaries(prepared.graph, graph_allowed=module is None or bool(module.units))
        self._add_constants(opened.graph)
        self._tie_epsilons()
        for node in opened.graph:
            owner = self.problem.unit(self._whole(node))
            for value in node.outputs:
                if is_float(value) and not node.metadata_props.get(ROLE_KEY):
                    self._add_limits(value.name or "")
                    if value.name not in self._owner_of_output or not self._is_between(value.name or ""):
                        self.problem.inner[value.name or ""] = owner

    def _look_at(self, node: ir.Node) -> None:
        """Decide what a node of the repaired graph may ask for: edges, FP32, a word about a missing rule."""
        if not float_slots(node):
            return
        unit = self.problem.unit(node.name or "")
        if has_body(node):
            self.problem.islands[unit] = f"{node.op_type} has a body, which is not looked into"
            return
        refused = self._refused(node)
        if refused:
            self.problem.islands[unit] = f"ONNX defines {node.op_type} for FP32, not FP16 ({', '.join(refused)})"
            return
        if rule_of(node) is None:
            self.problem.unknown_operators.append(node.name or "")
        if self._is_whole(node) and is_flexible(node, self._constants):
            return
        for value in dict.fromkeys(v for v in node.inputs if v is not None and is_float(v)):
            if self._may_be_shifted(value):
                edge = Edge(value.name or "", unit, self._kind(node, value.name or ""))
                self._edges.setdefault((edge.tensor, unit), edge)

    def _is_between(self, tensor: str) -> bool:
        return self._between is None or tensor in self._between

    def _is_whole(self, node: ir.Node) -> bool:
        """Tell whether a node is a unit by itself."""
        return self._sizes[self.problem.unit(node.name or "")] == 1

    def _may_be_shifted(self, value: ir.Value) -> bool:
        """Tell whether a multiplication may stand between a tensor and a unit that reads it."""
        if self._between is None:
            return value.name not in self._constants
        return value.name in self._between and not value.is_initializer()

    def _kind(self, node: ir.Node, tensor: str) -> EdgeKind:
        if not self._is_whole(node) or (self._module and not self._module.units):
            return "candidate"
        if node.op_type == "Log":
            return "log"
        leaves_range = tensor in self._limits and self._limits[tensor].leaves_range
        return "clip" if node.op_type in SATURATING and leaves_range else "candidate"

    def _refused(self, node: ir.Node) -> list[str]:
        """Return the operands that ONNX does not allow to be FP16; constants among them are kept as they are."""
        schema = schema_at(node.op_type, self._opset) if node.domain in ("", "ai.onnx") else None
        if schema is None:
            return []
        allowed = {c.type_param_str: "tensor(float16)" in c.allowed_type_strs for c in schema.type_constraints}
        refused = []
        for slot, at in float_slots(node):
            values, formal = (node.inputs, schema.inputs) if slot == "in" else (node.outputs, schema.outputs)
            parameter = formal[min(int(at), len(formal) - 1)]
            value = values[int(at)]
            if allowed.get(parameter.type_str, parameter.type_str == "tensor(float16)") or value is None:
                continue
            if value.is_initializer():
                self.problem.kept.add(value.name or "")
            else:
                refused.append(value.name or "")
        return refused

    def _whole(self, node: ir.Node) -> str:
        """Return the node of the repaired graph that a node of the opened one belongs to."""
        name = node.name or ""
        return name if name in self._own else self._owner_of_output[name.rsplit("/", 1)[0]]

    def _add_rows(self, node: ir.Node) -> None:
        whole = self._whole(node)
        owner = self.problem.unit(whole)
        for relation in relations_of(node):
            self.problem.rows.append(Row(self._terms(node, whole, owner, relation), owner))

    def _terms(self, node: ir.Node, whole: str, owner: str, relation: Relation) -> dict[Unknown, int]:
        terms: dict[Unknown, int] = {}
        for (kind, at), coefficient in relation.items():
            if kind in ("attr", "aux"):
                unknown: Unknown = (kind, node.name or "", str(at))
                if kind == "attr":
                    self._epsilons[whole] = unknown
                    # what is inside a node has no attribute that could be written
                    if node.name not in self._own or (self._module and whole in self._module.attributes):
                        self.problem.rows.append(Row({unknown: 1}, owner))
            else:
                value = node.inputs[int(at)] if kind == "in" else node.outputs[int(at)]
                name = value.name or "" if value is not None else ""
                edge = self._edges.get((name, owner)) if kind == "in" else None
                unknown = edge.unknown if edge else ("t", name)
            terms[unknown] = terms.get(unknown, 0) + coefficient
        return {unknown: c for unknown, c in terms.items() if c}

    def _add_boundaries(self, graph: ir.Graph, *, graph_allowed: bool) -> None:
        for value in graph.inputs:
            if not is_float(value):
                continue
            name = value.name or ""
            self._add_limits(name)
            if graph_allowed and self._limits[name].leaves_range:
                self.problem.outside.append(name)
            else:
                self.problem.rows.append(Row({("t", name): 1}, name))
        for value in graph.outputs:
            name = value.name or ""
            if not is_float(value) or name in self._constants:
                continue
            is_outside = graph_allowed and name in self._limits and self._limits[name].leaves_range
            edge = Edge(name, OUTPUT, "boundary" if is_outside else "candidate")
            if is_outside and name not in self.problem.outside:
                self.problem.outside.append(name)
            self.problem.edges.append(edge)
            self.problem.rows.append(Row({edge.unknown: 1}, OUTPUT))

    def _add_constants(self, graph: ir.Graph) -> None:
        fixed = self._module.constants if self._module else frozenset()
        for name, value in graph.initializers.items():
            if not is_float(value) or value.is_graph_input():
                continue
            is_inner = "/constant_" in name
            owner = self._owner_of_output.get(name.rsplit("/", 1)[0], "")
            if is_inner and _is_epsilon(value) and not (self._module and owner in self._module.attributes):
                self._epsilons[owner] = ("t", name)
                is_inner = False
            if name in fixed or name in self.problem.kept or is_inner or value.is_graph_output():
                self.problem.rows.append(Row({("t", name): 1}, f"constant '{name}'"))
            array = constant(value)
            if array is not None:
                self.problem.limits[name] = constant_limits(constant_range(array))

    def _tie_epsilons(self) -> None:
        """Give places that are one attribute of one module one scale."""
        for group in self._module.tied if self._module else ():
            unknowns = [("t", constant) if constant else self._epsilons.get(node) for node, constant in group]
            known = [unknown for unknown in unknowns if unknown is not None]
            for other in known[1:]:
                self.problem.rows.append(Row({known[0]: 1, other: -1}, group[0][0]))

    def _add_limits(self, name: str) -> None:
        if name in self._limits:
            self.problem.limits[name] = self._limits[name]


def constant_tensors(graph: ir.Graph) -> set[str]:
    """Return the names of constants and of everything that is computed from constants alone."""
    found = {name for name, value in graph.initializers.items() if not value.is_graph_input()}
    for node in graph:
        operands = [value for value in node.inputs if value is not None]
        if operands and not has_body(node) and all(value.name in found for value in operands):
            found.update(value.name or "" for value in node.outputs)
    return found


def is_flexible(node: ir.Node, constants: Collection[str]) -> bool:
    """Tell whether a node passes scales on as they come, so that nothing need be added before it.

    That is so where it has one operand, and its output's scale follows: a multiplication before it might as well stand
    behind it, or be absorbed by a weight.
    """
    operands = {v.name for v in node.inputs if v is not None and is_float(v) and v.name not in constants}
    relations = relations_of(node)
    if len(operands) > 1 or any(len(relation) == 1 for relation in relations):
        return False
    return all(abs(c) == 1 for relation in relations for slot, c in relation.items() if slot[0] in ("in", "out"))


def _is_epsilon(value: ir.Value) -> bool:
    """Tell whether an inner constant is what keeps a square root from zero, the one inside a norm that is its own."""
    users = [node for node, _ in value.uses()]
    if len(users) != 1 or users[0].op_type != "Add":
        return False
    return [node.op_type for node, _ in users[0].outputs[0].uses()] == ["Sqrt"]

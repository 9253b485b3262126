"""Numbers of a module's own that its graph has as constants or attributes, and that can absorb a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.graph.provenance import provenance
from torchferry.precision.apply import attribute_scales
from torchferry.precision.degrees import constant, float_slots, is_float
from torchferry.precision.prepare import bounded_mask
from torchferry.precision.problem import ModuleLimits

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir
    import torch

    from torchferry.precision.modules.capture import Captured
    from torchferry.precision.planning import Plan
    from torchferry.precision.prepare import Prepared

_EPSILONS = ("eps", "epsilon", "variance_epsilon")
_SAME = 1e-5  # relative; constants of the graph are FP32


@dataclass(frozen=True)
class Number:
    """A number, where the graph has it.

    Attributes:
        owner: The path of the module that has it as its eps, or the name of the call that it is an argument of.
        name: Of the module's attribute; empty for an argument.
        value: What it is.
        node: The node that has it as an attribute; empty where it is a constant.
        constant: The constant; empty where it is an attribute.
    """

    owner: str
    name: str
    value: float
    node: str = ""
    constant: str = ""

    def scaled(self, found: Plan) -> float:
        """Return the number that stands for it at the scales that were solved."""
        assert found.solution is not None  # the caller looked
        k = found.solution.scales.get(self.constant, 0) if self.constant else _attribute_scale(found, self.node)
        value = float(bounded_mask(np.float32(self.value))) if self.constant in found.prepared.masks else self.value
        return value * 2.0**-k


def find_epsilons(prepared: Prepared, model: torch.nn.Module) -> list[Number]:
    """Return the constants and attributes that are the eps of the module that a node belongs to."""
    found: list[Number] = []
    for node in prepared.model.graph:
        path = provenance(node).module
        try:
            module = model.get_submodule(path)
        except AttributeError:  # the path that torch gives need not be one that can be looked up
            continue
        for name in _EPSILONS:
            value = getattr(module, name, None)
            if isinstance(value, float):
                found += [
                    Number(path, name, value, *place)
                    for place in _places(node)
                    if math.isclose(_at(prepared, node, place), value, rel_tol=_SAME)
                ]
    return found


def find_arguments(prepared: Prepared, captured: Captured) -> list[Number]:
    """Return the constants and attributes that are a float among the arguments of the call that a node belongs to."""
    calls = captured.calls
    found: dict[Number, None] = {}
    for node in prepared.model.graph:
        unit = captured.units.get(node.name or "", "")
        floats = set(floats_of(calls[unit])) if unit in calls else set()
        for place in _places(node):
            if place[1] in captured.parameters:
                continue
            at = _at(prepared, node, place)
            for value in floats:
                if np.float32(value) == np.float32(at):
                    found[Number(unit, "", value, *place)] = None
    return list(found)


def floats_of(call: torch.fx.Node) -> Iterator[float]:
    """Give every Python float among the arguments of a call."""
    pending: list[Any] = [call.args, call.kwargs]
    while pending:
        argument = pending.pop()
        if type(argument) is float:
            yield argument
        elif isinstance(argument, tuple | list):
            pending += argument
        elif isinstance(argument, dict):
            pending += argument.values()


def module_limits(prepared: Prepared, captured: Captured, numbers: list[Number], *, by_calls: bool) -> ModuleLimits:
    """Return what only a graph could absorb: constants and attributes that are no parameter and no number.

    Args:
        prepared: The graph that scales are solved on.
        captured: The module.
        numbers: Those of the module that can be set.
        by_calls: Let nodes be added between calls.
    """
    graph = prepared.model.graph
    zeros = {name for name, value in graph.initializers.items() if is_float(value) and not constant(value).any()}
    free = captured.parameters | zeros | {each.constant for each in numbers}  # nothing shifted is nothing
    by_place: dict[tuple[str, str, float], list[Number]] = {}
    for each in numbers:
        by_place.setdefault((each.owner, each.name, each.value), []).append(each)
    between = {*captured.calls, *captured.inputs.values()}
    return ModuleLimits(
        frozenset(graph.initializers.keys() - free),
        frozenset(node.name or "" for node in graph) - {each.node for each in numbers},
        tuple(tuple((each.node, each.constant) for each in group) for group in by_place.values()),
        captured.units if by_calls else {},
        frozenset(between if by_calls else ()),
    )


def _places(node: ir.Node) -> Iterator[tuple[str, str]]:
    """Give (node, constant) of each single float that a node has, one of the two empty."""
    if "epsilon" in node.attributes:
        yield node.name or "", ""
    for value in node.inputs:
        if value is not None and value.is_initializer() and is_float(value) and constant(value).size == 1:
            yield "", value.name or ""


def _at(prepared: Prepared, node: ir.Node, place: tuple[str, str]) -> float:
    if place[1] in prepared.masks:
        return prepared.masks[place[1]]  # what it was before it was bounded
    if place[1]:
        return float(constant(prepared.model.graph.initializers[place[1]]).reshape(-1)[0])
    return node.attributes["epsilon"].as_float()


def _attribute_scale(found: Plan, name: str) -> int:
    assert found.solution is not None  # as above
    node = next(node for node in found.prepared.model.graph if node.name == name)
    unit = found.problem.unit(name)
    known = {}
    for slot in float_slots(node):
        value = (node.inputs if slot[0] == "in" else node.outputs)[int(slot[1])]
        tensor = value.name or "" if value is not None else ""
        shift = found.solution.shifts.get((tensor, unit), 0) if slot[0] == "in" else 0
        known[slot] = found.solution.scales.get(tensor, 0) - shift
    return attribute_scales(node, known).get("epsilon", 0)

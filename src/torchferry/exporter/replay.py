"""A captured program, run in PyTorch an operator at a time, from any point on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.export.graph_signature import OutputKind
from torch.fx import Node
from torch.fx.node import map_arg

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torchferry.exporter.inputs import Call


class Replay:
    """The operators of a program in the order in which they run.

    Args:
        program: What ``capture`` gives.

    Attributes:
        nodes: The operators whose results depend on the inputs.
        outputs: What the module returns, by the names of the nodes that compute it.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self._program = program
        self._all = list(program.graph.nodes)
        inputs = set(program.graph_signature.user_inputs)
        self.nodes: list[Node] = []
        varies: set[Node] = set()
        for node in self._all:
            if node.name in inputs or (node.op == "call_function" and not varies.isdisjoint(node.all_input_nodes)):
                varies.add(node)
                if node.op == "call_function":
                    self.nodes.append(node)
        returned = next(node for node in self._all if node.op == "output").args[0]
        specs = program.graph_signature.output_specs
        self._returned = [
            value for value, spec in zip(returned, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT
        ]
        self.outputs = [value.name for value in self._returned if isinstance(value, Node)]

    def live_after(self) -> list[frozenset[str]]:
        """Return, for each operator, the names of what it and those before it leave to those behind it."""
        place = {node: number for number, node in enumerate(self.nodes)}
        end = len(self.nodes)
        last_use = {
            node: end if node in self._returned else max((place.get(user, -1) for user in node.users), default=-1)
            for node in self.nodes
        }
        live: set[Node] = set()
        result = []
        for number, node in enumerate(self.nodes):
            live = {other for other in (*live, node) if last_use[other] > number}
            result.append(frozenset(other.name for other in live))
        return result

    def run(self, call: Call, given: Mapping[str, torch.Tensor], wanted: Iterable[str]) -> dict[str, Any]:
        """Compute values of the program.

        Args:
            call: The module's arguments, of the example's shapes.
            given: Values that are taken as they are, by name; what only they need is not run.
            wanted: Names of the values to return.
        """
        program = self._program
        leaves = iter(program._graph_module_flat_inputs(*call))
        values: dict[Node, Any] = {}
        for node in self._all:
            if node.op == "placeholder":
                values[node] = next(leaves)
        wanted = set(wanted)
        needed = self._needed(given, wanted)
        uses = {node: sum(user in needed for user in node.users) for node in self._all}
        found: dict[str, Any] = {}
        with torch.no_grad():
            for node in self._all:
                if node.name in given:
                    values[node] = given[node.name]
                elif node not in needed:
                    continue
                elif node.op == "get_attr":
                    values[node] = getattr(program.graph_module, str(node.target))
                elif node.op == "call_function":
                    args, kwargs = map_arg((node.args, node.kwargs), lambda other: values[other])
                    assert callable(node.target)
                    values[node] = node.target(*args, **kwargs)
                if node.name in wanted:
                    found[node.name] = values[node]
                for other in node.all_input_nodes:
                    uses[other] -= 1
                    if not uses[other]:
                        values.pop(other, None)
        return found

    def _needed(self, given: Mapping[str, torch.Tensor], wanted: set[str]) -> set[Node]:
        needed: set[Node] = set()
        todo = [node for node in self._all if node.name in wanted]
        while todo:
            node = todo.pop()
            if node not in needed:
                needed.add(node)
                if node.name not in given:
                    todo += node.all_input_nodes
        return needed

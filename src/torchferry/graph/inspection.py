"""What is in a graph, for people to read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchferry.graph.marks import is_mark
from torchferry.graph.provenance import provenance

if TYPE_CHECKING:
    from torchferry.graph.exported import Exported


@dataclass(frozen=True)
class ModuleRow:
    """One module of the model that was exported.

    Attributes:
        path: From the root, such as ``backbone.layer1.0``; empty for the root.
        nodes: Nodes of its own and of all modules inside it.
        parameters: Numbers in the weights that these nodes are the first to use.
    """

    path: str
    nodes: int
    parameters: int


@dataclass(frozen=True)
class Inspection:
    """What is in a graph.

    Attributes:
        inputs: Name, dtype and shape of each.
        outputs: Likewise.
        dims: The valid range of each dynamic dimension.
        opsets: By domain; ONNX's own is ``ai.onnx``.
        operators: Counts by domain, subgraphs included.
        parameters: Numbers in all weights.
        weights_bytes: Their size.
        marks: Each as ``func[call]:type name shape``, in the graph's order.
        nodes: All of them, marks and subgraphs included.
        modules: In the order in which they are first used; empty for a graph that torch did not export.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: dict[str, str]
    opsets: dict[str, int]
    operators: dict[str, dict[str, int]]
    parameters: int
    weights_bytes: int
    marks: tuple[str, ...]
    nodes: int
    modules: tuple[ModuleRow, ...]


def inspect(exported: Exported) -> Inspection:
    """Look through a graph; no weights are read."""
    model = exported.model
    nodes = [node for graph in model.graphs() for node in graph]
    operators: dict[str, Counter[str]] = {}
    for node in nodes:
        operators.setdefault(node.domain or "ai.onnx", Counter())[node.op_type] += 1
    ordered = sorted(operators.items(), key=lambda entry: (entry[0] != "ai.onnx", entry[0]))
    marks = [node for node in nodes if is_mark(node)]
    weights = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    return Inspection(
        tuple(map(str, exported.signature.inputs)),
        tuple(map(str, exported.signature.outputs)),
        {name: str(allowed) for name, allowed in exported.signature.dims.items()},
        {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        {domain: dict(counts.most_common()) for domain, counts in ordered},
        sum(weight.size for weight in weights if weight is not None),
        exported.weights_bytes,
        tuple(_shown(mark.attributes) for mark in marks),
        len(nodes),
        _modules(exported),
    )


def _shown(attributes: object) -> str:
    values = {name: attribute.value for name, attribute in attributes.items()}  # type: ignore[attr-defined]
    shape = ", ".join("?" if size < 0 else str(size) for size in values["shape"])
    return f"{values['func']}[{values['func_id']}]:{values['type']} {values['name']} [{shape}]"


def _modules(exported: Exported) -> tuple[ModuleRow, ...]:
    nodes: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    counted: set[str] = set()
    for graph in exported.model.graphs():
        for node in graph:
            path = provenance(node).module
            fresh = [v for v in node.inputs if v is not None and v.is_initializer() and v.name not in counted]
            counted.update(value.name or "" for value in fresh)
            size = sum(value.const_value.size for value in fresh if value.const_value is not None)
            for end in _ends(path):
                nodes[path[:end]] += 1
                parameters[path[:end]] += size
    if set(nodes) <= {""}:
        return ()
    return tuple(ModuleRow(path, count, parameters[path]) for path, count in nodes.items())


def _ends(path: str) -> list[int]:
    """Return where the path of each module ends that a module is in: the root's, every dot, its own."""
    inner = [index for index, letter in enumerate(path) if letter == "."]
    return [0, *inner, len(path)] if path else [0]

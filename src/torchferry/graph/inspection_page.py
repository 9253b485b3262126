"""Drawing a graph as one self-contained HTML page: boxes for modules that open on a click, nodes inside, edges between.

The page asks the network for nothing. The graph is in it as JSON, and whatever a file says is shown as text only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from torchferry.core.pages import page_environment
from torchferry.graph.marks import is_mark
from torchferry.graph.provenance import provenance

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torchferry.graph.exported import Exported

# Boxes and nodes that are to be seen before anything is opened, unless that would be very few.
BOXES_AT_FIRST = 40
# A box holds no more than this; what is more goes into boxes of its own, in the graph's order.
MOST_IN_A_BOX = 60
_FEW = 5
# Values of a small constant that are shown, and letters of an attribute.
_MOST_VALUES = 16
_MOST_LETTERS = 400


@dataclass
class _Box:
    """A module, a subgraph, or a run of nodes of one that is large: named boxes and nodes by number, in order."""

    name: str
    path: str
    kind: str = "module"
    items: list[_Box | int] = field(default_factory=list)
    boxes: dict[str, _Box] = field(default_factory=dict)

    def box(self, name: str, kind: str = "module") -> _Box:
        """Return the box of this name inside."""
        if name not in self.boxes:
            path = f"{self.path}.{name}" if self.path else name
            self.boxes[name] = _Box(name, path if kind == "module" else self.path, kind)
            self.items.append(self.boxes[name])
        return self.boxes[name]


def render(exported: Exported, title: str) -> str:
    """Return a graph as an HTML page.

    Args:
        exported: The graph; no weights are read but those of a few numbers.
        title: What the page is called, such as the file's name.

    Raises:
        OutputError: If Jinja2 is not installed.
    """
    folder = files("torchferry.graph")
    template, script = (
        folder.joinpath(f"inspection_page.{ending}").read_text(encoding="utf-8") for ending in ("html.j2", "js")
    )
    environment = page_environment("the graph")
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.from_string(template).render(title=title, script=script, graph=page_data(exported))


def page_data(exported: Exported) -> dict[str, Any]:
    """Return what the page shows, for JSON.

    Returns:
        ``values``: ``[name, type and shape, kind]`` each, where kind is ``input``, ``output``, ``weight`` or empty.
        ``nodes``: ``op``, ``domain``, ``name``, ``module``, ``source``, ``mark``, ``label`` (name of the module that it
        is all of), ``attributes`` as pairs, ``inputs`` and ``outputs`` as numbers of values, -1 for one left out.
        ``boxes``: ``[name, path, kind, items, open]`` each, the whole first; an item is a box's number, or that of a
        node counted down from -1. ``open`` tells which are open at first. ``inputs`` and ``outputs`` are numbers.
    """
    model = exported.model
    values = _Values(model)
    root = _Box("", "", "whole")
    nodes: list[dict[str, Any]] = []
    by_module = any(provenance(node).module for node in model.graph)
    _add(model.graph, root, nodes, values, by_module=by_module)
    for function in model.functions.values():
        if function.domain != "torchferry.mark":
            inside = root.box(f"{function.domain}::{function.name}", "function")
            _add(function, inside, nodes, values, by_module=False)
    _dissolve(root, nodes)
    boxes = _numbered(_in_runs(root))
    return {
        "inputs": [values.number(value) for value in model.graph.inputs if not value.is_initializer()],
        "outputs": list(dict.fromkeys(values.number(value) for value in model.graph.outputs)),
        "nodes": nodes,
        "values": values.listed,
        "boxes": _opened(boxes),
    }


class _Values:
    """Numbers the tensors of a model."""

    def __init__(self, model: ir.Model) -> None:
        self.listed: list[list[str]] = []
        self._numbers: dict[ir.Value, int] = {}
        self._ends = dict.fromkeys(model.graph.outputs, "output")
        self._ends |= dict.fromkeys(model.graph.inputs, "input")

    def number(self, value: ir.Value | None) -> int:
        """Return the number of a tensor, -1 for none."""
        if value is None:
            return -1
        if value not in self._numbers:
            self._numbers[value] = len(self.listed)
            kind = "weight" if value.is_initializer() else self._ends.get(value, "")
            self.listed.append([value.name or "", _type(value), kind])
        return self._numbers[value]


def _type(value: ir.Value) -> str:
    """Return dtype and shape, such as ``float32[n, 3]``; empty if the file tells neither."""
    given = value.const_value if value.is_initializer() and value.type is None else value
    if given is None or given.dtype in (None, ir.DataType.UNDEFINED):
        return ""
    if isinstance(value.type, ir.SequenceType | ir.OptionalType):
        return str(value.type)
    text = _dtype(given.dtype)
    return text if given.shape is None else f"{text}{_shape(given.shape)}"


def _dtype(dtype: ir.DataType) -> str:
    return "string" if dtype == ir.DataType.STRING else dtype.numpy().name


def _shape(shape: ir.ShapeProtocol) -> str:
    sizes = (size if isinstance(size, int) else size.value for size in shape)
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"


def _add(graph: Iterable[ir.Node], box: _Box, nodes: list[dict[str, Any]], values: _Values, *, by_module: bool) -> None:
    """Add the nodes of a graph, each to the box of its module or, in a foreign graph, of its name's folders."""
    for node in graph:
        origin = provenance(node)
        path = origin.module.split(".") if by_module else (node.name or "").strip("/").split("/")[:-1]
        place = box
        for name in path:
            place = place.box(name) if name else place
        place.items.append(len(nodes))
        nodes.append(
            {
                "op": node.op_type,
                "domain": node.domain,
                "name": node.name or "",
                "module": origin.module,
                "source": origin.source,
                "mark": _mark(node),
                "label": "",
                "attributes": [[name, _attribute(each)] for name, each in node.attributes.items()],
                "inputs": [values.number(value) for value in node.inputs],
                "outputs": [values.number(value) for value in node.outputs],
            }
        )
        for name, subgraph in _subgraphs(node):
            inside = place.box(f"{node.name or node.outputs[0].name} {name}", "subgraph")
            _add(subgraph, inside, nodes, values, by_module=False)


def _mark(node: ir.Node) -> str:
    if not is_mark(node):
        return ""
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    return f"{found.get('func')}[{found.get('func_id')}]:{found.get('type')} {found.get('name')}"


def _subgraphs(node: ir.Node) -> Iterable[tuple[str, ir.Graph]]:
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((f"{name}.{at}", graph) for at, graph in enumerate(attribute.as_graphs()))


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"= {attribute.ref_attr_name}"
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        text = f"{_dtype(tensor.dtype)}{_shape(tensor.shape)}"
        is_small = tensor.size <= _MOST_VALUES and not isinstance(tensor, ir.ExternalTensor)
        return f"{text} {tensor.numpy().tolist()}" if is_small else text
    if attribute.type == ir.AttributeType.GRAPH:
        return f"{len(attribute.as_graph())} nodes"
    value = attribute.value
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS]}…"


def _dissolve(box: _Box, nodes: list[dict[str, Any]]) -> None:
    """Let a node stand for the module that it is all of, and have its name as a label."""
    for at, item in enumerate(box.items):
        if isinstance(item, _Box):
            _dissolve(item, nodes)
            if item.kind == "module" and len(item.items) == 1 and isinstance(item.items[0], int):
                only = nodes[item.items[0]]
                only["label"] = f"{item.name}.{only['label']}" if only["label"] else item.name
                box.items[at] = item.items[0]


def _in_runs(box: _Box) -> _Box:
    """Put the items of large boxes into boxes of their own, one after the other."""
    for item in box.items:
        if isinstance(item, _Box):
            _in_runs(item)
    count = len(box.items)
    if count > MOST_IN_A_BOX:
        size = max(math.isqrt(count), -(-count // BOXES_AT_FIRST))
        starts = range(0, count, size)
        runs = [
            _Box(f"{at + 1}–{min(at + size, count)} of {count}", box.path, "run", box.items[at : at + size])  # noqa: RUF001
            for at in starts
        ]
        box.items = [_in_runs(run) for run in runs]
    return box


def _numbered(root: _Box) -> list[list[Any]]:
    """Return all boxes, level by level."""
    boxes = [root]
    for box in boxes:  # grows meanwhile
        boxes.extend(item for item in box.items if isinstance(item, _Box))
    numbers = {id(box): at for at, box in enumerate(boxes)}
    return [
        [box.name, box.path, box.kind, [numbers[id(i)] if isinstance(i, _Box) else -1 - i for i in box.items], False]
        for box in boxes
    ]


def _opened(boxes: list[list[Any]]) -> list[list[Any]]:
    """Open boxes, level by level, as long as no more than so many things are to be seen."""
    level: Sequence[int] = [0]
    shown = 1
    while level:
        more = sum(len(boxes[at][3]) - 1 for at in level)
        if shown + more > (BOXES_AT_FIRST if shown > _FEW else MOST_IN_A_BOX):
            break
        shown += more
        for at in level:
            boxes[at][4] = True
        level = [item for at in level for item in boxes[at][3] if item > 0]
    return boxes

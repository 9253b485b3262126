"""The verb partition: a graph of its own for each part of a plan."""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from torchferry.core.files import new_files, new_folder
from torchferry.graph.exported import SIGNATURE_KEY
from torchferry.graph.marks import MARK_DOMAIN, is_mark
from torchferry.partitioning.boundaries import Boundaries
from torchferry.partitioning.flow import inner_graphs
from torchferry.partitioning.outline import Outline, outlined
from torchferry.partitioning.plan import Partition, Region, plan_partition

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from torchferry.graph import Exported
    from torchferry.partitioning.flow import Flow
    from torchferry.partitioning.plan import PartitionPlan

# In a part: the signature of the whole, from which join knows what was an input and an output, and what was a cut.
WHOLE_KEY = "torchferry.whole"
# Where onnx-ir keeps the names of a tensor's scale and zero point, which are tensors of the same graph.
QUANTIZATION_KEY = "quant_parameter_tensor_names"


def partition(
    exported_or_path: Any, parts: Sequence[Mapping[str, Any] | str], *, out: str | os.PathLike[str] | None = None
) -> list[Exported]:
    """Cut a graph into parts, each a graph of its own.

    A selector is ``func:input``, ``func[2]:output.1`` or ``func:output.name`` for a boundary that was marked,
    ``backbone:output`` for what crosses into or out of a module, or the name of a tensor. Without a call it is call 0,
    without an item every tensor of the boundary.

    Args:
        exported_or_path: An ``Exported``, a path, a ``ModelProto``, an ``ir.Model`` or torch's ``ONNXProgram``. It is
            not changed, and shares its weights with the parts.
        parts: For each part ``dict(start=…, end=…, save_file=…, name=…, output_names=…)``, all optional; ``"rest"``
            for what remains, which is several parts where other parts stand in between.
        out: The folder for the files; nothing is written by default.

    Returns:
        The parts in the order asked for. A tensor that leaves one part has the same name where it enters another.

    Raises:
        ConfigError: If a selector means nothing, an end is not behind its start, parts overlap, a part needs a tensor
            from elsewhere, or what remains needs one from inside a part.
        OutputError: If a file cannot be written; then none is.
    """
    with _no_collection():
        is_path = isinstance(exported_or_path, str | os.PathLike)
        whole = (outlined(Path(exported_or_path)) if is_path else None) or exported_or_path
        plan = plan_partition(whole, parts)
        made = split(plan)
    if out is not None:
        folder = Path(out)
        with new_files(folder) if folder.is_dir() else new_folder(folder, marker="") as partial:
            for part, exported in zip(plan.parts, made, strict=True):
                exported.save(partial / part.save_file)
    return made


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from looking through 100,000 objects again and again, all of which live."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def split(plan: PartitionPlan) -> list[Exported]:
    """Return the parts of a plan.

    Raises:
        ConfigError: If a tensor at a cut is no tensor but a sequence, or its dtype is not known.
    """
    boundaries = Boundaries(plan.whole, plan.flow, [part.region for part in plan.parts])
    whole = boundaries.signature_of_whole().to_json()
    return [_part(plan, part, boundaries, whole) for part in plan.parts]


def with_boundaries(plan: PartitionPlan) -> Exported:
    """Return the whole with every tensor at a cut as an output, under the name by which the parts know it.

    Inputs and weights that are at a cut are no outputs.

    Raises:
        ConfigError: As ``split``.
    """
    flow = plan.flow
    given = {*flow.inputs, *flow.model.graph.initializers.values()}
    at_cuts = [value for part in plan.parts for value in (*part.region.inputs, *part.region.outputs)]
    outputs = tuple(value for value in dict.fromkeys([*flow.outputs, *at_cuts]) if value not in given)
    region = Region(tuple(flow.inputs), outputs, frozenset(flow.upstream(outputs)))
    names = [tuple(map(flow.name, values)) for values in (region.inputs, region.outputs)]
    everything = Partition("whole", "whole.onnx", (), (), names[0], names[1], region)
    boundaries = Boundaries(plan.whole, flow, [region, *(part.region for part in plan.parts)])
    return _part(plan, everything, boundaries, boundaries.signature_of_whole().to_json())


def _part(plan: PartitionPlan, part: Partition, boundaries: Boundaries, whole: str) -> Exported:
    source = plan.flow.model
    graph = _graph(plan.flow, part.region, part.name)
    _strip_marks(graph, source.opset_imports.get("", 1))
    cuts = [*zip((*part.region.inputs, *part.region.outputs), (*graph.inputs, *graph.outputs), strict=True)]
    for value in graph.inputs:
        value.const_value = None  # of a weight at which a part starts
    signature = boundaries.apply(part.region, graph)
    _name_cuts(graph, {new: plan.flow.name(old) for old, new in cuts})
    functions = []
    for key in sorted(_called(graph, source)):
        function = source.functions[key].clone()
        _strip_marks(function, source.opset_imports.get("", 1))
        functions.append(function)
    model = ir.Model(
        graph,
        ir_version=source.ir_version,
        producer_name=source.producer_name,
        producer_version=source.producer_version,
        domain=source.domain,
        model_version=source.model_version,
        doc_string=source.doc_string,
        functions=functions,
        metadata_props={**source.metadata_props, SIGNATURE_KEY: signature.to_json(), WHOLE_KEY: whole},
        device_configurations=source.device_configurations,
    )
    return plan.whole.replace(model=model, signature=signature)


def _graph(flow: Flow, region: Region, name: str) -> ir.Graph:
    """Return the nodes and weights of a part, with the marks between them, as a graph of their own."""
    graph = flow.model.graph
    nodes = flow.ordered(region.nodes)
    known = {*region.inputs, *(out for node in nodes for out in node.outputs)}
    read = {value for node in nodes for value in flow.reads[node]} | set(region.outputs)
    weights = [v for v in graph.initializers.values() if v in read and v not in region.inputs]
    parameters = {name for value in (*known, *weights) for name in (value.meta.get(QUANTIZATION_KEY) or {}).values()}
    weights += [v for v in graph.initializers.values() if v.name in parameters and v not in {*weights, *known}]
    known.update(weights)
    passing = {mark for mark in flow.marks if flow.origin(mark.outputs[0]) in known}
    chosen = {*nodes, *passing}
    content = [node for node in graph if node in chosen]
    model: object = flow.model
    if isinstance(model, Outline):
        return model.part(name, region.inputs, region.outputs, content, weights)
    return ir.GraphView(
        region.inputs,
        region.outputs,
        nodes=content,
        initializers=weights,
        doc_string=graph.doc_string,
        opset_imports={domain: version for domain, version in graph.opset_imports.items() if domain != MARK_DOMAIN},
        name=name,
        metadata_props=dict(graph.metadata_props),
    ).clone()


def _strip_marks(body: ir.Graph | ir.Function, opset: int) -> None:
    """Remove the marks of a graph or function and of its subgraphs, in place."""
    body.opset_imports.pop(MARK_DOMAIN, None)
    for node in [each for each in ir.traversal.RecursiveGraphIterator(body) if is_mark(each)]:
        before, after = node.inputs[0], node.outputs[0]
        assert before is not None
        assert node.graph is not None
        if after.is_graph_output():  # what a graph gives has a name of its own
            node.domain, node.op_type, node.overload = "", "Identity", ""
            node.attributes.clear()
            body.opset_imports.setdefault("", opset)
            continue
        ir.convenience.replace_all_uses_with(after, before)
        node.graph.remove(node, safe=True)


def _name_cuts(graph: ir.Graph, names: Mapping[ir.Value, str]) -> None:
    """Give the inputs and outputs their names, and whatever else had one of these another."""
    holder = {name: value for value, name in names.items()}
    values = list(all_values(graph))
    taken = {value.name for value in values} | holder.keys()
    for value in values:
        if value not in names and value.name in holder:
            value.name = fresh(value.name, taken)
    for value, name in names.items():
        value.name = name


def fresh(name: str, taken: set[str | None]) -> str:
    """Return a name like this one that is not taken, and take it."""
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    taken.add(f"{name}_{number}")
    return f"{name}_{number}"


def all_values(graph: ir.Graph) -> Iterable[ir.Value]:
    """Give every value of a graph and of its subgraphs once."""
    found: dict[ir.Value, None] = {}
    for each in (graph, *graph.subgraphs()):
        found |= dict.fromkeys((*each.inputs, *each.initializers.values()))
        found |= dict.fromkeys(out for node in each for out in node.outputs)
    return found


def _called(graph: ir.Graph, source: ir.Model) -> Collection[ir.OperatorIdentifier]:
    """Return the local functions that a graph calls, itself or through others."""
    called: set[ir.OperatorIdentifier] = set()
    pending: list[Iterable[ir.Node]] = [graph]
    while pending:
        for node in pending.pop():
            pending.extend(inner_graphs(node))
            key = node.op_identifier()
            if key in source.functions and key not in called and not is_mark(node):
                called.add(key)
                pending.append(source.functions[key])
    return called

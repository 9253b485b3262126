"""Graphs to cut, and running them."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from torchferry.graph import Exported
from torchferry.graph.provenance import MODULE_KEY

MARK = "torchferry.mark"


def mark(source: str, result: str, func: str, kind: str, at: int = 0, item: str = "", call: int = 0):
    made = helper.make_node("Mark", [source], [result], domain=MARK, func=func, func_id=call, type=kind, id=at)
    made.attribute.append(helper.make_attribute("name", item))  # make_node takes a name for the node's
    return made


def node(op: str, inputs: str, outputs: str, module: str = "", **attributes):
    made = helper.make_node(op, inputs.split(), outputs.split(), name=f"n_{outputs.split(maxsplit=1)[0]}", **attributes)
    if module:
        made.metadata_props.add(key=MODULE_KEY, value=module)
    return made


def values(*texts: str):
    """Return value infos of texts such as ``x float batch,4``."""
    made = []
    for text in texts:
        name, kind, shape = text.split(" ")
        dims = [int(dim) if dim.isdigit() else None if dim == "?" else dim for dim in shape.split(",") if dim]
        made.append(helper.make_tensor_value_info(name, getattr(TensorProto, kind.upper()), dims))
    return made


def weight(name: str, array) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(array), name)


def model(nodes, inputs, outputs, weights=(), value_info=(), functions=(), domains=()) -> onnx.ModelProto:
    functions = list(functions)
    if any(each.domain == MARK for each in nodes):
        body = [helper.make_node("Identity", ["x"], ["y"])]
        functions.append(helper.make_function(MARK, "Mark", ["x"], ["y"], body, [helper.make_opsetid("", 20)]))
        domains = (*domains, MARK)
    graph = helper.make_graph(nodes, "whole", inputs, outputs, list(weights), value_info=list(value_info))
    imports = [helper.make_opsetid("", 20), *(helper.make_opsetid(domain, 1) for domain in domains)]
    made = helper.make_model(graph, opset_imports=imports, functions=functions)
    made.ir_version = 10
    return made


def proto_of(graph) -> onnx.ModelProto:
    if isinstance(graph, Exported):
        graph = graph.model
    return ir.to_proto(graph) if isinstance(graph, ir.Model) else graph


def run(graph, feeds):
    """Return what ONNX Runtime gives by name, without any optimisation."""
    proto = proto_of(graph)
    onnx.checker.check_model(proto)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    given = {each.name: feeds[each.name] for each in session.get_inputs()}
    return dict(zip(names, session.run(names, given), strict=True))


def run_chain(parts, feeds):
    """Return all tensors that parts give when they run in order."""
    known = dict(feeds)
    for part in parts:
        known |= run(part, known)
    return known


def assert_same(got, want):
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        assert got[name].tobytes() == array.tobytes(), name
        assert got[name].shape == array.shape

"""Changes that make a graph fit an engine: what they do, and that the meaning stays."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from torchferry.core.signature import DimRange, Signature, TensorSpec
from torchferry.graph import as_exported
from torchferry.graph.passes import PASSES, adapt
from torchferry.graph.passes.drop_idle_inputs import drop_idle_inputs
from torchferry.graph.provenance import MODULE_KEY, SOURCE_KEY, provenance


def model(nodes, inputs, outputs, initializers=(), functions=()):
    values = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in names] for names in (inputs, outputs)
    ]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", *values, list(initializers)), opset_imports=opsets, functions=list(functions)
    )
    proto.ir_version = 10
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def run(graph, *arrays):
    names = [value.name for value in graph.graph.inputs]
    return ReferenceEvaluator(ir.to_proto(graph)).run(None, dict(zip(names, arrays, strict=True)))


def operators(graph):
    return [node.op_type for node in graph.graph]


def twice():
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_function("own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], opsets)


def test_functions_are_inlined_and_say_where_they_were_called():
    calls = [
        helper.make_node("Twice", ["x"], ["t"], domain="own"),
        helper.make_node("Twice", ["t"], ["y"], domain="own"),
    ]
    given = model(calls, ["x"], ["y"], functions=[twice()])
    for node, path in zip(given.graph, ("stem", "head"), strict=True):
        node.metadata_props.update({MODULE_KEY: path, SOURCE_KEY: f"net.py:1 in {path}"})
    adapted, done = adapt(given, ["inline-functions"])
    assert done == ("inline-functions x2",)
    assert operators(adapted) == ["Add", "Add"]
    assert not adapted.functions
    assert [provenance(node).module for node in adapted.graph] == ["stem", "head"]
    assert operators(given) == ["Twice", "Twice"]  # the graph itself is as it was
    np.testing.assert_array_equal(run(adapted, np.float32([1, 2]))[0], [4, 8])


@pytest.mark.parametrize("operator", ["Identity", "Dropout", "Max", "Sum"])
def test_what_does_nothing_goes(operator):
    nodes = [helper.make_node(operator, ["x"], ["t"]), helper.make_node("Neg", ["t"], ["y"])]
    adapted, done = adapt(model(nodes, ["x"], ["y"]), ["remove-identities"])
    assert done == ("remove-identities x1",)
    assert operators(adapted) == ["Neg"]
    np.testing.assert_array_equal(run(adapted, np.float32([1, 2]))[0], [-1, -2])


def test_what_does_something_stays():
    mode = helper.make_tensor("train", TensorProto.BOOL, [], [True])
    ratio = helper.make_tensor("ratio", TensorProto.FLOAT, [], [0.5])
    nodes = [helper.make_node("Max", ["x", "z"], ["t"]), helper.make_node("Dropout", ["t", "ratio", "train"], ["y"])]
    adapted, done = adapt(model(nodes, ["x", "z"], ["y"], [ratio, mode]), ["remove-identities"])
    assert done == ()
    assert operators(adapted) == ["Max", "Dropout"]


def test_an_output_keeps_its_name_where_an_identity_gives_it():
    nodes = [helper.make_node("Neg", ["x"], ["t"]), helper.make_node("Identity", ["t"], ["y"])]
    adapted, _ = adapt(model([*nodes, helper.make_node("Identity", ["x"], ["same"])], ["x"], ["y", "same"]), PASSES)
    assert len(adapted.graph.outputs) == 2
    for got, expected in zip(run(adapted, np.float32([1, 2])), ([-1, -2], [1, 2]), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_empty_inputs_at_the_end_of_a_node_go():
    nodes = [helper.make_node("Clip", ["x", "", "top"], ["t"]), helper.make_node("Clip", ["t", "top", ""], ["y"])]
    top = helper.make_tensor("top", TensorProto.FLOAT, [], [2.0])
    adapted, done = adapt(model(nodes, ["x"], ["y"], [top]), ["trim-inputs"])
    assert done == ("trim-inputs x1",)
    assert [len(node.inputs) for node in adapted.graph] == [3, 2]
    np.testing.assert_array_equal(run(adapted, np.float32([1, 3]))[0], [2, 2])


def test_names_become_plain_and_do_not_collide():
    nodes = [helper.make_node("Neg", ['a "b" é'], ["input0"]), helper.make_node("Add", ["input0", "z"], ["out, 1"])]
    given = model(nodes, ['a "b" é', "z"], ["out, 1"])
    adapted, done = adapt(given, ["name-tensors"])
    assert done == ("name-tensors x3",)
    assert [value.name for value in adapted.graph.inputs] == ["input0_", "input1"]
    assert [value.name for value in adapted.graph.outputs] == ["output0"]
    assert [value.name for value in given.graph.inputs] == ['a "b" é', "z"]
    np.testing.assert_array_equal(run(adapted, np.float32([1, 2]), np.float32([3, 3]))[0], [2, 1])


def sized(nodes, shape, opset=20, **initializers):
    """Build a graph from ``x`` of a shape to ``y`` of any."""
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None))]
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in initializers.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:], weights), opset_imports=[helper.make_opsetid("", opset)]
    )
    proto.ir_version = 8
    return ir.from_proto(proto)


SIZES_BY_DIVISION = [
    helper.make_node("Shape", ["x"], ["shape"]),
    helper.make_node("Cast", ["shape"], ["size"], to=TensorProto.FLOAT),
    helper.make_node("Div", ["wanted", "size"], ["scales"]),
    helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="linear"),
]


class TestFoldConstants:
    wanted = np.float32([1, 2, 8, 12])

    def test_what_follows_from_fixed_sizes_becomes_a_number(self):
        given = sized(SIZES_BY_DIVISION, [1, 2, 4, 4], wanted=self.wanted)
        adapted, done = adapt(given, ["fold-constants"])
        assert done == ("fold-constants x3",)
        assert operators(adapted) == ["Constant", "Resize"]
        x = np.random.default_rng(0).random((1, 2, 4, 4), np.float32)
        np.testing.assert_array_equal(run(adapted, x)[0], run(given, x)[0])
        assert run(adapted, x)[0].shape == (1, 2, 8, 12)

    def test_sizes_that_are_free_stay(self):
        given = sized(SIZES_BY_DIVISION, ["n", 2, 4, 4], wanted=self.wanted)
        adapted, done = adapt(given, ["fold-constants"])
        assert done == ()
        assert operators(adapted) == operators(given)

    def test_a_slice_of_a_shape_needs_its_own_sizes_alone(self):
        nodes = [helper.make_node("Shape", ["x"], ["s"], start=1), helper.make_node("Reshape", ["k", "s"], ["y"])]
        adapted, done = adapt(sized(nodes, ["n", 2, 3], k=np.zeros(6, np.float32)), ["fold-constants"])
        assert done == ("fold-constants x2",)
        assert operators(adapted) == ["Constant"]

    @pytest.mark.parametrize("operator", ["Abs", "RandomUniformLike"])
    def test_large_results_and_chance_stay(self, operator):
        size = 1 << 15 if operator == "Abs" else 4
        nodes = [helper.make_node(operator, ["k"], ["t"]), helper.make_node("Add", ["x", "t"], ["y"])]
        adapted, done = adapt(sized(nodes, [size], k=np.ones(size, np.float32)), ["fold-constants"])
        assert done == ()
        assert operators(adapted) == [operator, "Add"]


class TestRaiseOpset:
    def test_an_old_operator_becomes_what_it_is_now(self):
        nodes = [helper.make_node("Upsample", ["x", "scales"], ["y"], mode="nearest")]
        given = sized(nodes, ["n", 1, 2, 2], opset=9, scales=np.float32([1, 1, 2, 2]))
        adapted, done = adapt(given, ["raise-opset"])
        assert done == ("raise-opset x1",)
        assert adapted.opset_imports[""] == 20
        assert given.opset_imports[""] == 9
        assert operators(adapted)[-1] == "Resize"
        x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
        np.testing.assert_array_equal(run(adapted, x)[0], x.repeat(2, 2).repeat(2, 3))

    def test_a_graph_as_new_as_that_stays_and_so_does_one_that_cannot_go(self):
        new = sized([helper.make_node("Neg", ["x"], ["y"])], [2], opset=21)
        assert adapt(new, ["raise-opset"])[1] == ()
        unaligned = helper.make_node("Add", ["x", "x"], ["y"], broadcast=1, axis=1)  # of how many axes?
        adapted, done = adapt(sized([unaligned], None, opset=6), ["raise-opset"])
        assert done == ()
        assert adapted.opset_imports[""] == 6


def test_inputs_that_nothing_uses_go_and_the_signature_with_them():
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
    given = model([helper.make_node("Mul", ["x", "w"], ["y"])], ["idle", "w", "x"], ["y"], [weight])
    exported = as_exported(given)
    assert exported.signature.input_names == ("idle", "x")
    left = drop_idle_inputs(given, exported.signature)
    assert left == Signature(
        (TensorSpec("x", "float32", ("n",)),), (TensorSpec("y", "float32", ("n",)),), {"n": DimRange()}
    )
    np.testing.assert_array_equal(run(given, np.float32([1, 2]))[0], [2, 4])

"""Every behaviour that a backend must have, on every backend."""

import dataclasses
import gc
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import torchferry as ferry
from torchferry import backends
from torchferry.core.compare import TOLERANCES, compare
from torchferry.core.engine import Engine, get_backend, open_options
from torchferry.core.errors import (
    BackendError,
    FormatError,
    InputError,
    IntegrityError,
    MissingBackendError,
    MissingFileError,
    OutputError,
    TorchferryError,
    UnsupportedError,
)
from torchferry.core.target import Target
from torchferry.graph import Exported, as_exported
from torchferry.verification.isolation import run_isolated

TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}


# What an engine has to refuse, and why. It is held to it: a test that passes, or fails in another way, is an error.
_ONLY_FLOAT32 = "it computes in float32 alone"
REFUSED = {
    "reference": {
        "test_weights_are_inputs_and_scales_an_attribute": "it has Upsample as of opset 9 alone",
    },
    "ncnn": {
        "test_an_operator_that_does_nothing_beside_inputs_without_effect": "it hands nothing through",
        "test_outputs_that_are_one_tensor_an_input_or_a_constant": "it hands nothing through",
        "test_inputs_without_elements": "it has no NonZero",
        "test_sizes_that_depend_on_values": "it has no NonZero",
        "test_branches": "it has no If",
        "test_dtypes": _ONLY_FLOAT32,
        "test_infinities_and_nan_come_through": _ONLY_FLOAT32,
        "test_integers_wrap_around": _ONLY_FLOAT32,
        "test_large_integers_are_right_or_refused": _ONLY_FLOAT32,
        "test_large_floats_are_right_or_refused": _ONLY_FLOAT32,
        "test_an_end_beyond_every_size_is_the_end": _ONLY_FLOAT32,
        "test_booleans": _ONLY_FLOAT32,
        "test_scalars": "it has no tensors without axes",
        "test_what_fails_while_running_is_one_clear_error": "it would not notice, so the graph is not compiled",
    },
}

# Engines that take the precision from the graph's own types.
COMPUTES_AS_TYPED = ("reference", "tensorrt", "tensorrt-rtx")


def graph(nodes, inputs, outputs, initializers=(), opset=20) -> onnx.ModelProto:
    """Build a model; inputs and outputs are (name, dtype, shape)."""
    values = [[helper.make_tensor_value_info(n, TYPES[t], s) for n, t, s in group] for group in (inputs, outputs)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *values, list(initializers)), opset_imports=[helper.make_opsetid("", opset)]
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


def double(dtype="float32", shape=("n", 3)) -> onnx.ModelProto:
    return graph([helper.make_node("Add", ["x", "x"], ["y"])], [("x", dtype, shape)], [("y", dtype, shape)])


def times(weights) -> onnx.ModelProto:
    """Build a product of matrices with constant weights, in their type."""
    rows, columns = weights.shape
    kind = weights.dtype.name
    return graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", kind, ["n", rows])],
        [("y", kind, ["n", columns])],
        [helper.make_tensor("w", TYPES[kind], weights.shape, weights.tobytes(), raw=True)],
    )


def known_gap(request, backend, name, reason) -> None:
    """Mark the test as one that fails on an engine, and must be looked at again when it passes."""
    if backend == name:
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason))


def right_or_refused(run, expected) -> None:
    """Let an engine say that it cannot, but not give a wrong answer."""
    try:
        got = run()
    except (BackendError, InputError):
        return
    np.testing.assert_array_equal(got, expected)


@pytest.fixture(params=backends.names())
def builder(request) -> str:
    """One backend that compiles here; a missing engine is a visible skip."""
    available = backends.get(request.param).availability()
    if not available.ok:
        pytest.skip(f"{request.param}: {available.reason}")
    return request.param


@pytest.fixture
def backend(request, builder) -> str:
    """One backend that compiles and runs here; one that cannot is a visible skip."""
    available = backends.get(builder).availability()
    if not available.can_run:
        pytest.skip(available.reason)
    reason = REFUSED.get(builder, {}).get(request.node.originalname)
    taken = request.node.callspec.params.get("dtype") == "float32"
    if reason and not taken:
        request.applymarker(pytest.mark.xfail(strict=True, raises=BackendError, reason=reason))
    return builder


def bounded(model) -> Exported:
    """Give every dimension of a graph a largest size, for engines that want one."""
    exported = as_exported(model)
    signature = exported.signature
    dims = {name: dataclasses.replace(allowed, max=64) for name, allowed in signature.dims.items()}
    return exported.replace(signature=dataclasses.replace(signature, dims=dims))


@pytest.fixture
def compiled(backend, tmp_path):
    """Compile a graph for the backend."""

    def compile_(model, name="engine") -> Engine:
        return ferry.compile(model, Target(backend), tmp_path / name)

    return compile_


def only(outputs):
    (value,) = outputs.values()
    return value


def test_it_says_what_it_is(builder):
    found = get_backend(builder)
    assert found.name == builder
    assert found.availability().version
    capabilities = found.capabilities()
    assert "fp32" in capabilities.precisions
    assert capabilities.max_opset >= 20
    assert capabilities.dynamic_shapes


def test_dynamic_sizes(compiled):
    with compiled(double()).open() as session:
        for n in (1, 2, 7, 1):
            x = np.random.default_rng(n).random((n, 3), np.float32)
            np.testing.assert_allclose(only(session.run({"x": x})), 2 * x)
        nothing = np.zeros((0, 3), np.float32)
        right_or_refused(lambda: only(session.run({"x": nothing})), nothing)


def test_several_inputs_and_outputs_keep_their_names_and_order(compiled):
    nodes = [helper.make_node("Sub", ["a", "b"], ["z"]), helper.make_node("Add", ["a", "b"], ["c"])]
    values = [("b", "float32", [2]), ("a", "float32", [2])]
    model = graph(nodes, values, [("z", "float32", [2]), ("c", "float32", [2])])
    with compiled(model).open() as session:
        got = session.run({"a": np.float32([5, 6]), "b": np.float32([1, 2])})
    assert list(got) == ["z", "c"]
    np.testing.assert_array_equal(got["z"], [4, 4])
    np.testing.assert_array_equal(got["c"], [6, 8])


def test_an_input_without_effect_is_still_an_input(compiled):
    values = [("unused", "float32", ["k"]), ("x", "float32", ["n"])]
    model = graph([helper.make_node("Neg", ["x"], ["y"])], values, [("y", "float32", ["n"])])
    with compiled(model).open() as session:
        got = session.run({"unused": np.zeros(7, np.float32), "x": np.float32([1, 2])})
        np.testing.assert_array_equal(only(got), [-1, -2])
        with pytest.raises(InputError, match="'unused' is missing"):
            session.run({"x": np.float32([1, 2])})


@pytest.mark.parametrize("operator", ["Max", "Sum", "Dropout", "Identity"])
def test_an_operator_that_does_nothing_beside_inputs_without_effect(compiled, operator):
    nodes = [helper.make_node(operator, [name], [out]) for name, out in (("a", "p"), ("b", "q"))]
    nodes += [helper.make_node("Neg", ["c"], ["r"]), helper.make_node("Neg", ["dead"], ["nobody_asks"])]
    values = [[(name, "float32", ["n"]) for name in names] for names in (("unused", "c", "b", "dead", "a"), "rqp")]
    x = {name: np.float32([place, -place]) for place, name in enumerate("abc", 1)}
    for without in (["unused", "dead"], ["dead"], ["unused"], []):
        inputs = [value for value in values[0] if value[0] not in without]
        model = graph(nodes[: 3 if "dead" in without else 4], inputs, values[1])
        with compiled(model, f"without {len(without)} {without[:1]}").open() as session:
            got = session.run({**{name: np.zeros(2, np.float32) for name, *_ in inputs}, **x})
        for name, expected in {"p": x["a"], "q": x["b"], "r": -x["c"]}.items():
            np.testing.assert_array_equal(got[name], expected, name)


def test_outputs_that_are_one_tensor_an_input_or_a_constant(compiled):
    copies = [("t", "b"), ("t", "a"), ("x", "same"), ("k", "constant")]
    nodes = [helper.make_node("Neg", ["x"], ["t"])]
    nodes += [helper.make_node("Identity", [source], [name]) for source, name in copies]
    outputs = [("b", "float32", ["n"]), ("t", "float32", ["n"]), ("same", "float32", ["n"])]
    outputs += [("constant", "int64", [2]), ("a", "float32", ["n"])]
    constant = helper.make_tensor("k", TensorProto.INT64, [2], [3, 4])
    with compiled(graph(nodes, [("x", "float32", ["n"])], outputs, [constant])).open() as session:
        x = np.float32([1, 2])
        got = session.run({"x": x})
    assert list(got) == ["b", "t", "same", "constant", "a"]
    for name, expected in {"b": -x, "t": -x, "a": -x, "same": x, "constant": [3, 4]}.items():
        np.testing.assert_array_equal(got[name], expected, name)
    got["same"][:] = 9
    np.testing.assert_array_equal(x, [1, 2])  # an output is the caller's own


def test_a_weight_that_is_listed_as_an_input(compiled):
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [3, 4])
    inputs = [("w", "float32", [2]), ("x", "float32", [2])]
    model = graph([helper.make_node("Mul", ["x", "w"], ["y"])], inputs, [("y", "float32", [2])], [weight])
    with compiled(model).open() as session:
        np.testing.assert_array_equal(only(session.run({"x": np.ones(2, np.float32)})), [3, 4])


def test_outputs_of_one_call_outlive_the_next(compiled):
    with compiled(double()).open() as session:
        first = only(session.run({"x": np.ones((1, 3), np.float32)}))
        session.run({"x": np.zeros((1, 3), np.float32)})
    np.testing.assert_array_equal(first, [[2, 2, 2]])


def test_names_may_be_anything(compiled):
    nodes = [helper.make_node("Neg", ['a,b <&"> é'], ["out,1"]), helper.make_node("Abs", ["a"], ["a:0"])]
    inputs = [('a,b <&"> é', "float32", [1]), ("a", "float32", [1])]
    with compiled(graph(nodes, inputs, [("out,1", "float32", [1]), ("a:0", "float32", [1])])).open() as session:
        got = session.run({'a,b <&"> é': np.float32([1]), "a": np.float32([-5])})
    assert got == {"out,1": np.float32(-1), "a:0": np.float32(5)}


def test_local_functions(compiled):
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    twice = helper.make_function("own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], opsets[:1])
    thrice = helper.make_function(
        "own",
        "Thrice",
        ["a"],
        ["c"],
        [helper.make_node("Twice", ["a"], ["b"], domain="own"), helper.make_node("Add", ["a", "b"], ["c"])],
        opsets,
    )
    model = double()
    model.graph.node[0].CopyFrom(helper.make_node("Thrice", ["x"], ["y"], domain="own"))
    model.functions.extend([twice, thrice])
    model.opset_import.append(opsets[1])
    before = model.SerializeToString()
    with compiled(model).open() as session:
        np.testing.assert_array_equal(only(session.run({"x": np.ones((1, 3), np.float32)})), [[3, 3, 3]])
    assert model.SerializeToString() == before


def test_inputs_without_elements(compiled):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("NonZero", ["x"], ["places"]),
        helper.make_node("Concat", ["x", "x"], ["joined"], axis=0),
    ]
    outputs = [("product", "float32", ["n", 2]), ("sum", "float32", []), ("places", "int64", [2, None])]
    outputs.append(("joined", "float32", [None, 4]))
    weights = helper.make_tensor("w", TensorProto.FLOAT, [4, 2], np.ones(8))
    with compiled(graph(nodes, [("x", "float32", ["n", 4])], outputs, [weights])).open() as session:
        for n in (0, 3, 0):
            got = session.run({"x": np.ones((n, 4), np.float32)})
            assert {k: v.shape for k, v in got.items()} == {
                "product": (n, 2), "sum": (), "places": (2, 4 * n), "joined": (2 * n, 4)
            }  # fmt: skip
            assert got["sum"] == 4 * n


def test_sizes_that_depend_on_values(compiled):
    values = [("x", "float32", ["n", 3])], [("y", "int64", [2, None])]
    with compiled(graph([helper.make_node("NonZero", ["x"], ["y"])], *values)).open() as session:
        for n in (1, 3, 2):
            np.testing.assert_array_equal(only(session.run({"x": np.eye(n, 3, dtype=np.float32)})), [range(n)] * 2)


def test_branches(compiled):
    branches = {
        f"{which}_branch": helper.make_graph(
            [helper.make_node(op, ["x"], [which])], which, [], [helper.make_tensor_value_info(which, 1, None)]
        )
        for which, op in (("then", "Neg"), ("else", "Abs"))
    }
    inputs = [("x", "float32", ["n"]), ("choice", "bool", [])]
    model = graph([helper.make_node("If", ["choice"], ["y"], **branches)], inputs, [("y", "float32", ["n"])])
    with compiled(model).open() as session:
        for choice, expected in ((True, [2, -3]), (False, [2, 3])):
            got = only(session.run({"x": np.float32([-2, 3]), "choice": np.array(choice)}))
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", [t for t in TYPES if t != "bool"])
def test_dtypes(compiled, dtype):
    with compiled(double(dtype)).open() as session:
        got = only(session.run({"x": np.arange(6, dtype=dtype).reshape(2, 3)}))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, 2 * np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_infinities_and_nan_come_through(compiled, dtype):
    x = np.array([[np.inf, -np.inf, np.nan]], dtype)
    with compiled(double(dtype)).open() as session:
        np.testing.assert_array_equal(only(session.run({"x": x})), x)


@pytest.mark.parametrize("operator", ["Relu", "Exp", "Max"])
def test_nan_is_not_lost_on_the_way(request, backend, compiled, operator):
    known_gap(request, backend, "openvino", "its kernels for the CPU take NaN for a number")
    if operator == "Exp":
        known_gap(request, backend, "ncnn", "its kernel takes NaN for a number")
    inputs = ["x", "one"] if operator == "Max" else ["x"]
    one = helper.make_tensor("one", TensorProto.FLOAT, [], [1.0])
    values = [("x", "float32", ["n"])], [("y", "float32", ["n"])]
    with compiled(graph([helper.make_node(operator, inputs, ["y"])], *values, [one])).open() as session:
        assert np.isnan(only(session.run({"x": np.float32([np.nan])}))).all()


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_integers_wrap_around(request, backend, compiled, dtype):
    if dtype == "uint8":
        known_gap(request, backend, "openvino", "its 8-bit integers stop at their ends")
    x = np.full((1, 3), np.iinfo(dtype).max, dtype)
    with compiled(double(dtype)).open() as session:
        np.testing.assert_array_equal(only(session.run({"x": x})), x + x)


@pytest.mark.parametrize("value", [2**40, -(2**31) - 1, 2**31, np.iinfo("int64").max // 2])
def test_large_integers_are_right_or_refused(compiled, value):
    x = np.array([value], np.int64)
    values = [("x", "int64", [1])], [("y", "int64", [1])]
    constant = helper.make_tensor("c", TensorProto.INT64, [1], [value])
    with compiled(graph([helper.make_node("Identity", ["x"], ["y"])], *values), "input").open() as session:
        right_or_refused(lambda: only(session.run({"x": x})), x)
    for name, node in (
        ("initializer", helper.make_node("Identity", ["c"], ["k"])),
        ("node", helper.make_node("Constant", [], ["k"], value_int=value)),
    ):
        model = graph([node, helper.make_node("Add", ["x", "k"], ["y"])], *values, [constant])

        def run(model=model, name=name):
            with compiled(model, name).open() as session:
                return only(session.run({"x": np.zeros(1, np.int64)}))

        right_or_refused(run, x)


@pytest.mark.parametrize("value", [1e300, -1e300])
def test_large_floats_are_right_or_refused(compiled, value):
    values = [("x", "float64", [1])], [("y", "float64", [1])]
    with compiled(graph([helper.make_node("Neg", ["x"], ["y"])], *values), "input").open() as session:
        right_or_refused(lambda: only(session.run({"x": np.array([value])})), [-value])

    def run():
        constant = helper.make_tensor("c", TensorProto.DOUBLE, [1], [value])
        model = graph([helper.make_node("Add", ["x", "c"], ["y"])], *values, [constant])
        with compiled(model, "constant").open() as session:
            return only(session.run({"x": np.zeros(1)}))

    right_or_refused(run, [value])


def test_an_end_beyond_every_size_is_the_end(compiled):
    bounds = [helper.make_tensor(n, TensorProto.INT64, [1], [v]) for n, v in (("from", 1), ("to", 2**63 - 1))]
    values = [("x", "int64", ["n"])], [("y", "int64", [None])]
    with compiled(graph([helper.make_node("Slice", ["x", "from", "to"], ["y"])], *values, bounds)).open() as session:
        np.testing.assert_array_equal(only(session.run({"x": np.arange(5)})), [1, 2, 3, 4])


def test_booleans(compiled):
    model = graph([helper.make_node("Not", ["x"], ["y"])], [("x", "bool", ["n"])], [("y", "bool", ["n"])])
    with compiled(model).open() as session:
        np.testing.assert_array_equal(only(session.run({"x": np.array([True, False])})), [False, True])


def test_scalars(compiled):
    scalar = graph([helper.make_node("Neg", ["x"], ["y"])], [("x", "float32", [])], [("y", "float32", [])])
    with compiled(scalar, "scalar").open() as session:
        assert only(session.run({"x": np.array(3, np.float32)})) == -3


def old(nodes, inputs, outputs, opset, ir_version, **weights) -> onnx.ModelProto:
    """Build a model of an old file format and opset, which has only to be read."""
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in group] for group in (inputs, outputs)]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "torch-jit-export", *values, initializers),
        opset_imports=[helper.make_opsetid("", opset)],
    )
    model.ir_version = ir_version
    return model


KERNEL = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)


class TestFilesOfOtherExporters:
    def test_weights_are_inputs_and_scales_an_attribute(self, compiled):
        bias = np.float32([1, 2, 3, 4])
        weights = {"w": KERNEL, "b": bias}
        nodes = [
            helper.make_node("Conv", ["0", "w", "b"], ["3"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["3"], ["4"]),
            helper.make_node("Upsample", ["4"], ["5"], mode="nearest", scales=[1.0, 1.0, 2.0, 2.0]),
        ]
        inputs = [("0", [1, 3, 8, 8]), *((name, array.shape) for name, array in weights.items())]
        model = old(nodes, inputs, [("5", [1, 4, 16, 16])], opset=7, ir_version=3, **weights)
        convolution = old(nodes[:1], inputs, [("3", [1, 4, 8, 8])], opset=7, ir_version=3, **weights)
        x = np.random.default_rng(1).random((1, 3, 8, 8), np.float32)
        (expected,) = ReferenceEvaluator(convolution).run(None, {"0": x})
        with compiled(model).open() as session:
            got = only(session.run({"0": x}))
        np.testing.assert_allclose(got, np.maximum(expected, 0).repeat(2, 2).repeat(2, 3), rtol=1e-4, atol=1e-5)

    def test_sizes_have_no_names_and_inputs_are_left_empty(self, compiled):
        nodes = [
            helper.make_node("Conv", ["image:0", "w", ""], ["t"], auto_pad="SAME_UPPER"),
            helper.make_node("Clip", ["t"], ["Identity:0"], min=0.0, max=6.0),
        ]
        inputs = [("image:0", [-1, 3, None, "unk__7/2"])]
        model = old(nodes, inputs, [("Identity:0", [-1, 4, None, None])], opset=10, ir_version=5, w=KERNEL)
        same = old(nodes, inputs, [("Identity:0", [None] * 4)], opset=10, ir_version=5, w=KERNEL)
        with compiled(model).open() as session:
            for shape in ((2, 3, 8, 10), (1, 3, 12, 9)):
                x = np.random.default_rng(1).random(shape, np.float32)
                (expected,) = ReferenceEvaluator(same).run(None, {"image:0": x})
                np.testing.assert_allclose(only(session.run({"image:0": x})), expected, rtol=1e-4, atol=1e-5)

    def test_sizes_are_computed_node_by_node(self, compiled):
        nodes = [
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["y"], transB=1),  # before what it needs
            helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
            helper.make_node("Shape", ["pooled"], ["shape"]),
            helper.make_node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array(0))),
            helper.make_node("Gather", ["shape", "zero"], ["batch"]),
            helper.make_node("Unsqueeze", ["batch"], ["first"], axes=[0]),
            helper.make_node("Constant", [], ["rest"], value=numpy_helper.from_array(np.array([-1]))),
            helper.make_node("Concat", ["first", "rest"], ["sizes"], axis=0),
            helper.make_node("Reshape", ["pooled", "sizes"], ["flat"]),
        ]
        weights = {"weights": np.float32([[1, 2, 3]]), "bias": np.float32([1])}
        model = old(nodes, [("x", ["batch_size", 3, 4, 4])], [("y", ["batch_size", 1])], 9, 4, **weights)
        model.opset_import[0].domain = "ai.onnx"
        with compiled(model).open() as session:
            x = np.random.default_rng(1).random((2, 3, 4, 4), np.float32)
            expected = x.mean((2, 3)) @ weights["weights"].T + 1
            np.testing.assert_allclose(only(session.run({"x": x})), expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [[4, 3], [None, 3], ["n", 3]])
def test_a_file_of_another_exporter_is_built(builder, tmp_path, shape):
    nodes = [helper.make_node("Conv", ["x", "w", ""], ["t"]), helper.make_node("Clip", ["t"], ["y"], min=0.0, max=6.0)]
    model = old(nodes, [("x", [*shape, 8, 8])], [("y", [None, 4, 6, 6])], opset=10, ir_version=5, w=KERNEL)
    assert ferry.compile(bounded(model), Target(builder), tmp_path / "engine").files


def test_views(compiled):
    with compiled(double(shape=("n", "m"))).open() as session:
        x = np.arange(24, dtype=np.float32).reshape(4, 6)
        for view in (x.T, x[::2, ::-1], np.asfortranarray(x)):
            np.testing.assert_array_equal(only(session.run({"x": view})), 2 * view)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "'x' is missing"),
        ({"y": np.zeros((2, 3), np.float32)}, "unknown input 'y'"),
        ({"x": np.zeros((2, 3), np.float32), "z": np.zeros(1)}, "unknown input 'z'"),
        ({"x": np.zeros((2, 3))}, "must be float32, got float64"),
        ({"x": np.zeros((2, 3), ">f4")}, "byte order"),
        ({"x": np.zeros(3, np.float32)}, "must have 2 dimensions"),
        ({"x": np.zeros((2, 4), np.float32)}, "axis 1 of 'x' must be 3, got 4"),
        ({"x": [[1.0, 2.0, 3.0]]}, "numpy array"),
        (None, "dictionary"),
    ],
)
def test_wrong_inputs_are_refused_before_the_engine_sees_them(compiled, inputs, message):
    with compiled(double()).open() as session:
        session.run({"x": np.zeros((2, 3), np.float32)})
        with pytest.raises(InputError, match=message):
            session.run(inputs)


def test_threads_may_share_a_session(compiled):
    weights = np.random.default_rng(0).random((64, 64), np.float32)
    failures = []
    with compiled(times(weights)).open() as session:

        def work(seed):
            rng = np.random.default_rng(seed)
            for _ in range(20):
                x = rng.random((int(rng.integers(1, 9)), 64), np.float32)
                if not np.allclose(only(session.run({"x": x})), x @ weights, rtol=1e-4):
                    failures.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_close_and_reopen(compiled):
    engine = compiled(double())
    x = np.ones((1, 3), np.float32)
    session = engine.open()
    first = only(session.run({"x": x}))
    session.close()
    session.close()
    with pytest.raises(BackendError, match="closed"):
        session.run({"x": x})
    gc.collect()
    np.testing.assert_array_equal(first, 2 * x)  # an output outlives its session
    with Engine.load(engine.folder).open() as again:
        np.testing.assert_array_equal(only(again.run({"x": x})), first)


RUNS_AND_MEMORY = """
import sys, numpy
from torchferry.core.engine import Engine

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

engine, x = Engine.load(sys.argv[1]), numpy.ones((2, 1024), numpy.float32)
for cycle in range(40):
    with engine.open(**({"threads": 1} if sys.argv[2] == "threads" else {})) as session:
        session.run({"x": x})
    if cycle == 9:
        before = resident()
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read where Linux has it")
def test_memory_comes_back_when_a_session_is_closed(backend, compiled):
    weights = np.random.default_rng(0).random((1024, 1024), np.float32)
    engine = compiled(times(weights))
    threads = "threads" if "threads" in open_options(get_backend(backend)) else ""
    command = [sys.executable, "-c", RUNS_AND_MEMORY, str(engine.folder), threads]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Thirty sessions hold 120 MiB of weights at least, if nothing comes back.
    assert int(done.stdout) < 8 * weights.nbytes


def test_an_engine_of_another_version_opens_or_says_which_it_was(compiled):
    engine = compiled(double())
    other = dataclasses.replace(engine, versions={**engine.versions, engine.target.backend: "0.0.1"})
    other.save()
    with Engine.load(engine.folder).open() as session:
        np.testing.assert_array_equal(only(session.run({"x": np.ones((1, 3), np.float32)})), [[2, 2, 2]])
    for file in engine.files:
        (engine.folder / file).write_bytes(b"of a format that nobody knows")
    installed = engine.versions[engine.target.backend]
    message = f"compiled with {engine.target.backend} 0.0.1, and {re.escape(installed)} is installed"
    with pytest.raises(BackendError, match=message) as caught:
        other.open()
    assert caught.value.hint == f"compile it again, or install {engine.target.backend} 0.0.1"
    with pytest.raises(BackendError) as caught:
        engine.open()
    assert "0.0.1" not in str(caught.value)


def test_the_record_on_disk_is_the_engine(builder, tmp_path):
    engine = ferry.compile(bounded(double()), Target(builder), tmp_path / "engine")
    assert Engine.load(engine.folder) == engine
    assert engine.versions[engine.target.backend]


def test_a_package_round_trip(compiled, tmp_path):
    engine = compiled(double())
    ferry.pack(engine, tmp_path / "package", name="double")
    shutil.rmtree(engine.folder)
    shutil.move(tmp_path / "package", tmp_path / "elsewhere")
    with ferry.load(tmp_path / "elsewhere").open() as session:
        np.testing.assert_array_equal(only(session.run({"x": np.ones((4, 3), np.float32)})), 2 * np.ones((4, 3)))


def test_it_is_the_graph_that_was_compiled_and_not_the_file(compiled, tmp_path):
    onnx.save(double(), tmp_path / "m.onnx")
    engine = compiled(tmp_path / "m.onnx")
    (tmp_path / "m.onnx").unlink()
    with engine.open() as session:
        session.run({"x": np.ones((4, 3), np.float32)})


def test_weights_in_a_file_of_their_own(compiled, tmp_path):
    weights = np.random.default_rng(0).random((64, 64), np.float32)
    (tmp_path / "model").mkdir()
    onnx.save(times(weights), tmp_path / "model" / "m.onnx", save_as_external_data=True, location="m.weights")
    assert (tmp_path / "model" / "m.weights").stat().st_size >= weights.nbytes
    engine = compiled(tmp_path / "model" / "m.onnx")
    shutil.rmtree(tmp_path / "model")
    x = np.ones((2, 64), np.float32)
    with engine.open() as session:
        np.testing.assert_allclose(only(session.run({"x": x})), x @ weights, rtol=1e-4)


def test_a_graph_that_it_cannot_take_leaves_nothing_behind(builder, tmp_path):
    node = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nobody")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    model = helper.make_model(
        helper.make_graph([node], "g", values[:1], values[1:]),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)],
    )
    model.ir_version = 10
    with pytest.raises(BackendError, match="NoSuchOperator") as caught:
        ferry.compile(model, Target(builder), tmp_path / "engine")
    assert "\n" not in caught.value.message
    assert not list(tmp_path.iterdir())


def test_a_missing_or_unlisted_file_is_named(builder, tmp_path):
    engine = ferry.compile(bounded(double()), Target(builder), tmp_path / "engine")
    (engine.folder / engine.files[0]).unlink()
    with pytest.raises(IntegrityError, match=engine.files[0]):
        engine.open()


@pytest.mark.parametrize("damage", [lambda data: b"\x00garbage", lambda data: data[: len(data) // 2]])
def test_a_damaged_file_is_one_clear_error(compiled, capfd, damage):
    engine = compiled(times(np.ones((64, 64), np.float32)))
    for file in engine.files:
        content = (engine.folder / file).read_bytes()
        (engine.folder / file).write_bytes(damage(content))
        with pytest.raises(BackendError, match="load") as caught:
            engine.open()
        assert "\n" not in caught.value.message
        (engine.folder / file).write_bytes(content)
    engine.open().close()
    assert capfd.readouterr() == ("", "")


def test_what_fails_while_running_is_one_clear_error(compiled):
    values = [("a", "float32", ["n", 2]), ("b", "float32", ["m", 2])], [("y", "float32", ["n", 4])]
    with compiled(graph([helper.make_node("Concat", ["a", "b"], ["y"], axis=1)], *values)).open() as session:
        two, three = np.ones((2, 2), np.float32), np.ones((3, 2), np.float32)
        with pytest.raises(BackendError, match="run the model") as caught:
            session.run({"a": two, "b": three})
        assert "\n" not in caught.value.message
        np.testing.assert_array_equal(only(session.run({"a": two, "b": two})), np.ones((2, 4)))


def test_every_precision_that_it_offers_is_within_its_tolerance(backend, tmp_path):
    rng = np.random.default_rng(0)
    weights, x = rng.standard_normal((64, 8), np.float32) / 8, rng.standard_normal((5, 64), np.float32)
    for precision in get_backend(backend).capabilities().precisions:
        is_half = backend in COMPUTES_AS_TYPED and precision == "fp16"
        w, given = (weights.astype("float16"), x.astype("float16")) if is_half else (weights, x)
        graph, asked = (times(w), TOLERANCES.get(precision))
        if precision == "int8":
            symmetric = get_backend(backend).capabilities().symmetric_int8
            graph = ferry.quantize(graph, [(x,), (x / 2,)], symmetric=symmetric)
            asked = ferry.Budget(relative=0.02)
        with ferry.compile(graph, Target(backend, precision), tmp_path / precision).open() as session:
            got = compare((x @ weights).astype(w.dtype), only(session.run({"x": given})), asked)
        assert got.passed, f"{precision}: {got}"


def test_a_graph_is_computed_in_the_precision_that_was_asked_for_or_not_at_all(builder, tmp_path):
    with pytest.raises(UnsupportedError, match="int8"):
        ferry.compile(bounded(double()), Target(builder, "int8"), tmp_path / "engine")
    quantized = ferry.quantize(times(np.eye(64, dtype=np.float32)), [(np.ones((2, 64), np.float32),)])
    with pytest.raises(UnsupportedError, match="is quantised, so it would be computed in int8"):
        ferry.compile(quantized, Target(builder), tmp_path / "engine")
    assert not list(tmp_path.iterdir())


def test_a_trial_runs_the_graph_also_in_a_forked_child(backend, tmp_path):
    weights = np.random.default_rng(0).random((64, 64), np.float32)
    exported = as_exported(times(weights))
    if not get_backend(backend).capabilities().general:
        pytest.skip(f"{backend} takes some graphs only, so nothing is tried on it unless it is named")
    with get_backend(backend).trial(exported, tmp_path) as session:
        for n in (0, 3, 0, 5):
            x = np.ones((n, 64), np.float32)
            for got in (run_isolated(lambda x=x: session.run({"x": x})), session.run({"x": x})):
                np.testing.assert_allclose(only(got), x @ weights, rtol=1e-4)
    np.testing.assert_array_equal(exported.model.graph.initializers["w"].const_value.numpy(), weights)


def test_a_precision_or_device_that_it_lacks_is_refused_with_what_it_offers(builder, tmp_path):
    missing = {"fp32", "fp16", "bf16", "int8"} - set(get_backend(builder).capabilities().precisions)
    for precision in missing:
        with pytest.raises(UnsupportedError, match="fp32"):
            ferry.compile(double(), Target(builder, precision), tmp_path / "engine")
    with pytest.raises(UnsupportedError, match="nowhere"):
        ferry.compile(double(), Target(builder, device="nowhere"), tmp_path / "engine")


def test_an_existing_folder_is_kept_unless_it_may_be_replaced(builder, tmp_path):
    engine = ferry.compile(bounded(double()), Target(builder), tmp_path / "engine")
    with pytest.raises(OutputError, match="exists"):
        ferry.compile(bounded(double()), Target(builder), tmp_path / "engine")
    ferry.compile(bounded(double(shape=("n", 5))), Target(builder), engine.folder, overwrite=True)
    assert Engine.load(engine.folder).signature.inputs[0].shape == ("n", 5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="did not write it"):
        ferry.compile(bounded(double()), Target(builder), tmp_path / "mine", overwrite=True)


class TestTheTable:
    def test_an_unknown_backend_names_the_nearest(self, tmp_path):
        with pytest.raises(MissingBackendError, match="did you mean 'onnxruntime'"):
            ferry.compile(double(), Target("onnxrutime"), tmp_path / "engine")

    def test_a_missing_engine_says_how_to_install_it(self, monkeypatch, tmp_path):
        import importlib.util

        find_spec = importlib.util.find_spec
        hidden = lambda name, *rest: None if name == "onnxruntime" else find_spec(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", hidden)
        with pytest.raises(MissingBackendError, match=r"pip install 'torchferry\[onnxruntime\]'"):
            ferry.compile(double(), Target("onnxruntime"), tmp_path / "engine")

    @pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x0a" * 100])
    def test_a_file_that_is_no_onnx_model(self, tmp_path, content):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(FormatError, match="m.onnx"):
            ferry.compile(tmp_path / "m.onnx", Target(), tmp_path / "engine")

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(MissingFileError, match="m.onnx"):
            ferry.compile(tmp_path / "m.onnx", Target(), tmp_path / "engine")

    def test_something_else_altogether(self, tmp_path):
        with pytest.raises(TorchferryError, match="dict"):
            ferry.compile({}, Target(), tmp_path / "engine")

    @pytest.mark.parametrize("record", ["", "[]", "{}", '{"target": 3}'])
    def test_a_damaged_record(self, tmp_path, record):
        (tmp_path / "engine.json").write_text(record)
        with pytest.raises(FormatError, match="engine.json"):
            Engine.load(tmp_path)


def test_onnxruntime_saves_what_it_optimises_and_runs_with_one_thread(tmp_path):
    engine = ferry.compile(double(), Target("onnxruntime"), tmp_path / "engine")
    with engine.open(threads=1, spinning=True) as session:
        session.run({"x": np.ones((1, 3), np.float32)})
    with pytest.raises(TypeError, match="thread_count"):
        engine.open(thread_count=1)

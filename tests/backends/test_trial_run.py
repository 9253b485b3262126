"""Every compiled engine is run once on made-up inputs, and only what is the engine's fault is held against it."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import torchferry as ferry
from torchferry import backends
from torchferry.backends.trial_run import sizes_to_try
from torchferry.core.errors import BackendError
from torchferry.core.signature import DimRange, Relation, Signature, TensorSpec
from torchferry.core.target import Target

needs_onnxruntime = pytest.mark.skipif(
    not backends.get("onnxruntime").availability().ok, reason="onnxruntime is not installed"
)


def graph(nodes, inputs, outputs, **initializers):
    values = [[helper.make_tensor_value_info(n, t, s) for n, t, s in group] for group in (inputs, outputs)]
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in initializers.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *values, weights), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


@needs_onnxruntime
def test_what_opens_and_then_fails_to_run_is_no_engine(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["shape", "two"], ["sizes"]),
        helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], mode="cubic"),  # of 3 axes: known when it runs
    ]
    values = [("x", TensorProto.FLOAT, ["n", "h", "w"])], [("y", TensorProto.FLOAT, [None, None, None])]
    message = r"^'onnxruntime' compiles the graph and then fails at 'x' \[.*Resize node '': 'Cubic' mode"
    with pytest.raises(BackendError, match=message):
        ferry.compile(graph(nodes, *values, two=np.int64([2])), Target("onnxruntime"), tmp_path / "engine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_what_made_up_numbers_do_to_the_graph_itself_is_not_held_against_the_engine(tmp_path, backend):
    if not backends.get(backend).availability().ok:
        pytest.skip(f"{backend} is not installed")
    node = helper.make_node("Reshape", ["x", "sizes"], ["y"])  # neither zeros nor ones are right
    values = [("x", TensorProto.FLOAT, [6]), ("sizes", TensorProto.INT64, [2])], [("y", TensorProto.FLOAT, ["a", "b"])]
    with ferry.compile(graph([node], *values), Target(backend), tmp_path / "engine").open() as session:
        got = session.run({"x": np.zeros(6, np.float32), "sizes": np.array([2, 3])})
    assert got["y"].shape == (2, 3)


@needs_onnxruntime
def test_scales_that_nobody_would_give_are_not_held_against_the_engine(tmp_path):
    node = helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="cubic")  # in two axes, which 0..1 would not be
    inputs = [("x", TensorProto.FLOAT, [1, 3, 8, 8]), ("scales", TensorProto.FLOAT, [4])]
    model = graph([node], inputs, [("y", TensorProto.FLOAT, [None, None, None, None])])
    with ferry.compile(model, Target("onnxruntime"), tmp_path / "engine").open() as session:
        given = {"x": np.ones((1, 3, 8, 8), np.float32), "scales": np.float32([1, 1, 2, 2])}
        assert session.run(given)["y"].shape == (1, 3, 16, 16)


@needs_onnxruntime
def test_integers_are_zeros_for_an_index_and_ones_for_a_divisor(tmp_path):
    inputs = [("x", TensorProto.INT64, ["n"]), ("divisor", TensorProto.INT64, [])]
    modulo = graph([helper.make_node("Mod", ["x", "divisor"], ["y"])], inputs, [("y", TensorProto.INT64, ["n"])])
    ferry.compile(modulo, Target("onnxruntime"), tmp_path / "modulo")
    lookup = helper.make_node("Gather", ["table", "x"], ["y"])
    one_row = graph([lookup], inputs[:1], [("y", TensorProto.FLOAT, ["n", 3])], table=np.ones((1, 3), np.float32))
    ferry.compile(one_row, Target("onnxruntime"), tmp_path / "lookup")


class TestSizesToTry:
    image = TensorSpec("x", "float32", ("batch", 3, "height", "width"))

    def signature(self, relations=(), **dims):
        ranges = {"batch": DimRange(), "height": DimRange(), "width": DimRange(), **dims}
        return Signature((self.image,), (), ranges, tuple(Relation(text) for text in relations))

    def test_they_differ_from_each_other(self):
        tried = sizes_to_try(self.signature())
        assert len(tried) == 3
        for sizes in tried:
            assert sizes["height"] != sizes["width"]
        assert len({sizes["batch"] for sizes in tried}) == 3

    def test_they_keep_ranges_and_relations(self):
        limited = self.signature(["height == width", "height % 3 == 0"], batch=DimRange(4, 4))
        tried = sizes_to_try(limited)
        for sizes in tried:
            limited.check_sizes(sizes)
            assert sizes["batch"] == 4

    def test_a_fixed_graph_is_tried_once(self):
        assert sizes_to_try(Signature((TensorSpec("x", "float32", (1, 2)),), ())) == [{}]

    def test_conditions_that_nothing_meets_are_an_error(self):
        with pytest.raises(BackendError, match="fixed sizes"):
            sizes_to_try(self.signature(["height == 7 * width + 1"]))

    def test_a_range_that_fixes_a_dimension_needs_no_second_size(self):
        spec = TensorSpec("x", "float32", ("n", 2))
        assert sizes_to_try(Signature((spec,), (), {"n": DimRange(3, 3)})) == [{"n": 3}]

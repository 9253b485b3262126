"""What is particular to ncnn: it is not taken at its word."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import torchferry as ferry
from torchferry import backends
from torchferry.backends.ncnn.operators import check_operators, check_tensors
from torchferry.backends.ncnn.proof import make_cases
from torchferry.core.errors import BackendError, UnsupportedError
from torchferry.core.signature import Signature, TensorSpec
from torchferry.core.target import Target
from torchferry.graph import as_exported
from torchferry.graph.provenance import MODULE_KEY, SOURCE_KEY

available = backends.get("ncnn").availability()
needs_ncnn = pytest.mark.skipif(not available.ok, reason=available.reason)


def graph(nodes, inputs, outputs, initializers=()):
    values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in group] for group in (inputs, outputs)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", *values, list(initializers)), opset_imports=[helper.make_opsetid("", 20)]
    )
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.deep = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last = torch.nn.Linear(8, 4)

    def forward(self, x):
        x = torch.nn.functional.hardswish(self.first(x))
        x = torch.nn.functional.interpolate(self.deep(x) + x, scale_factor=2.0, mode="bilinear")
        return self.last(x.mean((2, 3))), x


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 24)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.inner(x).reshape(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


@needs_ncnn
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_at_sizes_that_pnnx_never_saw(tmp_path, precision):
    torch.manual_seed(0)
    model, example = Small().eval(), torch.rand(2, 3, 20, 24)
    exported = ferry.export(model, example, dynamic_shapes={"x": {0: "batch", 2: "height", 3: "width"}})
    engine = ferry.compile(exported, Target("ncnn", precision), tmp_path / "engine")
    report = ferry.verify(engine, model, example)
    assert report.passed
    assert len({comparison.case for comparison in report.comparisons}) > 5
    largest = max(comparison.max_abs for comparison in report.comparisons)
    # Half a unit of bfloat16's eight bits shows; fp32 is fp32, and not the fp16 that ncnn would choose.
    assert 1e-5 < largest < 5e-2 if precision == "bf16" else largest < 1e-5
    (refused,) = (finding for finding in report.findings if finding.severity == "warning")
    assert refused.code == "engine-refuses-empty"


@needs_ncnn
def test_what_pnnx_leaves_out_is_an_error_at_the_line(tmp_path):
    exported = ferry.export(Attention().eval(), torch.rand(1, 5, 8))
    with pytest.raises(UnsupportedError, match="pnnx says .* this Reshape makes 5") as caught:
        ferry.compile(exported, Target("ncnn"), tmp_path / "engine")
    assert "reshape(batch, length, 3, 2, 4)" in caught.value.where
    assert "torchferry partition" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_an_operator_that_ncnn_lacks_is_named_with_its_module_and_line():
    nodes = [helper.make_node("Softsign", ["x"], ["t"], name="soft"), helper.make_node("NonZero", ["t"], ["y"])]
    model = as_exported(graph(nodes, [("x", [2])], [("y", [2])])).model
    model.graph[0].metadata_props.update({MODULE_KEY: "body.1", SOURCE_KEY: "net.py:7 in forward: soft(x)"})
    with pytest.raises(UnsupportedError) as caught:
        check_operators(model, model)
    assert caught.value.message == "ncnn has no operator Softsign ('soft' in module 'body.1'), NonZero"
    assert caught.value.where == "net.py:7 in forward: soft(x)"
    assert "torchferry partition" in caught.value.hint


@needs_ncnn
@pytest.mark.parametrize(("power", "problem"), [(3, "off by"), (0.5, "numbers in place of NaN")])
def test_numbers_that_ncnn_gets_wrong_are_refused(tmp_path, power, problem):
    constant = helper.make_tensor("k", TensorProto.FLOAT, [], [power])
    model = graph([helper.make_node("Pow", ["x", "k"], ["y"])], [("x", [2, 8])], [("y", [2, 8])], [constant])
    with pytest.raises(BackendError, match=f"wrong numbers for 'y': .*{problem}"):
        ferry.compile(model, Target("ncnn"), tmp_path / "engine")  # of negative numbers, it knows squares alone
    assert not list(tmp_path.iterdir())


@needs_ncnn
def test_a_graph_that_is_right_at_some_sizes_only_is_refused(tmp_path):
    node = helper.make_node("Add", ["a", "b"], ["y"])
    model = graph([node], [("a", ["n", 4]), ("b", ["m", 4])], [("y", ["n", 4])])
    with pytest.raises(BackendError, match="the graph itself fails at m=2, n=3"):
        ferry.compile(model, Target("ncnn"), tmp_path / "engine")


@needs_ncnn
def test_nothing_empty_is_run(tmp_path):
    model = graph([helper.make_node("Neg", ["x"], ["y"])], [("x", ["n"])], [("y", ["n"])])
    with ferry.compile(model, Target("ncnn"), tmp_path / "engine").open(threads=1) as session:
        with pytest.raises(BackendError, match="'x' is empty"):
            session.run({"x": np.zeros(0, np.float32)})
        np.testing.assert_array_equal(session.run({"x": np.ones(2, np.float32)})["y"], [-1, -1])


@needs_ncnn
def test_without_pnnx_there_is_a_hint(tmp_path, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "pnnx" else find_spec(name, *rest)
    )
    model = graph([helper.make_node("Neg", ["x"], ["y"])], [("x", [2])], [("y", [2])])
    with pytest.raises(BackendError, match="'pnnx'.*not installed") as caught:
        ferry.compile(model, Target("ncnn"), tmp_path / "engine")
    assert "torchferry[ncnn]" in caught.value.hint


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("ids", "int64", (1, 4)), "'ids' is int64"),
        (TensorSpec("x", "float32", (None, 4)), r"got x: float32\[\?, 4\]"),
        (TensorSpec("x", "float32", None), "one axis at least"),
        (TensorSpec("x", "float32", ()), "one axis at least"),
    ],
)
def test_inputs_that_ncnn_cannot_take(spec, message):
    with pytest.raises(UnsupportedError, match=message):
        check_tensors(Signature((spec,), ()))


def test_a_graph_for_large_pictures_is_tried_at_larger_sizes():
    bounds = [helper.make_tensor(n, TensorProto.INT64, [1], [v]) for n, v in (("axis", 2), ("one", 1), ("70", 70))]
    nodes = [helper.make_node("Slice", ["x", "one", "70", "axis"], ["t"])]
    nodes += [helper.make_node("Reshape", ["t", "shape"], ["y"])]
    shape = helper.make_tensor("shape", TensorProto.INT64, [4], [0, 69, 1, -1])  # wants 70 rows at least
    model = as_exported(graph(nodes, [("x", ["n", 1, "h", "w"])], [("y", ["n", 69, 1, None])], [*bounds, shape]))
    cases = make_cases(model.model, model.signature)
    assert [case.sizes["h"] for case in cases] == [224, 336, 280]
    assert cases[0].expected[0].shape == (cases[0].sizes["n"], 69, 1, cases[0].sizes["w"])


@needs_ncnn
def test_a_package_runs_where_pnnx_and_torch_are_not_needed(tmp_path):
    import subprocess
    import sys

    model = graph([helper.make_node("Neg", ["x"], ["y"])], [("x", ["n"])], [("y", ["n"])])
    ferry.pack(ferry.compile(model, Target("ncnn"), tmp_path / "engine"), tmp_path / "package")
    code = f"""
import sys
for name in ("torch", "onnx", "onnx_ir", "pnnx"):
    sys.modules[name] = None
import numpy, torchferry
with torchferry.load({str(tmp_path / "package")!r}).open() as session:
    print(session.run({{"x": numpy.ones(3, "float32")}})["y"].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[-1.0, -1.0, -1.0]\n"


@needs_ncnn
def test_marks_and_other_functions_vanish_by_a_named_pass(tmp_path):
    class Marked(torch.nn.Module):
        def forward(self, x):
            return -ferry.mark_tensors("inside", x * 2)

    exported = ferry.export(Marked(), torch.rand(2, 3), apply_marks=True)
    assert as_exported(exported).model.functions
    engine = ferry.compile(exported, Target("ncnn"), tmp_path / "engine")
    assert engine.adaptations[0].startswith("inline-functions")
    with engine.open() as session:
        (got,) = session.run({"x": np.ones((2, 3), np.float32)}).values()
    np.testing.assert_array_equal(got, np.full((2, 3), -2))

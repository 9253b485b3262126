"""A tiny model that doubles a picture's size, compiled and packed."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from torchferry import backends
from torchferry.core.compare import Tolerance, compare
from torchferry.core.report import Report
from torchferry.core.target import Target
from torchferry.package import Postprocess, Preprocess, pack


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory):
    scales = numpy_helper.from_array(np.float32([1, 1, 2, 2]), "scales")
    graph = helper.make_graph(
        [helper.make_node("Resize", ["image", "", "scales"], ["big"], mode="nearest")],
        "double",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info("big", TensorProto.FLOAT, ["batch", 3, "2*height", "2*width"])],
        [scales],
    )
    path = tmp_path_factory.mktemp("onnx") / "double.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture(scope="session")
def engine(onnx_file, tmp_path_factory):
    return backends.compile(onnx_file, Target("onnxruntime"), tmp_path_factory.mktemp("engine") / "ort")


@pytest.fixture(scope="session")
def reference_engine(onnx_file, tmp_path_factory):
    return backends.compile(onnx_file, Target("reference"), tmp_path_factory.mktemp("engine") / "reference")


@pytest.fixture(scope="session")
def report():
    ones = np.ones(3, np.float32)
    cases = [("2x2", 0.0), ("5x7", 0.25)]
    comparisons = [compare(ones, ones + np.float32(e), Tolerance(0.5, 0), name="big", case=c) for c, e in cases]
    return Report("double: PyTorch against onnxruntime", comparisons=tuple(comparisons))


@pytest.fixture
def packed(engine, report, tmp_path):
    """A package with everything in it."""
    return pack(
        engine,
        tmp_path / "double",
        report=report,
        preprocess={"image": Preprocess()},
        postprocess={"big": Postprocess()},
        rewrites={"torch.Tensor.repeat": 2},
        versions={"torch": "2.13"},
    )

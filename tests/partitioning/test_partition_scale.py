"""Weights in external data are never loaded for a cut."""

import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from partition_graphs import model, node, values

from torchferry.partitioning import join, partition

SIDE = 1 << 14  # a weight of SIDE x SIDE float32 is 1 GiB
PROGRAM = """
import resource, sys
from torchferry.partitioning import join, partition
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parts = partition(sys.argv[1], [dict(end="b"), "rest"])
joined = join(parts)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used, [part.weights_bytes for part in (*parts, joined)])
"""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model of 1 GiB whose data is a hole in a file, without types inside, so that they have to be inferred."""
    big = TensorProto(name="big", data_type=TensorProto.FLOAT, dims=[SIDE, SIDE], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "big.data"), ("offset", "0"), ("length", str(4 * SIDE * SIDE))):
        big.external_data.add(key=key, value=value)
    nodes = [node("MatMul", "x big", "a"), node("Relu", "a", "b"), node("MatMul", "b big", "c"), node("Exp", "c", "y")]
    graph = model(nodes, values(f"x float n,{SIDE}"), values(f"y float n,{SIDE}"), [big])
    (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
    with (tmp_path / "big.data").open("wb") as file:
        file.truncate(4 * SIDE * SIDE)
    return tmp_path / "m.onnx"


def test_memory_is_that_of_the_graph(large):
    done = subprocess.run([sys.executable, "-c", PROGRAM, large], capture_output=True, text=True, check=True)
    kibibytes, sizes = done.stdout.split(" ", 1)
    assert int(kibibytes) < 64 << 10
    assert sizes.strip() == str([4 * SIDE * SIDE] * 3)


def test_parts_refer_to_the_same_file(large):
    parts = partition(large, [{"end": "b"}, "rest"])
    for part in (*parts, join(parts)):
        tensor = part.model.graph.initializers["big"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert Path(tensor.path).samefile(large.parent / "big.data")
    assert parts[1].signature.inputs[0].shape == ("n", SIDE)


def test_saved_parts_have_their_own_copy(tmp_path):
    weights = helper.make_tensor("w", TensorProto.FLOAT, [512, 4], bytes(range(256)) * 32, raw=True)
    nodes = [node("Relu", "x", "a"), node("MatMul", "a w", "y")]
    graph = model(nodes, values("x float n,512"), values("y float n,4"), [weights])
    onnx.save(graph, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    partition(tmp_path / "m.onnx", [{"end": "a", "name": "front"}, "rest"], out=tmp_path / "out")
    (tmp_path / "w.bin").unlink()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["front.onnx", "rest.onnx", "rest.onnx.data"]
    loaded = onnx.load(tmp_path / "out" / "rest.onnx")
    assert loaded.graph.initializer[0].raw_data == bytes(range(256)) * 32

"""A cut of a file, where only the parts become onnx-ir's, is the same as one of the whole in memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from partition_graphs import mark, model, node, proto_of, values, weight
from test_partition_properties import graphs

from torchferry.core.errors import FormatError, MissingFileError, TorchferryError
from torchferry.graph.provenance import SOURCE_KEY
from torchferry.partitioning import partition
from torchferry.partitioning.outline import outlined


def outcome(whole, parts):
    """Return what a cut gives, as bytes and signatures, or the message of what refuses it."""
    try:
        made = partition(whole, parts)
    except TorchferryError as exc:
        return str(exc)
    for part in made:
        onnx.checker.check_model(proto_of(part))
    return [(normal(proto_of(part)), part.signature) for part in made]


def normal(proto: onnx.ModelProto) -> str:
    """Return a model as text, without the order of what has none."""
    for each in (proto.graph.value_info, proto.graph.initializer, proto.opset_import, proto.metadata_props):
        entries = sorted(each, key=lambda entry: entry.SerializeToString(deterministic=True))
        del each[:]
        each.extend(entries)
    return str(proto)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(graphs(), st.data())
def test_any_cut(graph, data):
    names = [name for name in graph.pool if name.startswith(("v", "x", "w"))]
    start, end = (data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True)) for _ in "ab")
    parts = [{"start": start, "end": end}] + ["rest"] * data.draw(st.booleans())
    for cut in (parts, [{"end": end}, "rest"], [{"start": start}]):
        proto = graph.proto()
        with_path = saved(proto)
        assert (outlined(with_path) is None) == any(each.op_type == "If" for each in graph.nodes)
        assert outcome(with_path, cut) == outcome(proto, cut)


def saved(proto: onnx.ModelProto) -> Path:
    path = saved.folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    saved.folder = tmp_path_factory.mktemp("files")


def test_metadata_marks_and_modules():
    nodes = [
        mark("x", "x_marked", "net", "input", item="image"),
        node("Add", "x_marked w", "a", module="backbone"),
        mark("a", "a_marked", "mid", "output"),
        node("Relu", "a_marked", "b", module="head"),
        mark("b", "y", "net", "output"),
    ]
    nodes[1].metadata_props.add(key=SOURCE_KEY, value="net.py:3")
    infos = values("a float n,4")
    infos[0].metadata_props.add(key="k", value="v")
    proto = model(nodes, values("x float n,4"), values("y float n,4"), [weight("w", np.ones(4, np.float32))], infos)
    proto.producer_name, proto.producer_version, proto.doc_string, proto.model_version = "p", "1", "doc", 7
    proto.metadata_props.add(key="author", value="me")
    proto.graph.metadata_props.add(key="g", value="1")
    proto.graph.doc_string = "of the graph"
    for parts in (
        [{"start": "net:input", "end": "mid:output"}, "rest"],
        [{"start": "mid:output"}],
        [{"end": "backbone:output", "output_names": "c"}, "rest"],
        [{"start": "head:input", "end": "y", "name": "tail"}],
        [{"start": "nett:input"}],
    ):
        assert outcome(saved(proto), parts) == outcome(proto, parts)


def test_types_are_inferred_where_the_file_tells_none():
    nodes = [node("Exp", "x", "a"), node("Relu", "a", "b"), node("Shape", "b", "y")]
    proto = model(nodes, values("x float n,4"), values("y int64 2"))
    assert outcome(saved(proto), [{"start": "a", "end": "b"}]) == outcome(proto, [{"start": "a", "end": "b"}])


def with_branch():
    branches = {
        name: helper.make_graph([node(op, "x", f"{name}_out")], name, [], values(f"{name}_out float 4"))
        for name, op in (("then_branch", "Exp"), ("else_branch", "Relu"))
    }
    nodes = [node("Abs", "x", "a"), node("If", "c", "b", **branches), node("Add", "a b", "y")]
    return model(nodes, values("x float 4", "c bool "), values("y float 4"))


def with_function():
    body = [helper.make_node("Exp", ["x"], ["y"])]
    function = helper.make_function("own", "F", ["x"], ["y"], body, [helper.make_opsetid("", 20)])
    nodes = [node("Relu", "x", "a"), node("F", "a", "y", domain="own")]
    infos = values("a float 4")
    return model(nodes, values("x float 4"), values("y float 4"), (), infos, [function], ["own"])


@pytest.mark.parametrize("make", [with_branch, with_function])
def test_what_has_no_outline_is_read_whole(make):
    proto = make()
    assert outlined(saved(proto)) is None
    assert outcome(saved(proto), [{"end": "a"}, "rest"]) == outcome(proto, [{"end": "a"}, "rest"])


@pytest.mark.parametrize("breaks", ["computed twice", "given and computed", "no order"])
def test_a_broken_graph_is_refused_alike(breaks):
    nodes = [node("Exp", "x", "a"), node("Relu", "a", "y")]
    proto = model(nodes, values("x float 4"), values("y float 4"))
    if breaks == "computed twice":
        proto.graph.node.append(node("Abs", "x", "a"))
    elif breaks == "given and computed":
        proto.graph.input.extend(values("a float 4"))
    else:
        proto.graph.node.sort(key=lambda each: each.op_type, reverse=True)
    results = []
    for whole in (saved(proto), ir.load(saved(proto)) if breaks == "no order" else saved(proto)):
        with pytest.raises(TorchferryError) as caught:
            partition(whole, [{"start": "a", "end": "y"}])
        results.append(str(caught.value))
    assert results[0] == results[1]


class TestFiles:
    def external(self, folder: Path, location: str) -> Path:
        big = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", "16"), ("length", "16")):
            big.external_data.add(key=key, value=value)
        nodes = [node("Exp", "x", "a"), node("Add", "a w", "y")]
        proto = model(nodes, values("x float 4"), values("y float 4"), [big], values("a float 4"))
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
        return folder / "m.onnx"

    def test_weights_outside_the_folder_are_refused(self, tmp_path):
        (tmp_path / "secret").write_bytes(bytes(32))
        (tmp_path / "in").mkdir()
        with pytest.raises(FormatError, match="outside its own folder"):
            partition(self.external(tmp_path / "in", "../secret"), [{"end": "a"}])

    def test_missing_weights_are_named(self, tmp_path):
        with pytest.raises(MissingFileError, match=r"w\.bin"):
            partition(self.external(tmp_path, "w.bin"), [{"end": "a"}])

    def test_the_part_has_the_weights_it_needs(self, tmp_path):
        (tmp_path / "w.bin").write_bytes(bytes(16) + np.arange(4, dtype=np.float32).tobytes())
        (part,) = partition(self.external(tmp_path, "w.bin"), [{"start": "a"}])
        assert part.weights_bytes == 16
        part.save(tmp_path / "part.onnx")
        (tmp_path / "w.bin").unlink()
        loaded = onnx.load(tmp_path / "part.onnx")
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(loaded.graph.initializer[0]), np.arange(4.0))

    def test_the_program_needs_no_torch(self, tmp_path):
        (tmp_path / "w.bin").write_bytes(bytes(32))
        program = (
            "import sys; from torchferry.cli.main import main; "
            "assert main(['partition', sys.argv[1], '--start', 'a', '-o', sys.argv[2]]) == 0; "
            "print({'torch', 'onnxruntime', 'scipy'} & sys.modules.keys() or 'light')"
        )
        command = [sys.executable, "-c", program, self.external(tmp_path, "w.bin"), tmp_path / "part.onnx"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "light"

    def test_what_is_no_model(self, tmp_path):
        (tmp_path / "m.onnx").write_bytes(b"\x00" * 40)
        with pytest.raises(FormatError, match="is not"):
            partition(tmp_path / "m.onnx", [{"end": "a"}])

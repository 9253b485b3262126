"""What an engine lacks is named all at once, with module and line, and where to cut the graph around it."""

import re
import shlex

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import torchferry as ferry
from torchferry import backends
from torchferry.cli import main
from torchferry.core.errors import UnsupportedError
from torchferry.core.target import Target

LACKING_DET = [
    pytest.param(name, marks=pytest.mark.skipif(not backends.get(name).availability().ok, reason=f"no {name}"))
    for name in ("openvino", "ncnn", "tensorrt-rtx")
]
WITH_ALL = [
    pytest.param(name, marks=pytest.mark.skipif(not backends.get(name).availability().ok, reason=f"no {name}"))
    for name in backends.names()
]


def graph(nodes, inputs, outputs) -> onnx.ModelProto:
    known = [["behind it"], inputs, outputs]  # nobody can tell what an unknown operator gives
    inside, *values = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4]) for n in names] for names in known]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", *values, value_info=inside), opset_imports=opsets)
    model.ir_version = 10
    return model


def foreign(operator, inputs, outputs):
    return helper.make_node(operator, inputs, outputs, domain="nobody")


def refused(model, backend, folder) -> UnsupportedError:
    with pytest.raises(UnsupportedError) as caught:
        ferry.compile(model, Target(backend), folder / "engine")
    assert not (folder / "engine").exists()
    return caught.value


def cuts(hint: str) -> list[list[str]]:
    """Return the options of every command that a hint proposes."""
    return [shlex.split(command)[3:] for command in re.findall(r"`(torchferry partition MODEL.onnx [^`]+)`", hint)]


@pytest.mark.parametrize("backend", WITH_ALL)
def test_operators_of_nobodys_and_the_parts_around_them_that_the_engine_takes(tmp_path, backend):
    nodes = [
        helper.make_node("Abs", ["x"], ["before"], name="first"),
        foreign("Odd", ["before"], ["t"]),
        foreign("Odd", ["t"], ["u"]),
        helper.make_node("Relu", ["u"], ["between"]),
        foreign("Even", ["between", "before"], ["behind it"]),
        helper.make_node("Neg", ["behind it"], ["y"], name="last"),
    ]
    model = graph(nodes, ["x"], ["y"])
    error = refused(model, backend, tmp_path)
    assert re.search(r"nobody::Odd \(x2\b.*\), nobody::Even", error.message)
    assert "\n" not in error.message
    assert cuts(error.hint) == [["--end", "before"], ["--start", "behind it"]]
    onnx.save(model, tmp_path / "m.onnx")
    for number, options in enumerate(cuts(error.hint)):
        part = tmp_path / f"part{number}.onnx"
        assert main(["partition", str(tmp_path / "m.onnx"), *options, "-o", str(part)]) == 0
        ferry.compile(part, Target(backend), tmp_path / f"engine{number}")


@pytest.mark.parametrize("backend", LACKING_DET)
def test_an_operator_of_onnx_with_its_module_and_line(tmp_path, backend):
    class Body(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.det(x)

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Body()

        def forward(self, x):
            return self.body(x + 1) * torch.linalg.det(x)

    model = ferry.export(Whole(), torch.rand(2, 3, 3))
    error = refused(model, backend, tmp_path)
    assert re.search(r"Det \(x2, first '\w+' in module 'body'\)", error.message)
    first, second = error.where.split("; ")
    assert "torch.linalg.det(x)" in first
    assert "self.body(x + 1) * torch.linalg.det(x)" in second
    before, after = cuts(error.hint)
    assert before[::2] == ["--end"]
    assert after[::2] == ["--start", "--start"]
    head, tail = ferry.partition(model, [{"end": before[1::2]}, {"start": after[1::2]}])
    assert [node.op_type for node in head.model.graph] == ["Add"]
    assert [node.op_type for node in tail.model.graph] == ["Mul"]


@pytest.mark.parametrize("backend", WITH_ALL)
def test_a_cut_is_not_proposed_where_the_user_would_not_find_it(tmp_path, backend):
    opset = helper.make_opsetid("nobody", 1)
    odd = helper.make_function("own", "Wrapped", ["a"], ["b"], [foreign("Odd", ["a"], ["b"])], [opset])
    model = graph([helper.make_node("Wrapped", ["x"], ["y"], domain="own")], ["x"], ["y"])
    model.functions.append(odd)
    model.opset_import.append(helper.make_opsetid("own", 1))
    error = refused(model, backend, tmp_path)
    assert "nobody::Odd" in error.message
    assert cuts(error.hint) == []
    assert "torchferry partition" in error.hint

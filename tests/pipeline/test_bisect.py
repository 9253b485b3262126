"""Finding the operator that an engine gets wrong."""

import json
import math

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchferry as ferry
from torchferry.core.errors import BackendError, ConfigError, MissingBackendError
from torchferry.pipeline.bisect import bisect
from torchferry.pipeline.steps import Steps


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


class Net(nn.Module):
    def __init__(self, blocks=4):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(8) for _ in range(blocks)])
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def picture(seed=0):
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


class Faulty:
    """ONNX Runtime, wrong from one node of the graph on: that node's value is off."""

    def __init__(self, folder, value, wrong):
        self.folder, self.value, self.wrong, self.builds = folder, value, wrong, 0

    def __call__(self, exported):
        model = exported.model.clone()
        for node in list(model.graph):
            for output in node.outputs:
                if output.name == self.value:
                    self.plant(model.graph, output)
        self.builds += 1
        engine = ferry.compile(model, ferry.Target(), self.folder / f"{self.builds}")
        return engine.open()

    def plant(self, graph, output):
        factor = ir.Value(name="fault", const_value=ir.tensor(np.float32(self.wrong), name="fault"))
        graph.register_initializer(factor)
        producer = output.producer()
        users = list(output.uses())
        fault = ir.node("Mul", [output, factor])
        fault.outputs[0].shape, fault.outputs[0].dtype = output.shape, output.dtype
        graph.insert_after(producer, fault)
        for user, place in users:
            user.replace_input_with(place, fault.outputs[0])
        name, output.name = output.name, f"{output.name}_right"
        fault.outputs[0].name = name
        for place, value in enumerate(graph.outputs):
            if value is output:
                graph.outputs[place] = fault.outputs[0]


def test_an_engine_that_is_right(net):
    found = bisect(net, "onnxruntime", (picture(),))
    assert found.passed
    assert found.module is None
    assert [p.passed for p in found.prefixes] == [True]
    assert "within" in str(found)


@pytest.mark.parametrize(
    ("value", "module", "operator"),
    [("relu_2", "blocks.2", "relu"), ("add", "blocks.0", "add"), ("mean", "", "mean")],
)
def test_names_the_module_and_the_line(net, tmp_path, value, module, operator):
    faulty = Faulty(tmp_path, value, 1.5)
    found = bisect(net, faulty, (picture(),))
    assert (found.module, found.suspects[-1]) == (module, value)
    assert operator in found.operator
    assert "test_bisect.py" in found.source
    assert faulty.builds == len(found.prefixes) <= math.ceil(math.log2(found.total)) + 1
    wrong = next(t for t in found.tensors if t.name == value)
    assert wrong.actual == pytest.approx(1.5 * wrong.expected, rel=1e-5)
    assert module in str(found)
    assert json.loads(found.to_json())["module"] == module


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_finds_whichever_operator_is_wrong(net, tmp_path_factory, data):
    names = [f"{name}_{i}" for name in ("relu", "add") for i in range(1, 4)]
    value = data.draw(st.sampled_from([*names, "mean", "linear"]))
    found = bisect(net, Faulty(tmp_path_factory.mktemp("engines"), value, 2.0), (picture(),))
    assert found.suspects[-1] == value


def test_nan_and_infinities_are_counted(net, tmp_path):
    found = bisect(net, Faulty(tmp_path, "relu_1", np.inf), (picture(),))
    assert found.suspects[-1] == "relu_1"
    assert sum(t.not_finite for t in found.tensors) > 0
    assert "no longer finite" in str(found)
    json.loads(found.to_json())


def test_only_one_of_many_inputs_shows_the_fault(tmp_path):
    class Gate(nn.Module):
        def forward(self, x):
            return (x * 2).exp().tanh() + 1

    small, large = (torch.full((1, 4), 0.0),), (torch.full((1, 4), -1.0),)
    faulty = Faulty(tmp_path, "mul", 1.3)  # zero stays zero
    assert bisect(Gate(), Faulty(tmp_path / "a", "mul", 1.3), [small]).passed
    assert bisect(Gate(), faulty, [small, large]).suspects == ("mul",)


def test_bf16_of_a_real_engine(net):
    pytest.importorskip("openvino")
    target = ferry.Target("openvino", precision="bf16")
    found = bisect(net, target, (picture(),), tolerance=ferry.Tolerance(1e-5, 1e-5))
    assert not found.passed
    assert found.engine == "openvino-bf16"
    assert bisect(net, target, (picture(),)).passed  # within bf16's own tolerance


def test_a_nan_that_a_real_engine_loses():
    pytest.importorskip("openvino")

    class Roots(nn.Module):
        def forward(self, x):
            return (x.sqrt() * 2).relu() + 1

    found = bisect(Roots(), "openvino", (torch.tensor([[-1.0, 4.0]]),))
    assert found.suspects[-1] == "relu"


def test_several_outputs_and_branches(tmp_path):
    class Two(nn.Module):
        def forward(self, x):
            a, b = (x + 1).chunk(2, -1)
            return {"sum": a + b, "product": (a * b).sigmoid()}

    found = bisect(Two(), Faulty(tmp_path, "mul", 3.0), torch.rand(2, 6))
    assert found.suspects[-1] == "mul"


def test_a_prefix_that_the_engine_refuses(net, tmp_path):
    folders = (tmp_path / str(number) for number in range(100))

    def engine(exported):
        if any(node.op_type == "ReduceMean" for node in exported.model.graph):
            raise BackendError("no ReduceMean here")
        return ferry.compile(exported, ferry.Target(), next(folders)).open()

    found = bisect(net, engine, (picture(),))
    assert found.suspects[-1] == "mean"
    assert "no ReduceMean here" in str(found)


def test_every_build_is_told(net):
    steps = Steps()
    bisect(net, "onnxruntime", (picture(),), steps=steps)
    assert [step.name.partition(":")[0] for step in steps.done] == ["export", "engine"]


def test_the_module_is_left_as_it_was(net):
    net.train()
    try:
        bisect(net, "onnxruntime", (picture(),))
        assert net.training
    finally:
        net.eval()


@pytest.mark.parametrize(
    ("engine", "inputs", "error"),
    [
        ("onnxruntime", None, ConfigError),
        ("nothing", (picture(),), MissingBackendError),
        (3, (picture(),), ConfigError),
    ],
)
def test_mistakes(net, engine, inputs, error):
    with pytest.raises(error):
        bisect(net, engine, inputs)

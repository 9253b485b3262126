"""Marks: boundaries that stay in the graph, and change nothing."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.core.errors import ConfigError
from torchferry.rewrite import FunctionRewriter


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclass
class Features:
    low: torch.Tensor
    high: torch.Tensor
    scale: float = 2.0


class Model(nn.Module):
    """Calls a function; its outputs are the tensors of what that gives."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def export(function, *, marks=True, **options):
    shapes = {"x": {0: "n"}}
    return ferry.export(Model(function).eval(), torch.rand(3, 4), apply_marks=marks, dynamic_shapes=shapes, **options)


def marks(exported):
    """Return what every Mark of the graph is called."""
    found = []
    for node in exported.model.graph:
        if node.domain == "torchferry.mark":
            values = {name: attribute.value for name, attribute in node.attributes.items()}
            found.append("{func}[{func_id}]:{type}.{name} {id}".format(**values))
    return found


def test_a_mark_has_every_attribute():
    @ferry.mark("body", inputs=["input"], outputs=["result"], level=3, kind="test")
    def body(x):
        return x * 2

    exported = export(lambda x: body(x + 1))
    nodes = [node for node in exported.model.graph if node.op_type == "Mark"]
    values = [{name: attribute.value for name, attribute in node.attributes.items()} for node in nodes]
    shared = {"func": "body", "func_id": 0, "id": 0, "level": 3, "kind": "test", "dtype": 1, "shape": (-1, 4)}
    assert values == [{**shared, "type": "input", "name": "input"}, {**shared, "type": "output", "name": "result"}]
    assert "return x * 2" not in str(exported.provenance(nodes[0]))
    assert "test_marks.py" in str(exported.provenance(nodes[0]))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "reference"])
def test_a_marked_model_runs_everywhere(backend, tmp_path):
    @ferry.mark("body", level=3)
    def body(x):
        return torch.relu(x) * 2

    model = Model(lambda x: body(x) + body(x - 1)).eval()
    exported = ferry.export(model, torch.rand(3, 4), apply_marks=True, dynamic_shapes={"x": {0: "n"}})
    assert len(marks(exported)) == 4
    exported.save(tmp_path / "end2end.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "end2end.onnx"), full_check=True)
    engine = ferry.compile(exported, ferry.Target(backend), tmp_path / "engine")
    ferry.verify(engine, model, torch.randn(5, 4)).raise_for_failure()


class TestNames:
    def test_parameters_and_output_where_none_are_given(self):
        @ferry.mark("body")
        def body(left, other, scale=2, *, right):
            return left * scale + other - right

        exported = export(lambda x: body(x, other=x + 1, right=x * 3))
        assert marks(exported) == [
            "body[0]:input.left 0",
            "body[0]:input.other 1",
            "body[0]:input.right 2",
            "body[0]:output.output 0",
        ]

    def test_of_methods_and_only_of_what_holds_tensors(self):
        class Head:
            @ferry.mark("head", inputs=["feats"], outputs=["maps"])
            def forward(self, feats, metas=None, rescale=False):
                return [feat * 2 for feat in feats]

        exported = export(lambda x: torch.cat(Head().forward([x, x + 1], metas=[{"scale": 1}])))
        assert marks(exported) == [
            "head[0]:input.feats.0 0",
            "head[0]:input.feats.1 1",
            "head[0]:output.maps.0 0",
            "head[0]:output.maps.1 1",
        ]

    def test_one_for_each_part_of_what_is_returned(self):
        @ferry.mark("detector", outputs=["dets", "labels", "masks"])
        def detector(x):
            return x * 2, "no tensor", [x.sum(1), x.mean(1)]

        def used(x):
            dets, _, (first, second) = detector(x)
            return dets, first + second

        assert marks(export(used))[1:] == [
            "detector[0]:output.dets 0",
            "detector[0]:output.labels.0 1",
            "detector[0]:output.labels.1 2",
        ]

    @pytest.mark.parametrize(
        ("inputs", "outputs", "message"),
        [
            (["a"], None, "'body' has 1 input names .a., the call has 2 inputs"),
            (["a", "a"], None, "two inputs of the same name"),
            (None, ["a", "b"], "has 2 output names .a, b., the call has 3 outputs"),
            (None, ["a", "b", "b"], "two outputs of the same name"),
        ],
    )
    def test_too_few_and_equal_ones_are_refused(self, inputs, outputs, message):
        @ferry.mark("body", inputs=inputs, outputs=outputs)
        def body(x, y):
            return x, y, x + y

        with pytest.raises(ConfigError, match=message):
            export(lambda x: body(x, x + 1)[2])
        assert len(body(torch.ones(2), torch.ones(2))) == 3  # in eager nobody looks at them


def ordered(x):
    return OrderedDict(a=x, b={"c": x + 1, "d": "text"})


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda x: Pair(x, x + 1), ["value.first", "value.second"]),
        (lambda x: Features(x, x + 1), ["value.low", "value.high"]),
        (ordered, ["value.a", "value.b.c"]),
        (lambda x: [x, (x + 1, None)], ["value.0", "value.1.0"]),
    ],
    ids=["namedtuple", "dataclass", "dict", "list"],
)
def test_structures_keep_their_kind(build, names):
    kinds = []

    @ferry.mark("body")
    def body(value):
        kinds.append(type(value))
        leaves = torch.utils._pytree.tree_leaves(vars(value) if isinstance(value, Features) else value)
        return sum(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))

    found = marks(export(lambda x: body(build(x))))
    assert [mark.split(" ")[0].removeprefix("body[0]:input.") for mark in found[:-1]] == names
    assert set(kinds) == {type(build(torch.ones(1)))}


class TestCounts:
    def test_calls_are_counted_and_exports_start_over(self):
        @ferry.mark("body", outputs=["y"])
        def body(x):
            return x * 2

        for _ in range(2):
            exported = export(lambda x: body(body(x)))
            assert marks(exported) == [
                "body[0]:input.x 0",
                "body[0]:output.y 0",
                "body[1]:input.x 0",
                "body[1]:output.y 0",
            ]

    def test_tensors_of_a_structure_have_numbers(self):
        def forward(x):
            value = ferry.mark_tensors("feats", {"a": x, "b": [x + 1, x + 2]})
            again = ferry.mark_tensors("feats", value["a"] * 2)
            return value["a"] + value["b"][0] + value["b"][1] + again

        assert sorted(marks(export(forward))) == [
            "feats[0]:output.feats.a 0",
            "feats[0]:output.feats.b.0 1",
            "feats[0]:output.feats.b.1 2",
            "feats[1]:output.feats 0",
        ]


def test_a_function_inside_a_rewriter_is_marked():
    rewriters = FunctionRewriter()

    @rewriters.register_rewriter("torch.nn.functional.relu")
    def relu(x, inplace=False):
        @ferry.mark("relu", inputs=["before"], outputs=["after"])
        def inner(value):
            return value.clamp(min=0)

        return inner(x)

    exported = export(nn.functional.relu, function_rewriter=rewriters)
    assert marks(exported) == ["relu[0]:input.before 0", "relu[0]:output.after 0"]


def test_nothing_is_left_where_no_marks_are_asked_for():
    calls = []

    @ferry.mark("body", inputs=["a", "a"])
    def body(x):
        """Return twice as much."""
        calls.append(x)
        return x * 2

    x = torch.ones(2)
    assert ferry.mark_tensors("x", x) is x
    body(x)
    assert calls[0] is x
    assert (body.__name__, body.__doc__) == ("body", "Return twice as much.")
    exported = export(lambda x: ferry.mark_tensors("x", body(x)), marks=False)
    assert [node.op_type for node in exported.model.graph] == ["Mul"]
    assert exported.model.functions == {}


def test_marks_do_not_change_what_is_computed(tmp_path):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    marked = ferry.mark("layers")(layers)
    x = torch.randn(6, 4)
    results = []
    for apply in (True, False):
        engine = ferry.compile(export(marked, marks=apply), ferry.Target(), tmp_path / str(apply))
        with engine.open() as session:
            results.append(next(iter(session.run({"x": x.numpy()}).values())))
    np.testing.assert_array_equal(*results)


def test_marks_leave_the_batch_unbounded():
    """torch chooses a convolution's algorithm on fake tensors, and NNPACK's takes batches below 16 alone."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = nn.Conv2d(3, 3, 3, 2, 1)
            self.head = nn.Conv2d(3, 5, 1)

        def forward(self, x):
            deep = ferry.mark_tensors("deep", self.deep(x))
            return self.head(ferry.mark_tensors("x", x) + nn.functional.interpolate(deep, size=x.shape[-2:]))

    shapes = {"x": {0: "n", 2: "h", 3: "w"}}
    exported = ferry.export(Head().eval(), torch.rand(2, 3, 8, 8), apply_marks=True, dynamic_shapes=shapes)
    assert exported.signature.dims["n"].max is None

"""Every part against the whole, the joined parts, and what PyTorch has at the boundaries."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry import backends
from torchferry.core.errors import BackendError, ConfigError, FormatError, InputError
from torchferry.partitioning import join, split
from torchferry.verification import parts as parts_module

CUT = [{"name": "backbone", "end": "features:output"}, {"name": "head", "start": "features:output"}]


class Detector(nn.Module):
    """A backbone whose features are marked, and a head with two outputs."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 5, 1)

    @ferry.mark("detector", inputs=["image"])
    def forward(self, x):
        maps = self.head(ferry.mark_tensors("features", self.backbone(x)))
        return maps[:, :4], maps[:, 4].sigmoid()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Detector().eval()


@pytest.fixture(scope="module")
def exported(model):
    return ferry.export(
        model,
        torch.rand(1, 3, 8, 8),
        apply_marks=True,
        dynamic_shapes={"x": {0: "n"}},
        output_names=["boxes", "scores"],
    )


@pytest.fixture(scope="module")
def plan(exported):
    return ferry.plan_partition(exported, CUT)


@pytest.fixture(scope="module")
def engines(plan, tmp_path_factory):
    return ferry.compile_parts(plan, ferry.Target(), tmp_path_factory.mktemp("parts") / "out")


@pytest.fixture
def x():
    return torch.rand(2, 3, 8, 8)


def changed(part, by=0.5):
    """Return a copy of a part with one number of one weight changed."""
    copy = part.replace(model=part.model.clone())
    weight = max(copy.model.graph.initializers.values(), key=lambda each: each.const_value.size)
    array = weight.const_value.numpy().copy()
    array.flat[0] += by
    weight.const_value = ir.tensor(array, name=weight.name)
    return copy


def names(report):
    return [comparison.name for comparison in report.comparisons]


def codes(report):
    return [finding.code for finding in report.findings]


def test_every_output_of_every_part_is_compared(engines, plan, model, x):
    report = ferry.verify_parts(engines, plan, x, source=model).raise_for_failure()
    assert names(report)[:5] == ["backbone/relu", "head/boxes", "head/scores", "joined/boxes", "joined/scores"]
    assert {c.case for c in report.comparisons} == {"data"}
    assert all(c.max_abs == 0 for c in report.comparisons if c.name.startswith("joined/"))
    assert set(names(report)[5:]) == {
        "x at detector[0]:input.0",
        "relu at features[0]:output.0",
        "boxes at output of the model",
        "boxes at detector[0]:output.0",
        "scores at output of the model",
        "scores at detector[0]:output.1",
    }
    assert report.facts["parts"]["backbone"] == "onnxruntime-fp32, atol 0.0001, rtol 0.0001"


@pytest.mark.parametrize(
    "given",
    [
        lambda x: (x,),
        lambda x: {"x": x},
        lambda x: {"x": x.numpy()},
        lambda x: x.numpy(),
        lambda x: iter([(x,)]),
        lambda x: [(x.numpy(),)],
    ],
)
def test_inputs_may_be_given_as_for_verify(engines, plan, model, x, given):
    assert ferry.verify_parts(engines, plan, given(x)).passed
    assert ferry.verify_parts(engines, plan, given(x), source=model).passed


def test_several_sets_of_inputs(engines, plan, x):
    report = ferry.verify_parts(engines, plan, [(x,), (x[:1],)])
    assert {c.case for c in report.comparisons} == {"data 1", "data 2"}
    assert {c.shape[0] for c in report.comparisons if c.case == "data 2"} == {1}


def test_a_source_brings_its_own_inputs(engines, plan, model, x):
    assert "relu at features[0]:output.0" in names(ferry.verify_parts(engines, plan, source=ferry.Source(model, x)))


@pytest.mark.parametrize("broken", ["backbone", "head"])
def test_a_part_with_one_changed_weight_is_the_only_one_named(engines, plan, x, tmp_path, broken):
    parts = dict(zip((part.name for part in plan.parts), split(plan), strict=True))
    wrong = ferry.compile(changed(parts[broken]), ferry.Target(), tmp_path / "wrong")
    report = ferry.verify_parts({**engines, broken: wrong}, plan, x)
    assert set(codes(report)) == {"part-differs"}
    assert all(f"part '{broken}' differs on onnxruntime-fp32: output '" in f.message for f in report.findings)
    failed = {c.name.partition("/")[0] for c in report.comparisons if not c.passed}
    assert failed == {broken}
    with pytest.raises(ferry.TorchferryError, match=broken):
        report.raise_for_failure()


@pytest.mark.parametrize(("by", "found"), [(0.0, []), (1e-6, ["joined-not-equal"] * 2), (0.5, ["joined-differs"] * 2)])
def test_joined_parts_that_are_not_the_whole(engines, plan, x, monkeypatch, by, found):
    """What joining could do wrong is put in its place."""
    monkeypatch.setattr(parts_module, "join", lambda parts: changed(join(parts), by))
    report = ferry.verify_parts(engines, plan, x)
    assert codes(report) == found
    assert report.passed == (by < 0.1)
    assert [c.passed for c in report.comparisons if "joined" not in c.name] == [True] * 3


def test_an_engine_that_optimises_by_itself_records_as_well(engines, plan, x, monkeypatch):
    monkeypatch.setattr(backends, "names", lambda: ("openvino",))
    report = ferry.verify_parts(engines, plan, x).raise_for_failure()
    assert len(report.comparisons) == 5


def test_the_tolerance_is_what_decides(engines, plan, x, tmp_path):
    wrong = ferry.compile(changed(split(plan)[0], by=1e-3), ferry.Target(), tmp_path / "wrong")
    engines = {**engines, "backbone": wrong}
    assert not ferry.verify_parts(engines, plan, x).passed
    assert ferry.verify_parts(engines, plan, x, tolerance=ferry.Tolerance(atol=0.1, rtol=0)).passed


def test_a_graph_that_is_not_the_model_is_found_at_its_boundary(exported, model, x, tmp_path):
    """The parts equal the whole, but the whole does not equal PyTorch from the features on."""
    wrong = changed(exported)
    plan = ferry.plan_partition(wrong, CUT)
    engines = ferry.compile_parts(plan, ferry.Target(), tmp_path / "out")
    report = ferry.verify_parts(engines, plan, x, source=model)
    assert set(codes(report)) == {"boundary-differs"}
    places = {f.message.partition(":")[0] for f in report.findings}
    assert "'relu' is not what PyTorch has at features[0]" in places
    assert all(c.passed for c in report.comparisons if "/" in c.name or c.name.startswith("x at"))


def test_a_module_boundary_is_compared(exported, model, x, tmp_path):
    plan = ferry.plan_partition(exported, [{"name": "head", "start": "head:input", "end": "head:output"}])
    engines = ferry.compile_parts(plan, ferry.Target(), tmp_path / "out")
    report = ferry.verify_parts(engines, plan, x, source=model).raise_for_failure()
    assert {"relu at head:input", "conv2d_1 at head:output"} <= set(names(report))
    assert not [name for name in names(report) if name.startswith("joined/")]
    assert report.facts["parts"]["joined again"].startswith("not compared")


@pytest.mark.parametrize("channels", [3, 4])
def test_a_module_that_an_optimisation_merged_is_found(x, tmp_path, channels):
    """The exporter folds the batch norm into the convolution before it, so both begin at the same tensor."""
    model = nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels)).eval()
    plan = ferry.plan_partition(ferry.export(model, x), [{"name": "norm", "start": "1:input"}])
    engines = ferry.compile_parts(plan, ferry.Target(), tmp_path / "out")
    report = ferry.verify_parts(engines, plan, x, source=model)
    if channels == 3:
        assert codes(report) == ["boundary-differs"]
        assert "'input' is not what PyTorch has at 1:input" in report.findings[0].message
        assert "at a mark" in report.findings[0].hint
    else:
        assert report.passed
        assert "dtype and shape" in report.facts["not compared with PyTorch"]["input at 1:input"]


def test_a_module_called_twice_is_left_out(x, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.inner(self.inner(x).relu())

    model = Twice().eval()
    exported = ferry.export(model, x)
    plan = ferry.plan_partition(exported, [{"name": "twice", "end": "relu"}, "rest"])
    whole = ferry.plan_partition(exported, [{"name": "all", "start": "inner:input.0"}])
    for each, out in ((plan, "a"), (whole, "b")):
        engines = ferry.compile_parts(each, ferry.Target(), tmp_path / out)
        report = ferry.verify_parts(engines, each, x, source=model).raise_for_failure()
        assert not [name for name in names(report) if "inner" in name]
    assert set(report.facts["not compared with PyTorch"].values()) == {"PyTorch calls the module 2 times"}


def test_a_module_with_other_outputs_and_without_the_marks(engines, plan, model, x):
    class Features(nn.Module):
        def forward(self, x):
            return model.backbone(x)

    report = ferry.verify_parts(engines, plan, x, source=Features()).raise_for_failure()
    left_out = report.facts["not compared with PyTorch"]
    assert left_out["boxes at output of the model"] == "PyTorch gives 1 outputs, the graph 2"
    assert left_out["relu at features[0]:output.0"] == "PyTorch comes by no such mark"


def test_the_model_is_left_as_it_was(engines, plan, x):
    model = Detector().train()
    hooks = len(model.head._forward_hooks), len(model.head._forward_pre_hooks)
    ferry.verify_parts(engines, plan, x, source=model)
    assert model.training
    assert hooks == (len(model.head._forward_hooks), len(model.head._forward_pre_hooks))


def test_an_engine_that_fails_is_named_and_the_others_are_run(engines, plan, x):
    signature = dataclasses.replace(engines["head"].signature, dims={"n": ferry.DimRange(min=5)})
    narrow = dataclasses.replace(engines["head"], signature=signature)
    report = ferry.verify_parts({**engines, "head": narrow}, plan, x)
    assert codes(report) == ["part-fails"]
    assert "part 'head' fails on onnxruntime-fp32: 'n' = 2 is outside" in report.findings[0].message
    assert names(report) == ["backbone/relu", "joined/boxes", "joined/scores"]


def test_an_engine_for_other_machines_is_said(engines, plan, x, monkeypatch, tmp_path):
    backend = backends.get("reference")
    head = ferry.compile(split(plan)[1], ferry.Target("reference"), tmp_path / "head")
    elsewhere = dataclasses.replace(backend.availability(), can_run=False, reason="it needs a phone")
    monkeypatch.setattr(backend, "availability", lambda: elsewhere)
    report = ferry.verify_parts({**engines, "head": head}, plan, x)
    assert report.passed
    assert codes(report) == ["part-not-run"]
    assert "part 'head' was not run on reference-fp32: it needs a phone" in report.findings[0].message
    assert names(report) == ["backbone/relu", "joined/boxes", "joined/scores"]


def test_each_precision_has_its_own_tolerance(plan, model, x, tmp_path):
    targets = {"backbone": ferry.Target("openvino", "bf16"), "head": ferry.Target()}
    engines = ferry.compile_parts(plan, targets, tmp_path / "out")
    report = ferry.verify_parts(engines, plan, x, source=model).raise_for_failure()
    asked = {c.name: c.tolerance.atol for c in report.comparisons}
    assert (asked["backbone/relu"], asked["head/boxes"]) == (5e-2, 1e-4)
    error = {c.name: c.max_abs for c in report.comparisons}
    assert error["backbone/relu"] > 1e-4
    assert error["head/boxes"] < 1e-5  # it gets the whole's features, not those of the other part


def test_outputs_that_have_other_names_in_the_parts(exported, model, x, tmp_path):
    parts = [{"name": "backbone", "end": "features:output", "output_names": "maps"}]
    parts.append({"name": "head", "start": "features:output", "output_names": ["relu", "classes"]})
    plan = ferry.plan_partition(exported, parts)
    engines = ferry.compile_parts(plan, ferry.Target(), tmp_path / "out")
    report = ferry.verify_parts(engines, plan, x, source=model).raise_for_failure()
    assert {"backbone/maps", "head/relu", "head/classes", "joined/relu", "joined/classes"} <= set(names(report))
    assert "relu at output of the model" in names(report)


def test_parts_that_start_at_a_weight(tmp_path):
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.rand(4))

        def forward(self, x):
            return (x + self.bias).exp()

    exported = ferry.export(Biased().eval(), torch.rand(4))
    plan = ferry.plan_partition(exported, [{"name": "exp", "start": ["x", "bias"]}])
    engines = ferry.compile_parts(plan, ferry.Target(), tmp_path / "out")
    ferry.verify_parts(engines, plan, torch.rand(4)).raise_for_failure()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, "no inputs to run"),
        (iter([]), "no inputs to run"),
        ({"y": torch.rand(1, 3, 8, 8)}, "unknown input 'y'"),
        ({}, "input 'x' is missing"),
        ((torch.rand(1, 3, 8, 8), torch.rand(1)), "2 arrays were given for the 1 inputs x"),
        (torch.rand(1, 3, 8), "must have 4 dimensions"),
    ],
)
def test_inputs_that_do_not_fit(engines, plan, tmp_path, inputs, message):
    with pytest.raises(InputError, match=message):
        ferry.verify_parts(engines, plan, inputs)
    with pytest.raises(InputError, match=message):
        ferry.record_calibration(plan, inputs, tmp_path / "calibration")
    assert not (tmp_path / "calibration").exists()


def test_engines_that_are_not_those_of_the_parts(engines, plan, x):
    with pytest.raises(ConfigError, match="part 'head' has no engine"):
        ferry.verify_parts({"backbone": engines["backbone"]}, plan, x)
    with pytest.raises(ConfigError, match="no part 'haed' to give a engine to") as caught:
        ferry.verify_parts({**engines, "haed": engines["head"]}, plan, x)
    assert "did you mean 'head'" in caught.value.hint


def test_a_whole_that_no_engine_here_runs(tmp_path):
    node = ir.node("Absent", [ir.val("x", ir.DataType.FLOAT, [2])], domain="nowhere")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(node.inputs, node.outputs, nodes=[node], opset_imports={"": 20, "nowhere": 1}, name="g")
    plan = ferry.plan_partition(ir.Model(graph, ir_version=10), ["rest"])
    with pytest.raises(BackendError, match="no engine here runs the whole graph: .*Absent"):
        ferry.record_calibration(plan, np.ones(2, np.float32), tmp_path / "calibration")
    assert not list(tmp_path.iterdir())


class TestCalibration:
    def test_what_goes_into_a_part_is_what_the_whole_has_there(self, plan, engines, x, tmp_path):
        files = ferry.record_calibration(plan, [(x,), (x[:1],)], tmp_path / "calibration")
        assert files == {name: tmp_path / "calibration" / f"{name}.npz" for name in ("backbone", "head")}
        first, second = ferry.read_samples(files["backbone"])
        np.testing.assert_array_equal(first["x"], x.numpy())
        np.testing.assert_array_equal(second["x"], x[:1].numpy())
        with engines["backbone"].open() as session:
            for sample, given in zip(ferry.read_samples(files["head"]), (x, x[:1]), strict=True):
                np.testing.assert_allclose(sample["relu"], session.run({"x": given.numpy()})["relu"], atol=1e-5)

    def test_a_part_is_verified_with_it(self, plan, x, model, tmp_path):
        files = ferry.record_calibration(plan, x, tmp_path)
        (samples,) = [ferry.read_samples(files["head"])]
        engine = ferry.compile(split(plan)[1], ferry.Target(), tmp_path / "head")

        class Head(nn.Module):
            def forward(self, relu):
                maps = model.head(relu)
                return maps[:, :4], maps[:, 4].sigmoid()

        calls = [{name: torch.tensor(array) for name, array in sample.items()} for sample in samples]
        ferry.verify(engine, Head(), calls).raise_for_failure()

    def test_files_are_replaced_in_a_folder_that_is_there(self, plan, x, tmp_path):
        (tmp_path / "other.txt").write_text("stays")
        ferry.record_calibration(plan, x, tmp_path)
        files = ferry.record_calibration(plan, x[:1], tmp_path)
        assert len(ferry.read_samples(files["head"])[0]["relu"]) == 1
        assert {path.name for path in tmp_path.iterdir()} == {"other.txt", "backbone.npz", "head.npz"}

    def test_a_plain_archive_is_one_sample(self, tmp_path):
        np.savez(tmp_path / "plain.npz", x=np.ones(3), y=np.zeros(2))
        (sample,) = ferry.read_samples(tmp_path / "plain.npz")
        assert list(sample) == ["x", "y"]

    def test_ten_samples_stay_in_order(self, plan, tmp_path):
        given = [(torch.full((1, 3, 8, 8), float(at)),) for at in range(11)]
        files = ferry.record_calibration(plan, given, tmp_path)
        assert [sample["x"].max() for sample in ferry.read_samples(files["backbone"])] == list(range(11))

    def test_what_is_no_such_file_is_refused(self, tmp_path):
        (tmp_path / "text.npz").write_text("no")
        np.savez(tmp_path / "mixed.npz", **{"0/x": np.ones(1), "y": np.ones(1)})
        np.savez(tmp_path / "objects.npz", x=np.array([{}], dtype=object))
        for name, message in (("text", "not a whole"), ("mixed", "'y' without a number"), ("objects", "not a whole")):
            with pytest.raises(FormatError, match=message):
                ferry.read_samples(tmp_path / f"{name}.npz")

"""Choosing the target: what is tried, what is within the budget, what is packed, and what is said of the rest.

What is compiled and verified here is real. The times are given, so that the choice is always the same one; those of
``tests/cli/test_auto_command.py`` are measured.
"""

import json

import numpy as np
import pytest
import torch

import torchferry as ferry
from torchferry import FUNCTION_REWRITER, backends
from torchferry.core.errors import ConfigError, ExportError, UnsupportedError, VerificationError
from torchferry.core.target import AUTO
from torchferry.pipeline import auto
from torchferry.pipeline.bench_report import BenchRow, Measured
from torchferry.pipeline.steps import Steps

PERCENT = ferry.Budget(relative=0.01)


def _has_bf16():
    return backends.get("openvino").availability().ok and "bf16" in backends.get("openvino").capabilities().precisions


needs_bf16 = pytest.mark.skipif(not _has_bf16(), reason="this machine has no OpenVINO that computes in bf16")
needs_ncnn = pytest.mark.skipif(not backends.get("ncnn").availability().ok, reason="ncnn is not installed")


class Watched:
    """Every step that was begun."""

    def __init__(self):
        self.begun = []

    def started(self, name):
        self.begun.append(name)

    def finished(self, step):
        pass


@pytest.fixture
def source():
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh()).eval()
    return ferry.Source(net, torch.rand(4, 32), dynamic_shapes={"input": {0: "n"}}, output_names=("y",))


@pytest.fixture
def here(monkeypatch):
    """Say which engines run here, and what a run of each target takes in ms; one without fails when it is measured."""

    def say(*names, **milliseconds):
        def measure(contenders, plan, steps):
            assert plan.race
            return tuple(_row(contender.name, milliseconds.get(contender.name)) for contender in contenders)

        monkeypatch.setattr(backends, "running", lambda: names)
        monkeypatch.setattr(auto, "measure", measure)

    return say


def _row(name, milliseconds):
    if milliseconds is None:
        return BenchRow(name, failed="its process ended with SIGSEGV")
    return BenchRow(name, measured=Measured(((milliseconds / 1e3,),) * 5, 0.0, 0.0, 0.0, 0.0))


def _tried(package):
    """What the report in a package says of every target."""
    facts = json.loads((package.folder / "report.json").read_text())["facts"]["tried"]
    assert ": float32[4, 32]; " in facts.pop("measured on")
    return facts


def _ids(package):
    return [entry.id for entry in package.manifest.engines]


THREE = {"onnxruntime-fp32": 3.0, "openvino-fp32": 2.0, "openvino-bf16": 1.0}


@needs_bf16
@pytest.mark.parametrize(
    ("asked", "budget", "milliseconds", "packed"),
    [
        (AUTO, PERCENT, THREE, ["openvino-bf16", "openvino-fp32"]),
        (AUTO, ferry.Budget(relative=1e-4), THREE, ["openvino-fp32"]),
        (AUTO, None, THREE, ["openvino-fp32"]),
        (AUTO, PERCENT, THREE | {"onnxruntime-fp32": 1.04}, ["onnxruntime-fp32"]),
        (ferry.Target(AUTO, "bf16"), PERCENT, THREE, ["openvino-bf16"]),
        (AUTO, PERCENT, {"openvino-bf16": 1.0}, ["openvino-bf16"]),
    ],
    ids=["1 %", "0.01 %", "none", "tie", "bf16", "the rest fails"],
)
def test_the_fastest_within_the_budget_is_packed(here, source, tmp_path, asked, budget, milliseconds, packed):
    here("onnxruntime", "openvino", "reference", **milliseconds)
    package = ferry.deploy(source, asked, tmp_path / "out", budget=budget, sizes={})
    assert _ids(package) == packed
    assert package.manifest.verified.passed
    with ferry.load(tmp_path / "out").open() as session, torch.no_grad():
        x = torch.rand(7, 32)
        np.testing.assert_allclose(session.run({"input": x.numpy()})["y"], source.model(x).numpy(), atol=0.02)


@needs_bf16
def test_the_table(here, source, tmp_path):
    here("onnxruntime", "openvino", **{"onnxruntime-fp32": 3.0, "openvino-fp32": 2.0})
    package = ferry.deploy(source, AUTO, tmp_path / "out", budget=ferry.Budget(max_abs=1e-4))
    tried = _tried(package)
    assert set(tried) == {f"{name}-{kind}" for name in ("onnxruntime", "openvino") for kind in ("fp32", "int8")} | {
        "openvino-bf16"
    }
    assert tried["openvino-int8"].startswith("outside")
    assert tried["onnxruntime-fp32"].startswith("within, max abs ")
    assert tried["onnxruntime-fp32"].endswith(", 3.000 ms, ratio 1.500")
    assert tried["openvino-fp32"].startswith("chosen, max abs ")
    assert tried["openvino-fp32"].endswith(", 2.000 ms, ratio 1.000")
    assert tried["openvino-bf16"].startswith("outside, max abs ")
    assert ": output 'y' differs: " in tried["openvino-bf16"]
    page = (package.folder / "report.html").read_text()
    assert all(target in page for target in tried)
    assert "<h3>tried</h3>" in page


def test_one_that_cannot_be_measured_is_left_aside(here, source, tmp_path):
    here("onnxruntime", "openvino", **{"openvino-fp32": 1.0})
    package = ferry.deploy(source, ferry.Target(AUTO, "fp32"), tmp_path / "out", sizes={})
    assert _ids(package) == ["openvino-fp32"]
    assert _tried(package)["onnxruntime-fp32"].startswith("failed, max abs ")
    assert _tried(package)["onnxruntime-fp32"].endswith(": its process ended with SIGSEGV")


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [(ferry.Budget(relative=1e-12), "outside, max abs "), (PERCENT, "failed, max abs ")],
    ids=["outside", "not measured"],
)
def test_nothing_is_left(here, source, tmp_path, budget, verdict):
    here("onnxruntime", "openvino")
    with pytest.raises(VerificationError, match=f"no engine here runs it within {budget}") as caught:
        ferry.deploy(source, ferry.Target(AUTO, "fp32"), tmp_path / "out", budget=budget, sizes={})
    for target in ("onnxruntime-fp32", "openvino-fp32"):
        assert f"\n  {target}: {verdict}" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["out.report.html"]
    page = (tmp_path / "out.report.html").read_text()
    assert "nothing-within" in page
    assert "<h3>tried</h3>" in page
    assert "y on openvino-fp32" in page


@needs_ncnn
def test_an_engine_that_does_not_take_the_graph_is_tried_once(here, tmp_path):
    class Sums(torch.nn.Module):
        def forward(self, x):
            return x.cumsum(0)

    here("onnxruntime", "ncnn", **{"onnxruntime-fp32": 1.0})
    watched = Watched()
    source = ferry.Source(Sums().eval(), torch.rand(4, 32))
    package = ferry.deploy(source, AUTO, tmp_path / "out", budget=PERCENT, steps=Steps(watched))
    assert _ids(package) == ["onnxruntime-fp32"]
    tried = _tried(package)
    assert tried["ncnn-fp32"].startswith("refused: ")
    assert "CumSum" in tried["ncnn-fp32"]
    assert tried["ncnn-bf16"] == tried["ncnn-fp32"]
    assert "compile for ncnn-fp32" in watched.begun
    assert "compile for ncnn-bf16" not in watched.begun


@pytest.mark.parametrize("fault", ["refused", "wrong"])
def test_a_model_that_cannot_be_exported_for_one_engine(here, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(FUNCTION_REWRITER, "_records", list(FUNCTION_REWRITER.records()))
    wrong = {"refused": lambda x: x if x.sum() > 0 else -x, "wrong": lambda x: x * 2}[fault]
    FUNCTION_REWRITER.register_rewriter("torch.special.expit", backend="openvino")(wrong)

    class Model(torch.nn.Module):
        def forward(self, x):
            return torch.special.expit(x)

    here("onnxruntime", "openvino", **{"onnxruntime-fp32": 1.0})
    source = ferry.Source(Model().eval(), torch.rand(4, 32))
    package = ferry.deploy(source, ferry.Target(AUTO, "fp32"), tmp_path / "out")
    assert _ids(package) == ["onnxruntime-fp32"]
    assert _tried(package)["openvino-fp32"].startswith("refused: ")

    here("openvino")  # where it is the only one, what is wrong is said as if it had been named
    with pytest.raises(ExportError if fault == "refused" else VerificationError) as automatic:
        ferry.deploy(source, AUTO, tmp_path / "other")
    with pytest.raises(type(automatic.value)) as named:
        ferry.deploy(source, "openvino", tmp_path / "other")
    assert automatic.value.message == named.value.message
    assert automatic.value.hint == named.value.hint


def test_a_device_that_no_engine_has(here, source, tmp_path):
    here("onnxruntime", "openvino")
    with pytest.raises(VerificationError, match="openvino-fp32: refused: 'openvino' runs on 'cpu' here, not on 'warp'"):
        ferry.deploy(source, ferry.Target(AUTO, "fp32", "warp"), tmp_path / "out")


def test_nothing_to_choose_from(here, source, tmp_path):
    here("reference")
    with pytest.raises(UnsupportedError, match="no engine that runs here can be chosen for 'auto-fp32'"):
        ferry.deploy(source, ferry.Target(AUTO, "fp32"), tmp_path / "out")
    with pytest.raises(ConfigError, match="it must be the only target, got 2"):
        ferry.deploy(source, [ferry.Target(AUTO), ferry.Target()], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_only_deploy_chooses(source, tmp_path):
    exported = ferry.export(source)
    for verb in (
        lambda: ferry.export(source, target=ferry.Target(AUTO)),
        lambda: ferry.compile(exported, ferry.Target(AUTO), tmp_path / "engine"),
        lambda: ferry.bench(exported, targets=[ferry.Target(AUTO)]),
    ):
        with pytest.raises(ConfigError, match="'auto' is no engine: it lets deploy choose one"):
            verb()

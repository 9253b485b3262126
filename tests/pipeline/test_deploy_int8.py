"""Deploying in int8: quantised on the data, within an error that was asked for, on engines that compute so."""

import numpy as np
import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.core.errors import ConfigError, VerificationError
from torchferry.pipeline.config import validate
from torchferry.pipeline.deploy import deploy_config
from torchferry.pipeline.steps import Steps

BUDGET = ferry.Budget(relative=0.1)
ENGINES = [ferry.Target("onnxruntime", "int8"), ferry.Target("openvino", "int8")]
SIZES = {"batch": [1, 5]}


def _data(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 3, 12, 12, generator=generator),) for _ in range(count)]


@pytest.fixture
def source():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    )
    shapes = {"input": {0: "batch"}}
    return ferry.Source(model.eval(), _data(1)[0], dynamic_shapes=shapes, output_names=("scores",))


def test_the_whole_walk(source, tmp_path):
    steps = Steps()
    package = ferry.deploy(source, ENGINES, tmp_path / "out", data=_data(8), budget=BUDGET, sizes=SIZES, steps=steps)
    details = {step.name: step.detail for step in steps.done}
    assert details["quantize for onnxruntime"] == details["quantize for openvino"] == "on 6 of 8 calls"
    verified = package.manifest.verified
    assert verified.passed
    assert [entry.id for entry in package.manifest.engines] == ["onnxruntime-int8", "openvino-int8"]
    assert set(verified.tolerances.values()) == {BUDGET}
    assert {"data 1", "data 8", "batch=1", "batch=5"} == set(verified.cases) & {
        "data 1",
        "data 8",
        "batch=1",
        "batch=5",
    }
    assert all(0.0005 < error < 0.1 for error in verified.relative.values())
    ((x,),) = _data(1, seed=5)
    for entry in package.manifest.engines:
        with ferry.load(tmp_path / "out").open(entry.id) as session, torch.no_grad():
            got = session.run({"input": x.numpy()})["scores"]
            want = source.model(x).numpy()
        assert got.dtype == np.float32
        assert 0 < np.linalg.norm(got - want) < 0.1 * np.linalg.norm(want)
    page = (tmp_path / "out" / "report.html").read_text()
    for said in ("int8: Conv 2 of 2", "the last 2 of 8 calls were not calibrated on", "Gemm x1 in fp32"):
        assert said in page


def test_it_lies_beside_fp32_of_the_same_engine(source, tmp_path):
    targets = [ferry.Target("openvino"), ferry.Target("openvino", "int8")]
    package = ferry.deploy(source, targets, tmp_path / "out", data=_data(8), budget=BUDGET, sizes={})
    errors = {name.rpartition(" on ")[2]: error for name, error in package.manifest.verified.relative.items()}
    assert errors["openvino-fp32"] < 1e-5 < errors["openvino-int8"]


def test_without_a_budget_it_is_refused_before_any_work(source, tmp_path):
    steps = Steps()
    with pytest.raises(ConfigError, match="int8 has no usual tolerance") as caught:
        ferry.deploy(source, [ferry.Target(), *ENGINES], tmp_path / "out", data=_data(8), steps=steps)
    assert "--budget relative=0.05" in caught.value.hint
    assert not steps.done
    values = {"model": {"factory": "nowhere:net"}, "inputs": ["x=1"], "out": tmp_path / "out"}
    config = validate({**values, "targets": [{"precision": "int8"}]}, "test")
    with pytest.raises(ConfigError, match="int8 has no usual tolerance"):
        deploy_config(config)
    assert not list(tmp_path.iterdir())


def test_a_budget_that_int8_does_not_keep_packs_nothing(source, tmp_path):
    with pytest.raises(VerificationError, match="relative error .* allowed 0.0001"):
        ferry.deploy(source, ENGINES[:1], tmp_path / "out", data=_data(4), budget=ferry.Budget(relative=1e-4), sizes={})
    assert [path.name for path in tmp_path.iterdir()] == ["out.report.html"]


def test_the_example_alone_is_one_call_and_a_warning(source, tmp_path):
    ferry.deploy(source, ENGINES[1:], tmp_path / "out", tolerance=ferry.Tolerance(0.2, 0.2), sizes={})
    page = (tmp_path / "out" / "report.html").read_text()
    assert "int8-one-call" in page
    assert "int8-held-out" not in page


def test_a_model_that_was_trained_for_int8_is_taken_as_it_is(tmp_path):
    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            def rounded(tensor, scale):
                return torch.fake_quantize_per_tensor_affine(tensor, scale, 0, -128, 127)

            weights = [rounded(layer.weight, 0.002) for layer in (self.first, self.last)]
            x = torch.relu(rounded(x, 0.03) @ weights[0].T)
            return rounded(x, 0.02) @ weights[1].T

    torch.manual_seed(0)
    source = ferry.Source(Trained().eval(), torch.randn(6, 16), output_names=("y",))
    steps = Steps()
    ferry.deploy(source, ENGINES[1:], tmp_path / "out", budget=ferry.Budget(relative=0.01), steps=steps)
    assert not [step for step in steps.done if step.name.startswith("quantize")]
    with pytest.raises(ferry.TorchferryError, match="is quantised, so it would be computed in int8"):
        ferry.deploy(source, [ferry.Target()], tmp_path / "other")


def test_auto_tries_int8_within_a_budget_alone(source, tmp_path):
    """How fast it is depends on the machine, so what is chosen is not looked at."""
    package = ferry.deploy(source, "auto", tmp_path / "within", data=_data(8), budget=BUDGET, sizes={})
    page = (package.folder / "report.html").read_text()
    assert "quantize for openvino" in page
    with pytest.raises(ConfigError, match="int8 has no usual tolerance"):
        ferry.deploy(source, ferry.Target("auto", "int8"), tmp_path / "none", data=_data(8))
    package = ferry.deploy(source, "auto", tmp_path / "without", data=_data(8), sizes={})
    page = (package.folder / "report.html").read_text()
    assert "refused: how much error is allowed has not been said" in page
    assert "quantize for" not in page

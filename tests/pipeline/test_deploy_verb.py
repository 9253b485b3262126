"""``ferry.deploy`` and ``ferry.export`` from Python."""

import numpy as np
import pytest
import torch

import torchferry as ferry
from torchferry.core.errors import ConfigError, MissingBackendError, OutputError, VerificationError
from torchferry.pipeline.steps import Steps


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x, factor):
        return self.conv(x) * factor


def _source(**changes):
    torch.manual_seed(0)
    given = {"args": (torch.rand(2, 3, 6, 8), torch.ones(1)), "dynamic_shapes": {"x": {0: "n", 2: "h"}}}
    return ferry.Source(Net(), **{**given, **changes})


def test_the_whole_walk(tmp_path):
    source = _source(output_names=("y",))
    steps = Steps()
    package = ferry.deploy(source, out=tmp_path / "out", name="tiny", steps=steps)
    assert [step.name.partition(" ")[0] for step in steps.done] == ["export", "compile", "verify", "pack"]
    assert package.manifest.name == "tiny"
    assert not package.manifest.preprocess
    again = ferry.load(tmp_path / "out")
    assert again.manifest == package.manifest
    x, factor = torch.rand(3, 3, 5, 8), torch.full((1,), 2.0)
    with again.open() as session, torch.no_grad():
        [y] = session.run({"x": x.numpy(), "factor": factor.numpy()}).values()
        np.testing.assert_allclose(y, source.model(x, factor).numpy(), atol=1e-5)


def test_data_tolerance_and_sizes(tmp_path):
    data = [(torch.rand(2, 3, 6, 8), torch.ones(1)), (torch.rand(4, 3, 6, 8), torch.zeros(1))]
    tolerance = ferry.Tolerance(1e-2, 0)
    package = ferry.deploy(
        _source(output_names=("y",)), out=tmp_path / "out", data=data, tolerance=tolerance, sizes={"h": [3, 4]}
    )
    verified = package.manifest.verified
    assert verified.cases == ("data 1", "data 2", "h=3", "h=4")
    assert verified.tolerances == {"y": tolerance}


def test_a_budget(tmp_path):
    budget = ferry.Budget(relative=1e-3)
    package = ferry.deploy(_source(output_names=("y",)), out=tmp_path / "out", budget=budget, sizes={})
    verified = ferry.load(tmp_path / "out").manifest.verified
    assert verified == package.manifest.verified
    assert verified.tolerances == {"y": budget}
    assert 0 < verified.relative["y"] < 1e-3
    with pytest.raises(ConfigError, match="a tolerance and a budget"):
        ferry.deploy(_source(), out=tmp_path / "other", budget=budget, tolerance=ferry.Tolerance(1, 1))


def test_a_model_that_draws_fresh_numbers_is_refused(tmp_path):
    class Noise(torch.nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    with pytest.raises(VerificationError, match="did not arrive intact") as caught:
        ferry.deploy(ferry.Source(Noise(), torch.ones(4)), out=tmp_path / "out")
    assert str(tmp_path / "out.report.html") in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["out.report.html"]


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ferry.deploy(_source(), out="new/out").folder.is_dir()
    with pytest.raises(OutputError, match="exists"):
        ferry.deploy(_source(), out="new/out")


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([], ConfigError, "no target"),
        ([ferry.Target(), ferry.Target()], ConfigError, "two targets are alike"),
        ([ferry.Target("reference", opset=18), ferry.Target()], ConfigError, "the same opset"),
        ([ferry.Target("onnxrutime")], MissingBackendError, "unknown backend"),
    ],
)
def test_targets_that_cannot_be(tmp_path, targets, error, message):
    with pytest.raises(error, match=message):
        ferry.deploy(_source(), targets, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_each_engine_is_held_to_its_own_report(tmp_path):
    targets = [ferry.Target("reference"), ferry.Target("onnxruntime")]
    verified = ferry.deploy(_source(output_names=("y",)), targets, tmp_path / "out").manifest.verified
    assert verified.max_abs.keys() == {"y on reference-fp32", "y on onnxruntime-fp32"}


def test_export_takes_a_source_or_its_parts_but_not_both():
    source = _source(input_names=("a", "b"), dynamic_shapes={"a": {0: "n"}})
    parts = ferry.export(
        source.model, source.args, dynamic_shapes={"a": {0: "n"}}, input_names=["a", "b"], output_names=["y"]
    )
    assert ferry.export(source).signature.inputs == parts.signature.inputs
    assert parts.signature.output_names == ("y",)
    with pytest.raises(ConfigError, match="a Source holds its own"):
        ferry.export(source, input_names=["a", "b"])


@pytest.mark.parametrize("args", [torch.ones(2, 2), (torch.ones(2, 2),), {"input": torch.ones(2, 2)}])
def test_export_takes_inputs_in_any_form(args):
    exported = ferry.export(torch.nn.Identity(), args)
    assert [str(spec) for spec in exported.signature.inputs] == ["input: float32[2, 2]"]

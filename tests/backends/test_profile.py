"""The times of layers, on every engine that tells them, and the answer of those that do not."""

import tempfile

import numpy as np
import pytest
import torch

import torchferry as ferry
from torchferry import backends
from torchferry.core.engine import layer_times, open_options

X = np.ones((1, 3, 16, 16), np.float32)


@pytest.fixture(scope="module")
def exported():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Softmax(1)).eval()
    return ferry.export(model, torch.from_numpy(X))


@pytest.fixture(params=backends.names())
def engine(request, exported, tmp_path, monkeypatch):
    available = backends.get(request.param).availability()
    if not (available.ok and available.can_run):
        pytest.skip(available.reason)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return ferry.compile(exported, ferry.Target(request.param), tmp_path / "engine")


def test_an_engine_that_tells_its_layers(engine, tmp_path):
    if "profile" not in open_options(backends.get(engine.target.backend)):
        with pytest.raises(TypeError), engine.open(profile=True):
            pass
        return
    with engine.open(profile=True) as session:
        for _ in range(3):
            expected = session.run({"input": X})
        layers = session.profile()
        assert any(layer.kind.startswith("Conv") for layer in layers)
        assert any(layer.kind == "Softmax" for layer in layers)
        assert all(0 <= layer.seconds < 60 for layer in layers)
        assert len({(layer.name, layer.kind) for layer in layers}) == len(layers)
        assert session.profile() == ()  # it has stopped
        again = session.run({"input": X})
    assert all((again[name] == expected[name]).all() for name in again)
    with engine.open(profile=True) as session:
        session.run({"input": X})
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_without_being_asked_none_tells(engine):
    with engine.open() as session:
        session.run({"input": X})
        assert session.profile() == ()


def test_the_median_over_runs():
    conv, relu = ("a", "Conv"), ("b", "Relu")
    runs = [{conv: 9.0, relu: 1.0}, {conv: 2.0}, {conv: 1.0, relu: 3.0}]
    assert [(layer.name, layer.kind, layer.seconds) for layer in layer_times(runs)] == [
        ("a", "Conv", 2.0),
        ("b", "Relu", 1.0),
    ]
    assert layer_times([]) == ()

"""``torchferry fp16``: what a user sees of overflow, its repair and its proof."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file

import torchferry
from torchferry.precision import fix as fix_module

MODEL = '''
"""Two convolutions; what is between them is beyond 65504."""
import torch
from torch import nn


class Big(nn.Module):
    def __init__(self, factor=3e5):
        super().__init__()
        torch.manual_seed(0)
        self.factor = factor
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.norm.weight.data.fill_(factor)
        self.last.weight.data.div_(factor)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def small():
    return Big(1.0)


big = Big
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "big.py").write_text(MODEL)
    data = np.random.default_rng(0).random((2, 1, 3, 8, 8), np.float32)
    np.savez(tmp_path / "x.npz", x=data[0])
    np.savez(tmp_path / "other.npz", x=data[1])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def big_onnx(place, ferry):
    assert ferry("export", "--model", "big.py:big", "--input", "x.npz", "-o", "big.onnx").status == 0
    return place / "big.onnx"


class TestCheck:
    def test_names_the_module_and_fails(self, ferry, place):
        ran = ferry("fp16", "check", "--model", "big.py:big", "--input", "x.npz", "--watch", "watch.html")
        assert ran.status == 1
        assert "OUT OF RANGE" in ran.out
        assert "norm" in ran.out
        assert "fp16-overflow" in ran.out or "constant-out-of-range" in ran.out
        assert "<svg" in (place / "watch.html").read_text()

    def test_a_model_within_range(self, ferry, place):
        ran = ferry("fp16", "check", "--model", "big.py:small", "--input", "x.npz", "--mode", "strict", "--json")
        assert ran.status == 0
        assert ran.values["report"]["passed"]
        assert ran.values["watch"]["modules"]

    def test_an_onnx_file(self, ferry, big_onnx):
        ran = ferry("fp16", "check", "big.onnx", "--input", "x.npz", "--report", "report.json")
        assert ran.status == 1
        saved = json.loads((big_onnx.parent / "report.json").read_text())
        assert not saved["passed"]
        assert any("big.py" in (finding["where"] or "") for finding in saved["findings"])

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["big.onnx"], "needs data"),
            (["big.onnx", "--input", "x.npz", "--watch", "w.html"], "has no modules"),
            (["none.onnx", "--input", "x.npz"], "none.onnx"),
            (["big.onnx", "--input", "x=1,2"], "x"),
        ],
    )
    def test_mistakes(self, ferry, big_onnx, arguments, said):
        assert said in ferry("fp16", "check", *arguments).refusal


class TestBisect:
    def test_names_the_operator_that_hardware_would_get_wrong(self, ferry, place):
        ran = ferry("fp16", "bisect", "--model", "big.py:big", "--input", "x.npz", "--target", "emulated")
        assert ran.status == 1
        assert "'norm'" in ran.out
        assert "big.py" in ran.out
        assert "no longer finite" in ran.out

    def test_an_engine_that_is_right(self, ferry, place):
        ran = ferry("fp16", "bisect", "--model", "big.py:big", "--input", "x.npz", "--json")
        assert ran.status == 0
        assert ran.values["passed"]

    def test_an_unknown_engine(self, ferry, place):
        refused = ferry("fp16", "bisect", "--model", "big.py:big", "--input", "x.npz", "--target", "nothing").refusal
        assert "nothing" in refused


class TestFixAndCertify:
    def test_a_pytorch_model_and_its_weights(self, ferry, place):
        ran = ferry(
            "fp16",
            "fix",
            "--model",
            "big.py:big",
            "--input",
            "x.npz",
            "--input",
            "other.npz",
            "--weights",
            "w.safetensors",
        )
        assert ran.status == 0, ran.err
        assert (place / "fp16" / "fixed.onnx").is_file()
        namespace = {}
        exec(MODEL, namespace)
        model = namespace["Big"]().eval()
        x = torch.from_numpy(np.load("x.npz")["x"])
        expected = model(x)
        assert not model.half()(x.half()).isfinite().all()
        fixed = namespace["Big"]().eval()
        fixed.load_state_dict(load_file("w.safetensors"))
        torch.testing.assert_close(fixed(x), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(fixed.half()(x.half()).float(), expected, rtol=2e-2, atol=2e-2)
        assert ferry("fp16", "certify", "fp16").status == 0

    def test_an_onnx_file_that_then_passes_the_check(self, ferry, big_onnx):
        ran = ferry("fp16", "fix", "big.onnx", "--input", "x.npz", "-o", "half", "--json")
        assert ran.status == 0
        assert ran.values["checks"]
        assert ferry("fp16", "check", "half/fixed.onnx", "--input", "x.npz").status == 0

    def test_a_changed_file_fails_the_certificate(self, ferry, big_onnx):
        assert ferry("fp16", "fix", "big.onnx", "--input", "x.npz", "-o", "half").status == 0
        fixed = onnx.load("half/fixed.onnx")
        for tensor in fixed.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.dtype == np.float16 and array.ndim == 4:
                tensor.CopyFrom(numpy_helper.from_array(array * np.float16(2), tensor.name))
                break
        onnx.save(fixed, "half/fixed.onnx")
        ran = ferry("fp16", "certify", "half")
        assert ran.status == 1
        assert "FAILED" in ran.out

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["big.onnx", "--input", "x.npz", "--weights", "w.safetensors"], "PyTorch model"),
            (["big.onnx", "--input", "x.npz", "--headroom-bits", "99"], "99"),
            (["big.onnx", "--input", "x.npz", "-o", "full"], "full"),
        ],
    )
    def test_mistakes(self, ferry, big_onnx, arguments, said):
        (big_onnx.parent / "full").mkdir()
        (big_onnx.parent / "full" / "mine.txt").write_text("mine")
        assert said in ferry("fp16", "fix", *arguments).refusal

    def test_nothing_to_certify(self, ferry, place):
        assert "nowhere" in ferry("fp16", "certify", "nowhere").refusal


class TestDeploy:
    def test_repairs_certifies_and_packs(self, ferry, place):
        ran = ferry(
            "deploy", "--model", "big.py:big", "--input", "x.npz", "--target", "reference", "--precision", "fp16",
            "--out", "half",
        )  # fmt: skip
        assert ran.status == 0, ran.err
        certificate = json.loads((place / "half" / "certificates" / "reference-fp16.json").read_text())
        assert all(check["passed"] for check in certificate["checks"])
        report = json.loads((place / "half" / "report.json").read_text())
        assert any(finding["code"] == "fp16-repaired" for finding in report["findings"])
        x = np.load("x.npz")["x"]
        with torchferry.load("half").open() as session:
            (got,) = session.run({"x": x}).values()
        assert got.dtype == np.float32
        assert np.isfinite(got).all()

    def test_a_repair_that_is_not_proved_is_not_packed(self, ferry, place, monkeypatch):
        proved = fix_module.fix

        def unproved(*args, **kwargs):
            fixed, certificate = proved(*args, **kwargs)
            first, *others = certificate.checks
            checks = (dataclasses.replace(first, passed=False), *others)
            return fixed, dataclasses.replace(certificate, checks=checks)

        monkeypatch.setattr(fix_module, "fix", unproved)
        flags = ("--model", "big.py:big", "--input", "x.npz", "--target", "reference", "--precision", "fp16")
        assert "not certified" in ferry("deploy", *flags, "--out", "half").refusal
        assert not (place / "half").exists()

    def test_an_engine_without_fp16_is_told_so(self, ferry, place):
        refused = ferry(
            "deploy", "--model", "big.py:big", "--input", "x.npz", "--precision", "fp16", "--out", "half"
        ).refusal
        assert "does not compute in fp16" in refused

"""A certificate catches what is wrong: planted scales, clipped constants, missing rules; and is checked from files."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import torchferry as ferry
from torchferry.core.errors import FormatError, MissingFileError, VerificationError
from torchferry.precision import degrees
from torchferry.precision.certificate import Certificate
from torchferry.precision.checks import with_checks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.conv2 = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(8, 8, 3)
        self.last = nn.Linear(8, 4)
        self.conv.weight.data.mul_(1e5)
        self.conv2.weight.data.mul_(1e5)
        self.last.weight.data.mul_(1e-5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(self.norm(self.conv(x))))
        return self.last((x * torch.sigmoid(x)).mean((2, 3)))


class Wave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.first.weight.data.mul_(1e6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.first(x))


@pytest.fixture(scope="module")
def certified() -> Certificate:
    torch.manual_seed(0)
    data = [(torch.randn(1, 3, 10, 10),) for _ in range(4)]
    fixed, certificate = ferry.fp16.fix(ferry.export(Net().eval(), data[0]), data)
    assert certificate.passed, str(certificate)
    assert certificate.evidence.fixed is fixed
    return certificate


def again(certificate: Certificate, **changes: Any) -> Certificate:
    evidence = dataclasses.replace(certificate.evidence, **changes)
    return with_checks(certificate, evidence)


def mutated(certificate: Certificate, name: str, change: Any) -> Certificate:
    """Check again with one constant of the repaired graph changed."""
    fixed = certificate.evidence.fixed
    model = fixed.model.clone()
    value = model.graph.initializers[name]
    value.const_value = ir.Tensor(change(value.const_value.numpy().copy()), name=name)
    return again(certificate, fixed=fixed.replace(model=model))


def failed(certificate: Certificate) -> set[str]:
    return {check.name for check in certificate.checks if not check.passed}


def test_it_says_what_was_checked_on_what_and_what_it_does_not_promise(certified: Certificate) -> None:
    assert [check.name for check in certified.checks] == ["agreement", "constants", "bounds", "error"]
    for check in certified.checks:
        assert check.figure
        assert check.data
        assert check.not_promised
    text = str(certified)
    assert "certified" in text
    assert "clipped" in text  # the sigmoid's input leaves the range
    assert certified.raise_for_failure() is certified


def test_a_constant_that_was_clipped_is_caught(certified: Certificate) -> None:
    found = mutated(certified, "conv.weight", lambda w: np.clip(w, -np.abs(w).max() / 2, np.abs(w).max() / 2))
    assert "constants" in failed(found)
    with pytest.raises(VerificationError, match="conv.weight"):
        found.raise_for_failure()


def test_a_constant_that_became_infinite_is_caught(certified: Certificate) -> None:
    scales = {name: dataclasses.replace(r, k=r.k - 40) for name, r in certified.constants.items()}
    found = again(dataclasses.replace(certified, constants=scales))
    assert any("does not fit FP16" in problem for problem in found.check("constants").problems)


def test_a_weight_with_a_wrong_scale_is_caught(certified: Certificate) -> None:
    assert "constants" in failed(mutated(certified, "conv2.weight", lambda w: w * 2))


def test_a_multiplication_by_a_wrong_power_of_two_is_caught(certified: Certificate) -> None:
    name = next(n for n, r in certified.constants.items() if not r.source and r.value not in (2.0**15, -(2.0**15)))
    assert "constants" in failed(mutated(certified, name, lambda w: w * 2))


def test_a_wrong_scale_is_caught_where_the_record_lies_too(certified: Certificate) -> None:
    record = certified.constants["conv2.weight"]
    lying = {**certified.constants, "conv2.weight": dataclasses.replace(record, k=record.k - 1)}
    found = mutated(dataclasses.replace(certified, constants=lying), "conv2.weight", lambda w: w * 2)
    assert "agreement" in failed(found)


@pytest.mark.parametrize("tensor", ["relu", "conv2d_1"])
def test_a_wrong_scale_in_the_record_is_caught(certified: Certificate, tensor: str) -> None:
    source, k = certified.scales[tensor]
    wrong = {**certified.scales, tensor: (source, k + 1)}
    assert "agreement" in failed(again(dataclasses.replace(certified, scales=wrong)))


def test_an_output_that_nothing_is_compared_with_is_caught(certified: Certificate) -> None:
    name = certified.evidence.fixed.model.graph.outputs[0].name
    hidden = {tensor: entry for tensor, entry in certified.scales.items() if tensor != name}
    found = again(dataclasses.replace(certified, scales=hidden))
    assert "agreement" in failed(found)
    assert "compared with nothing" in str(found)


def test_a_rule_that_is_wrong_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Wave().eval()
    data = [(torch.randn(3, 8),) for _ in range(4)]
    monkeypatch.setitem(degrees.RULES, "Sin", degrees.Rule("equal", "(wrong)", degrees.EQUAL))
    _, certificate = ferry.fp16.fix(ferry.export(model, data[0]), data)
    assert "agreement" in failed(certificate)


def test_an_overflow_is_caught(certified: Certificate) -> None:
    larger = [{name: array * 64 for name, array in feeds.items()} for feeds in certified.evidence.calibration]
    found = again(certified, calibration=larger)
    assert "bounds" in failed(found)
    assert "FP16 ends at 65504" in str(found)


def test_a_loss_of_precision_is_caught(certified: Certificate) -> None:
    smaller = [{name: array * 2.0**-24 for name, array in feeds.items()} for feeds in certified.evidence.held_out]
    assert "error" in failed(again(certified, held_out=smaller))


def test_it_is_checked_again_from_the_saved_files_alone(certified: Certificate, tmp_path: Path) -> None:
    certified.save(tmp_path / "proof")
    assert sorted(p.name for p in (tmp_path / "proof").iterdir()) == [
        "certificate.json",
        "data.npz",
        "fixed.onnx",
        "original.onnx",
    ]
    found = ferry.fp16.certify(tmp_path / "proof")
    assert found.passed, str(found)
    assert found == certified


def test_files_that_were_tampered_with_fail(certified: Certificate, tmp_path: Path) -> None:
    folder = tmp_path / "proof"
    certified.save(folder)
    model = ir.load(folder / "fixed.onnx")
    weight = model.graph.initializers["conv.weight"]
    weight.const_value = ir.Tensor(weight.const_value.numpy() * np.float16(0.5), name="conv.weight")
    ir.save(model, folder / "fixed.onnx")
    assert not ferry.fp16.certify(folder).passed

    certified.save(folder, overwrite=True)
    record = json.loads((folder / "certificate.json").read_text())
    record["checks"] = []
    assert not Certificate.from_json(json.dumps(record)).passed
    (folder / "certificate.json").write_text("{}")
    with pytest.raises(FormatError, match="not a certificate"):
        ferry.fp16.certify(folder)
    with pytest.raises(MissingFileError, match="certificate"):
        ferry.fp16.certify(tmp_path / "nothing")


def test_it_survives_a_copy_and_json(certified: Certificate) -> None:
    assert Certificate.from_json(certified.to_json()) == certified
    assert copy.copy(certified).passed

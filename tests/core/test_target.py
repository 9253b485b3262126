"""Targets: valid without their engine, refused when they make no sense."""

import pytest

from torchferry.core.compare import TOLERANCES, usual_tolerance
from torchferry.core.errors import ConfigError
from torchferry.core.target import PRECISIONS, Target


def test_defaults_and_an_engine_that_is_not_here() -> None:
    assert Target() == Target("onnxruntime", precision="fp32", device="cpu", opset=None)
    assert str(Target("tensorrt", precision="fp16")) == "tensorrt-fp16"
    assert len({Target(), Target(), Target(opset=18), Target(options={"limit": 1})}) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp61"}, ["'fp61'", "did you mean 'fp16'"]),
        ({"precision": "double"}, ["'double'", "known: 'bf16', 'fp16', 'fp32', 'int8'"]),
        ({"opset": 0}, ["opset", "0"]),
        ({"opset": -3}, ["opset", "-3"]),
        ({"options": {"max_workspace_size": "1G"}}, ["'max_workspace_size'", "'1G'"]),
        ({"options": {"max_workspace_size": -1}}, ["'max_workspace_size'", "-1"]),
    ],
)
def test_refused(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Target(**options)
    assert all(word in str(caught.value) for word in words)


def test_every_precision_but_int8_has_a_tolerance_that_grows() -> None:
    tolerances = [usual_tolerance(precision) for precision in PRECISIONS if precision != "int8"]
    assert tolerances == sorted(tolerances, key=lambda t: (t.atol, t.rtol))
    assert str(TOLERANCES["fp32"]) == "atol 0.0001, rtol 0.0001"
    with pytest.raises(ConfigError, match="int8 has no usual tolerance") as caught:
        usual_tolerance("int8")
    assert "--budget" in str(caught.value.hint)

"""``torchferry op``: what is known about an operator, and which engines run it."""

import pytest
import torch

from torchferry import backends
from torchferry.core.engine import Availability

LIBRARY = torch.library.Library("ferry_cli_op", "DEF")
LIBRARY.define("twist(Tensor x, int times=2) -> Tensor")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def _row(ran, *cells):
    """The line of the tables that starts with these cells."""
    rows = [line.split() for line in ran.out.splitlines()]
    found = [row for row in rows if row[: len(cells)] == list(cells)]
    assert len(found) == 1, ran.out
    return " ".join(found[0])


def test_an_operator_that_is_translated_and_runs_everywhere(ferry):
    ran = ferry("op", "asinh")
    assert (ran.status, ran.err) == (0, "")
    assert "aten::asinh(Tensor self) -> Tensor" in ran.out
    assert _row(ran, "Asinh", "same") == "Asinh same name input 9, 22"
    for engine in ("onnxruntime", "reference"):
        assert _row(ran, "aten::asinh", engine) == f"aten::asinh {engine} runs at opset 20 on float32[3, 3]"
        assert _row(ran, "Asinh", engine) == f"Asinh {engine} runs at opset 20 on float32[2, 3]"


def test_as_json(ferry):
    ran = ferry("op", "aten::fmax", "--json")
    assert (ran.status, ran.err) == (0, "")
    values = ran.values
    assert values["name"] == "aten::fmax"
    missing, out = values["overloads"]
    assert missing["schema"] == "aten::fmax(Tensor self, Tensor other) -> Tensor"
    assert (missing["status"], missing["engines"]) == ("missing", [])
    assert out["status"] == "functionalized"
    [near] = values["onnx"]
    assert (near["name"], near["why"], near["inputs"]) == ("Max", "similar name", ["data_0..."])
    tried = {trial["backend"]: trial["status"] for trial in near["engines"]}
    assert tuple(tried) == backends.names()
    assert [tried[name] for name in ("onnxruntime", "openvino", "reference")] == ["runs"] * 3
    assert 'register_symbolic("fmax", is_pytorch=True' in values["symbolic"]
    assert [step["name"] for step in values["steps"]] == ["import torch", "look it up", "run Max"]


def test_an_operator_without_translation_comes_with_a_symbolic_function_to_complete(ferry):
    code = ferry("op", "erfinv").out.partition("to complete:\n\n")[2]
    compile(code, "op", "exec")
    assert "def erfinv(g, input):" in code
    assert "to complete" not in ferry("op", "erf").out


def test_an_operator_of_onnx(ferry):
    ran = ferry("op", "Resize")
    assert ran.status == 0
    assert "X, [roi], [scales], [sizes]" in _row(ran, "Resize", "asked")
    assert _row(ran, "Resize", "onnxruntime").startswith(
        "Resize onnxruntime not tried made-up inputs do not fit it: Resize"
    )


def test_what_torch_makes_of_an_operator_is_run_where_its_onnx_operator_cannot_be(ferry):
    ran = ferry("op", "aten::upsample_bicubic2d.default")
    assert "torch.onnx uses it" in _row(ran, "Resize", "torch.onnx")
    assert "runs at opset 20 on float32[2, 2, 2, 2]" in _row(ran, "aten::upsample_bicubic2d", "onnxruntime")


def test_an_operator_of_a_library(ferry):
    ran = ferry("op", "ferry_cli_op::twist")
    assert "ferry_cli_op::twist(Tensor x, int times=2) -> Tensor" in ran.out
    assert "no ONNX operator has a similar name" in ran.out


def test_an_engine_that_is_not_installed(ferry, monkeypatch):
    monkeypatch.setattr(
        type(backends.get("onnxruntime")), "availability", lambda self: Availability(False, reason="not here (pip ...)")
    )
    ran = ferry("op", "Asinh")
    assert _row(ran, "Asinh", "onnxruntime") == "Asinh onnxruntime not installed not here (pip ...)"
    assert "runs" in _row(ran, "Asinh", "reference")


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("Mod", "runs", "int64[2, 3]"),  # of fractions only with an attribute
        ("GlobalAveragePool", "runs", "float32[2, 2, 2, 2]"),  # of matrices by the reference alone
        ("Where", "runs", "bool[2, 3], float32[2, 3], float32[2, 3]"),
        ("RandomUniformLike", "runs", "its outputs are random"),
        ("Reshape", "not tried", "its input 'shape' takes more than plain numbers"),
        ("Cast", "not tried", "it needs values for to"),
        ("Constant", "not tried", "it has no inputs that it needs"),
        ("Upsample", "not tried", "opset 20 has it no longer"),
    ],
)
def test_which_inputs_are_made_up(ferry, name, status, reason):
    [near] = ferry("op", name, "--json").values["onnx"]
    trial = near["engines"][0]
    assert (trial["backend"], trial["status"]) == ("onnxruntime", status)
    assert reason in trial["detail"]


def test_an_operator_that_is_too_new_for_an_engine(ferry, monkeypatch):
    backend = type(backends.get("onnxruntime"))
    capabilities = backend.capabilities(backends.get("onnxruntime"))
    older = type(capabilities)(capabilities.precisions, 13, capabilities.dynamic_shapes)
    monkeypatch.setattr(backend, "capabilities", lambda self: older)
    assert _row(ferry("op", "HardSwish"), "HardSwish", "onnxruntime").endswith(
        "refused it reads opsets up to 13, not 14"
    )
    assert _row(ferry("op", "Asinh"), "Asinh", "onnxruntime").endswith("runs at opset 13 on float32[2, 3]")


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("asinnh", "error: unknown operator 'asinnh'\n  hint: did you mean 'asinh'"),
        ("aten::squeeze.dimm", "error: operator 'aten::squeeze' has no overload 'dimm'\n  hint: did you mean 'dim'"),
        ("nowhere::op", "error: unknown operator 'nowhere::op'"),
    ],
)
def test_an_unknown_operator(ferry, name, fragment):
    ran = ferry("op", name)
    assert fragment in ran.refusal
    assert ran.status == 2


def test_an_unknown_operator_as_json(ferry):
    ran = ferry("op", "asinnh", "--json")
    assert (ran.status, ran.err) == (2, "")
    assert ran.values["error"]["code"] == "ConfigError"

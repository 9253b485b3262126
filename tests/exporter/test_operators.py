"""What is known about an operator: schemas, what becomes of it in an export, the nearest ONNX operators."""

import doctest
import importlib

import onnx
import pytest
import torch

from torchferry.core.errors import ConfigError
from torchferry.exporter.operators import describe_operator, nearest_onnx

LIBRARY = torch.library.Library("ferry_operators", "DEF")
LIBRARY.define("plain(Tensor x, int times=2) -> Tensor")
LIBRARY.define("hard_swish(Tensor x) -> Tensor")


def _only(name):
    [overload], _ = describe_operator(name)
    return overload


@pytest.mark.parametrize(
    "name",
    [
        "squeeze.dim",
        "aten::squeeze.dim",
        "aten.squeeze.dim",
        "torch.ops.aten.squeeze.dim",
    ],
)
def test_every_way_to_name_an_overload(name):
    overload = _only(name)
    assert overload.name == "aten::squeeze.dim"
    assert overload.schema == str(torch.ops.aten.squeeze.dim._schema)
    assert (overload.status, overload.detail) == ("translated", "by Torchferry")


def test_a_bare_name_gives_every_overload_that_a_graph_may_have():
    overloads, _ = describe_operator("asinh")
    assert [overload.name for overload in overloads] == ["aten::asinh", "aten::asinh.out"]
    assert [overload.status for overload in overloads] == ["translated", "functionalized"]


@pytest.mark.parametrize(
    ("name", "status", "detail"),
    [
        ("aten::asinh.default", "translated", "by torch.onnx"),
        ("aten::conv2d.padding", "decomposed", "into aten::convolution"),
        ("aten::cummax.default", "missing", "no translation, no decomposition"),
        ("aten::grid_sampler_3d.default", "missing", "no translation, no decomposition"),
        (
            "aten::erfinv.default",
            "missing",
            "no translation; decomposed into prims::erf_inv, which has no translation either",
        ),
        ("prims::erf_inv.default", "missing", "no translation, no decomposition"),
        ("ferry_operators::plain", "unclear", None),
        ("aten::diagonal_scatter.default", "unclear", None),  # torch refuses the made-up call when it decomposes it
        ("aten::is_pinned", "unclear", None),  # gives no tensor
    ],
)
def test_what_becomes_of_an_operator(name, status, detail):
    overload = _only(name)
    assert overload.status == status
    assert detail in (None, overload.detail)


def test_only_what_lacks_a_translation_is_blamed():
    detail = _only("aten::copysign.Tensor").detail
    assert "prims::neg" in detail
    assert detail.endswith("of which prims::signbit has no translation either")


def test_an_operator_of_a_library_that_is_not_installed():
    [overload], near = describe_operator("torchvision::deform_conv2d")
    assert overload.status == "translated"
    assert overload.onnx == ("DeformConv",)
    assert [operator.name for operator in near] == ["DeformConv"]


@pytest.mark.parametrize(
    ("name", "expected", "why"),
    [
        ("asinh", ["Asinh"], "same name"),
        ("aten::hardswish", ["HardSwish"], "same name"),
        ("ferry_operators::hard_swish", ["HardSwish"], "same name"),
        ("torchvision::deform_conv2d", ["DeformConv"], "same name"),
        ("linalg_det", ["Det"], "same name"),
        ("fmax", ["Max"], "similar name"),
        ("grid_sampler_3d", ["GridSample"], "similar name"),
        ("max_pool2d_with_indices", ["MaxPool"], "similar name"),
        ("erfinv", [], ""),
        ("upsample_bicubic2d", [], ""),
    ],
)
def test_the_nearest_onnx_operators_by_name(name, expected, why):
    near = nearest_onnx(name)
    assert [operator.name for operator in near] == expected
    assert {operator.why for operator in near} <= {why}


def test_the_nearest_onnx_operators_by_what_torch_makes_of_them():
    _, near = describe_operator("upsample_bicubic2d")
    assert [(operator.name, operator.why) for operator in near] == [("Resize", "torch.onnx uses it")]


def test_an_onnx_operator_with_its_history():
    overloads, [resize] = describe_operator("Resize")
    assert overloads == ()
    assert resize.inputs == ("X", "[roi]", "[scales]", "[sizes]")
    assert resize.attributes["antialias"] == "INT"
    assert resize.attributes["mode"] == "STRING"
    assert resize.opsets[:3] == (10, 11, 13)
    history = {s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == "Resize" and not s.domain}
    assert set(resize.opsets) == history


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("asinnh", "unknown operator 'asinnh'", "did you mean 'asinh'"),
        ("Resise", "unknown operator 'Resise'", "did you mean 'Resize'"),
        ("aten::asinnh", "unknown operator 'aten::asinnh'", "did you mean 'aten::asinh'"),
        ("aten::squeeze.dimm", "operator 'aten::squeeze' has no overload 'dimm'", "did you mean 'dim'"),
        ("absent_library::op", "unknown operator 'absent_library::op'", "the library has to be installed"),
        ("", "unknown operator ''", ""),
        ("aten::", "unknown operator 'aten::'", ""),
        ("../x y", "unknown operator '../x y'", ""),
    ],
)
def test_an_unknown_operator(name, message, hint):
    with pytest.raises(ConfigError) as caught:
        describe_operator(name)
    assert caught.value.message == message
    assert hint in caught.value.hint


def test_a_library_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "ferry_broken_library.py").write_text("raise OSError('no shared object')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="'ferry_broken_library' cannot be imported: OSError: no shared object"):
        describe_operator("ferry_broken_library::op")


def test_a_library_is_imported_for_its_operators(tmp_path, monkeypatch):
    (tmp_path / "ferry_late_library.py").write_text(
        "import torch\n"
        "LIBRARY = torch.library.Library('ferry_late_library', 'DEF')\n"
        "LIBRARY.define('op(Tensor x) -> Tensor')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert _only("ferry_late_library::op").schema == "ferry_late_library::op(Tensor x) -> Tensor"


@pytest.mark.parametrize("name", ["operators", "skeletons"])
def test_doctests(name):
    failed, attempted = doctest.testmod(importlib.import_module(f"torchferry.exporter.{name}"))
    assert (failed, attempted > 0) == (0, True)

"""The example finds what leaves FP16's range in PANet, and both repairs bring it back."""

# ruff: noqa: F821 - the fixture below imports the modules of the example

import contextlib
import importlib
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx_ir
import pytest
import torch

import torchferry as ferry
from torchferry.codebases.openmmlab import libraries

EXAMPLE = Path(__file__).parents[2] / "examples" / "fp16_panet"
NAMES = ("panet", "by_hand", "overflow")
SIZE = 64
NORM = "backbone.layer3.1.bn2"  # whose scale is driven first
OPENMMLAB = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not libraries.installed("mmocr"), reason="OpenMMLab is not installed; scripts/openmmlab installs it"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def _example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE))
        globals().update({name: importlib.import_module(name) for name in NAMES})
        yield
    for name in NAMES:
        del globals()[name], sys.modules[name]


@pytest.fixture(scope="module", params=["twin", pytest.param("mmocrs", marks=OPENMMLAB)])
def done(request, _example, tmp_path_factory):
    """The whole example, run once."""
    out, printed = tmp_path_factory.mktemp("fp16_panet"), io.StringIO()
    subject = getattr(overflow, request.param)(panet.picture(size=SIZE))
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    with contextlib.redirect_stdout(printed):
        table = overflow.run(subject, SIZE, out)
    prefix = "model." if request.param == "mmocrs" else ""
    sections = printed.getvalue().split("\n\n")
    return SimpleNamespace(
        subject=subject, before=before, out=out, table=table, prefix=prefix, printed=dict(enumerate(sections, 1))
    )


def ratio(cell: str) -> float:
    """Of an error to the ideal one."""
    return float(cell.split(", ")[1].removesuffix(" x ideal"))


def test_watching_names_where_values_enter_and_leave(done):
    report = ferry.fp16.WatchReport.load(done.out / "watch.json")
    first = report.crossings[0]
    assert (first.kind, first.module) == ("enters", done.prefix + NORM)
    assert any(crossing.kind == "leaves" and "neck" in crossing.module for crossing in report.crossings)
    assert report[""].given < 1000
    assert f"from: {done.prefix}{NORM} (reaches " in done.printed[1]
    assert "<svg" in (done.out / "watch.html").read_text()


def test_bisecting_names_the_same_module(done):
    assert "emulate leaves atol 1, rtol 0 at operator " in done.printed[2]
    assert f" in '{done.prefix}{NORM}', " in done.printed[2]


def test_every_rewriter_acts(done):
    for count, name in zip((8, 1, 12, 1), done.subject.classes, strict=True):
        assert f"  {count} x {name}.forward\n" in done.printed[3]


def test_the_original_overflows_whatever_is_done_with_its_norms(done):
    assert done.table["original"] == ["not finite"] * 4


def test_what_is_repaired_by_hand_does_not_overflow(done):
    acc32, strict, _, norms_in_fp32 = done.table["by hand"]
    assert ratio(acc32) < 10
    assert ratio(strict) < 10
    assert ratio(norms_in_fp32) < 2


def test_what_is_repaired_automatically_is_near_the_ideal(done):
    assert all(ratio(cell) < 2 for cell in done.table["fixed, weights"])
    assert all(ratio(cell) < 2 for cell in done.table["fixed, graph"][:2])


@pytest.mark.parametrize("which", ["weights", "graph"])
def test_the_certificates_are_saved(done, which):
    folder = done.out / f"certificate_{which}"
    certificate = ferry.fp16.Certificate.from_json((folder / "certificate.json").read_bytes())
    assert certificate.passed
    assert certificate.weights_only
    assert {file.name for file in folder.iterdir()} >= {"original.onnx", "fixed.onnx", "data.npz"}


def test_the_graph_on_disk_is_in_fp16(done):
    model = onnx_ir.load(done.out / "panet_fp16.onnx")
    dtypes = {value.dtype for value in [*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs]}
    assert onnx_ir.DataType.FLOAT16 in dtypes
    assert onnx_ir.DataType.FLOAT not in dtypes


@torch.no_grad()
def test_the_rewritten_model_gives_what_the_model_gives_and_nothing_stays_patched(done):
    model, x = done.subject.model, panet.picture(size=SIZE)
    expected = model(x)
    registry = by_hand.rewriters(done.subject.classes)
    with ferry.RewriterContext({"watch": str(done.out / "watch.json")}, function_rewriter=registry) as context:
        with ferry.fp16.watch(model) as watch:
            got = model(x)
        assert len(context.log.applied()) == 4
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert watch.report()[done.prefix + "neck"].given < 65504 / 4

    with ferry.fp16.watch(model) as watch:
        assert torch.equal(model(x), expected)
    assert watch.report()[done.prefix + "neck"].given > 65504
    assert all(torch.equal(tensor, done.before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_report_within_range_leaves_every_call_to_the_original(tmp_path):
    model, x = panet.build(), panet.picture(size=SIZE)
    with ferry.fp16.watch(model) as watch:
        expected = model(x)
    watch.report().save(tmp_path / "watch.json")
    by_hand.name_modules(model)
    registry = by_hand.rewriters(overflow.TWIN_CLASSES)
    with ferry.RewriterContext({"watch": str(tmp_path / "watch.json")}, function_rewriter=registry) as context:
        assert torch.equal(model(x), expected)
    assert all(row.calls == row.left for row in context.log.rows)

"""``ferry.verify``: agreement is shown at several sizes, and every kind of difference fails."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.core.errors import TorchferryError, VerificationError
from torchferry.core.target import Target
from torchferry.verification.sizes import sizes_to_try


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, image):
        return self.conv(image), image.mean(dim=(2, 3))


def deployed(model, arguments, tmp_path, **options):
    return ferry.compile(ferry.export(model, arguments, **options), Target(), tmp_path / "engine")


@pytest.fixture
def net(tmp_path):
    model = Net().eval()
    image = torch.rand(1, 3, 20, 24)
    shapes = {"image": {0: "batch", 2: "height", 3: "width"}}
    return model, image, deployed(model, image, tmp_path, dynamic_shapes=shapes, output_names=["image_out", "means"])


def test_agreement_at_several_sizes_of_every_dimension(net):
    model, image, engine = net
    report = ferry.verify(engine, model, image).raise_for_failure()
    assert report.passed
    for name in ("image_out", "means"):
        cases = {c.case for c in report.comparisons if c.name == name}
        assert "data" in cases
        for dim in ("batch", "height", "width"):
            assert len([case for case in cases if case.startswith(f"{dim}=") and "," not in case]) >= 2
        assert any(case.count("=") > 1 for case in cases)
    assert {p.caption for p in report.pictures} == {"image_out, data"}
    assert report.facts["environment"]["onnxruntime"]


def test_several_sets_of_data_are_all_run(net):
    model, image, engine = net
    report = ferry.verify(engine, model, (call for call in [(image,), {"image": image[:, :, :5]}]))
    assert {"data 1", "data 2"} <= {c.case for c in report.comparisons}


def test_chosen_sizes(net):
    model, image, engine = net
    report = ferry.verify(engine, model, image, sizes=[{"height": 31}, {"batch": 2, "width": 3}])
    assert [c.case for c in report.comparisons if c.name == "means"] == ["data", "height=31", "batch=2, width=3"]


@pytest.mark.parametrize("error", [1e-2, np.nan, np.inf, -np.inf])
def test_a_difference_fails_and_names_the_output_and_the_values(net, tmp_path, error):
    model, image, engine = net
    bias = model.conv.bias.detach().clone()
    with torch.no_grad():
        model.conv.bias[1] += error
    report = ferry.verify(engine, model, image)
    assert not report.passed
    assert {f.code for f in report.findings} == {"output-differs"}
    assert all("'image_out'" in f.message and "expected" in f.message for f in report.findings)
    assert all(c.passed for c in report.comparisons if c.name == "means")
    with pytest.raises(VerificationError, match="image_out"):
        report.raise_for_failure()
    if np.isnan(error):
        huge = ferry.Tolerance(atol=1e30, rtol=1e30)
        assert not ferry.verify(engine, model, image, tolerance=huge).passed
    with torch.no_grad():
        model.conv.bias.copy_(bias)
    assert ferry.verify(engine, model, image).passed


def test_a_tolerance_is_what_decides(net):
    model, image, engine = net
    with torch.no_grad():
        model.conv.bias += 1e-3
    assert not ferry.verify(engine, model, image).passed
    assert ferry.verify(engine, model, image, tolerance=ferry.Tolerance(atol=1e-2, rtol=0)).passed


def test_a_difference_at_one_size_only_is_found(tmp_path):
    """The case that checking the example alone would miss."""

    class Halved(nn.Module):
        def forward(self, x):
            return x / x.shape[0]

    model = Halved().eval()
    exported = ferry.export(model, torch.rand(4, 2), dynamic_shapes={"x": {0: "n"}})
    four = ir.Value(name="four", const_value=ir.tensor(np.float32(4), name="four"))
    division = next(node for node in exported.model.graph if node.op_type == "Div")
    exported.model.graph.register_initializer(four)
    division.replace_input_with(1, four)
    engine = ferry.compile(exported, Target(), tmp_path / "engine")
    report = ferry.verify(engine, model, torch.rand(4, 2))
    verdicts = {c.case: c.passed for c in report.comparisons}
    assert verdicts["data"]
    assert not report.passed
    assert not any(passed for case, passed in verdicts.items() if case not in ("data", "n=0"))


def test_a_wrong_dtype_or_number_of_outputs_fails(tmp_path):
    class Model(nn.Module):
        def __init__(self, mode):
            super().__init__()
            self.mode = mode

        def forward(self, x):
            return {"one": x + 1, "double": (x + 1).double(), "two": (x + 1, x)}[self.mode]

    x = torch.rand(2)
    engine = deployed(Model("one").eval(), x, tmp_path)
    assert ferry.verify(engine, Model("one"), x).passed
    assert "dtype float32, expected float64" in str(ferry.verify(engine, Model("double"), x))
    assert [f.code for f in ferry.verify(engine, Model("two"), x).findings] == ["output-count"]


def test_an_engine_that_fails_where_pytorch_does_not(net):
    model, image, engine = net
    dims = {**engine.signature.dims, "height": ferry.DimRange(min=30)}
    narrow = dataclasses.replace(engine, signature=dataclasses.replace(engine.signature, dims=dims))
    report = ferry.verify(narrow, model, image)
    assert "engine-fails" in {f.code for f in report.findings if f.severity == "error"}
    assert not report.passed


def test_the_model_is_left_as_it_was_and_its_inputs_too(tmp_path):
    class InPlace(nn.Module):
        def forward(self, x):
            return x.clone().add_(1)

    class Dirty(InPlace):
        def forward(self, x):
            return x.add_(1)

    engine = deployed(InPlace().eval(), torch.zeros(3), tmp_path)
    model, x = Dirty().train(), torch.zeros(3)
    assert ferry.verify(engine, model, x).passed
    assert x.tolist() == [0, 0, 0]
    assert model.training


def test_no_inputs_is_an_error(net):
    model, _, engine = net
    with pytest.raises(TorchferryError, match="needs inputs"):
        ferry.verify(engine, model)


def test_a_source_brings_its_own(net):
    model, image, engine = net
    source = ferry.Source(model, image)
    assert ferry.verify(engine, source).passed


def test_sizes_to_try_respect_ranges_and_relations():
    dims = {"n": ferry.DimRange(min=4, max=9), "m": ferry.DimRange(min=0, excluded={1: "squeezed"})}
    spec = ferry.Signature((), (), dims)
    tried = list(sizes_to_try(spec, {"n": 5, "m": 2}))
    assert {s["n"] for s in tried} == {4, 5, 6, 9}
    assert {s["m"] for s in tried if s["n"] == 5} == {0, 3, 4}
    assert len({tuple(s.items()) for s in tried}) == len(tried)
    assert {"n": 5, "m": 2} not in tried


def test_the_page_holds_the_figures_and_the_pictures(net):
    model, image, engine = net
    page = ferry.verify(engine, model, image).to_html()
    assert page.count("data:image/png;base64,") == 4
    assert "image_out" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")


def test_an_engine_that_refuses_empty_inputs_is_said_and_passes(tmp_path):
    """A refusal is no wrong number; the example itself must of course run."""

    class Model(nn.Module):
        def forward(self, x):
            return torch.ones(3, x.shape[2]) @ x @ torch.ones(x.shape[3], 3)

    model, x = Model().eval(), torch.rand(1, 2, 7, 8)
    dims = {"x": {0: "n"}}
    engine = deployed(model, x, tmp_path, dynamic_shapes=dims)
    narrow = dataclasses.replace(
        engine, signature=dataclasses.replace(engine.signature, dims={"n": ferry.DimRange(min=1)})
    )
    report = ferry.verify(narrow, model, x, sizes=[{"n": 0}])
    assert report.passed
    assert [f.code for f in report.findings] == ["engine-refuses-empty"]

"""Inputs that the export would lose or freeze: said, with the line, or made dynamic and proved."""

import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.core.errors import ExportError
from torchferry.testing import assert_op


class Enlarging(nn.Module):
    """Enlarges by a factor that is an input, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x, factor):
        return torch.relu(self.convolution(self.way(x, factor)))


def enlarged(x, factor, mode="bicubic"):
    return nn.functional.interpolate(x, scale_factor=factor, mode=mode, align_corners=False)


def by_size(x, factor):
    height, width = x.shape[2:]
    return nn.functional.interpolate(x, size=(int(height * factor.item()), int(width * factor.item())))


@pytest.mark.parametrize(
    "way",
    [
        lambda x, factor: enlarged(x, factor.item()),
        lambda x, factor: enlarged(x, factor.item(), "bilinear"),
        lambda x, factor: enlarged(x, [factor.item(), factor.item()]),
    ],
    ids=["bicubic", "bilinear", "of two"],
)
def test_a_factor_taken_out_by_item_is_dynamic(way):
    torch.manual_seed(0)
    x = torch.rand(1, 3, 9, 7)
    cases = [(x, torch.tensor(factor)) for factor in (3.0, 2.0, 4.0, 1.5)]
    report = assert_op(Enlarging(way), cases, ["onnxruntime"])
    assert len(report.comparisons) == 4


@pytest.mark.parametrize(
    "way",
    [
        lambda x, factor: enlarged(x, float(factor)),
        lambda x, factor: enlarged(x, int(factor)),
        lambda x, factor: enlarged(x, float(factor.numpy())),
        lambda x, factor: enlarged(x, 2.0) if factor > 2 else x,
        by_size,
    ],
    ids=["float", "int", "numpy", "comparison", "size"],
)
def test_a_factor_that_would_be_frozen_is_refused_at_the_line(way):
    with pytest.raises(ExportError) as caught:
        ferry.export(Enlarging(way).eval(), (torch.rand(1, 3, 8, 8), torch.tensor(3.0)))
    assert "test_lost.py" in caught.value.where
    assert "factor" in caught.value.where
    for remedy in (".item()", "autograd.Function with a symbolic"):
        assert remedy in caught.value.hint


class OnlyWhileExporting(nn.Module):
    def forward(self, x, factor):
        if torch.compiler.is_exporting():
            return x * 3.0
        return x * factor.item()


def test_an_input_that_the_graph_lost_is_an_error():
    with pytest.raises(ExportError, match="has lost the input 'scale'") as caught:
        ferry.export(OnlyWhileExporting().eval(), (torch.rand(2), torch.tensor(3.0)), input_names=["image", "scale"])
    line = OnlyWhileExporting.forward.__code__.co_firstlineno + 3
    assert caught.value.where.endswith(f"test_lost.py:{line}")


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, x, like, mask):
        return self.dropout(x).expand(like.shape[0], -1)


@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_the_model_does_not_read_stays(training):
    model = Unused().train(training)
    exported = ferry.export(model, (torch.rand(1, 3), torch.rand(4, 3), torch.ones(2, dtype=torch.bool)))
    messages = [f.message for f in exported.report.findings if f.code == "input-unused"]
    assert messages == [f"no output depends on the values of '{name}'; it stays an input" for name in ("like", "mask")]
    assert exported.signature.input_names == ("x", "like", "mask")
    assert model.training is training


def test_numbers_among_the_arguments_are_said_to_be_fixed():
    class Model(nn.Module):
        def forward(self, x, options, offset=1, flag=True, name="n"):
            return x * options["scale"] + offset

    exported = ferry.export(Model().eval(), (torch.rand(2), {"scale": 2.5}, 3), {"flag": False})
    found = [(f.severity, f.message, f.hint) for f in exported.report.findings if f.code == "number-fixed"]
    assert [message.split(",")[0] for _, message, _ in found] == [
        "'options.scale' is the number 2.5",
        "'offset' is the number 3",
    ]
    assert found[0][0] == "warning"
    assert found[0][2].endswith("torch.tensor(2.5)")

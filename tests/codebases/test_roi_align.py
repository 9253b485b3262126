"""RoIAlign in PyTorch alone against every engine's own: regions inside, outside, tiny and empty."""

from pathlib import Path

import pytest
import torch

import torchferry as ferry
from torchferry import backends
from torchferry.codebases.openmmlab.roi_align import roi_align

ENGINES = [each for each in ("onnxruntime", "openvino", "reference") if backends.get(each).availability().ok]


class Align(torch.nn.Module):
    def __init__(self, samples: int, aligned: bool) -> None:
        super().__init__()
        self.samples = samples
        self.aligned = aligned

    def forward(self, features: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        return roi_align(features, rois, 3, 2, 0.25, self.samples, self.aligned)


def data(batch: int, regions: int, *, empty: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(regions)
    features = torch.randn(batch, 4, 9, 7, generator=generator)
    starts = torch.rand(regions, 2, generator=generator) * 40 - 8
    sides = torch.rand(regions, 2, generator=generator) * torch.tensor([[1.0], [30.0]]).repeat(regions, 1)[:regions]
    numbers = torch.randint(0, batch, (regions, 1), generator=generator).float()
    rois = torch.cat([numbers, starts, starts + sides], 1)
    if empty:
        rois[0, 3:] = rois[0, 1:3]
    return features, rois


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 2])
def test_engines_read_the_same(samples: int, aligned: bool, tmp_path: Path) -> None:
    module = Align(samples, aligned).eval()
    exported = ferry.export(
        module, data(2, 6), dynamic_shapes={"features": {0: "batch", 2: "height", 3: "width"}, "rois": {0: "n"}}
    )
    exported.report.raise_for_failure()
    for name in ENGINES:
        engine = ferry.compile(exported, ferry.Target(name), tmp_path / name)
        empty = name != "openvino"  # which divides by the number of points of an empty region
        ferry.verify(engine, module, [data(n, k, empty=empty) for n, k in [(2, 1), (3, 20)]]).raise_for_failure()


def test_torch_accepts_the_operator() -> None:
    roi_align.opcheck(*data(2, 6), 3, 2, 0.25, 0, True)


def test_constant_features_give_their_value() -> None:
    rois = torch.tensor([[0.0, 4, 4, 20, 24]])
    torch.testing.assert_close(
        roi_align(torch.full((1, 1, 9, 7), 5.0), rois, 3, 2, 0.25, 0, True), torch.full((1, 1, 3, 2), 5.0)
    )


def test_no_regions() -> None:
    assert roi_align(torch.rand(1, 4, 9, 7), torch.zeros(0, 5), 3, 2, 0.25, 0, True).shape == (0, 4, 3, 2)

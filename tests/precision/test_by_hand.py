"""The exact identities, and a residual block made of them."""

import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.core.errors import InputError


class Block(nn.Module):
    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, stride, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1, stride), nn.BatchNorm2d(4)) if stride > 1 else None
        for norm in (self.bn1, self.bn2):
            norm.running_mean.normal_(0, 100)
            norm.running_var.uniform_(1, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + (x if self.downsample is None else self.downsample(x)))


@pytest.mark.parametrize("p", [2, 0.5, 256, 2**14])
@pytest.mark.parametrize("bias", [True, False])
def test_a_scaled_convolution_is_the_convolution_to_the_bit(p: float, bias: bool) -> None:
    conv, x = nn.Conv2d(3, 5, 3, stride=2, padding=1, padding_mode="reflect", bias=bias), torch.randn(2, 3, 9, 9)
    assert torch.equal(ferry.fp16.scaled_conv(conv, x / p, p) * p, conv(x))


@pytest.mark.parametrize("affine", [True, False])
def test_a_scaled_batch_norm_is_the_batch_norm(affine: bool) -> None:
    norm = nn.BatchNorm2d(4, affine=affine).eval()
    norm.running_mean.normal_(0, 1000)
    x = torch.randn(2, 4, 5, 5) * 1e4
    torch.testing.assert_close(ferry.fp16.scaled_batch_norm(norm, x / 1024, 1024) * 1024, norm(x))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_scaled_residual_block_keeps_half_precision_in_range(stride: int) -> None:
    torch.manual_seed(0)
    block = Block(stride).eval()
    x = torch.randn(1, 4, 8, 8) * 3e5
    scaled = ferry.fp16.ScaledResidual(block, 256).eval()
    torch.testing.assert_close(scaled(x / 256) * 256, block(x))
    assert not block.half()(x.half()).isfinite().all()
    assert scaled.half()((x / 256).half()).isfinite().all()


def test_other_scales_and_other_blocks_are_refused() -> None:
    with pytest.raises(InputError, match="power of two, got 100"):
        ferry.fp16.scaled_conv(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 1, 1), 100)
    with pytest.raises(InputError, match="no running statistics"):
        ferry.fp16.scaled_batch_norm(nn.BatchNorm2d(1, track_running_stats=False), torch.ones(1, 1, 1, 1), 2)
    with pytest.raises(InputError, match="Linear has no 'conv1'"):
        ferry.fp16.ScaledResidual(nn.Linear(1, 1), 2)

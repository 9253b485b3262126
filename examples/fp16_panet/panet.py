"""PANet, a text detector (arXiv:1908.05900), and a way to drive its activations beyond what FP16 can hold.

The network has the blocks of the paper: a ResNet-18, a neck that refines four feature maps again and again (FPEM) and
fuses them (FFM), and a head. Modules are named as mmocr's are, so that the same rewriters fit both.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """Two convolutions, and the input added to what they give."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, width, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        output: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return output


class ResNet18(nn.Module):
    """The backbone: four stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Give the maps of the four stages, at a 4th, 8th, 16th and 32nd of the size of (N, 3, H, W)."""
        x = nn.functional.max_pool2d(nn.functional.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return c2, c3, c4, self.layer4(c4)


class SeparableConv2d(nn.Module):
    """A convolution within each channel, then one across channels."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(width, width, 3, stride, 1, groups=width)
        self.pointwise_conv = nn.Conv2d(width, width, 1)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, width, H, W) to (N, width, H / stride, W / stride)."""
        output: Tensor = self.relu(self.bn(self.pointwise_conv(self.depthwise_conv(x))))
        return output


class FPEM(nn.Module):
    """Feature pyramid enhancement: up from the coarsest map to the finest, and down again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_add1, self.up_add2, self.up_add3 = (SeparableConv2d(width, 1) for _ in range(3))
        self.down_add1, self.down_add2, self.down_add3 = (SeparableConv2d(width, 2) for _ in range(3))

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, ...]:
        """Refine four maps, the finest first; each keeps its shape."""
        c4 = self.up_add1(_sum(c5, c4))
        c3 = self.up_add2(_sum(c4, c3))
        c2 = self.up_add3(_sum(c3, c2))
        c3 = self.down_add1(_sum(c3, c2))
        c4 = self.down_add2(_sum(c4, c3))
        return c2, c3, c4, self.down_add3(_sum(c5, c4))


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """Resize ``x`` to the size of ``y``, and add."""
    return nn.functional.interpolate(x, y.shape[2:]) + y


class FPEM_FFM(nn.Module):  # noqa: N801 - as the paper and mmocr write it
    """The neck: all maps to one width, refined twice, the results added, and brought to the finest size."""

    def __init__(self, width: int = 128, repeats: int = 2) -> None:
        super().__init__()
        self.reduce_conv_c2, self.reduce_conv_c3, self.reduce_conv_c4, self.reduce_conv_c5 = (
            nn.Sequential(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.ReLU()) for channels in WIDTHS
        )
        self.fpems = nn.ModuleList(FPEM(width) for _ in range(repeats))

    def forward(self, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Map the backbone's four maps to four of (N, width, H / 4, W / 4)."""
        c2, c3, c4, c5 = x
        maps = self.reduce_conv_c2(c2), self.reduce_conv_c3(c3), self.reduce_conv_c4(c4), self.reduce_conv_c5(c5)
        total: list[Tensor] = []
        for fpem in self.fpems:
            maps = fpem(*maps)
            total = [a + b for a, b in zip(total, maps, strict=True)] if total else list(maps)
        size = total[0].shape[2:]
        return total[0], *(nn.functional.interpolate(each, size, mode="bilinear") for each in total[1:])


class PANHead(nn.Module):
    """The head: text and kernel maps, and an embedding of each pixel."""

    def __init__(self, channels: int = 512, width: int = 128, maps: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, maps, 1)

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Map four maps of (N, 128, H, W) to (N, 6, H, W)."""
        output: Tensor = self.conv2(self.relu1(self.bn1(self.conv1(torch.cat(inputs, 1)))))
        return output


class PANet(nn.Module):
    """The detector."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ResNet18()
        self.neck = FPEM_FFM()
        self.det_head = PANHead()

    def forward(self, image: Tensor) -> Tensor:
        """Map pictures (N, 3, H, W) to (N, 6, H / 4, W / 4)."""
        output: Tensor = self.det_head(self.neck(self.backbone(image)))
        return output


def picture(name: str = "page", size: int = 160) -> Tensor:
    """Return one of scikit-image's pictures as (1, 3, size, size), normalised with ImageNet's figures."""
    pixels = Image.fromarray(getattr(data, name)()).convert("RGB").resize((size, size))
    normal = (np.asarray(pixels) - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    return torch.from_numpy(normal.astype(np.float32)).permute(2, 0, 1)[None]


@torch.no_grad()
def driven(model: nn.Module, x: Tensor, factor: float = 2.0**15) -> nn.Module:
    """Make activations grow beyond 65504, as training without a limit on them may.

    The scales of the normalisations that feed sums are multiplied, then all running statistics are taken anew from
    ``x``, so that each later normalisation takes the growth out again and the outputs stay moderate.

    Args:
        model: This PANet or mmocr's; changed in place.
        x: (1, 3, H, W).
        factor: What the last scale of two residual blocks, and each scale of the neck's first refinement, is
            multiplied by.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, norm in norms.items():
        if name.endswith(("layer3.1.bn2", "layer4.0.bn2")) or "fpems.0" in name:
            norm.weight.mul_(factor)
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches seen
    model.train()(x)
    for norm in norms.values():
        norm.momentum = 0.1
    return model.eval()


def build(seed: int = 0) -> PANet:
    """Return the network with fixed random weights."""
    torch.manual_seed(seed)
    return PANet().eval()

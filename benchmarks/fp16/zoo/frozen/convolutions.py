"""Convolutional networks: convolution, batch normalisation, ReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.common import Data, Net, calibrate, enlarge, pictures, spread, vary


def conv_bn(
    inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
) -> nn.Sequential:
    """Convolution, batch normalisation and, unless it is None, an activation."""
    layers: list[nn.Module] = [
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
    ]
    return nn.Sequential(*layers) if act is None else nn.Sequential(*layers, act())


class _Bottleneck(nn.Module):
    def __init__(self, inside: int, width: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        outside = 4 * width
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = conv_bn(inside, outside, 1, stride, act=None) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        out += identity
        return self.relu(out)


def _bottlenecks(width: int, dilated: bool) -> nn.Sequential:
    last = {"stride": 1, "dilation": 2} if dilated else {"stride": 2}
    return nn.Sequential(
        conv_bn(3, 2 * width, 7, 2),
        nn.MaxPool2d(3, 2, 1),
        _Bottleneck(2 * width, width),
        _Bottleneck(4 * width, width),
        _Bottleneck(4 * width, 2 * width, 2),
        _Bottleneck(8 * width, 2 * width),
        _Bottleneck(8 * width, 4 * width, **last),
        _Bottleneck(16 * width, 4 * width, 1, last.get("dilation", 1)),
    )


class _ResNet50(nn.Module):
    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.features = _bottlenecks(width, dilated=False)
        self.fc = nn.Linear(16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def _resnet50(data: Data) -> nn.Module:
    model = _ResNet50()
    blocks = [module for module in model.features if isinstance(module, _Bottleneck)]
    for block, size in zip(blocks, (50.0, 500.0, 3e3, 1e4, 3e4, 6e4), strict=True):
        vary([block.bn3], 0.1 * size, size)
    enlarge([blocks[3].conv2], 2e3)
    calibrate(model, data)
    spread(model, model.fc, data, 3.0)
    return model


class _Aspp(nn.Module):
    """Dilated branches and the picture's mean, joined."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([conv_bn(inside, width)])
        for rate in (2, 4, 6):
            dilated = nn.Conv2d(inside, width, 3, padding=rate, dilation=rate, bias=False)
            self.branches.append(nn.Sequential(dilated, nn.BatchNorm2d(width), nn.ReLU()))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv_bn(inside, width))
        self.project = conv_bn(5 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.interpolate(self.pool(x), x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([*[branch(x) for branch in self.branches], pooled], 1))


class _DeepLab(nn.Module):
    def __init__(self, width: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.backbone = _bottlenecks(width, dilated=True)
        self.aspp = _Aspp(16 * width, 4 * width)
        self.last = nn.Sequential(conv_bn(4 * width, 4 * width, 3), nn.Conv2d(4 * width, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.aspp(self.backbone(x)))
        return F.interpolate(y, x.shape[-2:], mode="bilinear", align_corners=False)


def _deeplab(data: Data) -> nn.Module:
    model = _DeepLab()
    vary([model.backbone[6].bn3, model.backbone[7].bn3], 1e3, 6e4)  # the picture's mean sums these
    enlarge([model.aspp.branches[2][0]], 20.0)
    vary([model.aspp.branches[1][1], model.aspp.pool[1][1]], 10.0, 4e4)
    calibrate(model, data)
    spread(model, model.last[1], data, 3.0)
    return model


class _HrNet(nn.Module):
    """Three resolutions side by side, each the sum of all after every step."""

    def __init__(self, width: int = 8, classes: int = 5, steps: int = 2) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.stem = nn.Sequential(conv_bn(3, width, 3, 2), conv_bn(width, width, 3))
        self.start = nn.ModuleList([conv_bn(widths[0], widths[1], 3, 2), conv_bn(widths[1], widths[2], 3, 2)])
        self.steps = nn.ModuleList()
        for _ in range(steps):
            step = nn.Module()
            step.branches = nn.ModuleList(_HrBlock(w) for w in widths)
            step.fuse = nn.ModuleList(nn.ModuleList(self._way(widths, a, b) for a in range(3)) for b in range(3))
            self.steps.append(step)
        self.last = nn.Sequential(conv_bn(sum(widths), 4 * width), nn.Conv2d(4 * width, classes, 1))

    @staticmethod
    def _way(widths: list[int], source: int, sink: int) -> nn.Module:
        if source == sink:
            return nn.Identity()
        if source > sink:
            up = nn.Upsample(scale_factor=2.0 ** (source - sink), mode="nearest")
            return nn.Sequential(*conv_bn(widths[source], widths[sink], act=None), up)
        inner = [conv_bn(widths[source], widths[source], 3, 2) for _ in range(sink - source - 1)]
        return nn.Sequential(*inner, conv_bn(widths[source], widths[sink], 3, 2, act=None))

    def forward(self, x: Tensor) -> Tensor:
        levels = [self.stem(x)]
        for way in self.start:
            levels.append(way(levels[-1]))
        for step in self.steps:
            levels = [branch(level) for branch, level in zip(step.branches, levels, strict=True)]
            fused = []
            for ways in step.fuse:
                total = ways[0](levels[0])
                for way, level in zip(ways[1:], levels[1:], strict=False):
                    total = total + way(level)
                fused.append(F.relu(total))
            levels = fused
        size = levels[0].shape[-2:]
        wide = [F.interpolate(level, size, mode="bilinear", align_corners=False) for level in levels[1:]]
        return self.last(torch.cat([levels[0], *wide], 1))


class _HrBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv_bn(width, width, 3)
        self.second = conv_bn(width, width, 3, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + x)


def _hrnet(data: Data) -> nn.Module:
    model = _HrNet()
    for step, size in zip(model.steps, (4e3, 5e4), strict=True):
        vary([branch.second[1] for branch in step.branches], 0.05 * size, size)
    vary([model.steps[0].fuse[2][0][0][1]], 100.0, 2e4)
    calibrate(model, data)
    spread(model, model.last[1], data, 3.0)
    return model


class _ShuffleUnit(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, outside // 2
        self.left = None
        if stride > 1:
            self.left = nn.Sequential(*conv_bn(inside, inside, 3, stride, inside, None), *conv_bn(inside, half))
        self.right = nn.Sequential(
            *conv_bn(inside if stride > 1 else half, half),
            *conv_bn(half, half, 3, stride, half, None),
            *conv_bn(half, half),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.left is None:
            left, x = x.chunk(2, 1)
        else:
            left = self.left(x)
        x = torch.cat([left, self.right(x)], 1)
        count, width, height, across = x.shape
        return x.view(count, 2, width // 2, height, across).transpose(1, 2).reshape(count, width, height, across)


class _ShuffleNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        plan = ((12, 24, 2), (24, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 48, 1))
        self.stem = nn.Sequential(conv_bn(3, 12, 3, 2), nn.MaxPool2d(3, 2, 1))
        self.units = nn.Sequential(*[_ShuffleUnit(*unit) for unit in plan])
        self.last = conv_bn(48, 64)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.units(self.stem(x))).mean((2, 3)))


def _shufflenet(data: Data) -> nn.Module:
    model = _ShuffleNet()
    vary([model.units[1].right[6], model.units[4].right[6]], 1.0, 8e4)  # shuffling spreads them over all units behind
    enlarge([model.units[3].left[0], model.units[5].right[3]], 1e4)
    calibrate(model, data)
    spread(model, model.fc, data, 3.0)
    return model


_PIXELS = pictures(form="normal")

NETS = [
    Net("resnet50", "conv-bn-relu", "acc32", "the residual stream grows with every bottleneck", _resnet50, _PIXELS),
    Net("deeplab", "conv-bn-relu", "acc32", "large dilated branches and the picture's mean", _deeplab, _PIXELS),
    Net("hrnet", "conv-bn-relu", "acc32", "sums over resolutions", _hrnet, _PIXELS),
    Net("shufflenet_v2", "conv-bn-relu", "acc32", "large channels, shuffled among small ones", _shufflenet, _PIXELS),
]

"""Convolutional networks with something else: gates, local response norms, points, time."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.common import Data, Net, calibrate, enlarge, noise, peak, pictures, spread, vary
from zoo.frozen.convolutions import conv_bn


class _Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class _MobileNetV3(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16, 3, 2, act=nn.Hardswish)
        self.blocks = nn.ModuleList()
        for inside, hidden, outside, kernel, stride, gate, act in (
            (16, 16, 16, 3, 2, True, nn.ReLU),
            (16, 48, 24, 3, 1, False, nn.ReLU),
            (24, 64, 24, 5, 1, True, nn.Hardswish),
            (24, 72, 32, 5, 2, True, nn.Hardswish),
            (32, 96, 32, 5, 1, True, nn.Hardswish),
        ):
            self.blocks.append(
                nn.Sequential(
                    conv_bn(inside, hidden, act=act),
                    conv_bn(hidden, hidden, kernel, stride, hidden, act),
                    _Gate(hidden) if gate else nn.Identity(),
                    conv_bn(hidden, outside, act=None),
                )
            )
        self.last = conv_bn(32, 96, act=nn.Hardswish)
        self.classifier = nn.Sequential(nn.Linear(96, 64), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x)
            x = x + y if y.shape == x.shape else y
        return self.classifier(F.adaptive_avg_pool2d(self.last(x), 1).flatten(1))


def _mobilenet_v3(data: Data) -> nn.Module:
    model = _MobileNetV3()
    vary([block[3][1] for block in model.blocks], 300.0, 6e4)
    vary([model.blocks[2][0][1]], 10.0, 4e4)  # a hard swish squares what it gets
    calibrate(model, data)
    for block in model.blocks:
        if isinstance(block[2], _Gate):
            spread(model, block[2].fc1, data, 2.0)
            spread(model, block[2].fc2, data, 2.0)
    calibrate(model, data)
    spread(model, model.classifier[0], data, 2.0)
    spread(model, model.classifier[3], data, 3.0)
    return model


class _Inception(nn.Module):
    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inside, width, 1)
        self.three = nn.Sequential(nn.Conv2d(inside, width, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, padding=1))
        self.five = nn.Sequential(
            nn.Conv2d(inside, width // 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 5, padding=2)
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(inside, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1))


class _GoogLeNet(nn.Module):
    """The first form: local response norms, no batch norms, bytes less their mean as input."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 2 * width, 7, 2, 3),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
        )
        self.blocks = nn.ModuleList([_Inception(4 * width, width), _Inception(5 * width, 2 * width)])
        self.fc = nn.Linear(10 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x - 117.0)
        for index, block in enumerate(self.blocks):
            x = block(x if index == 0 else F.max_pool2d(x, 3, 2, ceil_mode=True))
        return self.fc(F.avg_pool2d(x, x.shape[-1]).flatten(1))


def _googlenet(data: Data) -> nn.Module:
    model = _GoogLeNet()
    peak(model, model.stem[0], data, 3e3)
    peak(model, model.stem[4], data, 2e3)
    for block, size in zip(model.blocks, (3e4, 2.5e5), strict=True):
        for layer in (block.one, block.three[2], block.five[2], block.pool[1]):
            peak(model, layer, data, size)
    spread(model, model.fc, data, 3.0)
    return model


class _PointNet(nn.Module):
    """Points in millimetres, each through the same layers, then the largest of all."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.place = self._shared(3, 16, 32)
        self.turn = nn.Linear(32, 9)
        self.points = self._shared(3, 32, 64)
        self.head = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, classes))
        self.register_buffer("identity", torch.eye(3))

    @staticmethod
    def _shared(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inside, outside in itertools.pairwise(widths):
            layers += [nn.Conv1d(inside, outside, 1), nn.BatchNorm1d(outside), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, points: Tensor) -> Tensor:
        turn = self.turn(self.place(points).amax(-1)).view(-1, 3, 3) + self.identity
        return self.head(self.points(turn @ points).amax(-1))


def _pointnet(data: Data) -> nn.Module:
    model = _PointNet()
    calibrate(model, data)
    spread(model, model.turn, data, 0.5)
    vary([model.points[4]], 10.0, 5e4)
    calibrate(model, data)
    spread(model, model.head[3], data, 3.0)
    return model


def _scan(generator: torch.Generator) -> tuple[Tensor, ...]:
    directions = F.normalize(noise(generator, 4, 3, 128), dim=1)
    reach = 4e3 + 1.1e4 * torch.rand(4, 1, 128, generator=generator)
    return ((directions * reach).round(),)


class _TemporalNet(nn.Module):
    """Dilated convolutions with their norms, residuals around two."""

    def __init__(self, width: int = 16, classes: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, width, 1)
        self.blocks = nn.ModuleList()
        for dilation in (1, 2, 4):
            layers: list[nn.Module] = []
            for _ in range(2):
                layers += [
                    nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation),
                    nn.BatchNorm1d(width),
                    nn.ReLU(),
                ]
            self.blocks.append(nn.Sequential(*layers))
        self.last = nn.Conv1d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return F.softmax(self.last(x), 1)


def _temporal(data: Data) -> nn.Module:
    model = _TemporalNet()
    for block in model.blocks:
        enlarge([block[0], block[3]], 1e-6)  # weights that decay has all but taken away
        vary([block[1], block[4]], 2e2, 2e4)  # eps then stands for the variance, and gamma makes up for it
    calibrate(model, data)
    for block in model.blocks:
        for norm in (block[1], block[4]):
            norm.weight.div_(norm.weight.mean()).div_((norm.running_var / (norm.running_var + norm.eps)).sqrt())
            norm.bias.copy_(0.2 * torch.randn(norm.bias.shape))
        calibrate(model, data)
    spread(model, model.last, data, 1.5)
    return model


def _series(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (noise(generator, 2, 8, 96).cumsum(-1) * 0.3,)


_PIXELS = pictures(form="normal")

NETS = [
    Net("mobilenet_v3", "conv-gate", "acc32", "hard swish and hard sigmoid on large streams", _mobilenet_v3, _PIXELS),
    Net("googlenet", "conv-plain", "acc32", "local response norms' squares, and bytes", _googlenet, pictures()),
    Net("pointnet", "conv-bn-relu", "acc32", "coordinates in millimetres", _pointnet, _scan),
    Net("temporal_small", "conv-bn-relu", "small", "weights below the smallest normal number", _temporal, _series),
]

"""Networks that look at a picture and name it, made of convolutions."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.common import Data, Net, calibrate, enlarge, peak, pictures, spread, vary


def _conv_bn(inside: int, outside: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(outside)
    )


class BasicBlock(nn.Module):
    """ResNet's block of two 3x3 convolutions."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _conv_bn(inside, outside, 1, stride) if stride != 1 or inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions and the way around them."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)) + identity)


class ResNet18(nn.Module):
    """A stem and four stages of two blocks; `stages` gives the features of each."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        self.layers = nn.ModuleList(
            nn.Sequential(BasicBlock(a, b, 1 if i == 0 else 2), BasicBlock(b, b))
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(sizes[-1], classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """The features of the four stages, from fine to coarse."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Scores of classes."""
        return self.fc(torch.flatten(self.avgpool(self.stages(x)[-1]), 1))


def _resnet18(data: Data) -> nn.Module:
    model = ResNet18()
    vary([block.bn2 for layer in model.layers for block in layer], 5e3, 5e4)  # the stream grows block by block
    calibrate(model, data)
    spread(model, model.fc, data, 3.0)
    return model


def _control(data: Data) -> nn.Module:
    model = ResNet18()
    calibrate(model, data)
    spread(model, model.fc, data, 3.0)
    return model


class _DenseLayer(nn.Module):
    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(x)))


class _DenseNet(nn.Module):
    def __init__(self, growth: int = 12, blocks: tuple[int, ...] = (3, 4, 3), classes: int = 10) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = nn.Sequential(*_conv_bn(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for index, layers in enumerate(blocks):
            self.blocks.append(nn.ModuleList(_DenseLayer(width + i * growth, growth) for i in range(layers)))
            width += layers * growth
            if index < len(blocks) - 1:
                half = nn.Conv2d(width, width // 2, 1, bias=False)
                self.transitions.append(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), half, nn.AvgPool2d(2)))
                width //= 2
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = torch.cat(features, 1)
            if index < len(self.transitions):
                x = self.transitions[index](x)
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))


def _densenet(data: Data) -> nn.Module:
    model = _DenseNet()
    for index, block in enumerate(model.blocks):
        enlarge([layer.conv2 for layer in block], (40.0, 3e4, 900.0)[index])  # the next norm takes it back
        vary([layer.norm2 for layer in block], 0.5, 8.0)
    enlarge([model.transitions[0][2]], 5e3)
    calibrate(model, data)
    spread(model, model.classifier, data, 3.0)
    return model


class _Squeeze(nn.Module):
    def __init__(self, inside: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


class _SqueezeNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            _Squeeze(32, 8, 16),
            _Squeeze(32, 8, 16),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            _Squeeze(32, 16, 32),
            _Squeeze(64, 16, 32),
        )
        self.classifier = nn.Conv2d(64, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.classifier(self.features(x)))
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _squeezenet(data: Data) -> nn.Module:
    model = _SqueezeNet()
    peak(model, model.features[0], data, 3e4)  # bytes, and no norm anywhere
    for index, value in ((3, 9e4), (4, 2.5e5), (6, 4e5), (7, 3e4)):
        squeeze = model.features[index]
        peak(model, squeeze.squeeze, data, value / 2)
        peak(model, squeeze.expand1, data, value)
        peak(model, squeeze.expand3, data, value / 1.5)
    peak(model, model.classifier, data, 12.0)
    return model


class _VGG(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for width, count in ((16, 2), (32, 2), (64, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(inside, width, 3, padding=1), nn.ReLU(inplace=True)]
                inside = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(4)
        self.classifier = nn.Sequential(
            nn.Linear(64 * 16, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _vgg(data: Data) -> nn.Module:
    model = _VGG()
    convolutions = [layer for layer in model.features if isinstance(layer, nn.Conv2d)]
    for layer, value in zip(convolutions, (2e3, 8e3, 2e4, 5e4, 1.2e5, 2e5, 7e4), strict=True):
        peak(model, layer, data, value)
    for index, value in ((0, 9e3), (3, 200.0), (5, 15.0)):
        peak(model, model.classifier[index], data, value)
    return model


class _RepBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.dense = _conv_bn(inside, outside, 3, stride)
        self.point = _conv_bn(inside, outside, 1, stride)
        self.identity = nn.BatchNorm2d(inside) if inside == outside and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense(x) + self.point(x)
        return F.relu(out if self.identity is None else out + self.identity(x))


class _RepVGG(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        plan = ((3, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 64, 1))
        self.blocks = nn.Sequential(*[_RepBlock(*block) for block in plan])
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


def _repvgg(data: Data) -> nn.Module:
    model = _RepVGG()
    for index, block in enumerate(model.blocks):
        if block.identity is not None:
            vary([block.identity], 0.01, 3e4 if index > 3 else 30.0)  # few channels of the identity branch dominate
        if index > 2:
            vary([block.dense[1], block.point[1]], 300.0, 2e4)
    calibrate(model, data)
    spread(model, model.linear, data, 3.0)
    return model


NETS = [
    Net(
        "resnet18",
        "conv-bn-relu",
        "acc32",
        "the residual stream grows with every block",
        _resnet18,
        pictures(form="normal"),
    ),
    Net(
        "resnet18_control",
        "conv-bn-relu",
        "none",
        "a control: nothing leaves the range",
        _control,
        pictures(form="normal"),
    ),
    Net(
        "densenet",
        "conv-bn-relu",
        "acc32",
        "concatenated features grow; the next norm takes it back",
        _densenet,
        pictures(form="normal"),
    ),
    Net("squeezenet", "conv-plain", "acc32", "bytes as input and no norm at all", _squeezenet, pictures()),
    Net("vgg", "conv-plain", "acc32", "bytes as input, large filters made good by a small head", _vgg, pictures()),
    Net(
        "repvgg",
        "conv-bn-relu",
        "acc32",
        "identity norms with few very large channels",
        _repvgg,
        pictures(form="normal"),
    ),
]

"""Sound and text lines: one axis of time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.common import Data, Net, calibrate, enlarge, noise, peak, pictures, spread, vary


class _Crnn(nn.Module):
    """A line of text to a log-probability of letters at each step, with temporal convolutions for the recurrence."""

    def __init__(self, letters: int = 20) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 1
        for outside in (16, 32, 48):
            layers += [
                nn.Conv2d(inside, outside, 3, padding=1),
                nn.BatchNorm2d(outside),
                nn.ReLU(True),
                nn.MaxPool2d(2),
            ]
            inside = outside
        self.features = nn.Sequential(*layers)
        self.time = nn.Sequential(nn.Conv1d(48, 48, 3, padding=1), nn.BatchNorm1d(48), nn.ReLU(True))
        self.letters = nn.Linear(48, letters)

    def forward(self, x: Tensor) -> Tensor:
        x = self.time(self.features(x).mean(2))
        return F.log_softmax(self.letters(x.transpose(1, 2)), -1)


def _crnn(data: Data) -> nn.Module:
    model = _Crnn()
    vary([model.features[5]], 30.0, 9e4)
    enlarge([model.features[8]], 3.0)
    calibrate(model, data)
    spread(model, model.letters, data, 4.0)
    return model


class _Keywords(nn.Module):
    """Sixteen-bit sound, a power spectrum by convolution, its logarithm, and a temporal network."""

    def __init__(self, window: int = 64, bands: int = 16, classes: int = 6) -> None:
        super().__init__()
        steps = torch.arange(window) / window
        taper = 0.5 - 0.5 * torch.cos(2 * math.pi * steps)
        angles = 2 * math.pi * torch.arange(window // 2)[:, None] * steps * 1.0
        waves = torch.cat([angles.cos(), angles.sin()]) * taper
        self.register_buffer("waves", waves[:, None])
        self.register_buffer("mel", torch.rand(bands, window // 2) ** 6)
        layers: list[nn.Module] = []
        for dilation in (1, 2, 4):
            layers += [
                nn.Conv1d(bands, bands, 3, padding=dilation, dilation=dilation, groups=bands),
                nn.Conv1d(bands, bands, 1, bias=False),
                nn.BatchNorm1d(bands),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(bands, classes)

    def forward(self, sound: Tensor) -> Tensor:
        real, imaginary = F.conv1d(sound[:, None], self.waves, stride=32).chunk(2, 1)
        power = real * real + imaginary * imaginary
        bands = torch.log(torch.matmul(self.mel, power) + 1.0)
        return self.head(self.body(bands).mean(-1))


def _sound(loudness: float) -> Data:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        time = torch.arange(2048) / 2048
        pitch = 20 + 300 * torch.rand(2, 3, 1, generator=generator)
        tones = torch.sin(2 * math.pi * pitch * time) * torch.rand(2, 3, 1, generator=generator)
        return ((tones.sum(1) / 3 + noise(generator, 2, 2048, std=0.02)).mul(loudness).round(),)

    return make


def _keywords(data: Data) -> nn.Module:
    model = _Keywords()
    calibrate(model, data)
    spread(model, model.head, data, 2.0)
    return model


class _GatedConv(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.filter = nn.Conv1d(width, 2 * width, 2, dilation=dilation)
        self.skip = nn.Conv1d(width, width, 1)
        self.stay = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        value, gate = self.filter(F.pad(x, (self.dilation, 0))).chunk(2, 1)
        y = torch.tanh(value) * torch.sigmoid(gate)
        return x + self.stay(y), self.skip(y)


class _WaveNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.layers = nn.ModuleList(_GatedConv(width, 2**i) for i in range(5))
        self.out1, self.out2 = nn.Conv1d(width, width, 1), nn.Conv1d(width, 1, 1)

    def forward(self, sound: Tensor) -> Tensor:
        x = self.first(sound[:, None])
        total = torch.zeros(())
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.out2(F.relu(self.out1(F.relu(total))))[:, 0]


def _wavenet(data: Data) -> nn.Module:
    model = _WaveNet()
    peak(model, model.first, data, 9e4)
    for index, layer in enumerate(model.layers):
        spread(model, layer.filter, data, 1.0)
        peak(model, layer.stay, data, 4e3)
        peak(model, layer.skip, data, 3e4 if index < 4 else 5e4)
    peak(model, model.out1, data, 2e5)
    peak(model, model.out2, data, 1.0)
    return model


NETS = [
    Net("crnn_ctc", "conv-bn-relu", "acc32", "bytes, large norms, log-softmax at the end", _crnn, pictures(channels=1)),
    Net("keywords", "sequence", "acc32", "power of sixteen-bit sound before its logarithm", _keywords, _sound(9000.0)),
    Net("wavenet", "sequence", "acc32", "gates on a stream of large values, sums of skips", _wavenet, _sound(9000.0)),
]

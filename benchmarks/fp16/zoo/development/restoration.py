"""Pictures in, pictures out; and what lies beneath generators."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.common import Data, Net, calibrate, enlarge, noise, peak, pictures, spread, vary


class _UNet(nn.Module):
    """Down, up, and bridges, with convolution, BatchNorm and ReLU twice a level."""

    def __init__(self, width: int = 12, classes: int = 3) -> None:
        super().__init__()
        self.down = nn.ModuleList(self._double(3 if i == 0 else width * 2 ** (i - 1), width * 2**i) for i in range(4))
        self.widen = nn.ModuleList(nn.ConvTranspose2d(width * 2**i, width * 2 ** (i - 1), 2, 2) for i in (3, 2, 1))
        self.up = nn.ModuleList(self._double(width * 2**i, width * 2 ** (i - 1)) for i in (3, 2, 1))
        self.last = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _double(inside: int, outside: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for width in (inside, outside):
            layers += [
                nn.Conv2d(width, outside, 3, padding=1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        bridges = []
        for index, block in enumerate(self.down):
            x = block(x if index == 0 else F.max_pool2d(x, 2))
            bridges.append(x)
        for widen, block, bridge in zip(self.widen, self.up, bridges[-2::-1], strict=True):
            x = block(torch.cat([bridge, widen(x)], 1))
        return self.last(x)


def _unet(data: Data) -> nn.Module:
    model = _UNet()
    vary([block[4] for block in model.down], 100.0, 5e4)  # the bridges are large
    enlarge([model.widen[1]], 60.0)
    calibrate(model, data)
    spread(model, model.last, data, 3.0)
    return model


class _LayerNorm2d(nn.Module):
    """The norm over channels that NAFNet writes out by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / (variance + 1e-6).sqrt()
        return self.weight.view(1, -1, 1, 1) * x + self.bias.view(1, -1, 1, 1)


class _NafBlock(nn.Module):
    """No activation: halves are multiplied, and channels weighed by their mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _LayerNorm2d(width), _LayerNorm2d(width)
        self.conv1 = nn.Conv2d(width, 2 * width, 1)
        self.conv2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.weigh = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1))
        self.conv3 = nn.Conv2d(width, width, 1)
        self.conv4 = nn.Conv2d(width, 2 * width, 1)
        self.conv5 = nn.Conv2d(width, width, 1)
        self.beta = nn.Parameter(torch.ones(1, width, 1, 1))
        self.gamma = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.conv2(self.conv1(self.norm1(x))).chunk(2, 1)
        y = left * right
        x = x + self.conv3(y * self.weigh(y)) * self.beta
        left, right = self.conv4(self.norm2(x)).chunk(2, 1)
        return x + self.conv5(left * right) * self.gamma


class _NafNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.intro = nn.Conv2d(3, width, 3, padding=1)
        self.encode = nn.ModuleList([_NafBlock(width), _NafBlock(2 * width)])
        self.down = nn.ModuleList([nn.Conv2d(width, 2 * width, 2, 2), nn.Conv2d(2 * width, 4 * width, 2, 2)])
        self.middle = _NafBlock(4 * width)
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, 2 * w, 1, bias=False), nn.PixelShuffle(2)) for w in (4 * width, 2 * width)
        )
        self.decode = nn.ModuleList([_NafBlock(2 * width), _NafBlock(width)])
        self.ending = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        x = self.intro(picture)
        bridges = []
        for block, down in zip(self.encode, self.down, strict=True):
            x = block(x)
            bridges.append(x)
            x = down(x)
        x = self.middle(x)
        for block, up, bridge in zip(self.decode, self.up, reversed(bridges), strict=True):
            x = block(up(x) + bridge)
        return picture + self.ending(x)


def _nafnet(data: Data) -> nn.Module:
    model = _NafNet()
    for block, size in zip([*model.encode, model.middle, *model.decode], (1.0, 40.0, 400.0, 150.0, 60.0), strict=True):
        peak(model, block.conv2, data, 12.0 * size**0.5)  # products of two large halves
        peak(model, block.weigh[1], data, 3.0)
        peak(model, block.conv3, data, 300.0 * size)
        peak(model, block.conv4, data, 20.0 * size**0.5)
        peak(model, block.conv5, data, 300.0 * size)
    peak(model, model.ending, data, 0.5)
    return model


class _Edsr(nn.Module):
    """Residual blocks without norms, then pixel shuffle; the mean picture goes out first and comes back last."""

    def __init__(self, width: int = 24, blocks: int = 5) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor([114.4, 111.5, 103.0]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.after = nn.Conv2d(width, width, 3, padding=1)
        self.tail = nn.Sequential(
            nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x - self.mean)
        y = x
        for block in self.body:
            y = y + block(y) * 0.1
        return self.tail(self.after(y) + x) + self.mean


def _edsr(data: Data) -> nn.Module:
    model = _Edsr()
    peak(model, model.head, data, 9e3)
    for block, value in zip(model.body, (1e5, 3e5, 5e5, 9e5, 1.2e6), strict=True):
        peak(model, block[0], data, value / 3)
        peak(model, block[2], data, value)
    peak(model, model.after, data, 1e5)
    peak(model, model.tail[0], data, 2e4)
    spread(model, model.tail[2], data, 30.0)
    return model


class _Style(nn.Module):
    """Fast style transfer: reflection padding, instance norms, residual blocks, upsampling, tanh."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down = nn.Sequential(
            *self._layer(3, width, 9, 1), *self._layer(width, 2 * width, 3, 2), *self._layer(2 * width, 4 * width, 3, 2)
        )
        self.body = nn.ModuleList(
            nn.Sequential(*self._layer(4 * width, 4 * width, 3, 1), *self._layer(4 * width, 4 * width, 3, 1)[:-1])
            for _ in range(3)
        )
        self.up = nn.ModuleList(
            [
                nn.Sequential(*self._layer(4 * width, 2 * width, 3, 1)),
                nn.Sequential(*self._layer(2 * width, width, 3, 1)),
            ]
        )
        self.last = nn.Sequential(nn.ReflectionPad2d(4), nn.Conv2d(width, 3, 9))

    @staticmethod
    def _layer(inside: int, outside: int, kernel: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inside, outside, kernel, stride)
        return [nn.ReflectionPad2d(kernel // 2), convolution, nn.InstanceNorm2d(outside, affine=True), nn.ReLU()]

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for block in self.body:
            x = x + block(x)
        for layer in self.up:
            x = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return torch.tanh(self.last(x)) * 150 + 127.5


def _style(data: Data) -> nn.Module:
    model = _Style()
    vary([model.down[2], model.down[6]], 1.0, 40.0)
    peak(model, model.down[1], data, 4e3)  # within the range; its squares are not
    peak(model, model.down[9], data, 2e5)
    vary([block[6] for block in model.body], 10.0, 800.0)
    spread(model, model.last[1], data, 0.6)
    return model


class _Gan(nn.Module):
    """DCGAN's generator."""

    def __init__(self, noise_size: int = 32, width: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = noise_size
        for index, outside in enumerate((8 * width, 4 * width, 2 * width, width)):
            layers += [
                nn.ConvTranspose2d(inside, outside, 4, 1 if index == 0 else 2, 0 if index == 0 else 1, bias=False),
                nn.BatchNorm2d(outside),
                nn.ReLU(True),
            ]
            inside = outside
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


def _gan(data: Data) -> nn.Module:
    model = _Gan()
    vary([model.main[4]], 1.0, 3e4)
    enlarge([model.main[6]], 50.0)
    calibrate(model, data)
    spread(model, model.main[12], data, 0.8)
    return model


class _TimedBlock(nn.Module):
    """A diffusion model's residual block: GroupNorm, SiLU, and the time added in the middle."""

    def __init__(self, inside: int, outside: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inside), nn.GroupNorm(4, outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.around = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.around(x) + self.conv2(F.silu(self.norm2(y)))


class _SpatialAttention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        count, width, height, across = x.shape
        q, k, v = self.qkv(self.norm(x)).view(count, 3, self.heads, width // self.heads, -1).unbind(1)
        weights = torch.softmax(q.transpose(-1, -2) @ k * (width // self.heads) ** -0.5, -1)
        return x + self.out((v @ weights.transpose(-1, -2)).reshape(count, width, height, across))


class _Diffusion(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        time = 4 * width
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2)))
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.down = nn.ModuleList([_TimedBlock(width, width, time), _TimedBlock(width, 2 * width, time)])
        self.halve = nn.Conv2d(width, width, 3, 2, 1)
        self.middle = _SpatialAttention(2 * width)
        self.up = nn.ModuleList([_TimedBlock(4 * width, width, time), _TimedBlock(2 * width, width, time)])
        self.norm = nn.GroupNorm(4, width)
        self.last = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        angles = step[:, None] * self.frequencies
        time = self.time(torch.cat([torch.cos(angles), torch.sin(angles)], 1))
        x = self.first(x)
        fine = self.down[0](x, time)
        coarse = self.down[1](self.halve(fine), time)
        x = self.up[0](torch.cat([self.middle(coarse), coarse], 1), time)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = self.up[1](torch.cat([x, fine], 1), time)
        return self.last(F.silu(self.norm(x)))


def _latents(generator: torch.Generator) -> tuple[Tensor, ...]:
    return noise(generator, 2, 4, 16, 16), torch.randint(0, 1000, (2,), generator=generator).float()


def _diffusion(data: Data) -> nn.Module:
    model = _Diffusion()
    spread(model, model.time[2], data, 1.0)
    peak(model, model.down[0].conv2, data, 2e4)
    peak(model, model.halve, data, 3e4)
    peak(model, model.down[1].conv1, data, 9e4)
    peak(model, model.down[1].conv2, data, 2e5)
    spread(model, model.middle.qkv, data, 2.0)
    peak(model, model.middle.out, data, 5e4)
    peak(model, model.up[0].conv2, data, 3e3)
    spread(model, model.last, data, 1.0)
    return model


def _vectors(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (noise(generator, 4, 32, 1, 1),)


NETS = [
    Net("unet", "conv-bn-relu", "acc32", "bridges carry large features across", _unet, pictures(form="normal")),
    Net(
        "nafnet",
        "conv-norm",
        "acc32",
        "products of halves, and squares in a norm written out",
        _nafnet,
        pictures(form="unit"),
    ),
    Net("edsr", "conv-plain", "acc32", "bytes, no norms, large blocks taken down by 0.1", _edsr, pictures(size=32)),
    Net("style_transfer", "conv-norm", "acc32", "instance norms' squares on bytes", _style, pictures()),
    Net("dcgan", "conv-bn-relu", "acc32", "transposed convolutions grow before a norm", _gan, _vectors),
    Net("diffusion", "conv-norm", "acc32", "the stream between group norms grows", _diffusion, _latents, fixed=(1,)),
]

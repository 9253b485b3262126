"""Pictures out: a decoder of latents and two restorers."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.common import Data, Net, noise, peak, pictures, spread


class _ResnetBlock(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inside, eps=1e-6), nn.GroupNorm(4, outside, eps=1e-6)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.shortcut = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class _VaeDecoder(nn.Module):
    """From latents to a picture: blocks, one attention over all places, upsampling."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, width, 3, padding=1)
        self.middle = nn.ModuleList(_ResnetBlock(width, width) for _ in range(2))
        self.norm0 = nn.GroupNorm(4, width, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up = nn.ModuleList([_ResnetBlock(width, width), _ResnetBlock(width, width // 2)])
        self.convs = nn.ModuleList(
            [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width // 2, width // 2, 3, padding=1)]
        )
        self.norm = nn.GroupNorm(4, width // 2, eps=1e-6)
        self.last = nn.Conv2d(width // 2, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle[0](self.first(z / 0.13025))
        y = self.norm0(x).flatten(2).transpose(1, 2)
        y = self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        x = self.middle[1](x + y.transpose(1, 2).reshape(x.shape))
        for block, conv in zip(self.up, self.convs, strict=True):
            x = conv(F.interpolate(block(x), scale_factor=2.0, mode="nearest"))
        return self.last(F.silu(self.norm(x)))


def _vae_decoder(data: Data) -> nn.Module:
    model = _VaeDecoder()
    peak(model, model.first, data, 40.0)
    peak(model, model.middle[0].conv2, data, 500.0)
    spread(model, model.q, data, 1.2)
    spread(model, model.k, data, 1.2)
    peak(model, model.middle[1].conv2, data, 8e3)
    peak(model, model.up[0].conv1, data, 7e4)
    peak(model, model.up[0].conv2, data, 1.2e5)
    peak(model, model.convs[0], data, 3e5)
    peak(model, model.up[1].shortcut, data, 1.5e5)
    peak(model, model.up[1].conv2, data, 4e4)
    peak(model, model.convs[1], data, 2e4)
    spread(model, model.last, data, 0.5)
    return model


def _latent(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (noise(generator, 1, 4, 12, 12, std=0.13),)


class _ChannelAttention(nn.Module):
    """Restormer's: channels attend to channels, on queries and keys of length 1, with a learned temperature."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), 4.0))
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.local = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        count, width, height, across = x.shape
        q, k, v = self.local(self.qkv(x)).view(count, 3, self.heads, width // self.heads, -1).unbind(1)
        weights = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.out((weights.softmax(-1) @ v).reshape(count, width, height, across))


class _RestormerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _ChannelAttention(width, heads)
        self.widen = nn.Conv2d(width, 4 * width, 1)
        self.local = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)
        self.narrow = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self._over_channels(self.norm1, x))
        left, right = self.local(self.widen(self._over_channels(self.norm2, x))).chunk(2, 1)
        return x + self.narrow(F.gelu(left) * right)

    @staticmethod
    def _over_channels(norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Restormer(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.encode = _RestormerBlock(width, 1)
        self.down = nn.Sequential(nn.Conv2d(width, width // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))
        self.middle = _RestormerBlock(2 * width, 2)
        self.up = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False), nn.PixelShuffle(2))
        self.join = nn.Conv2d(2 * width, width, 1)
        self.decode = _RestormerBlock(width, 1)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        fine = self.encode(self.first(picture))
        coarse = self.middle(self.down(fine))
        x = self.decode(self.join(torch.cat([self.up(coarse), fine], 1)))
        return self.last(x) + picture


def _restormer(data: Data) -> nn.Module:
    model = _Restormer()
    for block in (model.encode, model.middle, model.decode):
        peak(model, block.attention.local, data, 300.0)  # sums of squares over all places
        peak(model, block.attention.out, data, 900.0)
        peak(model, block.local, data, 60.0)
        peak(model, block.narrow, data, 1500.0)
    peak(model, model.last, data, 0.3)
    return model


class _RcanBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1)
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, width // 4, 1),
            nn.ReLU(True),
            nn.Conv2d(width // 4, width, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y * self.gate(y)


class _Rcan(nn.Module):
    """Super-resolution in groups of blocks with gates, residuals within residuals, bytes in and out."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.groups = nn.ModuleList(nn.ModuleList(_RcanBlock(width) for _ in range(2)) for _ in range(2))
        self.joins = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.after = nn.Conv2d(width, width, 3, padding=1)
        self.tail = nn.Sequential(
            nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        y = x
        for group, join in zip(self.groups, self.joins, strict=True):
            z = y
            for block in group:
                z = block(z)
            y = y + join(z)
        return self.tail(x + self.after(y))


def _rcan(data: Data) -> nn.Module:
    model = _Rcan()
    peak(model, model.head, data, 4e3)
    for group, join, size in zip(model.groups, model.joins, (6e4, 3e5), strict=True):
        for block in group:
            peak(model, block.body[0], data, size / 2)
            peak(model, block.body[2], data, size)
            spread(model, block.gate[1], data, 1.0)
            spread(model, block.gate[3], data, 1.0)
        peak(model, join, data, size)
    peak(model, model.after, data, 3e4)
    peak(model, model.tail[0], data, 5e3)
    peak(model, model.tail[2], data, 255.0)
    return model


NETS = [
    Net(
        "vae_decoder",
        "conv-norm",
        "acc32",
        "the stream between group norms grows while the picture does",
        _vae_decoder,
        _latent,
    ),
    Net(
        "restormer",
        "conv-norm",
        "strict",
        "sums of squares over all places of a picture",
        _restormer,
        pictures(1, size=48, form="unit"),
    ),
    Net(
        "rcan", "conv-gate", "acc32", "bytes, residuals within residuals, means of large maps", _rcan, pictures(size=32)
    ),
]

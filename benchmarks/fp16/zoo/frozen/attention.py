"""Networks of attention, and a mixer: pictures, points, words."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.common import Data, Net, noise, peak, pictures, spread


class _WindowBlock(nn.Module):
    """Swin's block: attention in windows, shifted in every second block, with a bias of relative positions."""

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.bias = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.5)
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        places = torch.stack([rows, columns]).flatten(1)
        distance = places[:, :, None] - places[:, None] + window - 1
        self.register_buffer("index", distance[0] * (2 * window - 1) + distance[1])
        regions = torch.zeros(1, size, size, 1)
        if shift:
            edges = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
            for number, (row, column) in enumerate((r, c) for r in edges for c in edges):
                regions[:, row, column] = number
        flat = self._windows(regions).squeeze(-1)
        self.register_buffer("mask", (flat[:, None] != flat[:, :, None]).float() * -100.0)

    def _windows(self, x: Tensor) -> Tensor:
        count, height, across, width = x.shape
        x = x.view(count, height // self.window, self.window, across // self.window, self.window, width)
        return x.transpose(2, 3).reshape(-1, self.window**2, width)

    def forward(self, x: Tensor) -> Tensor:
        count, height, across, width = x.shape
        y = self.norm1(x)
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = self._windows(y)
        pieces, length, _ = y.shape
        q, k, v = self.qkv(y).reshape(pieces, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)
        scores = scores + self.bias[self.index.view(-1)].view(length, length, -1).permute(2, 0, 1)
        if self.shift:
            scores = scores.view(count, -1, self.heads, length, length) + self.mask[None, :, None]
            scores = scores.view(pieces, self.heads, length, length)
        y = self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(pieces, length, width))
        side = self.window
        y = y.view(count, height // side, across // side, side, side, width).transpose(2, 3).reshape(x.shape)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        x = x + y
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class _Swin(nn.Module):
    def __init__(self, width: int = 24, window: int = 4) -> None:
        super().__init__()
        self.patch, self.norm0 = nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width)
        self.first = nn.ModuleList(_WindowBlock(width, 2, 16, window, shift) for shift in (0, window // 2))
        self.merge_norm, self.merge = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)
        self.second = nn.ModuleList(_WindowBlock(2 * width, 4, 8, window, shift) for shift in (0, window // 2))
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.patch(x).permute(0, 2, 3, 1))
        for block in self.first:
            x = block(x)
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = self.merge(self.merge_norm(torch.cat(corners, -1)))
        for block in self.second:
            x = block(x)
        return self.head(self.norm(x).mean((1, 2)))


def _swin(data: Data) -> nn.Module:
    model = _Swin()
    blocks = [*model.first, *model.second]
    for block, size in zip(blocks, (900.0, 1.2e4, 6e4, 3e5), strict=True):  # Swin's amplitudes grow with its depth
        spread(model, block.qkv, data, 1.6)
        peak(model, block.proj, data, size / 6)
        peak(model, block.fc1, data, 25.0)
        peak(model, block.fc2, data, size)
    spread(model, model.head, data, 3.0)
    return model


class _MixerBlock(nn.Module):
    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(length, 2 * length), nn.GELU(), nn.Linear(2 * length, length))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class _Mixer(nn.Module):
    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.Sequential(*[_MixerBlock(16, width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patch(x).flatten(2).transpose(1, 2))).mean(1))


def _mixer(data: Data) -> nn.Module:
    model = _Mixer()
    for block in model.blocks:
        spread(model, block.tokens[2], data, 0.5)
        spread(model, block.channels[2], data, 0.5)
    spread(model, model.head, data, 3.0)
    return model


class _LinearAttention(nn.Module):
    """Softplus features, keys and values summed over all places, then a quotient."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        y = self.norm(x)
        q, k, v = self.qkv(y).reshape(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = F.softplus(q), F.softplus(k)
        total = k.sum(2, keepdim=True)
        mixed = (q @ (k.transpose(-2, -1) @ v)) / (q @ total.transpose(-2, -1) + 1e-6)
        mixed = mixed.transpose(1, 2).reshape(count, length, width)
        return x + self.out(mixed * F.softplus(self.gate(y)))


class _LinearNet(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.layers = nn.ModuleList(_LinearAttention(width, 2) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(width, 64), nn.ELU(), nn.Linear(64, width)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer, mlp in zip(self.layers, self.mlps, strict=True):
            x = layer(x)
            x = x + mlp(x)
        return self.head(self.norm(x))


def _linear_attention(data: Data) -> nn.Module:
    model = _LinearNet()
    for layer, mlp in zip(model.layers, model.mlps, strict=True):
        spread(model, layer.qkv, data, 14.0)  # sums over 512 places reach 1e5 and more
        spread(model, layer.gate, data, 3.0)
        spread(model, layer.out, data, 2.0)
        spread(model, mlp[2], data, 1.0)
    spread(model, model.head, data, 2.0)
    return model


def _features(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (noise(generator, 1, 512, 6),)


class _GemmaBlock(nn.Module):
    """Norms of 1 + weight before and after each half, GeGLU, capped scores, one head of keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.Parameter(torch.zeros(4, width))
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, width // heads, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        count, length, width = x.shape
        y = _gemma_norm(x, self.norms[0])
        q = self.q(y).view(count, length, self.heads, -1).transpose(1, 2)
        k, v = self.k(y)[:, None], self.v(y)[:, None]
        q, k = (
            t * cos + torch.cat([-t[..., t.shape[-1] // 2 :], t[..., : t.shape[-1] // 2]], -1) * sin for t in (q, k)
        )
        scores = torch.tanh(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 / 50.0) * 50.0
        mixed = torch.softmax(torch.where(mask, torch.finfo(torch.float32).min, scores), -1) @ v
        x = x + _gemma_norm(self.o(mixed.transpose(1, 2).reshape(count, length, width)), self.norms[1])
        y = _gemma_norm(x, self.norms[2])
        return x + _gemma_norm(self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y)), self.norms[3])


def _gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight)


class _Gemma(nn.Module):
    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3, length: int = 24, words: int = 64) -> None:
        super().__init__()
        size = width // heads
        angles = (torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("mask", torch.ones(length, length, dtype=torch.bool).triu(1))
        self.blocks = nn.ModuleList(_GemmaBlock(width, heads) for _ in range(depth))
        self.norm = nn.Parameter(torch.zeros(width))
        self.words = nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * math.sqrt(x.shape[-1])
        for block in self.blocks:
            x = block(x, self.cos, self.sin, self.mask)
        return torch.tanh(self.words(_gemma_norm(x, self.norm)) / 30.0) * 30.0


def _gemma(data: Data) -> nn.Module:
    model = _Gemma()
    for block, size in zip(model.blocks, (30.0, 3e3, 5e4), strict=True):
        spread(model, block.q, data, 2.0)
        spread(model, block.k, data, 2.0)
        spread(model, block.gate, data, 4.0)
        spread(model, block.up, data, 8.0)
        peak(model, block.down, data, 2e3)
        block.norms[1].add_(size / 10)
        block.norms[3].add_(torch.rand(block.norms[3].shape) * size)  # the norm behind each half has large weights
    spread(model, model.words, data, 5.0)
    return model


def _embeddings(generator: torch.Generator) -> tuple[Tensor, ...]:
    return (noise(generator, 2, 24, 48),)


NETS = [
    Net(
        "swin",
        "vision-attention",
        "acc32",
        "amplitudes that grow with depth; masks of -100",
        _swin,
        pictures(form="normal"),
    ),
    Net(
        "mixer_control",
        "vision-attention",
        "none",
        "a control: nothing leaves the range",
        _mixer,
        pictures(form="normal"),
    ),
    Net(
        "linear_attention", "sequence", "acc32", "keys and values summed over 512 places", _linear_attention, _features
    ),
    Net("gemma", "language", "acc32", "norms with large weights, capped scores, finfo.min", _gemma, _embeddings),
]

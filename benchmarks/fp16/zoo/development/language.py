"""Language: encoders and decoders of the usual three families."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.common import Data, Net, noise, peak, spread


class _RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


class _T5Block(nn.Module):
    """No scale in the attention, a bias of positions, and a ReLU feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = _RmsNorm(width), _RmsNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.wi, self.wo = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (_heads(layer(y), self.heads) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) + bias, -1)
        x = x + self.o((weights @ v).transpose(1, 2).reshape(x.shape))
        return x + self.wo(F.relu(self.wi(self.norm2(x))))


class _T5(nn.Module):
    """T5's encoder on embeddings, with a mask of finfo.min."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 4, length: int = 24) -> None:
        super().__init__()
        self.bias = nn.Embedding(2 * length, heads)
        distance = torch.arange(length)[None] - torch.arange(length)[:, None] + length
        self.register_buffer("distance", distance)
        self.blocks = nn.ModuleList(_T5Block(width, heads) for _ in range(depth))
        self.norm = _RmsNorm(width)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        hidden = (1.0 - mask[:, None, None, :]) * torch.finfo(torch.float32).min
        bias = self.bias(self.distance).permute(2, 0, 1)[None] + hidden
        x = embeddings
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


def _words(length: int = 24, width: int = 48, mask: bool = True) -> Data:
    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        embeddings = noise(generator, 2, length, width)
        if not mask:
            return (embeddings,)
        keep = torch.ones(2, length)
        keep[1, length - int(torch.randint(2, 9, (1,), generator=generator)) :] = 0.0
        return embeddings, keep

    return make


def _t5(data: Data) -> nn.Module:
    model = _T5()
    for block, size in zip(model.blocks, (800.0, 1.5e4, 9e4, 2.5e5), strict=True):
        spread(model, block.q, data, 0.6)
        spread(model, block.k, data, 0.6)
        peak(model, block.o, data, size / 8)
        peak(model, block.wi, data, 300.0)
        peak(model, block.wo, data, size)  # the feed-forward of late blocks is what overflows in T5
    model.norm.weight.mul_(0.2)
    return model


class _LlamaBlock(nn.Module):
    """Rotary positions, fewer heads for keys, SwiGLU."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared
        self.norm1, self.norm2 = _RmsNorm(width, 1e-5), _RmsNorm(width, 1e-5)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, width * shared // heads, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k = (_turn(_heads(layer(y), n), cos, sin) for layer, n in ((self.q, self.heads), (self.k, self.shared)))
        v = _heads(self.v(y), self.shared)
        k, v = (t.repeat_interleave(self.heads // self.shared, 1) for t in (k, v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask, -1)
        x = x + self.o((weights @ v).transpose(1, 2).reshape(x.shape))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class _Llama(nn.Module):
    """A decoder on embeddings, with a causal mask of -1e9."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3, length: int = 24, words: int = 64) -> None:
        super().__init__()
        size = width // heads
        frequencies = 10000.0 ** (-torch.arange(0, size, 2) / size)
        angles = (torch.arange(length)[:, None] * frequencies[None]).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("mask", torch.full((length, length), -1e9).triu(1))
        self.blocks = nn.ModuleList(_LlamaBlock(width, heads, heads // 2) for _ in range(depth))
        self.norm = _RmsNorm(width, 1e-5)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.cos, self.sin, self.mask)
        return self.head(self.norm(x))


def _llama(data: Data) -> nn.Module:
    model = _Llama()
    for index, block in enumerate(model.blocks):
        spread(model, block.q, data, 1.5)
        spread(model, block.k, data, 1.5)
        spread(model, block.o, data, 1.0)
        spread(model, block.gate, data, 3.0)
        peak(model, block.down, data, 6.0)
        if index == 1:  # the first words of a text get massive activations in two channels of one early block
            block.gate.weight[:4] *= 15.0
            block.up.weight[:4] *= 25.0
            block.down.weight[[7, 30], :4] *= 90.0
    spread(model, model.head, data, 3.0)
    return model


class _BertBlock(nn.Module):
    """Norms after the sums."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.wi, self.wo = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (_heads(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask, -1)
        x = self.norm1(x + self.o((weights @ v).transpose(1, 2).reshape(x.shape)))
        return self.norm2(x + self.wo(F.gelu(self.wi(x))))


class _Bert(nn.Module):
    """Token numbers and a mask in, hidden states and a pooled vector out."""

    def __init__(self, width: int = 48, heads: int = 4, depth: int = 3, words: int = 120, length: int = 24) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(_BertBlock(width, heads) for _ in range(depth))
        self.pooler = nn.Linear(width, width)

    def forward(self, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (1.0 - mask[:, None, None, :].to(self.places.weight.dtype)) * -10000.0
        x = self.norm(self.words(words) + self.places.weight[: words.shape[1]])
        for block in self.blocks:
            x = block(x, hidden)
        return x, torch.tanh(self.pooler(x[:, 0]))


def _tokens(generator: torch.Generator) -> tuple[Tensor, ...]:
    words = torch.randint(0, 120, (2, 24), generator=generator)
    keep = torch.ones(2, 24, dtype=torch.int64)
    keep[1, 24 - int(torch.randint(2, 9, (1,), generator=generator)) :] = 0
    return words, keep


def _bert(data: Data) -> nn.Module:
    model = _Bert()
    for index, block in enumerate(model.blocks):
        spread(model, block.q, data, 1.5)
        spread(model, block.k, data, 1.5)
        spread(model, block.v, data, 1.0)
        if index == 1:
            block.wo.weight[11] *= 1e3  # one channel drowns the norm behind it; its weight is large to make up for it
            block.norm2.weight.mul_(6.0)
            block.norm2.weight[11] = 0.05
        if index == 2:
            peak(model, block.wi, data, 400.0)
            peak(model, block.wo, data, 1.5e5)
    spread(model, model.pooler, data, 1.0)
    return model


NETS = [
    Net(
        "t5_encoder", "language", "acc32", "the feed-forward's stream grows; finfo.min masks", _t5, _words(), fixed=(1,)
    ),
    Net(
        "llama", "language", "acc32", "massive activations of SwiGLU; a causal mask of -1e9", _llama, _words(mask=False)
    ),
    Net(
        "bert", "language", "acc32", "norms after large sums; eps of 1e-12; -10000 masks", _bert, _tokens, fixed=(0, 1)
    ),
]

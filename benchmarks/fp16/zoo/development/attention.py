"""Pictures through transformers, and convolutions that took over their habits."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.common import Data, Net, peak, pictures, spread


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        weights = ((q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(count, length, width))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class _ViT(nn.Module):
    """Patches, a class token, pre-norm blocks."""

    def __init__(self, width: int = 48, depth: int = 4, heads: int = 3, patch: int = 8, size: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.1)
        self.blocks = nn.Sequential(*[_Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def _settle_attention(model: nn.Module, data: Data) -> None:
    for block in model.blocks:
        spread(model, block.attn.qkv, data, 1.8)
        spread(model, block.attn.proj, data, 0.7)
        spread(model, block.fc1, data, 1.5)
        spread(model, block.fc2, data, 0.7)


def _vit(massive: float):
    def make(data: Data) -> nn.Module:
        model = _ViT()
        spread(model, model.patch, data, 1.0)
        _settle_attention(model, data)
        # Two channels take huge values behind the second block, as registers do, and the last norms hardly read them.
        model.blocks[1].fc2.weight[[5, 29]] *= massive
        model.blocks[1].fc2.bias[5] += 2.0 * massive
        for block in model.blocks[2:]:
            for norm in (block.norm1, block.norm2):
                norm.weight.mul_(6.0)
                norm.weight[[5, 29]] *= 0.05
        spread(model, model.head, data, 3.0)
        return model

    return make


class _ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.full((width,), 1e-2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(F.gelu(self.pwconv1(y))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class _ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _ConvNeXt(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), _ChannelNorm(widths[0], eps=1e-6))
        self.stages = nn.ModuleList(nn.ModuleList([_ConvNeXtBlock(w), _ConvNeXtBlock(w)]) for w in widths)
        self.down = nn.ModuleList(
            nn.Sequential(_ChannelNorm(a, eps=1e-6), nn.Conv2d(a, b, 2, 2)) for a, b in itertools.pairwise(widths)
        )
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            if index > 0:
                x = self.down[index - 1](x)
            for block in stage:
                x = block(x)
        return self.head(self.norm(x.mean((-2, -1))))


def _convnext(data: Data) -> nn.Module:
    model = _ConvNeXt()
    for stage, size in zip(model.stages, (3e4, 6e5, 4e6), strict=True):
        for block in stage:
            peak(model, block.pwconv1, data, 60.0)
            peak(model, block.pwconv2, data, size)  # layer scale takes 100 away again, behind the overflow
    spread(model, model.head, data, 3.0)
    return model


class _NonLocal(nn.Module):
    """The dot-product form: no softmax, the likeness of all pairs is divided by their number."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(width, width // 2, 1) for _ in range(3))
        self.out = nn.Conv2d(width // 2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        count, _, height, across = x.shape
        likeness = self.theta(x).flatten(2).transpose(1, 2) @ self.phi(x).flatten(2)
        y = (likeness / likeness.shape[-1]) @ self.g(x).flatten(2).transpose(1, 2)
        return x + self.out(y.transpose(1, 2).reshape(count, -1, height, across))


class _NonLocalNet(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU())
        self.pairs = _NonLocal(width)
        self.last = nn.Conv2d(width, width, 3, 1, 1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.last(self.pairs(self.stem(x))), 0.1)
        return self.head(x.mean((2, 3)))


def _non_local(data: Data) -> nn.Module:
    model = _NonLocalNet()
    peak(model, model.stem[0], data, 40.0)
    peak(model, model.stem[2], data, 60.0)
    peak(model, model.pairs.theta, data, 250.0)  # each fits; their product over channels does not
    peak(model, model.pairs.phi, data, 250.0)
    peak(model, model.pairs.g, data, 20.0)
    peak(model, model.pairs.out, data, 40.0)
    spread(model, model.head, data, 3.0)
    return model


_PIXELS = pictures(form="normal")

NETS = [
    Net("vit", "vision-attention", "acc32", "two channels of massive activations", _vit(3e4), _PIXELS),
    Net("vit_strict", "vision-attention", "strict", "massive channels whose squares overflow", _vit(300.0), _PIXELS),
    Net("convnext", "conv-norm", "acc32", "large MLPs before the layer scale", _convnext, _PIXELS),
    Net("non_local", "vision-attention", "acc32", "likeness of all pairs before its division", _non_local, _PIXELS),
]

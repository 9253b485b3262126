"""Scaled blocks by hand: a region computed on ``x / p`` with the weights as they are, for use inside rewriters.

With p a power of two the identities are exact in floating point, and nothing inside the region is p times too large.
``y`` below stands for what the block would have given; the functions return ``y / p``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from torchferry.core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
    BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


def scaled_conv(conv: Conv, x: Tensor, p: float) -> Tensor:
    """Return ``conv(p·x) / p`` without computing anything that is p times larger.

    From ``conv(p·x) = p·conv(x) - (p - 1)·b``: the weights act on x as it is, and the bias is added once, divided by p.

    Args:
        conv: A convolution; not changed.
        x: Its input, divided by p.
        p: The scale, a power of two.

    Raises:
        InputError: If p is not a power of two.

    >>> import torch
    >>> conv, x = torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
    >>> torch.equal(scaled_conv(conv, x / 64, 64) * 64, conv(x))
    True
    """
    _require_power_of_two(p)
    bias = None if conv.bias is None else conv.bias / p
    result: Tensor = conv._conv_forward(x, conv.weight, bias)
    return result


def scaled_batch_norm(norm: BatchNorm, x: Tensor, p: float) -> Tensor:
    """Return ``norm(p·x) / p`` in evaluation mode without computing anything that is p times larger.

    The running mean and the bias are divided by p: ``((p·x - μ)·s + β) / p = (x - μ/p)·s + β/p``.

    Args:
        norm: A batch normalisation with running statistics; not changed.
        x: Its input, divided by p.
        p: The scale, a power of two.

    Raises:
        InputError: If p is not a power of two, or the norm has no running statistics.
    """
    _require_power_of_two(p)
    if norm.running_mean is None or norm.running_var is None:
        raise InputError("the batch normalisation has no running statistics, so its scale depends on the batch")
    bias = None if norm.bias is None else norm.bias / p
    return nn.functional.batch_norm(
        x, norm.running_mean / p, norm.running_var, norm.weight, bias, training=False, eps=norm.eps
    )


class ScaledResidual(nn.Module):
    """A residual block ``relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))`` on ``x / p``, giving ``y / p``.

    It holds the layers of the block that it stands for, such as torchvision's and OpenMMLab's ``BasicBlock``, and
    changes none of them.

    Args:
        block: Has ``conv1``, ``bn1`` or ``norm1``, ``conv2``, ``bn2`` or ``norm2``, and may have ``downsample``, a
            sequence of convolutions and batch normalisations.
        p: The scale, a power of two.

    Raises:
        InputError: If p is not a power of two, or the block lacks a layer.
    """

    def __init__(self, block: nn.Module, p: float) -> None:
        super().__init__()
        _require_power_of_two(p)
        self.p = p
        self.layers = nn.ModuleList(
            [
                _layer(block, "conv1"),
                _layer(block, "bn1", "norm1"),
                _layer(block, "conv2"),
                _layer(block, "bn2", "norm2"),
            ]
        )
        downsample = getattr(block, "downsample", None)
        self.shortcut = nn.ModuleList([] if downsample is None else list(downsample))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output divided by p, for an input divided by p."""
        conv1, norm1, conv2, norm2 = (_scaled(layer) for layer in self.layers)
        y = nn.functional.relu(norm1(conv1(x, self.p), self.p))
        y = norm2(conv2(y, self.p), self.p)
        for layer in self.shortcut:
            x = _scaled(layer)(x, self.p)
        return nn.functional.relu(y + x)


def _layer(block: nn.Module, *names: str) -> nn.Module:
    modules = [getattr(block, name, None) for name in names]
    found = next((module for module in modules if isinstance(module, nn.Module)), None)
    if found is None:
        raise InputError(
            f"{type(block).__name__} has no '{names[0]}'",
            hint="write its scaled form with scaled_conv and scaled_batch_norm",
        )
    return found


def _scaled(layer: nn.Module) -> Callable[[Tensor, float], Tensor]:
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return lambda x, p: scaled_conv(layer, x, p)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return lambda x, p: scaled_batch_norm(layer, x, p)
    if isinstance(layer, nn.Identity | nn.ReLU | nn.AvgPool2d | nn.MaxPool2d):
        return lambda x, _: layer(x)
    raise InputError(f"{type(layer).__name__} has no scaled form here", hint="write its scaled form by hand")


def _require_power_of_two(p: float) -> None:
    if not p > 0 or math.frexp(p)[0] != 0.5:
        raise InputError(f"the scale must be a power of two, got {p:g}: any other rounds", hint="such as 256")

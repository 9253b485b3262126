"""Convolutions with a dynamic number of groups: one kernel a sample, as in StyleGAN 2 and Siamese trackers."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed, same

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.conv2d")
def conv2d(
    ctx: FunctionContext,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> torch.Tensor:
    """Multiply each group's kernels with its patches.

    ``conv2d(x, w, groups=g)`` → ``w.reshape(g, -1, c * k * k) @ unfold(x)``, one product a group.

    Without it: "Unsupported attribute type: SymbolicTensor"; the groups of an ONNX Conv are a constant.

    Declines: the groups are fixed, the kernels are a parameter, the input is not a batch, or padding is a word.
    """
    if not _is_dynamic(input, weight, padding, groups):
        result: torch.Tensor = ctx.origin_func(input, weight, bias, stride, padding, dilation, groups)
        return result
    batch, _, height, width = input.shape
    channels, kernel = weight.shape[1], (weight.shape[2], weight.shape[3])
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    patches = F.unfold(input.reshape(batch * groups, channels, height, width), kernel, dilation, padding, stride)
    kernels = weight.reshape(groups, _quotient(weight.shape[0], groups), channels * kernel[0] * kernel[1])
    grouped = torch.bmm(_for_each(batch, kernels), patches)
    sizes = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip((height, width), kernel, stride, padding, dilation, strict=True)
    ]
    return _with_bias(grouped.reshape(batch, weight.shape[0], *sizes), bias)


@FUNCTION_REWRITER.register_rewriter("torch.conv_transpose2d")
def conv_transpose2d(
    ctx: FunctionContext,
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: Any = 1,
    dilation: Any = 1,
) -> torch.Tensor:
    """Multiply each group's kernels with its pixels and add the patches up.

    ``conv_transpose2d(x, w, groups=g)`` → ``fold(w.reshape(g, c, -1).mT @ x.reshape(b, g, c, -1))``.

    Without it: as ``conv2d``.

    Declines: as ``conv2d``.
    """
    if not _is_dynamic(input, weight, padding, groups):
        result: torch.Tensor = ctx.origin_func(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return result
    batch, _, height, width = input.shape
    kernel = (weight.shape[2], weight.shape[3])
    stride, padding, dilation, extra = _pair(stride), _pair(padding), _pair(dilation), _pair(output_padding)
    channels = _quotient(weight.shape[0], groups)
    kernels = weight.reshape(groups, channels, weight.shape[1] * kernel[0] * kernel[1])
    patches = torch.bmm(_for_each(batch, kernels.mT), input.reshape(batch * groups, channels, height * width))
    sizes = [
        (size - 1) * s - 2 * p + d * (k - 1) + e + 1
        for size, k, s, p, d, e in zip((height, width), kernel, stride, padding, dilation, extra, strict=True)
    ]
    folded = F.fold(patches, tuple(sizes), kernel, dilation, padding, stride)
    return _with_bias(folded.reshape(batch, groups * weight.shape[1], *sizes), bias)


def _is_dynamic(input: torch.Tensor, weight: torch.Tensor, padding: Any, groups: Any) -> bool:
    if fixed(groups) or isinstance(weight, torch.nn.Parameter) or isinstance(padding, str) or input.dim() != 4:
        return False
    return isinstance(groups, torch.SymInt) or groups > 1


def _quotient(total: Any, groups: Any) -> Any:
    """Return the channels of one group: a number, where they are the same for any number of groups."""
    if not isinstance(total, torch.SymInt) or not isinstance(groups, torch.SymInt):
        return total // groups
    number = total.node.hint // groups.node.hint  # of the example
    return number if same(total, number * groups) else total // groups


def _pair(value: Any) -> tuple[Any, Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values[0], values[-1]


def _for_each(batch: Any, kernels: torch.Tensor) -> torch.Tensor:
    return kernels.expand(batch, *kernels.shape).flatten(0, 1)


def _with_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias.reshape(-1, 1, 1)

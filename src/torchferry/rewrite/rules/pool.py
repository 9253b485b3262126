"""Pooling over the whole input, and averages with a divisor of one's own."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed, same

if TYPE_CHECKING:
    import torch

    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.avg_pool2d", rank=2)
@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.avg_pool3d", rank=3)
def avg_pool(
    ctx: FunctionContext,
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """Average whole axes by a mean; apply the divisor after the average.

    ``avg_pool2d(x, x.shape[2:])`` → ``x.mean((2, 3), keepdim=True)``;
    ``avg_pool2d(x, k, divisor_override=d)`` → ``avg_pool2d(x, k) * (k * k / d)``.

    Without it: FrozenDimensionError for a kernel of the input's own size; torch leaves the divisor out of the graph,
    which then gives wrong numbers with no error.

    Declines: a fixed kernel without a divisor, or with one and ``ceil_mode``.
    """
    kernel = _sizes(kernel_size, ctx.rank)
    axes = _whole_axes(input, kernel, stride, padding, 1)
    if axes and divisor_override is None:
        return input.mean(axes, keepdim=True)
    if divisor_override is None or ceil_mode:
        result: torch.Tensor = ctx.origin_func(
            input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
        )
        return result
    average: torch.Tensor = ctx.origin_func(input, kernel_size, stride, padding)
    elements = 1
    for size in kernel:
        elements = elements * size
    return average * (elements / divisor_override)


@FUNCTION_REWRITER.register_rewriter("torch.max_pool1d", rank=1)
@FUNCTION_REWRITER.register_rewriter("torch.max_pool2d", rank=2)
@FUNCTION_REWRITER.register_rewriter("torch.max_pool3d", rank=3)
def max_pool(
    ctx: FunctionContext,
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """Take the maximum over whole axes.

    ``max_pool2d(x, x.shape[2:])`` → ``x.amax((2, 3), keepdim=True)``.

    Without it: FrozenDimensionError.

    Declines: a fixed kernel, or one that is neither the input's size nor 1.
    """
    axes = _whole_axes(input, _sizes(kernel_size, ctx.rank), stride, padding, dilation)
    if axes:
        return input.amax(axes, keepdim=True)
    result: torch.Tensor = ctx.origin_func(input, kernel_size, stride or kernel_size, padding, dilation, ceil_mode)
    return result


def _sizes(value: Any, rank: int) -> list[Any]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * rank if len(values) == 1 else values


def _whole_axes(input: torch.Tensor, kernel: list[Any], stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Return the axes that a kernel covers whole; none if it does anything else besides."""
    rank = len(kernel)
    if fixed(*kernel):
        return []
    if any(p != 0 for p in _sizes(padding, rank)) or any(d != 1 for d in _sizes(dilation, rank)):
        return []
    strides = _sizes(stride, rank) if stride else kernel
    axes = []
    for axis, size, step in zip(range(-rank, 0), kernel, strides, strict=True):
        if same(size, input.shape[axis]):
            axes.append(axis)
        elif not (same(size, 1) and same(step, 1)):
            return []
    return axes

"""Adaptive pooling to sizes that do not divide the input's, or of an input of dynamic size."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.adaptive_avg_pool1d", rank=1)
@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.adaptive_avg_pool2d", rank=2)
@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.adaptive_avg_pool3d", rank=3)
def adaptive_avg_pool(ctx: FunctionContext, input: torch.Tensor, output_size: Any) -> torch.Tensor:
    """Average the windows of each axis by a product with a matrix.

    ``adaptive_avg_pool2d(x, (r, s))`` → ``A_r @ x @ A_s.T``, row i of ``A`` being ``1 / length`` over the i-th window
    ``floor(i n / o) .. ceil((i + 1) n / o)``. ``interpolate(mode="area")`` is the same function and comes here too.

    Without it: torch writes the windows of the example's size into the graph, so that other sizes give another output
    shape or wrong values; in 3-D, "No ONNX function found for aten._adaptive_avg_pool3d".

    Declines: all output sizes are 1, or all sizes are fixed and divisible.
    """
    sizes = _output_sizes(input, output_size, ctx.rank)
    if _is_plain(input, sizes):
        result: torch.Tensor = ctx.origin_func(input, output_size)
        return result
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    for axis, windows in zip(range(-len(sizes), 0), sizes, strict=True):
        if windows is not None:
            matrix = _averages(x.shape[axis], windows, x)
            x = (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return x.to(input.dtype)


@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.adaptive_max_pool1d_with_indices", rank=1)
@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.adaptive_max_pool2d_with_indices", rank=2)
@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.adaptive_max_pool3d_with_indices", rank=3)
def adaptive_max_pool(
    ctx: FunctionContext, input: torch.Tensor, output_size: Any, return_indices: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the windows of each axis, all of the longest one's length, and take their maximum.

    ``adaptive_max_pool2d(x, (r, s))`` → ``x[..., rows, :][..., columns].amax(window)``; a shorter window repeats
    its last element, which leaves its maximum as it is.

    Without it: "No ONNX function found for aten.adaptive_max_pool2d" where a size does not divide; where it does, torch
    makes it a MaxPool with the example's kernel: another output shape at every other size.

    Declines: all output sizes are 1, or all sizes are fixed and divisible.
    """
    sizes = _output_sizes(input, output_size, ctx.rank)
    if _is_plain(input, sizes):
        result: tuple[torch.Tensor, torch.Tensor] = ctx.origin_func(input, output_size, return_indices)
        return result
    rank = len(sizes)
    spatial = input.shape[-rank:]
    lead = input.dim() - rank
    x = input
    places = torch.zeros((), dtype=torch.int64, device=input.device)  # of an element in the input, flattened
    for axis, (size, windows) in enumerate(zip(spatial, sizes, strict=True)):
        index = _gathered(size, windows, input.device)
        x = x[(slice(None),) * (lead + 2 * axis) + (index,)]
        shape = [1] * (2 * rank)
        shape[2 * axis : 2 * axis + 2] = index.shape
        places = places * size + index.reshape(shape)
    order = [*range(lead), *range(lead, x.dim(), 2), *range(lead + 1, x.dim(), 2)]
    windows_last = x.permute(order).flatten(-rank)
    places = places.permute([*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]).flatten(-rank)
    best = windows_last.argmax(-1, keepdim=True)
    indices = places.expand(windows_last.shape).gather(-1, best).squeeze(-1)
    return windows_last.amax(-1), indices


def _output_sizes(input: torch.Tensor, output_size: Any, rank: int) -> list[Any]:
    sizes = list(output_size) if isinstance(output_size, list | tuple) else [output_size] * rank
    return sizes * rank if len(sizes) < rank else sizes


def _is_plain(input: torch.Tensor, sizes: Sequence[Any]) -> bool:
    """Tell whether torch exports it right."""
    if all(type(size) is int and size == 1 for size in sizes):
        return True
    spatial = input.shape[-len(sizes) :]
    known = fixed(*spatial, *sizes)
    return known and all(o is None or n % o == 0 for n, o in zip(spatial, sizes, strict=True))


def _windows(size: Any, windows: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each window starts, and the element after its last."""
    index = torch.arange(windows, device=device)
    return index * size // windows, ((index + 1) * size + windows - 1) // windows


def _averages(size: Any, windows: Any, like: torch.Tensor) -> torch.Tensor:
    starts, ends = (bound.unsqueeze(1) for bound in _windows(size, windows, like.device))
    place = torch.arange(size, device=like.device)
    inside = (place >= starts) & (place < ends)
    return inside.to(like.dtype) / (ends - starts).to(like.dtype)


def _gathered(size: Any, windows: Any, device: torch.device) -> torch.Tensor:
    """Return the elements of each window, ``windows`` by the length of the longest; None leaves the axis as it is."""
    if windows is None:
        return torch.arange(size, device=device).unsqueeze(1)
    starts, ends = (bound.unsqueeze(1) for bound in _windows(size, windows, device))
    longest = (size + windows - 1) // windows + 1
    return torch.minimum(starts + torch.arange(longest, device=device), ends - 1)

"""Cutting an axis of dynamic size into pieces."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.chunk")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.chunk")
def chunk(ctx: FunctionContext, input: torch.Tensor, chunks: int, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """Slice at multiples of the pieces' size.

    ``x.chunk(2, 1)`` → ``x[:, :s], x[:, s:]`` with ``s = (n + 1) // 2``. How many pieces there are depends on the size
    too (4 elements make 2 pieces of 3): the graph is right for the sizes that give as many as the example.

    Without it: torch.onnx stops with "'NoneType' object has no attribute 'ndim'".

    Declines: the axis has a fixed size.
    """
    if fixed(input.shape[dim]):
        result: tuple[torch.Tensor, ...] = ctx.origin_func(input, chunks, dim)
        return result
    return _pieces(input, (input.shape[dim] + chunks - 1) // chunks, dim)


@FUNCTION_REWRITER.register_rewriter("torch.Tensor.split")
def split(ctx: FunctionContext, input: torch.Tensor, split_size: Any, dim: int = 0) -> tuple[torch.Tensor, ...]:
    """Slice at multiples of a dynamic size.

    ``x.split(n // 2, 1)`` → ``x[:, : n // 2], x[:, n // 2 : 2 * (n // 2)], …``, as many as the example has.

    Without it: torch.onnx stops with "'NoneType' object has no attribute 'ndim'".

    Declines: the pieces' size is fixed, or a list of sizes.
    """
    if isinstance(split_size, list | tuple | torch.Tensor) or fixed(split_size):
        result: tuple[torch.Tensor, ...] = ctx.origin_func(input, split_size, dim)
        return result
    return _pieces(input, split_size, dim)


@FUNCTION_REWRITER.register_rewriter("torch.tensor_split")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.tensor_split")
def tensor_split(
    ctx: FunctionContext, input: torch.Tensor, indices_or_sections: Any, dim: int = 0
) -> tuple[torch.Tensor, ...]:
    """Slice where each piece begins: the first ``n % k`` are longer by one.

    ``x.tensor_split(k)`` → slices that begin at ``i * (n // k) + min(i, n % k)``.

    Without it: torch writes the remainder of the example's size into the graph; other sizes give pieces of the wrong
    size with no error.

    Declines: the axis has a fixed size, or the places are given.
    """
    if not isinstance(indices_or_sections, int) or fixed(input.shape[dim]):
        result: tuple[torch.Tensor, ...] = ctx.origin_func(input, indices_or_sections, dim)
        return result
    size, pieces = input.shape[dim], indices_or_sections
    rest = size % pieces
    # min(i, rest), without a condition on the size: the number of j in 1..i with j <= rest.
    starts = [
        place * (size // pieces) + sum((rest + pieces - j) // pieces for j in range(1, place + 1))
        for place in range(pieces + 1)
    ]
    return tuple(_sliced(input, dim, begin, end) for begin, end in itertools.pairwise(starts))


def _pieces(x: torch.Tensor, size: Any, dim: int) -> tuple[torch.Tensor, ...]:
    count = int((x.shape[dim] + size - 1) // size)  # a guard: the graph holds where there are as many
    return tuple(
        _sliced(x, dim, place * size, None if place == count - 1 else (place + 1) * size) for place in range(count)
    )


def _sliced(x: torch.Tensor, dim: int, start: Any, end: Any) -> torch.Tensor:
    return x[(slice(None),) * (dim % x.dim()) + (slice(start, end),)]

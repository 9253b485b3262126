"""Tensors made of dynamic sizes."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.Tensor.new_tensor")
def new_tensor(
    ctx: FunctionContext, input: torch.Tensor, data: Any, *, dtype: torch.dtype | None = None, **options: Any
) -> torch.Tensor:
    """Make the tensor by ``torch.tensor``, which torch exports with its sizes.

    ``boxes.new_tensor([w, h, w, h])`` → ``torch.tensor([w, h, w, h], dtype=boxes.dtype)``.

    Without it: FrozenDimensionError; torch writes the example's sizes into the graph.

    Declines: all numbers are fixed, or the data is a tensor or an array.
    """
    if not _holds_sizes(data):
        result: torch.Tensor = ctx.origin_func(input, data, **({} if dtype is None else {"dtype": dtype}), **options)
        return result
    return torch.tensor(data, dtype=dtype or input.dtype, **{"device": input.device, **options})


@FUNCTION_REWRITER.register_rewriter("torch.as_tensor")
def as_tensor(ctx: FunctionContext, data: Any, **options: Any) -> torch.Tensor:
    """Make the tensor by ``torch.tensor``, which torch exports with its sizes.

    ``as_tensor(x.shape[0])`` → ``torch.tensor(x.shape[0])``.

    Without it: FrozenDimensionError; torch writes the example's sizes into the graph.

    Declines: all numbers are fixed, or the data is a tensor or an array.
    """
    if not _holds_sizes(data):
        result: torch.Tensor = ctx.origin_func(data, **options)
        return result
    return torch.tensor(data, **options)


def _holds_sizes(data: Any) -> bool:
    """Tell whether data is made of numbers of which one is dynamic."""
    numbers = pytree.tree_leaves(list(data) if isinstance(data, torch.Size) else data)
    return all(isinstance(n, int | float | torch.SymInt | torch.SymFloat) for n in numbers) and not fixed(*numbers)

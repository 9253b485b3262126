"""Scattering: sources larger than their index, sums and products, means."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import same

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext

_REDUCTIONS = {"add": "sum", "multiply": "prod"}


@FUNCTION_REWRITER.register_rewriter("torch.scatter", method="scatter", reducing="scatter_reduce")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.scatter", method="scatter", reducing="scatter_reduce")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.scatter_", method="scatter_", reducing="scatter_reduce_")
def scatter(
    ctx: FunctionContext,
    input: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    src: Any = None,
    *,
    value: Any = None,
    reduce: str | None = None,
) -> torch.Tensor:
    """Cut the source to the index; reduce by ``scatter_reduce``.

    ``x.scatter(1, i, v)`` → ``x.scatter(1, i, v[:rows, :columns])``;
    ``x.scatter(1, i, v, reduce="add")`` → ``x.scatter_reduce(1, i, v, "sum")``.

    Without it: engines refuse a source that is larger than its index ("Indices and updates dimensions differs");
    "No ONNX function found for aten.scatter" with a reduction.

    Declines: a source of the index's size, or a number, without a reduction.
    """
    source = src if value is None else value
    is_number = not isinstance(source, torch.Tensor)
    if reduce is None and (is_number or _fits(source, index)):
        result: torch.Tensor = ctx.origin_func(input, dim, index, source)
        return result
    source = torch.full_like(index, source, dtype=input.dtype) if is_number else _cut(source, index)
    method = ctx.method if reduce is None else ctx.reducing
    result = getattr(input, method)(dim, index, source, *([] if reduce is None else [_REDUCTIONS[reduce]]))
    return result


@FUNCTION_REWRITER.register_rewriter("torch.scatter_add", method="scatter_add")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.scatter_add", method="scatter_add")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.scatter_add_", method="scatter_add_")
def scatter_add(
    ctx: FunctionContext, input: torch.Tensor, dim: int, index: torch.Tensor, src: torch.Tensor
) -> torch.Tensor:
    """Cut the source to the index.

    ``x.scatter_add(1, i, v)`` → ``x.scatter_add(1, i, v[:rows, :columns])``.

    Without it: engines refuse the graph ("Indices and updates dimensions differs").

    Declines: a source of the index's size.
    """
    if _fits(src, index):
        result: torch.Tensor = ctx.origin_func(input, dim, index, src)
        return result
    result = getattr(input, ctx.method)(dim, index, _cut(src, index))
    return result


@FUNCTION_REWRITER.register_rewriter("torch.scatter_reduce", method="scatter_reduce")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.scatter_reduce", method="scatter_reduce")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.scatter_reduce_", method="scatter_reduce_")
def scatter_reduce(
    ctx: FunctionContext,
    input: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    src: torch.Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> torch.Tensor:
    """Cut the source to the index; take a mean as a sum over a number.

    ``x.scatter_reduce(1, i, v, "mean")`` → ``x.scatter_add(1, i, v) / ones.scatter_add(1, i, ones)``.

    Without it: torch leaves the mean out of the graph, which then gives wrong numbers with no error; engines refuse a
    source that is larger than its index.

    Declines: a source of the index's size with another reduction.
    """
    if reduce != "mean" and _fits(src, index):
        result: torch.Tensor = ctx.origin_func(input, dim, index, src, reduce, include_self=include_self)
        return result
    src = _cut(src, index)
    if reduce != "mean":
        result = getattr(input, ctx.method)(dim, index, src, reduce, include_self=include_self)
        return result
    total, number = input, torch.ones_like(input)
    if not include_self:
        total, number = total.scatter(dim, index, 0), number.scatter(dim, index, 0)
    total = total.scatter_add(dim, index, src)
    number = number.scatter_add(dim, index, torch.ones_like(src))
    mean = total / number if total.is_floating_point() else total.div(number, rounding_mode="floor")
    return input.copy_(mean) if ctx.method.endswith("_") else mean


def _fits(src: torch.Tensor, index: torch.Tensor) -> bool:
    return all(map(same, src.shape, index.shape))


def _cut(src: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    for axis, size in enumerate(index.shape):
        if not same(src.shape[axis], size):
            src = src.narrow(axis, 0, size)
    return src

"""Repeating each element a dynamic number of times."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.repeat_interleave")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.repeat_interleave")
def repeat_interleave(
    ctx: FunctionContext, input: torch.Tensor, repeats: Any = None, dim: int | None = None, *, output_size: Any = None
) -> torch.Tensor:
    """Expand a new axis; where each element has its own number, gather by the running sum of these numbers.

    ``repeat_interleave(x, n, 0)`` → ``x[:, None].expand(-1, n, ...).flatten(0, 1)``;
    ``repeat_interleave(x, r, 0, output_size=n)`` → ``x[(r.cumsum(0) <= arange(n)[:, None]).sum(1)]``.

    Without it: with a dynamic number, engines refuse the graph ("Expand … invalid expand shape"); with ``output_size``,
    "aten_repeat_interleave_Tensor() got an unexpected keyword argument 'output_size'".

    Declines: a fixed number, or numbers in a tensor without ``output_size``.
    """
    if isinstance(repeats, int | torch.SymInt) and not fixed(repeats):
        x, axis = _axis(input, dim)
        return x.unsqueeze(axis + 1).expand(*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :]).flatten(axis, axis + 1)
    if isinstance(repeats, torch.Tensor) and output_size is not None:
        x, axis = _axis(input, dim)
        ends = repeats.expand(x.shape[axis]).cumsum(0)
        place = torch.arange(output_size, device=x.device)
        return x.index_select(axis, (ends <= place.unsqueeze(1)).sum(1))
    if repeats is None:  # the only tensor holds the numbers of repeats
        result: torch.Tensor = ctx.origin_func(input, output_size=output_size)
        return result
    result = ctx.origin_func(input, repeats, dim, output_size=output_size)
    return result


def _axis(x: torch.Tensor, dim: int | None) -> tuple[torch.Tensor, int]:
    return (x.flatten(), 0) if dim is None else (x, dim % x.dim())

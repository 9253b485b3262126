"""Inverses of small matrices and systems of equations, by elimination."""

# ruff: noqa: A002, N803 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext

_LARGEST = 16  # a dozen nodes a row


@FUNCTION_REWRITER.register_rewriter("torch.linalg.inv")
@FUNCTION_REWRITER.register_rewriter("torch.inverse")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.inverse")
def inv(ctx: FunctionContext, input: torch.Tensor) -> torch.Tensor:
    """Eliminate with the unit matrix on the other side.

    ``inv(a)`` → n steps of Gauss and Jordan's elimination on ``[a | 1]`` with the largest element of a column as pivot.
    A singular matrix gives infinities or NaN, where PyTorch raises.

    Without it: "No ONNX function found for aten.linalg_inv_ex".

    Declines: matrices of dynamic size, larger than 16, or complex.
    """
    if not _is_small(input):
        result: torch.Tensor = ctx.origin_func(input)
        return result
    unit = torch.eye(input.shape[-1], dtype=input.dtype, device=input.device)
    return _eliminated(input, unit.expand(input.shape))


@FUNCTION_REWRITER.register_rewriter("torch.linalg.solve")
def solve(ctx: FunctionContext, A: torch.Tensor, B: torch.Tensor, *, left: bool = True) -> torch.Tensor:
    """Eliminate with the right side on the other side.

    ``solve(a, b)`` → n steps of Gauss and Jordan's elimination on ``[a | b]``, as ``inv``.

    Without it: "No ONNX function found for aten._linalg_solve_ex".

    Declines: as ``inv``, and with ``left=False``.
    """
    if not _is_small(A) or not left:
        result: torch.Tensor = ctx.origin_func(A, B, left=left)
        return result
    is_vector = B.dim() == 1 or (B.dim() == A.dim() - 1 and B.shape == A.shape[:-1])
    columns = B.unsqueeze(-1) if is_vector else B
    batch = torch.broadcast_shapes(A.shape[:-2], columns.shape[:-2])
    solved = _eliminated(A.expand(*batch, *A.shape[-2:]), columns.expand(*batch, *columns.shape[-2:]))
    return solved.squeeze(-1) if is_vector else solved


def _is_small(matrix: torch.Tensor) -> bool:
    size = matrix.shape[-1]
    return isinstance(size, int) and not isinstance(size, torch.SymInt) and size <= _LARGEST and not matrix.is_complex()


def _eliminated(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return ``matrix⁻¹ @ right``; Golub and Van Loan, Matrix Computations, 3.4 (partial pivoting)."""
    size = matrix.shape[-1]
    rows = torch.cat((matrix, right), -1)
    places = torch.arange(size, device=matrix.device)
    for step in range(size):
        pivot = rows[..., step:, step].abs().argmax(-1, keepdim=True) + step
        order = torch.where(places == step, pivot, torch.where(places == pivot, step, places))
        rows = rows.gather(-2, order.unsqueeze(-1).expand(rows.shape))
        unit = rows[..., step : step + 1, :] / rows[..., step : step + 1, step : step + 1]
        others = rows - rows[..., step : step + 1] * unit
        rows = torch.where((places == step).unsqueeze(-1), unit, others)
    return rows[..., size:]

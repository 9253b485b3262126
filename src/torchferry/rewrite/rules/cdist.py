"""Distances between all pairs of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext

_MANY = 25  # from more rows on, PyTorch computes Euclidean distances by a product too


@FUNCTION_REWRITER.register_rewriter("torch.cdist")
def cdist(
    ctx: FunctionContext,
    x1: torch.Tensor,
    x2: torch.Tensor,
    p: float = 2.0,
    compute_mode: str | None = "use_mm_for_euclid_dist_if_necessary",
) -> torch.Tensor:
    """Take the norm of all differences, or of Euclidean distances the root of the expanded square.

    ``cdist(a, b, p)`` → ``vector_norm(a[..., :, None, :] - b[..., None, :, :], p, -1)``, for p = 2 with more than 25
    rows, as in PyTorch, ``sqrt(|a|² + |b|² - 2 a @ b.T)``. The first takes ``rows(a) * rows(b) * columns`` elements.

    Without it: "No ONNX function found for aten._cdist_forward".

    Declines: never.
    """
    rows = [size for size in (x1.shape[-2], x2.shape[-2]) if not isinstance(size, torch.SymInt)]
    by_product = compute_mode == "use_mm_for_euclid_dist" or (
        compute_mode != "donot_use_mm_for_euclid_dist" and any(size > _MANY for size in rows)
    )
    if p != 2 or not by_product:
        return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)
    squares = x1.square().sum(-1, keepdim=True) + x2.square().sum(-1).unsqueeze(-2)
    return (squares - 2 * (x1 @ x2.mT)).clamp(min=0).sqrt()

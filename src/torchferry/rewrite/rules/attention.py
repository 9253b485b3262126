"""Scaled dot-product attention of other ranks than four, and with rows that a mask leaves empty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import same

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext

_RANK = 4


@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.scaled_dot_product_attention")
def scaled_dot_product_attention(
    ctx: FunctionContext,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Attend in four dimensions, and set rows to zero that may attend to nothing.

    ``attention(q, k, v)`` in 3-D → ``attention(q[None], k[None], v[None])[0]``, in 5-D on flattened batch axes;
    ``attention(q, k, v, m)`` with a mask of bools → ``where(m.any(-1, keepdim=True), attention(q, k, v, m), 0)``.

    Without it: "only 4D query, key, and value are supported"; a row that the mask leaves empty gives the mean of all
    values, where PyTorch gives 0, with no error.

    Declines: four dimensions and no mask of bools, or batch axes that need broadcasting.
    """
    rank = query.dim()
    mask = attn_mask
    if rank > _RANK:
        batch = query.shape[:-3]
        if not all(map(_same_shape, (key.shape[:-3], value.shape[:-3]), (batch, batch))):
            result: torch.Tensor = ctx.origin_func(query, key, value, mask, dropout_p, is_causal, **options)
            return result
        query, key, value = (x.flatten(0, rank - _RANK) for x in (query, key, value))
        if mask is not None and mask.dim() >= _RANK:
            mask = mask.expand(*batch, *mask.shape[-3:]).flatten(0, rank - _RANK)
    for _ in range(_RANK - rank):
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
    result = ctx.origin_func(query, key, value, mask, dropout_p, is_causal, **options)
    if mask is not None and mask.dtype is torch.bool:
        result = torch.where(mask.any(-1, keepdim=True), result, 0)
    if rank > _RANK:
        return result.reshape(*batch, *result.shape[1:])
    for _ in range(_RANK - rank):
        result = result.squeeze(0)
    return result


def _same_shape(first: torch.Size, second: torch.Size) -> bool:
    return len(first) == len(second) and all(map(same, first, second))

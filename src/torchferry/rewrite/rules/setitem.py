"""Writing where a mask says, behind other axes."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import same

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.Tensor.__setitem__")
def set_masked(ctx: FunctionContext, input: torch.Tensor, index: Any, value: Any) -> None:
    """Fill one value in by the mask, broadcast; write several at the places that the mask selects.

    ``x[:, m] = 0`` → ``x.masked_fill_(m, 0)``; ``x[:, m] = v`` → ``x[:, m.nonzero()[:, 0]] = v``.

    Without it: "Boolean index_put with multiple indices does not support None indices".

    Declines: no mask, more than one, a mask that nothing but numbers stands before, or other tensors as indices.
    """
    place = _mask_place(index)
    if place is None:
        ctx.origin_func(input, index, value)
        return
    before, mask, after = index[:place], index[place], index[place + 1 :]
    if isinstance(value, torch.Tensor) and not all(same(size, 1) for size in value.shape):
        input[(*before, *mask.nonzero().unbind(1), *after)] = value
        return
    part = input[(*before, *[slice(None)] * mask.dim(), *after)]
    behind = len([entry for entry in after if entry is None or isinstance(entry, slice)])
    if Ellipsis in after or not any(entry is Ellipsis for entry in before):
        taken = len([entry for entry in before if entry is None or isinstance(entry, slice)])
        behind = part.dim() - taken - mask.dim()
    part.masked_fill_(
        mask.reshape(*mask.shape, *[1] * behind), value.reshape(()) if isinstance(value, torch.Tensor) else value
    )


def _mask_place(index: Any) -> int | None:
    """Return where in an index the mask is; None if the index is not one of ours."""
    if not isinstance(index, tuple):
        return None
    masks = [place for place, entry in enumerate(index) if isinstance(entry, torch.Tensor)]
    if len(masks) != 1 or index[masks[0]].dtype is not torch.bool or index[masks[0]].dim() == 0:
        return None
    others = [entry for place, entry in enumerate(index) if place != masks[0]]
    if not all(entry is None or entry is Ellipsis or isinstance(entry, slice) or _is_number(entry) for entry in others):
        return None
    return None if all(map(_is_number, index[: masks[0]])) else masks[0]


def _is_number(entry: Any) -> bool:
    return isinstance(entry, int | torch.SymInt) and not isinstance(entry, bool)

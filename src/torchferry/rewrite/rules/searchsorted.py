"""Places in a sorted sequence, and membership in a set."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.searchsorted")
def searchsorted(
    ctx: FunctionContext,
    sorted_sequence: torch.Tensor,
    input: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> torch.Tensor:
    """Count the elements that come before each value.

    ``searchsorted(s, x)`` → ``(~(s[..., None, :] >= x[..., None])).sum(-1)``, and ``>`` for the right side; this takes
    as many elements as the two have in product.

    Without it: "No ONNX function found for aten.searchsorted".

    Declines: never.
    """
    sequence = sorted_sequence if sorter is None else sorted_sequence.gather(-1, sorter)
    values = input if isinstance(input, torch.Tensor) else torch.tensor(input, device=sequence.device)
    if sequence.dim() > 1:
        sequence = sequence.unsqueeze(-2)
    values = values.unsqueeze(-1)
    # Negated, for a NaN comes after all elements.
    before = ~(sequence > values) if right or side == "right" else ~(sequence >= values)
    places = before.sum(-1)
    return places.int() if out_int32 else places


@FUNCTION_REWRITER.register_rewriter("torch.isin")
def isin(
    ctx: FunctionContext,
    elements: Any,
    test_elements: Any,
    *,
    assume_unique: bool = False,
    invert: bool = False,
) -> torch.Tensor:
    """Compare each element with all of the set.

    ``isin(x, s)`` → ``(x[..., None] == s).any(-1)``.

    Without it: "No ONNX function found for aten.searchsorted".

    Declines: never.
    """
    elements, test_elements = (x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (elements, test_elements))
    found: torch.Tensor = (elements.unsqueeze(-1) == test_elements.flatten()).any(-1)
    return ~found if invert else found

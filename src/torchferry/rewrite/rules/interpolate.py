"""Resizing: antialiased, by inexact nearest neighbours, or by a factor that is an input of the model."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torchferry.rewrite.state import FunctionContext

_LINEAR = ("linear", "bilinear", "trilinear")
_MODES = (*_LINEAR, "bicubic", "nearest", "nearest-exact")


@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.interpolate")
def interpolate(
    ctx: FunctionContext,
    input: torch.Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> torch.Tensor:
    """Resize axis by axis: by weighted sums of gathered neighbours, or by a matrix of weights where antialiased.

    ``interpolate(x, scale_factor=s, mode="bilinear")`` → ``x[..., left] * (1 - t) + x[..., right] * t`` for each axis,
    with ``left + t = (i + 0.5) / s - 0.5`` and i up to the dynamic size ``n * s``; likewise the other modes;
    ``interpolate(x, size, antialias=True, align_corners=True)`` → ``rows @ x @ columns.T``.

    Without it: "argument 'scale_factors' must be tuple of floats, but found element of type SymFloat" for
    ``scale_factor=factor.item()``; wrong numbers, no error, for ``nearest-exact`` with a factor, for antialiasing with
    aligned corners, and for antialiasing by a factor at sizes that it does not divide.

    Declines: everything else: fixed factors in the other modes, sizes without antialiasing, integers, ``area``.
    """
    rank = input.dim() - 2
    scales = None if scale_factor is None else _tuple(scale_factor, rank)
    keeps_scales = scales is not None and not recompute_scale_factor
    wrong = (antialias and (align_corners or keeps_scales)) or (mode == "nearest-exact" and keeps_scales)
    computed = scales is not None and not fixed(*scales)
    if not (wrong or computed) or mode not in _MODES or not input.is_floating_point():
        result: torch.Tensor = ctx.origin_func(
            input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
        )
        return result
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    for place in range(rank):
        axis = place - rank
        old = x.shape[axis]
        new = _tuple(size, rank)[place] if scales is None else torch.sym_int(old * scales[place])
        if align_corners:
            step = (old - 1) / torch.sym_max(new - 1, 1)
        else:
            step = 1 / scales[place] if scales is not None and keeps_scales else old / new
        if antialias:
            weights = _weights(old, new, step, mode, x)
            x = (x.movedim(axis, -1) @ weights.T).movedim(-1, axis)
        else:
            shape = (-1, *[1] * (-axis - 1))
            x = sum(  # type: ignore[assignment]
                x.index_select(axis, at) * w.reshape(shape) for at, w in _taps(old, new, step, mode, align_corners, x)
            )
    return x.to(input.dtype)


def _tuple(value: Any, rank: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * rank


def _taps(
    old: Any, new: Any, step: Any, mode: str, align_corners: bool | None, like: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the neighbours of each element and their weights; aten/src/ATen/native/UpSample.h."""
    place = torch.arange(new, dtype=torch.float32, device=like.device)
    if mode.startswith("nearest"):
        at = (place + 0.5) * step if mode == "nearest-exact" else place * step
        yield at.floor().long().clamp(max=old - 1), torch.ones_like(place)
        return
    at = place * step if align_corners else (place + 0.5) * step - 0.5
    if mode in _LINEAR:
        at = at.clamp(min=0)
    left = at.floor()
    offsets = (0, 1) if mode in _LINEAR else (-1, 0, 1, 2)
    for offset in offsets:
        distance = (at - left - offset).abs()
        weight = 1 - distance if mode in _LINEAR else _cubic(distance, -0.75)
        yield (left.long() + offset).clamp(0, old - 1), weight.to(like.dtype)


def _weights(old: Any, new: Any, step: Any, mode: str, like: torch.Tensor) -> torch.Tensor:
    """Return the weight of each old element in each new one; aten/src/ATen/native/cpu/UpSampleKernel.cpp."""
    stretch = torch.sym_max(step, 1.0)
    support = stretch * (1 if mode in _LINEAR else 2)
    center = (torch.arange(new, dtype=torch.float32, device=like.device).unsqueeze(1) + 0.5) * step
    place = torch.arange(old, dtype=torch.float32, device=like.device)
    distance = ((place - center + 0.5) / stretch).abs()
    weights = (1 - distance).clamp(min=0) if mode in _LINEAR else _cubic(distance, -0.5)
    inside = (place >= (center - support + 0.5).floor()) & (place < (center + support + 0.5).floor())
    weights = torch.where(inside, weights, 0)
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Keys, Cubic convolution interpolation for digital image processing (1981), eq. 15 for any ``a``."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, 0))

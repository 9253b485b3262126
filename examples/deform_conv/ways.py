"""Three ways of exporting ``torchvision::deform_conv2d``, each in a registry of its own."""

from typing import Any

import torch
from torch import Tensor

import torchferry as ferry
from deformable import IS_TORCHVISION  # noqa: F401 - defines the operator where torchvision does not

STANDARD = ferry.rewriters.SymbolicRewriter()
"""As ONNX's own operator, for engines that have it."""

CUSTOM = ferry.rewriters.SymbolicRewriter()
"""As an operator in a domain of one's own, for an engine that is given a kernel for it."""

COMPOSED = ferry.rewriters.FunctionRewriter()
"""As operators that every engine has."""

# Five tensors, eight integers, a bool: the schema's arguments.
_DESCRIPTORS = ["v"] * 5 + ["i"] * 8 + ["b"]


@STANDARD.register_symbolic("torchvision::deform_conv2d", arg_descriptors=_DESCRIPTORS, opset=19)
def standard(
    g: Any,
    input: Any,  # noqa: A002 - its name in torchvision, here and below
    weight: Any,
    offset: Any,
    mask: Any,
    bias: Any,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Any:
    """``torchvision::deform_conv2d`` → ``DeformConv``, which wants its tensors in another order."""
    masks = (mask,) if use_mask else ()
    return g.op(
        "DeformConv",
        input,
        weight,
        offset,
        bias,
        *masks,
        strides_i=[stride_h, stride_w],
        pads_i=[pad_h, pad_w, pad_h, pad_w],
        dilations_i=[dilation_h, dilation_w],
        group_i=groups,
        offset_group_i=offset_groups,
    )


@CUSTOM.register_symbolic("torchvision::deform_conv2d", arg_descriptors=_DESCRIPTORS)
def custom(
    g: Any,
    input: Any,  # noqa: A002
    weight: Any,
    offset: Any,
    mask: Any,
    bias: Any,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Any:
    """``torchvision::deform_conv2d`` → ``custom::deform_conv2d``, the numbers as attributes."""
    return g.op(
        "custom::deform_conv2d",
        input,
        weight,
        offset,
        mask,
        bias,
        stride_i=[stride_h, stride_w],
        padding_i=[pad_h, pad_w],
        dilation_i=[dilation_h, dilation_w],
        groups_i=groups,
        offset_groups_i=offset_groups,
        use_mask_i=int(use_mask),
    )


@COMPOSED.register_rewriter("torch.ops.torchvision.deform_conv2d")
def composed(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offset: Tensor,
    mask: Tensor,
    bias: Tensor,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Tensor:
    """``torchvision::deform_conv2d`` → four gathers, weighed and summed, and a matrix product."""
    batch, channels, height, width = input.shape
    out_channels, _, taps_h, taps_w = weight.shape
    out_h, out_w = offset.shape[2:]
    taps = taps_h * taps_w
    # Where each tap of the kernel reads, (N, offset groups, taps, OH, OW).
    moves = offset.reshape(batch, offset_groups, taps, 2, out_h, out_w)
    down = (torch.arange(taps_h) * dilation_h).repeat_interleave(taps_w).reshape(taps, 1, 1)
    right = (torch.arange(taps_w) * dilation_w).repeat(taps_h).reshape(taps, 1, 1)
    y = moves[:, :, :, 0] + (down + (torch.arange(out_h) * stride_h - pad_h).unsqueeze(1))
    x = moves[:, :, :, 1] + (right + (torch.arange(out_w) * stride_w - pad_w))

    # One row for each pixel, so that the same Gather fetches it for all channels that share an offset.
    pixels = input.reshape(batch, offset_groups, channels // offset_groups, height * width)
    pixels = pixels.transpose(2, 3).reshape(-1, channels // offset_groups)
    image = (torch.arange(batch * offset_groups) * (height * width)).reshape(batch, offset_groups, 1, 1, 1)
    samples = torch.zeros(())
    for row, share_of_row in _neighbours(y, height):
        for column, share_of_column in _neighbours(x, width):
            rows = (image + row * width + column).reshape(-1)
            samples = samples + pixels.index_select(0, rows) * (share_of_row * share_of_column).reshape(-1, 1)
    if use_mask:
        samples = samples * mask.reshape(-1, 1)

    columns = samples.reshape(batch, offset_groups, taps * out_h * out_w, channels // offset_groups)
    columns = columns.transpose(2, 3).reshape(batch, groups, channels // groups * taps, out_h * out_w)
    product = weight.reshape(groups, out_channels // groups, channels // groups * taps) @ columns
    return product.reshape(batch, out_channels, out_h, out_w) + bias.reshape(-1, 1, 1)


def _neighbours(at: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the two whole numbers around each coordinate, and the share that each of them has in a linear sample.

    Args:
        at: Coordinates.
        size: How many pixels there are; the share of one outside is 0, and some pixel inside stands for it.
    """
    result = []
    for whole in (at.floor(), at.floor() + 1):
        inside = (whole >= 0) & (whole <= size - 1)
        share = torch.where(inside, 1 - (at - whole).abs(), 0.0)
        # Clamped as floats, for one too large for an integer becomes any integer.
        result.append((whole.clamp(0, size - 1).long(), share))
    return result

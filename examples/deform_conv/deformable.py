"""The operator ``torchvision::deform_conv2d``, with or without torchvision, and a small network that uses it.

Where torchvision does not import, the operator is defined here, with the same schema and a kernel in PyTorch.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

SCHEMA = (
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask) -> Tensor"
)


def deform_conv2d_kernel(
    input: Tensor,  # noqa: A002 - its name in torchvision
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
    """Convolve, each tap of the kernel moved by an offset of its own (arXiv:1703.06211; the mask: arXiv:1811.11168).

    Args:
        input: (N, C, H, W).
        weight: (O, C / groups, KH, KW).
        offset: (N, 2 x offset_groups x KH x KW, OH, OW) in pixels: of each tap the vertical, then the horizontal one.
        mask: (N, offset_groups x KH x KW, OH, OW), what each sample is multiplied by; any shape if it is not used.
        bias: (O,).
        stride_h: Vertical step.
        stride_w: Horizontal step.
        pad_h: Rows of zeros above and below.
        pad_w: Columns of zeros left and right.
        dilation_h: Vertical distance of taps.
        dilation_w: Horizontal distance of taps.
        groups: Groups of channels that are convolved apart.
        offset_groups: Groups of channels that have offsets and masks of their own.
        use_mask: Whether there is a mask.

    Returns:
        (N, O, OH, OW). Samples are bilinear, and outside of the input it is zero.
    """
    batch, channels, height, width = input.shape
    taps_h, taps_w = weight.shape[2:]
    out_h, out_w = offset.shape[2:]
    offset = offset.view(batch, offset_groups, taps_h * taps_w, 2, out_h, out_w)
    mask = mask.view(batch, offset_groups, taps_h * taps_w, out_h, out_w) if use_mask else mask
    images = torch.arange(batch).view(-1, 1, 1, 1)
    planes = torch.arange(channels).view(1, -1, 1, 1)
    group_of = torch.arange(channels) // (channels // offset_groups)
    output = bias.view(1, -1, 1, 1).repeat(batch, 1, out_h, out_w)
    for tap in range(taps_h * taps_w):
        down, right = divmod(tap, taps_w)
        y = offset[:, group_of, tap, 0] + (torch.arange(out_h) * stride_h - pad_h + down * dilation_h).view(-1, 1)
        x = offset[:, group_of, tap, 1] + (torch.arange(out_w) * stride_w - pad_w + right * dilation_w)
        sampled = torch.zeros_like(y)
        for row in (y.floor(), y.floor() + 1):
            for column in (x.floor(), x.floor() + 1):
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                # A pixel outside is replaced by some pixel inside, which then counts for nothing.
                pixel = input[images, planes, row.where(inside, 0).long(), column.where(inside, 0).long()]
                share = (1 - (y - row).abs()) * (1 - (x - column).abs())
                sampled += pixel * share.where(inside, 0)
        if use_mask:
            sampled = sampled * mask[:, group_of, tap]
        output += nn.functional.conv2d(sampled, weight[:, :, down, right, None, None], groups=groups)
    return output


def _is_defined() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # the latter where it was built for another torch
        return False
    return hasattr(torch.ops.torchvision, "deform_conv2d")


IS_TORCHVISION = _is_defined()
"""Whether the operator is torchvision's own."""

if not IS_TORCHVISION:
    LIBRARY: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    LIBRARY.define(SCHEMA)
    LIBRARY.impl("deform_conv2d", deform_conv2d_kernel, "CPU")

    @torch.library.register_fake("torchvision::deform_conv2d", lib=LIBRARY)  # type: ignore[untyped-decorator]
    def _fake(input: Tensor, weight: Tensor, offset: Tensor, *_: object) -> Tensor:  # noqa: A002
        return input.new_empty((input.shape[0], weight.shape[0], *offset.shape[2:]))


class DeformableConv2d(nn.Module):
    """A deformable convolution whose offsets, and masks if any, are convolved from its own input.

    Args:
        channels: Channels before and after.
        kernel_size: Rows and columns of the kernel.
        stride: Vertical and horizontal step.
        padding: Rows above and below, columns left and right.
        dilation: Vertical and horizontal distance of taps.
        groups: Groups of channels that are convolved apart.
        offset_groups: Groups of channels that have offsets and masks of their own.
        use_mask: Weigh each sample by a mask between 0 and 1.
    """

    def __init__(
        self,
        channels: tuple[int, int] = (3, 3),
        kernel_size: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (1, 1),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        offset_groups: int = 1,
        use_mask: bool = False,
    ) -> None:
        super().__init__()
        before, after = channels
        taps = offset_groups * kernel_size[0] * kernel_size[1]
        self.weight = nn.Parameter(torch.randn(after, before // groups, *kernel_size) / taps)
        self.bias = nn.Parameter(torch.randn(after))
        self.offsets = nn.Conv2d(before, 2 * taps, kernel_size, stride, padding, dilation)
        self.masks = nn.Conv2d(before, taps, kernel_size, stride, padding, dilation) if use_mask else None
        self.numbers = (*stride, *padding, *dilation, groups, offset_groups, use_mask)

    def forward(self, image: Tensor) -> Tensor:
        """Take float32 (N, C, H, W)."""
        offset = self.offsets(image)
        mask = image.new_zeros(image.shape[0], 1) if self.masks is None else self.masks(image).sigmoid()
        result: Tensor = torch.ops.torchvision.deform_conv2d(image, self.weight, offset, mask, self.bias, *self.numbers)
        return result

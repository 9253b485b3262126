"""Repairing PANet by hand: rewriters that compute on x / p whatever lies beyond FP16's range.

Which blocks do, and p, comes from a saved watch report through ``ctx.cfg``. Asking a tensor itself is no way, for what
it holds is not known while the model is exported.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import torchferry as ferry

LIMIT = 65504
HEADROOM_BITS = 2


class Region:
    """The modules that lie beyond FP16's range, as a watch saw them, and the scale of everything in them.

    Args:
        file: The watch report.

    Attributes:
        p: A power of two; the largest value divided by it is 2 to 3 bits below the limit.
    """

    def __init__(self, file: str) -> None:
        self._report = ferry.fp16.WatchReport.load(file)
        largest = max(max(row.taken, row.given) for row in self._report.modules)
        self.p = 2.0 ** (math.ceil(math.log2(largest / LIMIT)) + HEADROOM_BITS)

    def has(self, path: str) -> bool:
        """Tell whether anything in a module is beyond."""
        return any(row.is_beyond for row in self._report.modules if f"{row.path}.".startswith(f"{path}."))

    def entered(self, x: Tensor, module: Any) -> Tensor:
        """Divide a module's input, unless it comes from the region and is divided already."""
        return x if self._report[module.path].taken > LIMIT else x / self.p

    def left(self, y: Tensor, module: Any) -> Tensor:
        """Multiply what a module gives, unless it is beyond and thus stays in the region."""
        return y if self._report[module.path].given > LIMIT else y * self.p


def region(ctx: Any) -> Region:
    """Return the region that the deploy config names."""
    return Region(ctx.cfg["watch"])


def name_modules(model: nn.Module) -> None:
    """Tell every module its path, since a rewriter is given a module and not its place in the model."""
    for path, module in model.named_modules():
        module.__dict__["path"] = path


def block(ctx: Any, self: Any, x: Tensor) -> Tensor:
    """BasicBlock: two convolutions, and the input added."""
    beyond = region(ctx)
    if not beyond.has(self.path):
        untouched: Tensor = ctx.origin_func(self, x)
        return untouched
    scaled = ferry.fp16.ScaledResidual(self, beyond.p)
    return beyond.left(scaled(beyond.entered(x, self)), self)


def neck(ctx: Any, self: Any, x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """FPEM_FFM: all of it on x / p, from where the maps enter to where their sums leave."""
    beyond = region(ctx)
    if not beyond.has(self.path):
        untouched: tuple[Tensor, ...] = ctx.origin_func(self, x)
        return untouched
    layers = (self.reduce_conv_c2, self.reduce_conv_c3, self.reduce_conv_c4, self.reduce_conv_c5)
    maps = tuple(
        _normalised(conv, norm, beyond.entered(each, layer), beyond.p)
        for layer, (conv, norm, _), each in zip(layers, layers, x, strict=True)
    )
    total: list[Tensor] = []
    for fpem in self.fpems:
        maps = fpem(*maps)
        total = [a + b for a, b in zip(total, maps, strict=True)] if total else list(maps)
    size = total[0].shape[2:]
    maps = total[0], *(nn.functional.interpolate(each, size, mode="bilinear") for each in total[1:])
    return tuple(beyond.left(each, self) for each in maps)


def separable(ctx: Any, self: Any, x: Tensor) -> Tensor:
    """SeparableConv2d: on x / p like the neck that it belongs to, whether or not it is beyond itself."""
    beyond = region(ctx)
    if not beyond.has(self.path.partition(".fpems.")[0]):
        untouched: Tensor = ctx.origin_func(self, x)
        return untouched
    return _normalised(self.pointwise_conv, self.bn, ferry.fp16.scaled_conv(self.depthwise_conv, x, beyond.p), beyond.p)


def head(ctx: Any, self: Any, inputs: tuple[Tensor, ...], *_: Any) -> Tensor:
    """PANHead: its first convolution and normalisation on x / p; what they give is small."""
    beyond = region(ctx)
    if not beyond.has(self.path):
        untouched: Tensor = ctx.origin_func(self, inputs, *_)
        return untouched
    x = torch.cat([beyond.entered(each, self) for each in inputs], 1)
    output: Tensor = self.conv2(_normalised(self.conv1, self.bn1, x, beyond.p) * beyond.p)
    return output


def _normalised(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor, p: float) -> Tensor:
    """Convolution, normalisation and ReLU, from x / p to y / p."""
    return nn.functional.relu(ferry.fp16.scaled_batch_norm(norm, ferry.fp16.scaled_conv(conv, x, p), p))


def rewriters(classes: Sequence[str]) -> ferry.rewriters.FunctionRewriter:
    """Return a registry with a rewriter for the ``forward`` of four classes.

    Their results are divided by p where the region goes on, so they differ from the originals' on purpose.

    Args:
        classes: Dotted names of the residual block, the neck, the neck's convolution, and the head.
    """
    registry = ferry.rewriters.FunctionRewriter()
    functions: tuple[Callable[..., Any], ...] = (block, neck, separable, head)
    for name, rewriter in zip(classes, functions, strict=True):
        registry.register_rewriter(f"{name}.forward", changes_outputs=True)(rewriter)
    return registry

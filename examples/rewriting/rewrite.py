"""Two rewrites: a tensor method for one engine, and every instance of a module class.

Run it, and compare what the two engines get.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import torchferry as ferry


class SRCNN(nn.Module):
    """Enlarge by bicubic interpolation, then sharpen by three convolutions.

    Args:
        channels: Channels before, between and after the convolutions.
        kernel_sizes: Of the convolutions, odd.
        upscale_factor: How much larger the output is.
    """

    def __init__(
        self,
        channels: Sequence[int] = (3, 64, 32, 3),
        kernel_sizes: Sequence[int] = (9, 1, 5),
        upscale_factor: int = 3,
    ) -> None:
        super().__init__()
        self.upsampler: nn.Module = nn.Upsample(scale_factor=upscale_factor, mode="bicubic", align_corners=False)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, size, padding=size // 2)
            for before, after, size in zip(channels[:-1], channels[1:], kernel_sizes, strict=True)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Enlarge.

        Args:
            image: float32 (N, C, H, W).

        Returns:
            float32 (N, C, H x factor, W x factor).
        """
        image = self.upsampler(image)
        for number, convolution in enumerate(self.convolutions):
            image = torch.relu(image) if number else image
            image = convolution(image)
        return image

    def init_weights(self) -> None:
        """Start from small weights."""
        for parameter in self.convolutions.parameters():
            nn.init.normal_(parameter, std=1e-3)


class Tiled(nn.Module):
    """Repeats the sums of its input's columns."""

    def forward(self, x: Tensor) -> Tensor:
        """Take float32 (N, C), return float32 (3 x C,)."""
        return x.sum(0).repeat(3)


@ferry.FUNCTION_REWRITER.register_rewriter(func_name="torch.Tensor.repeat", backend="tensorrt")
def repeat_static(input: Tensor, *size: Any) -> Tensor:  # noqa: A002 - its name in torch
    """``x.repeat(n)`` on one dimension → ``x.unsqueeze(0).repeat(1, n).squeeze(0)``."""
    origin: Callable[..., Tensor] = ferry.FUNCTION_REWRITER.get_context().origin_func
    if input.ndim == 1 and len(size) == 1:
        return origin(input.unsqueeze(0), 1, *size).squeeze(0)
    return origin(input, *size)


@ferry.MODULE_REWRITER.register_rewrite_module(f"{__name__}.SRCNN", backend="tensorrt", changes_outputs=True)
class SRCNNWithoutUpsampler(nn.Module):
    """An SRCNN whose input is enlarged by somebody else, before the engine.

    Args:
        module: The SRCNN that it stands for.
        cfg: The deploy config.
        channels: As of the SRCNN.
        kernel_sizes: As of the SRCNN.
        upscale_factor: As of the SRCNN.
    """

    def __init__(
        self,
        module: SRCNN,
        cfg: Any,  # noqa: ARG002 - every replacement is given it
        channels: Sequence[int] = (3, 64, 32, 3),
        kernel_sizes: Sequence[int] = (9, 1, 5),
        upscale_factor: int = 3,
    ) -> None:
        super().__init__()
        module.upsampler = nn.Identity()
        self.module = module
        self.described = f"{len(kernel_sizes)} convolutions to {channels[-1]} channels, {upscale_factor}x elsewhere"

    def forward(self, image: Tensor) -> Tensor:
        """Sharpen a picture that is large already, float32 (N, C, H, W)."""
        sharpened: Tensor = self.module(image)
        return sharpened

    def init_weights(self) -> None:
        """Start from small weights, as the SRCNN does."""
        self.module.init_weights()


def main() -> None:
    """Export for two engines and show what each gets."""
    for model, example in ((Tiled(), torch.rand(5, 4)), (SRCNN(), torch.rand(1, 3, 16, 24))):
        for backend in ("onnxruntime", "tensorrt"):
            exported = ferry.export(model.eval(), example, target=ferry.Target(backend))
            exported.report.raise_for_failure()
            operators = " ".join(node.op_type for node in exported.model.graph)
            print(f"{type(model).__name__} for {backend}: {operators}")
            print(f"  rewritten: {', '.join(exported.rewrites) or 'nothing'}")
    print(f"the model afterwards: {type(model).__name__} with {type(model.upsampler).__name__}")


if __name__ == "__main__":
    main()

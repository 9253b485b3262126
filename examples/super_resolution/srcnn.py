"""SRCNN: a three-layer convolutional network that enlarges RGB pictures.

The architecture is the 9-1-5 network of Dong, Loy, He and Tang, "Learning a Deep Convolutional Network for Image
Super-Resolution" (ECCV 2014), with three differences: it takes RGB instead of luminance alone, the bicubic enlargement
is part of the model, and the convolutions predict a residual that is added to that enlargement.
"""

import torch
from torch import Tensor, nn


class SRCNN(nn.Module):
    """Bicubic enlargement by a fixed integer factor plus a learnt three-layer correction.

    The output is not clipped: clipping to 0..1 is post-processing and belongs to the caller.

    Attributes:
        factor: The enlargement factor of both sides.
    """

    def __init__(self, factor: int = 3) -> None:
        """Builds the network with untrained weights, whose output is close to the bicubic enlargement.

        Args:
            factor: The enlargement factor of both sides, at least 1.

        Raises:
            ValueError: If `factor` is below 1.
        """
        super().__init__()
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.factor = factor
        self.extract = nn.Conv2d(3, 64, kernel_size=9, padding=4)
        self.map = nn.Conv2d(64, 32, kernel_size=1)
        self.reconstruct = nn.Conv2d(32, 3, kernel_size=5, padding=2)
        # The last layer starts near zero, as in the paper, so that training starts from plain bicubic, not noise.
        nn.init.normal_(self.reconstruct.weight, std=1e-3)
        assert self.reconstruct.bias is not None
        nn.init.zeros_(self.reconstruct.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Enlarges a batch of pictures.

        Args:
            image: RGB pictures, float32, shape (N, 3, H, W), values in 0..1; any N, H and W of at least 1.

        Returns:
            The enlarged RGB pictures, float32, shape (N, 3, factor * H, factor * W). Values lie mostly in 0..1 but may
            overshoot a little, as they are not clipped.
        """
        enlarged = nn.functional.interpolate(
            image, scale_factor=float(self.factor), mode="bicubic", align_corners=False
        )
        features = torch.relu(self.extract(enlarged))
        features = torch.relu(self.map(features))
        residual: Tensor = self.reconstruct(features)
        return enlarged + residual


def srcnn_x3() -> SRCNN:
    """Builds the network that enlarges by 3, with untrained weights.

    Returns:
        The network; load `srcnn_x3.safetensors` into it for the trained weights.
    """
    return SRCNN(factor=3)

"""The networks of ``engines.py`` at their usual sizes, with random weights: speed does not depend on training."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path += [str(EXAMPLES / "super_resolution"), str(EXAMPLES / "fp16_panet")]

PICTURE = (1, 3, 224, 224)


def conv(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, and its normalisation."""
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(width)
    )


class Residual(nn.Module):
    """A block of ResNet: two 3x3 convolutions, or 1x1, 3x3, 1x1 with a wider end."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        relu = nn.ReLU()
        if expansion == 1:
            self.body = nn.Sequential(conv(channels, width, 3, stride), relu, conv(width, width, 3))
        else:
            narrow = conv(channels, width, 1)
            self.body = nn.Sequential(
                narrow, relu, conv(width, width, 3, stride), relu, conv(width, width * expansion, 1)
            )
        changes = stride != 1 or channels != width * expansion
        self.shortcut = conv(channels, width * expansion, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(blocks: tuple[int, ...], expansion: int) -> nn.Module:
    """ResNet (arXiv:1512.03385)."""
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate(blocks):
        for block in range(count):
            stride = 2 if stage and not block else 1
            layers.append(Residual(channels, 64 << stage, stride, expansion))
            channels = (64 << stage) * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class Inverted(nn.Module):
    """A block of MobileNetV3: widen, convolve each channel, weigh channels, narrow."""

    def __init__(self, channels: int, kernel: int, wide: int, width: int, *, weighs: bool, hard: bool, stride: int):
        super().__init__()
        act = nn.Hardswish() if hard else nn.ReLU()
        self.widen = nn.Sequential(conv(channels, wide, 1), act) if wide != channels else nn.Identity()
        self.depthwise = nn.Sequential(conv(wide, wide, kernel, stride, wide), act)
        inner = max(8, int(wide / 4 + 4) // 8 * 8)
        self.weigh = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(wide, inner, 1),
                nn.ReLU(),
                nn.Conv2d(inner, wide, 1),
                nn.Hardsigmoid(),
            )
            if weighs
            else None
        )
        self.narrow = conv(wide, width, 1)
        self.adds = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        """Add the input where the shapes are the same."""
        y = self.depthwise(self.widen(x))
        y = self.narrow(y if self.weigh is None else y * self.weigh(y))
        return x + y if self.adds else y


def mobilenet_v3() -> nn.Module:
    """MobileNetV3-Large (arXiv:1905.02244, table 1)."""
    rows = [
        (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
        (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
        (3, 184, 80, 0, 1, 1), (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2),
        (5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1),
    ]  # fmt: skip
    layers: list[nn.Module] = [conv(3, 16, 3, 2), nn.Hardswish()]
    channels = 16
    for kernel, wide, width, weighs, hard, stride in rows:
        layers.append(Inverted(channels, kernel, wide, width, weighs=bool(weighs), hard=bool(hard), stride=stride))
        channels = width
    head = [conv(channels, 960, 1), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(960, 1280)]
    return nn.Sequential(*layers, *head, nn.Hardswish(), nn.Linear(1280, 1000))


class Attention(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then think."""
        n, length, width = x.shape
        q, k, v = self.qkv(self.before(x)).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(x)


class ViT(nn.Module):
    """ViT-tiny with patches of 16 (arXiv:2012.12877)."""

    def __init__(self, width: int = 192, heads: int = 3, depth: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 197, width) * 0.02)
        self.blocks = nn.Sequential(*(Attention(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1000))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, 224, 224) to (N, 1000)."""
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(len(y), -1, -1), y], 1) + self.positions
        return self.head(self.blocks(y)[:, 0])


class YoloV3(nn.Module):
    """mmdet's YOLOv3 with Darknet-53, up to the maps that its head gives; needs OpenMMLab."""

    def __init__(self) -> None:
        super().__init__()
        from torchferry.codebases.openmmlab.models import build_model, find_model_config

        self.model = build_model(find_model_config("mmdet:yolo/yolov3_d53_8xb8-320-273e_coco.py", "mmdet"))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (N, 3, H, W) to the three maps of the head."""
        return tuple(self.model.bbox_head(self.model.neck(self.model.backbone(x)))[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Be built again in another process, where mmdet has to be imported in its own way."""
        return build_yolov3, ()


def build_yolov3() -> nn.Module:
    """Return YOLOv3 with the same weights every time."""
    torch.manual_seed(0)
    return YoloV3().eval()


def build(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network by name in evaluation mode, and the shape of its input."""
    torch.manual_seed(0)
    if name == "SRCNN":
        from srcnn import srcnn_x3

        return srcnn_x3().eval(), (1, 3, 96, 96)
    if name == "PANet":
        from panet import PANet

        return PANet().eval(), (1, 3, 320, 320)
    if name == "YOLOv3":
        return build_yolov3(), (1, 3, 320, 320)
    made = {
        "ResNet-18": lambda: resnet((2, 2, 2, 2), 1),
        "ResNet-50": lambda: resnet((3, 4, 6, 3), 4),
        "MobileNetV3": mobilenet_v3,
        "ViT-tiny": ViT,
    }
    return made[name]().eval(), PICTURE


NAMES = ("SRCNN", "ResNet-18", "ResNet-50", "MobileNetV3", "ViT-tiny", "PANet", "YOLOv3")

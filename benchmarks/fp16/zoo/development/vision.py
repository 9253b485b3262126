"""Detectors, and classifiers whose blocks have gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.common import Data, Net, calibrate, enlarge, peak, pictures, spread, vary
from zoo.development.classifiers import ResNet18


def _conv_bn_act(
    inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1, act: nn.Module | None = None
):
    return nn.Sequential(
        nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outside),
        nn.ReLU() if act is None else act,
    )


class _Separable(nn.Module):
    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, stride, 1, groups=width)
        self.pointwise = nn.Conv2d(width, width, 1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.pointwise(self.depthwise(x))))


class _Fpem(nn.Module):
    """Feature pyramid enhancement: up the pyramid, then down again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(_Separable(width) for _ in range(3))
        self.down = nn.ModuleList(_Separable(width, 2) for _ in range(3))

    def forward(self, c2: Tensor, c3: Tensor, c4: Tensor, c5: Tensor) -> tuple[Tensor, ...]:
        c4 = self.up[0](self._larger(c5, c4))
        c3 = self.up[1](self._larger(c4, c3))
        c2 = self.up[2](self._larger(c3, c2))
        c3 = self.down[0](self._larger(c3, c2))
        c4 = self.down[1](self._larger(c4, c3))
        c5 = self.down[2](self._larger(c5, c4))
        return c2, c3, c4, c5

    @staticmethod
    def _larger(small: Tensor, large: Tensor) -> Tensor:
        return F.interpolate(small, large.shape[-2:], mode="bilinear", align_corners=False) + large


class _PANet(nn.Module):
    """ResNet-18, two FPEMs, feature fusion, and the head's six maps: text, kernel and four of likeness."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.backbone = ResNet18(16)
        self.reduce = nn.ModuleList(_conv_bn_act(16 * 2**i, width, 1) for i in range(4))
        self.fpems = nn.ModuleList(_Fpem(width) for _ in range(2))
        self.out_conv = nn.Conv2d(4 * width, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        levels = tuple(reduce(c) for reduce, c in zip(self.reduce, self.backbone.stages(x), strict=True))
        sums: tuple[Tensor, ...] | None = None
        for fpem in self.fpems:
            levels = fpem(*levels)
            sums = levels if sums is None else tuple(a + b for a, b in zip(sums, levels, strict=True))
        assert sums is not None
        size = sums[0].shape[-2:]
        fused = [F.interpolate(level, size, mode="bilinear", align_corners=False) for level in sums[1:]]
        return self.out_conv(torch.cat([sums[0], *fused], 1))


def _panet(data: Data) -> nn.Module:
    model = _PANet()
    vary([block.bn2 for layer in model.backbone.layers for block in layer], 2e3, 3e4)
    enlarge([fpem.up[1].pointwise for fpem in model.fpems], 300.0)
    vary([layer.bn for fpem in model.fpems for layer in [*fpem.up, *fpem.down]], 50.0, 2e4)
    calibrate(model, data)
    spread(model, model.out_conv, data, 3.0)
    return model


class _Inverted(nn.Module):
    """MobileNetV2's block: widen, filter, and back without an activation."""

    def __init__(self, inside: int, outside: int, stride: int, ratio: int) -> None:
        super().__init__()
        hidden = inside * ratio
        widen = [] if ratio == 1 else [_conv_bn_act(inside, hidden, 1, act=nn.ReLU6())]
        self.conv = nn.Sequential(
            *widen,
            _conv_bn_act(hidden, hidden, 3, stride, hidden, nn.ReLU6()),
            nn.Conv2d(hidden, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.around = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.around else self.conv(x)


class _MobileNetV2(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        plan = ((16, 8, 1, 1), (8, 12, 2, 4), (12, 12, 1, 4), (12, 12, 1, 4), (12, 24, 2, 4), (24, 24, 1, 4))
        self.features = nn.Sequential(
            _conv_bn_act(3, 16, 3, 2, act=nn.ReLU6()),
            *[_Inverted(*block) for block in plan],
            _conv_bn_act(24, 64, 1, act=nn.ReLU6()),
        )
        self.classifier = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def _mobilenet_v2(data: Data) -> nn.Module:
    model = _MobileNetV2()
    linear = [block.conv[-1] for block in model.features if isinstance(block, _Inverted)]
    vary(linear[1:4], 2e3, 5e4)  # nothing bounds the linear bottlenecks
    enlarge([block.conv[-2] for block in list(model.features)[5:7]], 5e4)
    calibrate(model, data)
    spread(model, model.classifier, data, 3.0)
    return model


class _SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class _MBConv(nn.Module):
    def __init__(self, inside: int, outside: int, kernel: int, stride: int, ratio: int) -> None:
        super().__init__()
        hidden = inside * ratio
        self.expand = _conv_bn_act(inside, hidden, 1, act=nn.SiLU()) if ratio != 1 else nn.Identity()
        self.depthwise = _conv_bn_act(hidden, hidden, kernel, stride, hidden, nn.SiLU())
        self.excite = _SqueezeExcite(hidden, max(1, inside // 4))
        self.project = nn.Sequential(nn.Conv2d(hidden, outside, 1, bias=False), nn.BatchNorm2d(outside))
        self.around = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        out = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + out if self.around else out


class _EfficientNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        plan = ((16, 8, 3, 1, 1), (8, 16, 3, 2, 6), (16, 16, 3, 1, 6), (16, 24, 5, 2, 6), (24, 24, 5, 1, 6))
        self.stem = _conv_bn_act(3, 16, 3, 2, act=nn.SiLU())
        self.blocks = nn.Sequential(*[_MBConv(*block) for block in plan])
        self.head = _conv_bn_act(24, 96, 1, act=nn.SiLU())
        self.classifier = nn.Linear(96, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.head(self.blocks(self.stem(x))), 1).flatten(1))


def _efficientnet(data: Data) -> nn.Module:
    model = _EfficientNet()
    vary([block.project[1] for block in model.blocks], 1e3, 4e4)
    vary([model.blocks[2].depthwise[1]], 20.0, 3e4)  # SiLU on what is beyond the range
    calibrate(model, data)
    for block in model.blocks:
        spread(model, block.excite.reduce, data, 1.5)
        spread(model, block.excite.expand, data, 1.5)
    calibrate(model, data)
    spread(model, model.classifier, data, 3.0)
    return model


class _C2f(nn.Module):
    """A split, bottlenecks on one half, and everything joined."""

    def __init__(self, inside: int, outside: int, count: int = 1) -> None:
        super().__init__()
        half = outside // 2
        self.first = _conv_bn_act(inside, outside, 1, act=nn.SiLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(_conv_bn_act(half, half, 3, act=nn.SiLU()), _conv_bn_act(half, half, 3, act=nn.SiLU()))
            for _ in range(count)
        )
        self.last = _conv_bn_act((2 + count) * half, outside, 1, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class _Sppf(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv_bn_act(width, width // 2, 1, act=nn.SiLU())
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.last = _conv_bn_act(2 * width, width, 1, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        once = self.pool(x)
        twice = self.pool(once)
        return self.last(torch.cat([x, once, twice, self.pool(twice)], 1))


class _Yolo(nn.Module):
    """A backbone with SPPF, a pyramid of two levels, and boxes decoded in pixels."""

    anchors = ((10.0, 13.0, 33.0, 23.0), (62.0, 45.0, 116.0, 90.0))

    def __init__(self, classes: int = 4, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _conv_bn_act(3, width, 3, 2, act=nn.SiLU()), _conv_bn_act(width, 32, 3, 2, act=nn.SiLU())
        )
        self.fine = nn.Sequential(_C2f(32, 32), _conv_bn_act(32, 48, 3, 2, act=nn.SiLU()), _C2f(48, 48))
        self.coarse = nn.Sequential(_conv_bn_act(48, 64, 3, 2, act=nn.SiLU()), _C2f(64, 64), _Sppf(64))
        self.fuse = _C2f(112, 48)
        self.heads = nn.ModuleList(nn.Conv2d(inside, 2 * (5 + classes), 1) for inside in (48, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        fine = self.fuse(torch.cat([F.interpolate(coarse, scale_factor=2.0, mode="nearest"), fine], 1))
        boxes, scores = [], []
        for level, (head, features) in enumerate(zip(self.heads, (fine, coarse), strict=True)):
            count, _, height, width = features.shape
            out = head(features).view(count, 2, -1, height, width).permute(0, 1, 3, 4, 2)
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            grid = torch.stack([columns, rows], -1).float()
            stride = 8.0 * 2**level
            centre = (torch.sigmoid(out[..., :2]) * 2 - 0.5 + grid) * stride
            anchors = torch.tensor(self.anchors[level]).view(1, 2, 1, 1, 2)
            boxes.append(torch.cat([centre, torch.exp(out[..., 2:4]) * anchors], -1).reshape(count, -1, 4))
            scores.append(torch.sigmoid(out[..., 4:]).reshape(count, boxes[-1].shape[1], -1))
        return torch.cat(boxes, 1), torch.cat(scores, 1)


def _yolo(data: Data) -> nn.Module:
    model = _Yolo()
    vary([model.fine[0].last[1], model.fine[2].first[1], model.coarse[1].first[1]], 500.0, 4e4)
    vary([model.coarse[2].first[1], model.fuse.blocks[0][1][1]], 200.0, 5e4)
    enlarge([model.coarse[0][0]], 1e3)
    calibrate(model, data)
    for head in model.heads:
        spread(model, head, data, 1.0)
        for anchor in range(2):
            sizes = slice(anchor * 9 + 2, anchor * 9 + 4)
            head.weight[sizes] *= 0.04  # so that exp is a size in pixels at four times the data, too
            head.bias[sizes] *= 0.04
    return model


class _Embedder(nn.Module):
    """Faces to points on a sphere, and their likeness to known ones."""

    def __init__(self, width: int = 16, size: int = 32, known: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for outside in (width, 2 * width, 4 * width):
            layers += [nn.Conv2d(inside, outside, 3, 2, 1, bias=False), nn.BatchNorm2d(outside), nn.PReLU(outside)]
            inside = outside
        self.features = nn.Sequential(*layers)
        self.project = nn.Linear(inside * 64, size, bias=False)
        self.known = nn.Parameter(torch.randn(known, size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        point = F.normalize(self.project(self.features(x).flatten(1)))
        return point, 16.0 * F.linear(point, F.normalize(self.known))


def _embedder(largest: float):
    def make(data: Data) -> nn.Module:
        model = _Embedder()
        calibrate(model, data)
        peak(model, model.project, data, largest)
        return model

    return make


_PIXELS = pictures(form="normal")

NETS = [
    Net(
        "panet", "conv-bn-relu", "acc32", "the article's text detector: backbone and pyramid sums grow", _panet, _PIXELS
    ),
    Net(
        "mobilenet_v2",
        "conv-bn-relu",
        "acc32",
        "linear bottlenecks grow; ReLU6 is not homogeneous",
        _mobilenet_v2,
        _PIXELS,
    ),
    Net("efficientnet", "conv-gate", "acc32", "SiLU and gates on large streams", _efficientnet, _PIXELS),
    Net(
        "yolo",
        "conv-gate",
        "acc32",
        "large norms before SiLU; sigmoid and exp at the end",
        _yolo,
        pictures(size=96, form="normal"),
    ),
    Net("face_embedding", "conv-norm", "strict", "the sum of squares in an L2 norm", _embedder(900.0), _PIXELS),
    Net(
        "face_embedding_small",
        "conv-norm",
        "small",
        "features near 1e-4, whose squares vanish",
        _embedder(3e-4),
        _PIXELS,
    ),
]

"""What the nets of the zoo are made with: the noun `Net`, data from a seed, and weights brought to a chosen size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

Data = Callable[[torch.Generator], tuple[Tensor, ...]]

Kind = Literal["conv-bn-relu", "conv-gate", "conv-plain", "conv-norm", "vision-attention", "language", "sequence"]
Overflow = Literal["acc32", "strict", "small", "none"]


@dataclass(frozen=True)
class Net:
    """A network with fixed weights, and its data.

    Attributes:
        name: What the table calls it.
        kind: The family. ``conv-bn-relu`` are the nets that weights alone must repair.
        overflow: What plain FP16 does to it on its own data: a tensor leaves the range (``acc32``), only what a norm,
            a mean or a sum has inside leaves it (``strict``), values vanish below the range (``small``), or
            nothing happens (``none``: a control, which a repair has to leave alone).
        why: Where and why, as it happens in practice.
        factory: Makes the module; called under a fixed seed.
        data: Makes one batch of arguments.
        fixed: Positions of the arguments that `scale` does not touch: masks, times, token numbers.
    """

    name: str
    kind: Kind
    overflow: Overflow
    why: str
    factory: Callable[[Data], nn.Module]
    data: Data
    fixed: tuple[int, ...] = ()

    def build(self) -> nn.Module:
        """Make the module in eval mode, with the same weights every time; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            model = self.factory(self.data)
        return model.eval().requires_grad_(False)

    def inputs(self, seed: int, scale: float = 1.0) -> tuple[Tensor, ...]:
        """One batch of arguments; `scale` multiplies those that are data."""
        batch = self.data(torch.Generator().manual_seed(seed))
        return tuple(value if place in self.fixed else value * scale for place, value in enumerate(batch))

    def calibration(self, batches: int = 4) -> list[tuple[Tensor, ...]]:
        """What a repair may look at: seeds from 0."""
        return [self.inputs(seed) for seed in range(batches)]

    def held_out(self, batches: int = 2, scale: float = 1.0) -> list[tuple[Tensor, ...]]:
        """What a repair is judged on, and never sees: seeds from 1000."""
        return [self.inputs(1000 + seed, scale) for seed in range(batches)]


def noise(generator: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    """Normal noise."""
    return torch.randn(*shape, generator=generator) * std


def pictures(count: int = 2, channels: int = 3, size: int = 64, form: str = "bytes") -> Data:
    """Pictures with smooth ground, edges and grain.

    Args:
        count: Pictures in a batch.
        channels: Colours.
        size: Height and width in pixels.
        form: ``bytes`` for 0..255, ``unit`` for 0..1, ``normal`` for mean 0.45 and deviation 0.225 taken off.
    """

    def make(generator: torch.Generator) -> tuple[Tensor, ...]:
        ground = torch.zeros(count, channels, size, size)
        for octave in (4, 8, 16):
            coarse = noise(generator, count, channels, octave, octave)
            ground += F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False) * (4 / octave)
        for picture in ground:
            for _ in range(4):
                top, left = torch.randint(0, size - size // 4, (2,), generator=generator).tolist()
                height, width = torch.randint(size // 8, size // 2, (2,), generator=generator).tolist()
                picture[:, top : top + height, left : left + width] += noise(generator, channels, 1, 1)
        ground += noise(generator, *ground.shape, std=0.05)
        low, high = ground.amin((1, 2, 3), keepdim=True), ground.amax((1, 2, 3), keepdim=True)
        bytes_ = ((ground - low) / (high - low) * 255).round()
        if form == "bytes":
            return (bytes_,)
        return (bytes_ / 255 if form == "unit" else (bytes_ / 255 - 0.45) / 0.225,)

    return make


def batches(data: Data, count: int = 4) -> list[tuple[Tensor, ...]]:
    """The data that weights are settled on; none of it is calibration or held-out data."""
    return [data(torch.Generator().manual_seed(500 + seed)) for seed in range(count)]


def calibrate(model: nn.Module, data: Data) -> nn.Module:
    """Take the statistics of every batch normalisation from data, as training would leave them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for batch in batches(data):
        model(*batch)
    return model.eval()


def peak(model: nn.Module, layer: nn.Module, data: Data, value: float) -> None:
    """Scale `layer`'s weight and bias so that its largest output has magnitude `value`."""
    _rescale(model, layer, data, lambda outputs: value / max(float(output.abs().max()) for output in outputs))


def spread(model: nn.Module, layer: nn.Module, data: Data, value: float) -> None:
    """Scale `layer`'s weight and bias so that its output has the standard deviation `value`."""
    _rescale(model, layer, data, lambda outputs: value / float(torch.cat([o.flatten() for o in outputs]).std()))


def enlarge(layers: Iterable[nn.Module], factor: float) -> None:
    """Multiply weights, and biases where there are any, in place."""
    for layer in layers:
        for name in ("weight", "bias"):
            parameter = getattr(layer, name, None)
            if parameter is not None:
                parameter.mul_(factor)


def vary(layers: Iterable[nn.Module], low: float, high: float) -> None:
    """Draw the weights of norms from `low` to `high`, evenly in the logarithm, as trained ones differ by channel."""
    for layer in layers:
        span = torch.rand(layer.weight.shape)
        layer.weight.copy_(low * (high / low) ** span)
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(torch.randn(layer.bias.shape) * 0.2 * layer.weight)


def _rescale(model: nn.Module, layer: nn.Module, data: Data, factor: Callable[[list[Tensor]], float]) -> None:
    seen: list[Tensor] = []
    model.eval()
    handle = layer.register_forward_hook(lambda _module, _args, output: seen.append(output.clone()))
    for batch in batches(data):
        model(*batch)
    handle.remove()
    enlarge([layer], factor(seen))

"""What rewriters cost: entering and leaving a context with 200 of them, and an active context in a forward pass.

Usage: python benchmarks/rewriters.py

The forward pass is that of a ResNet-18 on one picture of 224x224. Passes without a context, with one, and with torch's
own ``BaseTorchFunctionMode``, which does nothing, take turns; what is compared is the fastest pass of each.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode

from torchferry.rewrite import FunctionRewriter, ModuleRewriter, RewriterContext

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

REWRITERS = 200
ROUNDS = 101


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block."""
        y = self.relu(self.bn1(self.conv1(x)))
        result: torch.Tensor = self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))
        return result


def resnet18() -> nn.Module:
    """Return a ResNet-18 with random weights."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)).eval()


def many_rewriters() -> FunctionRewriter:
    """Return rewriters of 150 Python functions, 25 methods that a class inherits and 25 functions of torch."""
    module = types.ModuleType("functions_to_rewrite")
    sys.modules[module.__name__] = module
    methods = "".join(f"    def method{n}(self, x, mode='a'):\n        return x\n" for n in range(25))
    functions = "".join(f"def function{n}(x, k=1, *args, mode='a', **kwargs):\n    return x\n" for n in range(150))
    source = f"{functions}class Base:\n{methods}class Derived(Base):\n    pass\n"
    exec(source, module.__dict__)  # noqa: S102 - it stands above
    names = [f"{module.__name__}.function{n}" for n in range(150)]
    names += [f"{module.__name__}.Derived.method{n}" for n in range(25)]
    names += [f"torch.{name}" for name in dir(torch) if isinstance(getattr(torch, name), types.BuiltinFunctionType)][
        :25
    ]
    rewriters = FunctionRewriter()
    for name in names:
        rewriters.register_rewriter(name)(lambda ctx, *args, **kwargs: ctx.origin_func(*args, **kwargs))
    assert len(names) == REWRITERS
    return rewriters


def entering() -> list[float]:
    """Return the times of entering and leaving, in seconds."""
    rewriters = many_rewriters()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        with RewriterContext(function_rewriter=rewriters, module_rewriter=ModuleRewriter()):
            pass
        times.append(time.perf_counter() - start)
    return times


def forward(names: list[str]) -> dict[str, float]:
    """Return the fastest forward pass in seconds: plain, with rewriters of these functions, with an idle mode."""
    rewriters = FunctionRewriter()
    for name in names:
        rewriters.register_rewriter(name)(lambda ctx, *args, **kwargs: ctx.origin_func(*args, **kwargs))
    model, picture = resnet18(), torch.randn(1, 3, 224, 224)
    surroundings: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "plain": contextlib.nullcontext,
        "rewriters": lambda: RewriterContext(function_rewriter=rewriters, module_rewriter=ModuleRewriter()),
        "idle mode": BaseTorchFunctionMode,
    }
    times: dict[str, list[float]] = {name: [] for name in surroundings}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, surrounding in surroundings.items():
                with surrounding():
                    start = time.perf_counter()
                    model(picture)
                    times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    """Print the figures."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    first, *later = entering()
    print(f"{REWRITERS} rewriters, entering and leaving: first {first * 1e3:.2f} ms,", end=" ")
    print(f"then median {statistics.median(later) * 1e3:.2f} ms, fastest {min(later) * 1e3:.2f} ms")
    for what, names in {
        "no function of torch": ["builtins.print"],
        "functions of torch, none of them called": ["torch.Tensor.repeat", "torch.Tensor.expand"],
        "every convolution and ReLU": ["torch.conv2d", "torch.nn.functional.relu"],
    }.items():
        seconds = forward(names)
        ratios = {name: f"x{value / seconds['plain']:.4f}" for name, value in seconds.items() if name != "plain"}
        print(f"ResNet-18 forward {seconds['plain'] * 1e3:.1f} ms; rewriting {what}: {ratios}")


if __name__ == "__main__":
    main()

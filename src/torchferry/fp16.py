"""FP16 that cannot overflow: see where it would, prove that it does not.

::

    ferry.fp16.emulate(model, inputs).first_bad          # what true FP16 gives, on a CPU
    with ferry.fp16.watch(model) as w: model(inputs)     # headroom of every module; print(w.report())
    fixed, certificate = ferry.fp16.fix(model, calibration)   # scaled by powers of two, and the proof

Everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchferry.pipeline.bisect import Bisection, bisect
    from torchferry.pipeline.emulation import emulate
    from torchferry.precision.by_hand import ScaledResidual, scaled_batch_norm, scaled_conv
    from torchferry.precision.certificate import Certificate
    from torchferry.precision.checks import certify
    from torchferry.precision.emulate import BadTensor, Emulation
    from torchferry.precision.fix import fix
    from torchferry.precision.watch import watch
    from torchferry.precision.watch_report import WatchReport

_HOMES = {
    "BadTensor": "torchferry.precision.emulate",
    "Certificate": "torchferry.precision.certificate",
    "ScaledResidual": "torchferry.precision.by_hand",
    "certify": "torchferry.precision.checks",
    "fix": "torchferry.precision.fix",
    "scaled_batch_norm": "torchferry.precision.by_hand",
    "scaled_conv": "torchferry.precision.by_hand",
    "Bisection": "torchferry.pipeline.bisect",
    "Emulation": "torchferry.precision.emulate",
    "WatchReport": "torchferry.precision.watch_report",
    "bisect": "torchferry.pipeline.bisect",
    "emulate": "torchferry.pipeline.emulation",
    "watch": "torchferry.precision.watch",
}

__all__ = [
    "BadTensor",
    "Bisection",
    "Certificate",
    "Emulation",
    "ScaledResidual",
    "WatchReport",
    "bisect",
    "certify",
    "emulate",
    "fix",
    "scaled_batch_norm",
    "scaled_conv",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'torchferry.fp16' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

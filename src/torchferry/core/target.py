"""Where a model is going: the engine, the precision, the device, the opset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torchferry.core.errors import ConfigError, did_you_mean

Precision = Literal["fp32", "fp16", "bf16", "int8"]
DEFAULT_BACKEND = "onnxruntime"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Target:
    """One engine at one precision.

    A target is valid on a machine without its engine: rewriting and exporting need only its name.

    Attributes:
        backend: The engine's name, as in ``torchferry.backends``.
        precision: What the engine computes in.
        device: Where it runs, ``cpu`` or a device string of the engine.
        opset: The opset of the default ONNX domain; None lets the exporter choose.

    Raises:
        ConfigError: If the precision is unknown or the opset is not a positive number.

    >>> str(Target("onnxruntime"))
    'onnxruntime-fp32'
    """

    backend: str = DEFAULT_BACKEND
    precision: Precision = "fp32"
    device: str = "cpu"
    opset: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"unknown precision '{self.precision}'", hint=did_you_mean(self.precision, PRECISIONS))
        if self.opset is not None and self.opset < 1:
            raise ConfigError(f"opset must be a positive number, got {self.opset}")

    def __str__(self) -> str:
        return f"{self.backend}-{self.precision}"

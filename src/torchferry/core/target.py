"""Where a model is going: the engine, the precision, the device, the opset."""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - pydantic reads the annotations
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torchferry.core.errors import ConfigError, did_you_mean

Precision = Literal["fp32", "fp16", "bf16", "int8"]
DEFAULT_BACKEND = "onnxruntime"
AUTO = "auto"
"""In place of a backend's name: the one that ``deploy`` finds to be the fastest on this machine."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Target:
    """One engine at one precision.

    A target is valid on a machine without its engine: rewriting and exporting need only its name.

    Attributes:
        backend: The engine's name, as in ``torchferry.backends``; or ``AUTO``, for ``deploy`` alone.
        precision: What the engine computes in, fp32 by default. Of ``AUTO``, the only one to be tried; None for all.
        device: Where it runs, ``cpu`` or a device string of the engine.
        opset: The opset of the default ONNX domain; None lets the exporter choose.
        options: Numbers by the engine's own names, such as the bytes of its ``max_workspace_size``; what there are is
            in its ``Capabilities``.

    Raises:
        ConfigError: If the precision is unknown, the opset is not a positive number, or an option no number from 0 up.

    >>> str(Target("onnxruntime"))
    'onnxruntime-fp32'
    """

    backend: str = DEFAULT_BACKEND
    precision: Precision = None  # type: ignore[assignment] # only AUTO keeps it
    device: str = "cpu"
    opset: int | None = None
    options: Mapping[str, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        given: Any = self.precision
        if given is None and self.backend != AUTO:
            object.__setattr__(self, "precision", "fp32")
        if given is not None and given not in PRECISIONS:
            raise ConfigError(f"unknown precision '{self.precision}'", hint=did_you_mean(self.precision, PRECISIONS))
        if self.opset is not None and self.opset < 1:
            raise ConfigError(f"opset must be a positive number, got {self.opset}")
        for name, value in self.options.items():
            if not isinstance(value, int) or value < 0:
                raise ConfigError(f"option '{name}' must be a number from 0 up, got {value!r}")

    def __str__(self) -> str:
        return "-".join(filter(None, (self.backend, self.precision)))


def check_named(backend: str) -> None:
    """Check that an engine is meant, and not a choice of one.

    Raises:
        ConfigError: If it is ``AUTO``.
    """
    if backend == AUTO:
        raise ConfigError(
            f"'{AUTO}' is no engine: it lets deploy choose one", hint="name an engine, or call deploy with it"
        )

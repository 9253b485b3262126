"""What a row of the table is about: a module, what a repair may look at, and what it is judged on."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo import DEVELOPMENT, FROZEN

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn
    from zoo import Net

SCALES = (1.0, 4.0)


@dataclass(frozen=True)
class Case:
    """A module and its data.

    Attributes:
        name: The row's name.
        group: Rows of one group are summed up together.
        module: In eval mode, FP32.
        calibration: Arguments that a repair may look at.
        held_out: Arguments that it is judged on, by how much larger they are than the calibration data.
    """

    name: str
    group: str
    module: nn.Module
    calibration: list[tuple[Tensor, ...]]
    held_out: dict[float, list[tuple[Tensor, ...]]]


def of_net(net: Net) -> Case:
    """Build a net of the zoo."""
    group = "frozen" if net.name in FROZEN else "development"
    held_out = {scale: net.held_out(scale=scale) for scale in SCALES}
    return Case(net.name, group, net.build(), net.calibration(), held_out)


def of_file(path: Path) -> list[Case]:
    """Return what the function ``cases()`` of a Python file gives: the way to bring a zoo of one's own.

    The file is executed.
    """
    scope: dict[str, Any] = runpy.run_path(str(path))
    return list(scope["cases"]())


def names(which: str) -> list[str]:
    """Return the names of ``frozen``, ``development`` or ``all`` nets."""
    return {"frozen": list(FROZEN), "development": list(DEVELOPMENT), "all": [*DEVELOPMENT, *FROZEN]}[which]

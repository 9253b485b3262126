"""Running an instrumented graph, and what it saw."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchferry import backends
from torchferry.core.target import DEFAULT_BACKEND

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchferry.core.engine import Array
    from torchferry.precision.instrument import Instrumented


@dataclass(frozen=True)
class Figures:
    """What one run, or several, saw of every tensor.

    Attributes:
        magnitude: Largest absolute value before rounding, of every tensor in ``Instrumented.seen``.
        is_finite: Whether every number was finite after rounding.
        subnormal: The largest share of subnormal numbers; empty without a census.
        bounds: Of every accumulator.
    """

    magnitude: Array
    is_finite: Array
    subnormal: Array
    bounds: Array

    def joined(self, other: Figures) -> Figures:
        """Return the worst of both."""
        return Figures(
            np.fmax(self.magnitude, other.magnitude),
            self.is_finite & other.is_finite,
            np.fmax(self.subnormal, other.subnormal),
            np.fmax(self.bounds, other.bounds),
        )


class Runner:
    """An instrumented graph, loaded in the default engine without its optimisations.

    Args:
        instrumented: The graph.
        names: Of the graph's own outputs.
        census: Whether it was instrumented with a census.
    """

    def __init__(self, instrumented: Instrumented, names: tuple[str, ...], *, census: bool = False) -> None:
        self.instrumented = instrumented
        self._names = names
        self._each = 4 if census else 3  # figures of a tensor
        folder = tempfile.mkdtemp(prefix="torchferry-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._session = backends.get(DEFAULT_BACKEND).trial(instrumented.exported, Path(folder))

    def run(self, feeds: Mapping[str, Array]) -> tuple[dict[str, Array], Figures]:
        """Run it; return the graph's own outputs, and what was seen."""
        values = list(self._session.run(feeds).values())
        count = self.instrumented.outputs
        outputs = dict(zip(self._names, values[:count], strict=True))
        return outputs, self._figures(values[count:])

    def close(self) -> None:
        """Let go of the engine's memory."""
        self._session.close()

    def _figures(self, values: list[Array]) -> Figures:
        seen = self.instrumented.seen
        rows = [index for index, tensor in enumerate(seen) if tensor.range is None]
        split = len(rows) * self._each
        table = np.array(values[:split], np.float64).reshape(len(rows), self._each)
        magnitude = np.array([tensor.range[0] if tensor.range else 0.0 for tensor in seen])
        is_finite = np.array([not (tensor.range and tensor.range[1]) for tensor in seen], bool)
        subnormal = np.zeros(len(seen) if self._each > 3 else 0)
        if rows:
            largest, smallest, total = table[:, 0], table[:, 1], table[:, 2]
            is_empty = (largest == -np.inf) & (smallest == np.inf)
            magnitude[rows] = np.where(is_empty, 0, np.fmax(np.abs(largest), np.abs(smallest)))
            is_finite[rows] = np.isfinite(total)
            if len(subnormal):
                subnormal[rows] = np.nan_to_num(table[:, 3])
        return Figures(magnitude, is_finite, subnormal, np.array(values[split:], np.float64))

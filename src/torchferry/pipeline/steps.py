"""What a run is doing, how long each step took, and how much memory it needed."""

from __future__ import annotations

import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Step:
    """A finished step.

    Attributes:
        name: What was done.
        seconds: Wall time.
        peak_mib: Largest resident memory of the process while it ran, in MiB.
        detail: One line on the result.
        notable: The detail must not go unsaid, even where progress is not shown.
    """

    name: str
    seconds: float
    peak_mib: float
    detail: str = ""
    notable: bool = False

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.peak_mib:.0f} MiB" + (f", {self.detail}" if self.detail else "")


class Watcher(Protocol):
    """Somebody who wants to see the steps as they run."""

    def started(self, name: str) -> None:
        """Hear that a step begins."""
        ...

    def finished(self, step: Step) -> None:
        """Hear that a step ended well."""
        ...


@dataclass
class Running:
    """A step that is running; set ``detail`` to say what came out, and ``notable`` if that must not go unsaid."""

    detail: str = ""
    notable: bool = False


@dataclass
class Steps:
    """Times steps and tells a watcher.

    Attributes:
        watcher: Told of every step; nobody if None.
        done: The finished steps in order.
    """

    watcher: Watcher | None = None
    done: list[Step] = field(default_factory=list)

    @contextmanager
    def step(self, name: str) -> Iterator[Running]:
        """Time the block as one step; a block that raises is no finished step."""
        if self.watcher is not None:
            self.watcher.started(name)
        running = Running()
        _forget_peak()
        start = time.perf_counter()
        yield running
        step = Step(name, time.perf_counter() - start, peak_mib(), running.detail, running.notable)
        self.done.append(step)
        if self.watcher is not None:
            self.watcher.finished(step)


def _forget_peak() -> None:
    """Reset the process's peak where the system can (Linux); elsewhere the peak is that of the whole run so far."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_mib() -> float:
    """Return the largest resident memory of this process in MiB, since it was last reset."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass  # not Linux: ask the C library instead
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024

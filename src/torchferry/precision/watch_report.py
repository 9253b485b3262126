"""What a watch has seen, as a noun: text, JSON, a page with the headroom along the network."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchferry.core.errors import FormatError, InputError, did_you_mean
from torchferry.core.files import require_file, write_text
from torchferry.precision.rounding import FP16_MAX

_MUCH = 0.01  # a share of subnormal numbers worth a line
_FORMAT = "torchferry.fp16.watch"


@dataclass(frozen=True)
class ModuleRange:
    """The range of what one module takes and gives, over all its calls.

    Attributes:
        path: From the root, such as ``backbone.layer1.0``; empty for the root. A module with several paths has its
            first.
        kind: Its class.
        calls: How often it was called.
        taken: Largest magnitude of its inputs; infinite if one was not finite.
        given: Likewise of its outputs.
        subnormal: Share of the outputs' numbers below 2⁻¹⁴, which FP16 holds with fewer bits; zeros are not counted.
        flushed: Share that FP16 rounds to zero.
        nans: How many outputs were not a number.
        infinities: How many were infinite.
        is_leaf: No other module was called inside it.
    """

    path: str
    kind: str
    calls: int
    taken: float
    given: float
    subnormal: float = 0.0
    flushed: float = 0.0
    nans: int = 0
    infinities: int = 0
    is_leaf: bool = True

    @property
    def headroom(self) -> float:
        """Bits between its largest output and 65504; negative beyond, infinite if it gives only zeros."""
        if math.isinf(self.given):
            return -math.inf
        return math.log2(FP16_MAX / self.given) if self.given else math.inf

    @property
    def is_beyond(self) -> bool:
        """Whether an input or output is beyond 65504."""
        return max(self.taken, self.given) > FP16_MAX


@dataclass(frozen=True)
class Crossing:
    """Where values pass 65504.

    Attributes:
        kind: ``enters`` the region beyond, or ``leaves`` it.
        module: The module in which it happens; its own code, if a module inside it is named in ``before``.
        magnitude: The largest value beyond.
        before: The module inside that takes these values first; empty if it happens in the module as a whole.
    """

    kind: Literal["enters", "leaves"]
    module: str
    magnitude: float
    before: str = ""

    def __str__(self) -> str:
        place = _shown(self.module) + (f", in its own code before {self.before}" if self.before else "")
        if self.kind == "enters":
            return f"from: {place} (reaches {self.magnitude:.6g})"
        return f"to:   {place} (from {self.magnitude:.6g})"


@dataclass(frozen=True)
class ParameterRange:
    """A parameter or buffer.

    Attributes:
        name: As in the state_dict.
        magnitude: Its largest absolute value.
    """

    name: str
    magnitude: float


@dataclass(frozen=True)
class WatchReport:
    """What was seen of every module.

    Attributes:
        model: The model's class.
        forwards: How many runs were seen.
        modules: Those that were called, in the order in which they were entered first; the root is the first.
        crossings: Where values enter and leave the region beyond 65504, innermost modules only, in order.
        origin: The innermost module that gave the first NaN or infinity having taken none; None if there was none.
        parameters: Those beyond 65504.
        not_called: Paths of modules that were not called.
    """

    model: str
    forwards: int
    modules: tuple[ModuleRange, ...]
    crossings: tuple[Crossing, ...] = ()
    origin: Crossing | None = None
    parameters: tuple[ParameterRange, ...] = ()
    not_called: tuple[str, ...] = ()

    @property
    def is_within(self) -> bool:
        """Whether everything that was seen, and every parameter, fits FP16."""
        return not self.parameters and not any(row.is_beyond for row in self.modules)

    def __getitem__(self, path: str) -> ModuleRange:
        """Return what was seen of a module.

        Raises:
            InputError: If no module of this path was called.
        """
        for row in self.modules:
            if row.path == path:
                return row
        if path in self.not_called:
            raise InputError(f"the module '{path}' was not called while it was watched")
        raise InputError(f"no module '{path}' was watched", hint=did_you_mean(path, [r.path for r in self.modules]))

    def to_text(self) -> str:
        """Render for a terminal or a log."""
        runs = f"{self.forwards} forward" + ("s" if self.forwards != 1 else "")
        lines = [f"{self.model} in FP16, {runs}: {'within range' if self.is_within else 'OUT OF RANGE'}"]
        if self.modules and self.modules[0].taken > FP16_MAX:
            lines.append(f"  input: reaches {self.modules[0].taken:.6g}")
        lines += [f"  parameter {p.name}: reaches {p.magnitude:.6g}" for p in self.parameters]
        lines += [f"  {crossing}" for crossing in self.crossings]
        if self.origin is not None:
            lines.append(f"  first NaN or infinity: {_shown(self.origin.module)}")
        rows = [("module", "calls", "largest in", "largest out", "headroom", "subnormal"), *map(_cells, self.modules)]
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]  # noqa: B905
            lines.append("  " + "  ".join(cells).rstrip())
        if self.not_called:
            lines.append(f"  not called: {', '.join(self.not_called)}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; infinity becomes the text ``inf``."""
        values = dataclasses.asdict(self)
        for row, known in zip(values["modules"], self.modules, strict=True):
            row["headroom"] = known.headroom
        plain: dict[str, Any] = _plain({"format": _FORMAT, **values})
        return plain

    def to_json(self) -> str:
        """Render as JSON, for ``WatchReport.load``."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_svg(self) -> str:
        """Draw the headroom of every innermost module in the order of execution."""
        from torchferry.precision.watch_page import headroom_svg

        return headroom_svg(self)

    def to_html(self) -> str:
        """Render as one self-contained page."""
        from torchferry.precision.watch_page import page

        return page(self)

    def save(self, path: str | Path) -> None:
        """Write ``.json``, ``.html``, ``.svg`` or text, by the name's ending.

        Raises:
            OutputError: If the file cannot be written.
        """
        path = Path(path)
        renderer = {".json": self.to_json, ".html": self.to_html, ".svg": self.to_svg}.get(path.suffix, self.to_text)
        write_text(path, renderer())

    @staticmethod
    def load(path: str | Path) -> WatchReport:
        """Read what ``save`` wrote as JSON.

        Raises:
            MissingFileError: If there is no such file.
            FormatError: If it is anything else.
        """
        path = require_file(path, "saved watch")
        try:
            values = json.loads(path.read_bytes())
            return _report(values)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise FormatError(f"'{path}' is not a saved watch: {exc}", hint="save it as .json again") from exc


def _report(values: dict[str, Any]) -> WatchReport:
    if values["format"] != _FORMAT:
        raise ValueError("it has another format")
    for row in values["modules"]:
        del row["headroom"]
    origin = values["origin"]
    return WatchReport(
        values["model"],
        values["forwards"],
        tuple(ModuleRange(**_numbers(row, "taken", "given")) for row in values["modules"]),
        tuple(_crossing(row) for row in values["crossings"]),
        None if origin is None else _crossing(origin),
        tuple(ParameterRange(**_numbers(row, "magnitude")) for row in values["parameters"]),
        tuple(values["not_called"]),
    )


def _shown(path: str) -> str:
    return path or "(root)"


def _cells(row: ModuleRange) -> tuple[str, ...]:
    return (
        f"{_shown(row.path)} ({row.kind})",
        str(row.calls),
        f"{row.taken:.4g}",
        f"{row.given:.4g}",
        f"{row.headroom:+.1f}",
        f"{row.subnormal:.0%}" if row.subnormal >= _MUCH else "",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return row | {name: float(row[name]) for name in names}


def _crossing(row: dict[str, Any]) -> Crossing:
    return Crossing(**_numbers(row, "magnitude"))

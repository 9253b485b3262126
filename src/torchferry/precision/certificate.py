"""What a repair proves, on which data, and what it does not promise; checkable again from the saved files."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping  # noqa: TC003 - pydantic reads the annotations
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from torchferry.core.errors import FormatError, VerificationError
from torchferry.core.files import new_folder, require_file
from torchferry.graph.reading import as_exported
from torchferry.precision.apply import (
    SMALLEST,
    Added,
    ConstantRecord,
)
from torchferry.precision.prepare import bounded_mask, prepare

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from torchferry.graph import Exported
    from torchferry.precision.ranges import Feeds

CERTIFICATE_FILE, ORIGINAL_FILE, FIXED_FILE, DATA_FILE = "certificate.json", "original.onnx", "fixed.onnx", "data.npz"


@dataclass(frozen=True)
class Check:
    """One of the four checks.

    Attributes:
        name: ``agreement``, ``constants``, ``bounds`` or ``error``.
        passed: Whether it holds.
        figure: What was found, in numbers.
        data: What it was found on.
        not_promised: What it does not say.
        problems: What is wrong, one line each.
    """

    name: str
    passed: bool
    figure: str
    data: str
    not_promised: str
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name}: {'passed' if self.passed else 'FAILED'}: {self.figure}", f"    on {self.data}"]
        lines += [f"    {problem}" for problem in self.problems]
        return "\n".join([*lines, f"    not promised: {self.not_promised}"])


@dataclass(frozen=True)
class Evidence:
    """What a certificate speaks of.

    Attributes:
        original: The graph that was given.
        fixed: The repaired one.
        calibration: Inputs that the scales were solved on.
        held_out: Inputs that they were not.
    """

    original: Exported
    fixed: Exported
    calibration: Sequence[Feeds]
    held_out: Sequence[Feeds]


@dataclass(frozen=True)
class Certificate:
    """What ``fix`` did to a graph, and the proof.

    Attributes:
        title: Of what.
        headroom_bits: The scales are to hold up to ``2**headroom_bits`` times the calibration inputs.
        scales: For each tensor of the repaired graph the tensor that it stands for, and its k: it holds t / 2**k.
        constants: For each float constant of the repaired graph where it comes from.
        added: Nodes that were added.
        islands: Nodes that stay FP32, with the reason.
        outside: Inputs and outputs that stay FP32, since their true values leave FP16's range.
        opened: Operators that were written out, so that a clip can stand inside.
        raised: Constants and attributes that FP16 would hold as 0, raised to its smallest number; with what they were.
        binding: What made the additions necessary.
        unknown_operators: Nodes of operators without a rule, which got scale 1.
        held_out: Where the data of the last check came from.
        seconds: What measuring and solving took.
        checks: The four checks.
        evidence: The graphs and the data; not part of the JSON.
    """

    title: str
    headroom_bits: int
    scales: Mapping[str, tuple[str, int]]
    constants: Mapping[str, ConstantRecord]
    added: tuple[Added, ...] = ()
    islands: Mapping[str, str] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    opened: Mapping[str, str] = field(default_factory=dict)
    raised: Mapping[str, float] = field(default_factory=dict)
    binding: Mapping[str, str] = field(default_factory=dict)
    unknown_operators: tuple[str, ...] = ()
    held_out: str = ""
    seconds: float = 0.0
    checks: tuple[Check, ...] = ()
    evidence: Any = field(default=None, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """True if all four checks were made and hold."""
        return len(self.checks) == len(CHECKS) and all(check.passed for check in self.checks)

    @property
    def weights_only(self) -> bool:
        """True if no node was added and none stays FP32."""
        return not self.added and not self.islands

    def check(self, name: str) -> Check:
        """Return a check by name."""
        return next(check for check in self.checks if check.name == name)

    def raise_for_failure(self) -> Certificate:
        """Return the certificate itself if it passed.

        Raises:
            VerificationError: If it did not; the message holds every problem.
        """
        if not self.passed:
            failed = "\n".join(f"  {check}" for check in self.checks if not check.passed) or "  checks are missing"
            raise VerificationError(
                f"{self.title}: not certified\n{failed}", hint="give more data to measure on, or stay in FP32"
            )
        return self

    def exceptions(self) -> tuple[str, ...]:
        """Return everything that is not the same computation, shifted; one line each."""
        clips = [f"'{a.tensor}' is clipped {a.why}" for a in self.added if a.operator == "Clip"]
        clips += [f"'{a.tensor}' is shifted: {a.why}" for a in self.added if a.operator == "Add"]
        masks = [f"mask '{name}' is bounded" for name, record in self.constants.items() if record.is_mask]
        opened = [f"{operator} '{name}' is written out" for name, operator in self.opened.items()]
        raised = [f"'{name}' is {SMALLEST:.3g}, since {value:.3g} would be 0" for name, value in self.raised.items()]
        return (*clips, *masks, *opened, *raised)

    def to_text(self) -> str:
        """Render for a terminal or a log."""
        kinds = {kind: sum(a.operator == kind for a in self.added) for kind in ("Mul", "Clip", "Add", "Cast")}
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        lines = [
            f"{self.title}: {'certified' if self.passed else 'NOT certified'}",
            f"  nodes added: {counts or 'none'}; in FP32: {len(self.islands) or 'none'}",
            *(f"  {check}" for check in self.checks),
        ]
        sections = {
            "in FP32": [f"{name}: {reason}" for name, reason in self.islands.items()],
            "inputs and outputs in FP32": list(self.outside),
            "added": [f"{a.name}: {a.why}" for a in self.added if a.operator != "Cast"],
            "because": [f"{name}: {reason}" for name, reason in self.binding.items()],
            "exceptions": list(self.exceptions()),
            "without a rule, at scale 1": list(self.unknown_operators),
        }
        for title, rows in sections.items():
            if rows:
                lines += [f"  {title}", *(f"    {row}" for row in rows)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()

    def to_json(self) -> str:
        """Render as JSON, for ``from_json``."""
        text: str = _adapter().dump_json(self, indent=2, exclude={"evidence"}).decode()
        return text

    @staticmethod
    def from_json(text: str | bytes) -> Certificate:
        """Read what ``to_json`` wrote.

        Raises:
            FormatError: If the text is anything else.
        """
        try:
            certificate: Certificate = _adapter().validate_python({**json.loads(text), "evidence": None})
        except (ValueError, TypeError) as exc:
            raise FormatError(f"this is not a certificate: {exc}", hint="repair the model again") from exc
        return certificate

    def save(self, folder: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Write the certificate with both graphs and the data, so that ``certify`` can check it again.

        Args:
            folder: Gets ``certificate.json``, ``original.onnx``, ``fixed.onnx`` and ``data.npz``.
            overwrite: Replace a folder that an earlier certificate was saved in.

        Raises:
            OutputError: If the folder exists or cannot be written.
        """
        evidence: Evidence | None = self.evidence
        with new_folder(Path(folder), overwrite=overwrite, marker=CERTIFICATE_FILE) as partial:
            (partial / CERTIFICATE_FILE).write_text(self.to_json(), encoding="utf-8")
            if evidence is None:
                return
            evidence.original.save(partial / ORIGINAL_FILE)
            evidence.fixed.save(partial / FIXED_FILE)
            groups = {"calibration": evidence.calibration, "held_out": evidence.held_out}
            arrays = {
                f"{group}/{number}/{name}": array
                for group, calls in groups.items()
                for number, feeds in enumerate(calls)
                for name, array in feeds.items()
            }
            np.savez(partial / DATA_FILE, **arrays)  # type: ignore[arg-type]


def load_evidence(folder: Path) -> Evidence:
    """Read the graphs and the data that ``Certificate.save`` wrote.

    Raises:
        MissingFileError: If one is not there.
        FormatError: If one cannot be read.
    """
    calls: dict[str, dict[int, dict[str, Any]]] = {"calibration": {}, "held_out": {}}
    path = require_file(folder / DATA_FILE, "data of the certificate")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                group, number, name = key.split("/", 2)
                calls[group].setdefault(int(number), {})[name] = arrays[key]
    except (ValueError, KeyError, OSError) as exc:
        raise FormatError(f"'{path}' does not hold the data of a certificate: {exc}") from exc
    original, fixed = (as_exported(folder / name) for name in (ORIGINAL_FILE, FIXED_FILE))
    ordered = {group: [each for _, each in sorted(numbered.items())] for group, numbered in calls.items()}
    return Evidence(original, fixed, ordered["calibration"], ordered["held_out"])


def check_constants(certificate: Certificate, evidence: Evidence) -> Check:
    """Check that every float constant is the user's, shifted, rounded, and nothing else: none clipped, none made 0."""
    prepared = prepare(evidence.original, split=False, bound_masks=False)
    sources = {name: v.const_value.numpy() for name, v in prepared.model.graph.initializers.items() if v.const_value}
    problems, vanished, subnormal, count = [], 0, 0, 0
    for name, value in evidence.fixed.model.graph.initializers.items():
        if value.const_value is None or value.const_value.dtype not in (ir.DataType.FLOAT16, ir.DataType.FLOAT):
            continue
        count += 1
        stored = value.const_value.numpy()
        record = certificate.constants.get(name)
        if record is None or (record.source and record.source not in sources):
            problems.append(f"'{name}' comes from nowhere in the original graph")
            continue
        true = sources[record.source] if record.source else np.full(stored.shape, record.value)
        true = bounded_mask(true) if record.is_mask else true
        shifted = true.astype(np.float64) / 2.0**record.k
        if name in certificate.raised:
            shifted = np.copysign(np.full_like(shifted, SMALLEST), shifted)
        with np.errstate(over="ignore"):
            expected = shifted.astype(stored.dtype)
        if np.isinf(expected[np.isfinite(shifted)]).any():
            problems.append(f"'{name}' does not fit FP16: {np.abs(shifted).max():.6g} at k = {record.k}")
        elif expected.shape != stored.shape or not np.array_equal(expected, stored, equal_nan=True):
            worst = np.abs(expected.astype(np.float64) - stored).max() if expected.shape == stored.shape else np.inf
            problems.append(f"'{name}' is not the original / 2**{record.k}, rounded: off by {worst:.6g}")
        vanished += int(((expected == 0) & (shifted != 0)).sum())
        subnormal += int(((np.abs(expected) < 2.0**-14) & (expected != 0)).sum())
    return Check(
        "constants",
        not problems,
        f"{count} constants, {len(problems)} wrong; of their elements {subnormal} subnormal, {vanished} rounded to 0",
        "both graphs",
        "that rounding them to FP16 costs nothing; the check of the error measures that",
        tuple(problems),
    )


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Certificate)


CHECKS = ("agreement", "constants", "bounds", "error")

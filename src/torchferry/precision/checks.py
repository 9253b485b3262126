"""The checks of a certificate that run both graphs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.core.files import require_file
from torchferry.precision.agreement import compare_nodes
from torchferry.precision.certificate import (
    CERTIFICATE_FILE,
    Certificate,
    Check,
    Evidence,
    check_constants,
    load_evidence,
)
from torchferry.precision.emulate import Emulation
from torchferry.precision.emulate_report import Errors
from torchferry.precision.instrument import instrument
from torchferry.precision.prepare import MASK_FROM
from torchferry.precision.rounding import FP16_MAX
from torchferry.precision.running import Runner

if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from torchferry.graph import Exported
    from torchferry.precision.ranges import Feeds
    from torchferry.precision.rounding import Rounding

ERROR_RATIO = 1.5
"""The emulated error may be this many times the least that FP16's eleven bits allow."""
_SHOWN = 8
_TRIFLE = 2.0**-12  # relative errors below half a step of FP16 are no errors


def certify(folder: str | PathLike[str]) -> Certificate:
    """Check a saved certificate again, from its files alone.

    Nothing of its verdict is believed: the scales that it lists are applied to the original graph and compared with
    the repaired one, constants are derived again, bounds and errors measured again.

    Args:
        folder: What ``Certificate.save`` wrote.

    Returns:
        The certificate with the checks as they come out now; ``passed`` tells.

    Raises:
        MissingFileError: If a file is not there.
        FormatError: If one cannot be read.
    """
    folder = Path(folder)
    path = require_file(folder / CERTIFICATE_FILE, "certificate")
    return with_checks(Certificate.from_json(path.read_bytes()), load_evidence(folder))


def with_checks(certificate: Certificate, evidence: Evidence) -> Certificate:
    """Make the four checks, and return the certificate with them."""
    with Emulation(evidence.fixed, "acc32") as acc32, Emulation(evidence.fixed, "strict") as strict:
        checks = (
            check_agreement(certificate, evidence),
            check_constants(certificate, evidence),
            check_bounds(certificate, evidence, strict),
            check_error(certificate, evidence, (acc32, strict)),
        )
    return dataclasses.replace(certificate, checks=checks, evidence=evidence)


def check_agreement(certificate: Certificate, evidence: Evidence) -> Check:
    """Check that every node of the repaired graph does what the user's does, shifted, bit for bit."""
    masks = [name for name, record in certificate.constants.items() if record.is_mask]
    found = compare_nodes(
        evidence.original,
        evidence.fixed,
        certificate.scales,
        certificate.constants,
        certificate.raised,
        masks,
        evidence.calibration,
    )
    problems = [f"'{name}' differs by {gap:.3g} of its largest value" for name, gap in found.different.items()]
    problems += [f"output '{name}' was compared with nothing" for name in found.missing]
    excused = f", {len(found.excused)} within 2**-20 where the operator's own rounding differs" if found.excused else ""
    skipped = f", {len(found.skipped)} nodes with bodies not compared" if found.skipped else ""
    passed_over = (
        f", {len(found.passed_over)} between a mask and its softmax compared there" if found.passed_over else ""
    )
    return Check(
        "agreement",
        not problems,
        f"{found.compared - len(found.different)} of {found.compared} tensors agree bit for bit in FP32, each given "
        f"what it is computed from{excused}{passed_over}{skipped}",
        _data(evidence.calibration, "calibration"),
        "anything of operators or branches that this data does not reach",
        tuple(problems[:_SHOWN]),
    )


def check_bounds(certificate: Certificate, evidence: Evidence, emulation: Emulation) -> Check:
    """Check that nothing leaves the range: tensors, what norms and means have inside, and sums in whatever order.

    Args:
        certificate: What was done.
        evidence: To what.
        emulation: Of the repaired graph, in strict mode.
    """
    factor = 2.0**certificate.headroom_bits
    problems: list[str] = []
    emulation.forget()
    for feeds in evidence.calibration:
        emulation.run(dict(feeds))
    problems += [str(bad) for bad in emulation.bad]
    sums = [f"sums of '{a.name}' may reach {a.bound:.6g}" for a in emulation.accumulators]
    name, largest = max(emulation.magnitudes().items(), key=lambda item: item[1], default=("", 0.0))
    emulation.forget()
    for feeds in evidence.calibration:
        emulation.run(enlarged(feeds, factor))
    problems += [f"at {factor:g} times the input, {bad}" for bad in emulation.bad]
    beyond = len(emulation.accumulators)
    _, most = max(emulation.magnitudes().items(), key=lambda item: item[1], default=("", 0.0))
    bits = math.log2(FP16_MAX / largest) if 0 < largest < math.inf else 0.0
    return Check(
        "bounds",
        not problems and not sums,
        f"at most {largest:.6g} ('{name}', {bits:.1f} bits of room), and {most:.6g} at {factor:g} times the input; "
        f"sums in the worst order stay below 65504 on the data, {beyond} may pass it at {factor:g} times",
        _data(evidence.calibration, "calibration"),
        f"inputs that are larger than {factor:g} times these, or of another kind; masks were left as they are",
        tuple((problems + sums)[:_SHOWN]),
    )


def check_error(certificate: Certificate, evidence: Evidence, emulations: Sequence[Emulation]) -> Check:
    """Check that FP16's rounding costs about the least it can, on data that was not solved on.

    Args:
        certificate: What was done.
        evidence: To what.
        emulations: Of the repaired graph, one for each mode.
    """
    found: dict[str, float] = {}
    problems: list[str] = []
    exact = _runner(evidence.original, None, opened=False)
    wanted = [exact.run(feeds)[0] for feeds in evidence.held_out]
    for emulation in emulations:
        errors, mode = Errors(), emulation.mode
        ideals = _ideals(evidence, opened=mode == "strict")
        emulation.forget()
        for feeds, want, ideal in zip(evidence.held_out, wanted, ideals, strict=True):
            errors.add(want, emulation.run(dict(feeds)), ideal)
        problems += [f"{mode}: {bad}" for bad in emulation.bad]
        for name, error in errors.by_output().items():
            ratio = error.relative / max(error.ideal, _TRIFLE)
            found[mode] = max(found.get(mode, 0.0), ratio)
            if not (ratio <= ERROR_RATIO and math.isfinite(error.ideal)):
                problems.append(
                    f"{mode}: '{name}' is off by {error.relative:.3g}, {ratio:.3g} x the ideal {error.ideal:.3g}"
                )
    return Check(
        "error",
        not problems,
        ", ".join(f"{mode} {ratio:.2f} x ideal" for mode, ratio in found.items()) or "no float output",
        f"{_data(evidence.held_out, 'held-out')}: {certificate.held_out}",
        f"an error below FP16's own: ideal is the same tensors in 11 bits with any exponent, and {ERROR_RATIO:g} times "
        "that is allowed",
        tuple(problems[:_SHOWN]),
    )


def _ideals(evidence: Evidence, *, opened: bool) -> list[dict[str, Any]]:
    """Return for each held-out call the outputs in 11 bits with any exponent."""
    ideal = _runner(evidence.original, "ideal", opened=opened)
    outputs = [ideal.run(_float32(feeds))[0] for feeds in evidence.held_out]
    if all(np.isfinite(array).all() for each in outputs for array in each.values() if array.dtype.kind == "f"):
        return outputs
    # Where the original holds numbers beyond 11 bits of FP32's own range, the repaired graph gives the ideal.
    ideal = _runner(evidence.fixed, "ideal", opened=opened)
    return [ideal.run(_float32(feeds))[0] for feeds in evidence.held_out]


def _runner(graph: Exported, rounding: Rounding | None, *, opened: bool) -> Runner:
    return Runner(instrument(graph, rounding, opened=opened, watched=False), graph.signature.output_names)


def _float32(feeds: Feeds) -> dict[str, Any]:
    """Return a call's arrays as an instrumented graph takes them."""
    return {k: v.astype(np.float32) if v.dtype == np.float16 else v for k, v in feeds.items()}


def enlarged(feeds: Feeds, factor: float) -> dict[str, Any]:
    """Multiply what is float among a call's arrays, but for masks: zeros and ones, or what hides scores."""
    return {
        name: array if array.dtype.kind != "f" or _is_mask(array) else array * np.float32(factor)
        for name, array in feeds.items()
    }


def _is_mask(array: Any) -> bool:
    return bool(np.isin(array, (0, 1)).all() or (array <= MASK_FROM).any())


def _data(calls: Sequence[Feeds], kind: str) -> str:
    return f"{len(calls)} {kind} call" + ("s" if len(calls) != 1 else "")

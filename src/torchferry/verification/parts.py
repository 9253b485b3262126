"""Every part against what the whole gives at its boundaries, and these against PyTorch."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from torchferry import backends
from torchferry.core.compare import TOLERANCES, Comparison, Criterion, Tolerance, compare, usual_tolerance
from torchferry.core.engine import platform_versions
from torchferry.core.errors import BackendError, InputError, TorchferryError
from torchferry.core.files import new_files, new_folder
from torchferry.core.report import Finding, Report
from torchferry.core.samples import SampleWriter
from torchferry.exporter.capture import evaluation_mode
from torchferry.exporter.inputs import as_calls, to_numpy
from torchferry.exporter.source import Source
from torchferry.partitioning import join, split, with_boundaries
from torchferry.partitioning.running import check_inputs, check_part_names
from torchferry.verification.boundaries import TorchBoundaries

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from os import PathLike

    from torchferry.core.engine import Array, Availability, Engine, Session
    from torchferry.exporter.inputs import Call
    from torchferry.graph import Exported
    from torchferry.partitioning import Partition, PartitionPlan

    Arrays = dict[str, Array]

_EXACT = Tolerance(atol=0.0, rtol=0.0)
_HINTS = {
    "part-not-run": "verify the parts again where that engine is",
    "part-differs": "if this much is expected, give a tolerance; else look for the operator at fault in this part",
    "boundary-differs": "the graph is not the model here: cut elsewhere, or at a mark, which no optimisation moves",
}


def verify_parts(
    engines: Mapping[str, Engine],
    plan: PartitionPlan,
    inputs: Any = None,
    *,
    source: torch.nn.Module | Source | None = None,
    tolerance: Criterion | None = None,
) -> Report:
    """Run every part of a cut on its own engine and compare it with what the whole gives there.

    The whole runs once for each set of inputs, as it is, with every tensor at a cut as an output. Each part then gets
    what was recorded at its start, and has to give what was recorded at its end. So a part is at fault for nothing but
    itself, and the report names it. Besides:

    - Parts that make up the whole are joined again, and the joined graph has to give exactly what the whole gives; an
      engine that optimises even then is held to the tolerance of fp32.
    - With ``source``, tensors at marks and at modules that selectors name, and the model's outputs, are compared with
      what PyTorch has there.

    Args:
        engines: For every part's name its engine, as ``compile_parts`` gives them.
        plan: The cut, from ``plan_partition``.
        inputs: One tuple or dict of tensors or arrays for the whole, or an iterable of them; may be left out for a
            ``Source``.
        source: The module that was exported, or its ``Source``.
        tolerance: What is asked of every part; by default ``core.compare.TOLERANCES`` of its engine's precision.

    Returns:
        A report with a comparison named ``part/output`` for every output of a part and every set of inputs. What
        differs is a finding of severity error that names the part.

    Raises:
        ConfigError: If a part has no engine, an engine belongs to no part, or one is int8 and no tolerance is given.
        InputError: If the inputs do not fit the whole.
        BackendError: If no engine here runs the whole, or one cannot be loaded.
    """
    check_part_names(engines, plan.parts, "engine")
    calls = _calls(inputs) if inputs is not None or not isinstance(source, Source) else [source.call]
    if source is not None and not isinstance(source, Source):
        args, kwargs = _as_tensors(calls[0])
        source = Source(source, args, kwargs, input_names=plan.whole.signature.input_names)
    cases = _cases(plan, calls, source)
    tolerances = {name: tolerance or usual_tolerance(engine.target.precision) for name, engine in engines.items()}
    checks = _Checks(plan, tolerances, tolerance or TOLERANCES["fp32"])
    with ExitStack() as stack:
        recorder = stack.enter_context(_loaded(with_boundaries(plan)))
        joined = stack.enter_context(_joined(plan)) if plan.is_whole else None
        running = [name for name, engine in engines.items() if _availability(engine).can_run]
        sessions = {name: stack.enter_context(engines[name].open()) for name in running}
        for part in plan.parts:
            if part.name not in sessions:
                checks.not_run(part, engines[part.name])
        torch_side = None
        if source is not None:
            stack.enter_context(evaluation_mode(source.model))
            torch_side = TorchBoundaries(plan, source)
        for case in cases:
            recorded = _recorded(plan, recorder, case.feeds)
            for part in plan.parts:
                if part.name in sessions:
                    checks.part(part, engines[part.name], sessions[part.name], recorded, case.label)
            if joined is not None:
                checks.joined(joined(case.feeds), case.label)
            if torch_side is not None and case.tensors is not None:
                checks.torch(torch_side, case.tensors, recorded, case.label)
    named = {part.name: f"{engines[part.name].target}, {tolerances[part.name]}" for part in plan.parts}
    whole = "compared with the whole" if plan.is_whole else "not compared: these parts are not the whole"
    report = Report("verification of parts", tuple(checks.findings), tuple(checks.comparisons))
    versions = {name: version for engine in engines.values() for name, version in engine.versions.items()}
    report = report.with_facts("parts", {**named, "joined again": whole})
    if checks.left_out:
        report = report.with_facts("not compared with PyTorch", checks.left_out)
    return report.with_facts("environment", {"torch": torch.__version__, **platform_versions(), **versions})


def record_calibration(plan: PartitionPlan, inputs: Any, out: str | PathLike[str]) -> dict[str, Path]:
    """Write what goes into every part when the whole runs on real data, for calibrating or testing the parts.

    There is one file ``PART.npz`` for each part, with the keys ``0/NAME``, ``1/NAME`` and so on: the number of the set
    of inputs, and the input's name. ``--input PART.npz`` reads it on the command line, ``read_samples`` in Python.

    Args:
        plan: The cut, from ``plan_partition``.
        inputs: As for ``verify_parts``.
        out: The folder; made if it is not there. Files of these names are replaced.

    Returns:
        For every part's name its file.

    Raises:
        InputError: If the inputs do not fit the whole.
        BackendError: If no engine here runs the whole.
        FormatError: If a tensor is of a dtype that the file cannot hold.
        OutputError: If the files cannot be written; then none is.
    """
    folder = Path(out)
    cases = _cases(plan, _calls(inputs), None)
    with (
        new_files(folder) if folder.is_dir() else new_folder(folder, marker="") as partial,
        ExitStack() as stack,
    ):
        recorder = stack.enter_context(_loaded(with_boundaries(plan)))
        writers = {p.name: stack.enter_context(SampleWriter(partial / f"{p.name}.npz")) for p in plan.parts}
        for case in cases:
            recorded = _recorded(plan, recorder, case.feeds)
            for part in plan.parts:
                writers[part.name].add({name: recorded[name] for name in part.inputs})
    return {part.name: folder / f"{part.name}.npz" for part in plan.parts}


def _availability(engine: Engine) -> Availability:
    return backends.get(engine.target.backend).availability()


@dataclass(frozen=True)
class _Case:
    """One set of inputs.

    Attributes:
        label: What the report calls it.
        feeds: Arrays for the whole's inputs.
        tensors: The same for PyTorch, if there is a ``Source``.
    """

    label: str
    feeds: Arrays
    tensors: dict[str, torch.Tensor] | None


class _Checks:
    """Compares, and collects what that shows, and in ``left_out`` why something was not compared."""

    def __init__(self, plan: PartitionPlan, tolerances: Mapping[str, Criterion], of_graph: Criterion) -> None:
        self._plan = plan
        self._tolerances = tolerances
        self._of_graph = of_graph
        self.comparisons: list[Comparison] = []
        self.findings: list[Finding] = []
        self.left_out: dict[str, str] = {}

    def part(self, part: Partition, engine: Engine, session: Session, recorded: Arrays, label: str) -> None:
        """Run a part on what was recorded at its start."""
        try:
            given = session.run({name: recorded[name] for name in part.inputs})
        except TorchferryError as exc:
            self._find("part-fails", "error", f"part '{part.name}' fails on {engine.target}: {exc.message}", label)
            return
        for name, array in given.items():
            comparison = compare(
                recorded[name], array, self._tolerances[part.name], name=f"{part.name}/{name}", case=label
            )
            self.comparisons.append(comparison)
            if not comparison.passed:
                what = f"part '{part.name}' differs on {engine.target}: output '{name}': {comparison.reason}"
                self._find("part-differs", "error", what, label)

    def not_run(self, part: Partition, engine: Engine) -> None:
        """Note a part whose engine runs on other machines only."""
        reason = _availability(engine).reason
        self._find("part-not-run", "warning", f"part '{part.name}' was not run on {engine.target}: {reason}", None)

    def joined(self, pair: tuple[Arrays, Arrays], label: str) -> None:
        """Compare what the whole and the joined parts gave."""
        for name, want in pair[0].items():
            exact = compare(want, pair[1][name], _EXACT, name=f"joined/{name}", case=label)
            close = exact if exact.passed else compare(want, pair[1][name], self._of_graph, name=exact.name, case=label)
            self.comparisons.append(close)
            if not close.passed:
                what = f"the parts joined again differ from the whole: output '{name}': {close.reason}"
                self._find("joined-differs", "error", what, label)
            elif not exact.passed:
                what = f"the parts joined again are near the whole, but not equal: output '{name}': {exact.reason}"
                self._find("joined-not-equal", "info", what, label)

    def torch(
        self, boundaries: TorchBoundaries, tensors: Mapping[str, torch.Tensor], recorded: Arrays, label: str
    ) -> None:
        """Compare what was recorded with what PyTorch has at the same place."""
        for name, places in boundaries.run(tensors).items():
            got = recorded[name]
            for place in places:
                at = f"{name} at {place.where}"
                compared = [
                    compare(want, got, self._of_graph, name=at, case=label)
                    for want in place.arrays
                    if place.is_certain or (want.shape, want.dtype) == (got.shape, got.dtype)
                ]
                if not compared:
                    self.left_out[at] = place.reason
                    continue
                nearest = min(compared, key=lambda comparison: comparison.mismatched)
                self.comparisons.append(nearest)
                if not nearest.passed:
                    what = f"'{name}' is not what PyTorch has at {place.where}: {nearest.reason}"
                    self._find("boundary-differs", "error", what, label)

    def _find(self, code: str, severity: Any, message: str, label: str | None) -> None:
        self.findings.append(Finding(code, severity, message, where=label, hint=_HINTS.get(code)))


def _calls(inputs: Any) -> list[Call]:
    calls = as_calls((inputs,) if isinstance(inputs, np.ndarray) else inputs) if inputs is not None else []
    if not calls:
        raise InputError("there are no inputs to run", hint="give one tuple of tensors, or an iterable of them")
    return calls


def _cases(plan: PartitionPlan, calls: Sequence[Call], source: Source | None) -> list[_Case]:
    """Return every set of inputs by the names of the whole."""
    cases = []
    for number, call in enumerate(calls, 1):
        tensors = None if source is None else source.names.tensors(_as_tensors(call))
        feeds = _feeds(plan, call) if tensors is None else {n: to_numpy(tensor) for n, tensor in tensors.items()}
        check_inputs(feeds, plan.whole.signature.input_names, ())
        cases.append(_Case("data" if len(calls) == 1 else f"data {number}", feeds, tensors))
    return cases


def _as_tensors(call: Call) -> Call:
    args, kwargs = pytree.tree_map_only(np.ndarray, torch.tensor, call)
    return args, kwargs


def _feeds(plan: PartitionPlan, call: Call) -> Arrays:
    """Return the arrays of a call that is for the graph: its positional tensors are the graph's inputs in order."""
    names = plan.whole.signature.input_names
    leaves = [leaf for leaf in pytree.tree_leaves(call[0]) if isinstance(leaf, torch.Tensor | np.ndarray)]
    if len(leaves) > len(names):
        raise InputError(f"{len(leaves)} arrays were given for the {len(names)} inputs {', '.join(names)}")
    given = {**dict(zip(names, leaves, strict=False)), **call[1]}
    return {name: to_numpy(value) if isinstance(value, torch.Tensor) else value for name, value in given.items()}


@contextmanager
def _loaded(graph: Exported) -> Iterator[Session]:
    """Load a graph as it is, without optimisation where the engine can do that, on the first engine that takes it.

    Raises:
        BackendError: If there is none.
    """
    reasons = []
    for name in backends.names():
        backend = backends.get(name)
        available = backend.availability()
        if not available.ok:
            reasons.append(available.reason)
            continue
        with tempfile.TemporaryDirectory(prefix="torchferry-") as folder:
            try:
                session = backend.trial(graph, Path(folder))
            except BackendError as exc:
                reasons.append(exc.message)
                continue
            with session:
                yield session
            return
    raise BackendError(f"no engine here runs the whole graph: {'; '.join(reasons)}")


@contextmanager
def _joined(plan: PartitionPlan) -> Iterator[Callable[[Arrays], tuple[Arrays, Arrays]]]:
    """Give what runs the whole and its parts joined again, and returns the outputs of both."""
    names: Sequence[str] = list(plan.results)
    with _loaded(plan.whole) as whole, _loaded(join(split(plan))) as again:

        def run(feeds: Arrays) -> tuple[Arrays, Arrays]:
            expected = whole.run(feeds)
            actual = again.run({name: feeds[name] for name in again.signature.input_names})
            return {name: expected[plan.results[name]] for name in names}, actual

        yield run


def _recorded(plan: PartitionPlan, recorder: Session, feeds: Arrays) -> Arrays:
    """Return every tensor at a cut, by the name by which the parts know it."""
    at_cuts = [value for part in plan.parts for value in (*part.region.inputs, *part.region.outputs)]
    weights = {plan.flow.name(v): v.const_value.numpy() for v in at_cuts if v.const_value is not None}
    return {**weights, **feeds, **recorder.run(feeds)}

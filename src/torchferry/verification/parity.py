"""PyTorch against the engine, on the user's data and at other sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.core.compare import Comparison, Criterion, compare, usual_tolerance
from torchferry.core.engine import platform_versions
from torchferry.core.errors import TorchferryError
from torchferry.core.report import Finding, Report
from torchferry.exporter.capture import evaluation_mode
from torchferry.exporter.inputs import as_calls, to_numpy
from torchferry.exporter.source import Source
from torchferry.verification.pictures import picture_rows
from torchferry.verification.sizes import first_line, resized, run_torch, sizes_to_try

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torchferry.core.engine import Array, Engine, Session

    Case = tuple[str, dict[str, torch.Tensor]]


def verify(
    engine: Engine,
    model: torch.nn.Module | Source,
    inputs: Any = None,
    *,
    tolerance: Criterion | None = None,
    sizes: Iterable[dict[str, int]] | None = None,
) -> Report:
    """Run the module and the engine on the same inputs and compare every output.

    Args:
        engine: What ``compile`` gave.
        model: The module that was exported, or its ``Source``.
        inputs: One tuple or dict of tensors, or an iterable of them; may be left out for a ``Source``.
        tolerance: What is asked, a ``Tolerance`` or a ``Budget``; by default ``core.compare.TOLERANCES`` of the
            target's precision. int8 has none there, so that it must be given.
        sizes: Sizes of the dynamic dimensions to run besides the data's own; chosen from the ranges if None.

    Returns:
        A report with a comparison for every output and case. A difference is a finding of severity error;
        ``raise_for_failure()`` turns it into an exception.

    Raises:
        ConfigError: If the target is int8 and no tolerance is given.
        ModelError: If ``model`` is not a module.
        InputError: If the inputs do not fit the model.
        BackendError: If the engine cannot be loaded.
    """
    tolerance = tolerance or usual_tolerance(engine.target.precision)
    source, calls = _source_and_calls(engine, model, inputs)
    data = [source.names.tensors(call) for call in calls]
    runner = _Runner(source, engine, tolerance)
    with engine.open() as session, evaluation_mode(source.model):
        for label, tensors in _cases(engine, data, sizes):
            runner.run(session, label, tensors)
    report = Report(
        f"verification of {type(source.model).__name__} on {engine.target}",
        tuple(runner.findings),
        tuple(runner.comparisons),
        pictures=tuple(runner.pictures),
    )
    dims = {
        dim: f"{allowed} (data: {_own_sizes(engine, data[0])[dim]})" for dim, allowed in engine.signature.dims.items()
    }
    report = report.with_facts("tolerance", {"every output": tolerance})
    if dims:
        report = report.with_facts("dynamic dimensions", dims)
    return report.with_facts("environment", {"torch": torch.__version__, **platform_versions(), **engine.versions})


def _source_and_calls(engine: Engine, model: torch.nn.Module | Source, inputs: Any) -> tuple[Source, list[Any]]:
    calls = as_calls(inputs) if inputs is not None else []
    if isinstance(model, Source):
        return model, calls or [model.call]
    if not calls:
        raise TorchferryError("verify needs inputs to run", hint="give one tuple of tensors, or an iterable of them")
    args, kwargs = calls[0]
    return Source(model, args, kwargs, input_names=engine.signature.input_names), calls


def _own_sizes(engine: Engine, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return engine.signature.sizes_of({name: to_numpy(tensor) for name, tensor in tensors.items()})


def _cases(
    engine: Engine, data: list[dict[str, torch.Tensor]], sizes: Iterable[dict[str, int]] | None
) -> Iterator[Case]:
    for number, tensors in enumerate(data, 1):
        yield ("data" if len(data) == 1 else f"data {number}"), tensors
    own = _own_sizes(engine, data[0])
    chosen = sizes_to_try(engine.signature, own) if sizes is None else sizes
    for other in chosen:
        full = {**own, **other}
        label = ", ".join(f"{dim}={size}" for dim, size in full.items() if size != own[dim])
        yield label or "data", resized(data[0], engine.signature, full)


def _is_empty(feeds: dict[str, Array]) -> bool:
    return any(array.size == 0 for array in feeds.values())


class _Runner:
    """Runs cases and collects what they show."""

    def __init__(self, source: Source, engine: Engine, tolerance: Criterion) -> None:
        self.source = source
        self.engine = engine
        self.tolerance = tolerance
        self.comparisons: list[Comparison] = []
        self.findings: list[Finding] = []
        self.pictures: list[Any] = []

    def run(self, session: Session, label: str, tensors: dict[str, torch.Tensor]) -> None:
        feeds = {name: to_numpy(tensor) for name, tensor in tensors.items()}
        try:
            expected: list[Array] | None = [to_numpy(t) for t in run_torch(self.source, tensors)]
        except Exception as exc:  # noqa: BLE001 - whatever the user's forward raises at this size
            expected, refusal = None, first_line(exc)
        try:
            actual = session.run(feeds)
        except TorchferryError as exc:
            if expected is not None and _is_empty(feeds) and not label.startswith("data"):
                # A refusal, not a wrong number; engines differ in what they take of nothing at all.
                self._find("engine-refuses-empty", "warning", f"the engine refuses empty inputs: {exc.message}", label)
            elif expected is not None:
                self._find("engine-fails", "error", f"the engine fails where PyTorch does not: {exc.message}", label)
            else:
                self._find("both-refuse", "info", f"PyTorch and the engine both refuse it: {refusal}", label)
            return
        if expected is None:
            self._find("only-pytorch-refuses", "warning", f"PyTorch refuses it, the engine answers: {refusal}", label)
            return
        self._compare(label, feeds, expected, actual)

    def _compare(self, label: str, feeds: dict[str, Array], expected: list[Array], actual: dict[str, Array]) -> None:
        if len(expected) != len(actual):
            self._find(
                "output-count", "error", f"PyTorch gives {len(expected)} outputs, the engine {len(actual)}", label
            )
            return
        for (name, got), want in zip(actual.items(), expected, strict=True):
            comparison = compare(want, got, self.tolerance, name=name, case=label)
            self.comparisons.append(comparison)
            if not comparison.passed:
                self._find("output-differs", "error", f"output '{name}' differs: {comparison.reason}", label)
        if label.startswith("data"):
            self.pictures += picture_rows(label, feeds, dict(zip(actual, expected, strict=True)), actual)

    def _find(self, code: str, severity: Any, message: str, label: str) -> None:
        hints = {"output-differs": "if this much is expected, give a tolerance; else look for the operator at fault"}
        self.findings.append(Finding(code, severity, message, where=label, hint=hints.get(code)))

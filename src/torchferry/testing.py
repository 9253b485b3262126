"""L5: the test that every author of an operator, a symbolic or a rewriter needs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from torchferry.backends import check_target, compile, get, names
from torchferry.core.compare import TOLERANCES, Comparison, Tolerance, compare, usual_tolerance
from torchferry.core.errors import (
    BackendError,
    ConfigError,
    InputError,
    MissingBackendError,
    ModelError,
    TorchferryError,
)
from torchferry.core.report import Finding, Report
from torchferry.core.target import Target
from torchferry.exporter import Source
from torchferry.exporter.capture import evaluation_mode
from torchferry.exporter.custom_op import CustomOp
from torchferry.exporter.inputs import Call, as_call, to_numpy
from torchferry.pipeline.export import export
from torchferry.verification.sizes import first_line, run_torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torchferry.core.engine import Array
    from torchferry.core.target import Precision

__all__ = ["assert_op"]

_PRECISIONS: dict[str, Precision] = {"float16": "fp16", "bfloat16": "bf16"}  # every other dtype is held to fp32
_SPECIAL = (0, 1)  # torch.export treats these sizes as special cases


def assert_op(
    fn: Callable[..., Any],
    inputs: Any,
    backends: str | Target | Iterable[str | Target] | None = None,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    dynamic: bool = True,
    dynamic_shapes: Any = None,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
    **export_options: Any,
) -> Report:
    """Assert that an operator gives on every engine what it gives in PyTorch.

    Cases that differ in sizes alone share a graph, exported at one of them and run at all: that tests sizes which were
    never exported. Cases that differ in a rank, a dtype, a number or their structure have graphs of their own.

    Args:
        fn: A function of tensors, a ``torch.nn.Module``, the ``apply`` of a ``torch.autograd.Function``, or what
            ``custom_op`` gave, which ``torch.library.opcheck`` looks at too.
        inputs: A case, or a list of cases. A case is a tuple of positional arguments or a dict of keyword arguments. A
            tuple of ints among them, also inside a list or dict, is a shape and becomes a random tensor; all else is
            handed over as it is, so give sizes and axes that ``fn`` wants as ints in a list.
        backends: Names or targets; every backend that is installed and takes any graph if None.
        dtypes: Run every case in each of these: random tensors have the dtype; if it is a floating-point dtype, the
            floating-point tensors of a case and of a module are converted to it. If None, random tensors are float32
            and nothing is converted.
        dynamic: Make dynamic every axis whose size differs between cases. False exports each case on its own, and so
            does an engine that has no dynamic shapes.
        dynamic_shapes: The dynamic axes, as ``ferry.export`` takes them, in place of those that differ.
        rtol: Relative tolerance. By default ``core.compare.TOLERANCES`` of the target's precision or of the output's
            dtype, whichever is larger.
        atol: Absolute tolerance, likewise.
        seed: Of the random tensors. Each case starts from it, so that a case has the same values when it is alone.
            Floats are standard normal, integers lie in -9..9, or in 0..9 if unsigned.
        **export_options: What else ``ferry.export`` takes, such as ``cfg`` or ``function_rewriter``.

    Returns:
        A report with a comparison for every output of every case on every target, and a finding ``backend-skipped``
        for every backend that is not installed.

    Raises:
        AssertionError: If an output differs in values, shape or dtype, an engine refuses a case, or the report of the
            export has an error. The message holds case, element, both values, largest errors, tolerance and seed.
        ModelError: If PyTorch itself refuses a case.
        ExportError: If the operator cannot be exported; names its line.
        FrozenDimensionError: If the operator fixes an axis that differs between cases; names the line.
        MissingBackendError: If a backend that was named is not installed, or none is.
        BackendError: If an engine refuses the graph.
        ConfigError: If there is nothing to compare.
    """
    targets, findings = _targets(backends)
    cases = inputs if isinstance(inputs, list) else [inputs]
    batches = [_cases(fn, cases, dtype, seed) for dtype in (dtypes if dtypes is not None else [None])]
    comparisons: list[Comparison] = []
    for target, batch in itertools.product(targets, batches):
        for group in _groups(batch, dynamic and get(target.backend).capabilities().dynamic_shapes):
            try:
                compared, found = _run(group, target, dynamic_shapes, (rtol, atol), export_options)
            except TorchferryError as exc:
                exc.add_note(f"while testing {_name(fn)} on {target} at {group[0].label}, seed {seed}")
                raise
            comparisons += compared
            findings += found
    report = Report(f"test of {_name(fn)}", tuple(dict.fromkeys(findings)), tuple(comparisons))
    if not report.passed:
        raise AssertionError(_failure(report, seed))
    if not comparisons:
        raise ConfigError(
            f"the {report.title} compares nothing",
            hint="give a case, a backend and a dtype at least, and let the operator return a tensor",
        )
    return report


@dataclass(frozen=True, eq=False)
class _Case:
    """A call of the operator: its tensors by name, and what PyTorch returns for them."""

    label: str
    source: Source
    tensors: dict[str, torch.Tensor]
    expected: tuple[Array, ...]


def _targets(backends: str | Target | Iterable[str | Target] | None) -> tuple[list[Target], list[Finding]]:
    if backends is not None:
        asked = [backends] if isinstance(backends, str | Target) else backends
        targets = [target if isinstance(target, Target) else Target(target) for target in asked]
        for target in targets:
            check_target(target)
        return targets, []
    targets, skipped = [], []
    for target in map(Target, names()):
        try:
            check_target(target)
        except BackendError as exc:
            skipped.append(Finding("backend-skipped", "info", f"nothing was run on {target}: {exc.message}"))
            continue
        if get(target.backend).capabilities().general:
            targets.append(target)
        else:
            reason = "it takes some graphs only, so it has to be named"
            skipped.append(Finding("backend-skipped", "info", f"nothing was run on {target}: {reason}"))
    if not targets:
        raise MissingBackendError("no engine is installed to test on", hint="pip install 'torchferry[all]'")
    return targets, skipped


def _name(fn: Any) -> str:
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return owner.__name__
    return getattr(fn, "__name__", type(fn).__name__)


def _module(fn: Any, dtype: torch.dtype | None) -> torch.nn.Module:
    """Return the operator as a module whose ``forward`` has the operator's parameters, as far as they are known."""
    if isinstance(fn, torch.nn.Module):
        return copy.deepcopy(fn).to(dtype) if dtype is not None and dtype.is_floating_point else fn
    if not callable(fn) or isinstance(fn, type):
        raise ModelError(
            f"an operator must be a function or a torch.nn.Module, got {fn!r}",
            hint="make an instance of a module's class; give the apply of an autograd.Function",
        )

    try:
        signature = inspect.signature(fn)
    except ValueError:  # a function in C, whose keywords are not known
        signature = inspect.Signature([inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)])

    def forward(*inputs: Any, **keywords: Any) -> Any:
        return fn(*inputs, **keywords)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    module: torch.nn.Module = type(_name(fn), (torch.nn.Module,), {"forward": staticmethod(forward)})()
    return module


def _cases(fn: Any, cases: Sequence[Any], dtype: torch.dtype | None, seed: int) -> list[_Case]:
    model = _module(fn, dtype)
    result = []
    for number, case in enumerate(cases, 1):
        args, kwargs = _filled(case, dtype, seed)
        leaves = pytree.tree_leaves((args, kwargs))
        label = f"case {number} ({', '.join(map(_shown, leaves))})"
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise InputError(
                f"{label} of {_name(fn)} has no tensor",
                hint="a case is a tuple of arguments, and a shape one of them: ((2, 3),)",
            )
        source = Source(model, args, kwargs)
        tensors = source.names.tensors(source.call)
        try:
            with evaluation_mode(model):
                expected = tuple(map(to_numpy, run_torch(source, tensors)))
        except Exception as exc:
            raise ModelError(f"{_name(fn)} fails in PyTorch at {label}: {first_line(exc)}") from exc
        if isinstance(fn, CustomOp):
            _check_with_torch(fn, source.call, label)
        result.append(_Case(label, source, tensors, expected))
    return result


def _check_with_torch(op: CustomOp, call: Call, label: str) -> None:
    try:
        op.opcheck(*call[0], **call[1])
    except Exception as exc:
        raise AssertionError(f"torch.library.opcheck refuses '{op.name}' at {label}: {first_line(exc)}") from exc


def _shown(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"{leaf.dtype}{list(leaf.shape)}".removeprefix("torch.")
    return repr(leaf)


def _filled(case: Any, dtype: torch.dtype | None, seed: int) -> Call:
    """Return a case's arguments with random tensors in place of shapes, and its tensors converted."""
    generator = torch.Generator().manual_seed(seed)
    wanted = dtype if dtype is not None and dtype.is_floating_point else None

    def fill(leaf: Any) -> Any:
        if _is_shape(leaf):
            return _random(leaf, dtype or torch.float32, generator)
        if wanted is not None and isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.to(wanted)
        return leaf

    args, kwargs = as_call(case)
    # As a list, the arguments themselves cannot be taken for a shape.
    filled_args, filled_kwargs = pytree.tree_map(fill, (list(args), kwargs), is_leaf=_is_shape)
    return tuple(filled_args), filled_kwargs


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(size) is int and size >= 0 for size in value)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        widest = torch.promote_types(dtype, torch.float64)  # every dtype gets the same values, rounded
        return torch.randn(shape, generator=generator, dtype=widest).to(dtype)
    low, high = (0, 2) if dtype is torch.bool else (-9 if dtype.is_signed else 0, 10)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def _groups(cases: list[_Case], dynamic: bool) -> list[list[_Case]]:
    """Put cases together that differ in sizes alone."""
    if not dynamic:
        return [[case] for case in cases]
    groups: dict[Any, list[_Case]] = {}
    for case in cases:
        leaves, structure = pytree.tree_flatten(case.source.call)
        kinds = [(x.dtype, x.ndim) if isinstance(x, torch.Tensor) else (type(x), repr(x)) for x in leaves]
        groups.setdefault((str(structure), *kinds), []).append(case)
    return list(groups.values())


def _differing(group: list[_Case]) -> dict[str, dict[int, Any]]:
    """Return as ``dynamic_shapes`` the axes whose sizes differ between cases."""
    shapes = {name: [case.tensors[name].shape for case in group] for name in group[0].tensors}
    return {
        name: {axis: Dim.AUTO for axis, sizes in enumerate(zip(*every, strict=True)) if len(set(sizes)) > 1}
        for name, every in shapes.items()
    }


def _run(
    group: list[_Case],
    target: Target,
    dynamic_shapes: Any,
    tolerance: tuple[float | None, float | None],
    export_options: dict[str, Any],
) -> tuple[list[Comparison], list[Finding]]:
    """Export a group at the case that has the fewest sizes of 0 and 1, and compare all its cases on the engine."""
    example = min(group, key=lambda case: sum(size in _SPECIAL for t in case.tensors.values() for size in t.shape))
    dynamic_shapes = _differing(group) if dynamic_shapes is None else dynamic_shapes
    exported = export(
        dataclasses.replace(example.source, dynamic_shapes=dynamic_shapes), target=target, **export_options
    )
    findings = [finding for finding in exported.report.findings if finding.severity != "info"]
    comparisons: list[Comparison] = []
    with tempfile.TemporaryDirectory(prefix="torchferry-") as folder:
        engine = compile(exported, target, Path(folder) / "engine")
        with engine.open() as session:
            for case in group:
                label = f"{target}, {case.label}"
                try:
                    outputs = session.run({name: to_numpy(tensor) for name, tensor in case.tensors.items()})
                except TorchferryError as exc:
                    said = f"the engine fails where PyTorch does not: {exc.message}"
                    said += f" ({exc.where})" if exc.where else ""
                    findings.append(Finding("engine-fails", "error", said, label))
                    continue
                if len(outputs) != len(case.expected):
                    said = f"PyTorch gives {len(case.expected)} outputs, the engine {len(outputs)}"
                    findings.append(Finding("output-count", "error", said, label))
                    continue
                comparisons += [
                    compare(want, got, _tolerance(target, want, *tolerance), name=f"output {place}", case=label)
                    for place, (want, got) in enumerate(zip(case.expected, outputs.values(), strict=True))
                ]
    return comparisons, findings


def _tolerance(target: Target, expected: Array, rtol: float | None, atol: float | None) -> Tolerance:
    own = TOLERANCES[_PRECISIONS.get(expected.dtype.name, "fp32")], usual_tolerance(target.precision)
    return Tolerance(
        atol=max(t.atol for t in own) if atol is None else atol, rtol=max(t.rtol for t in own) if rtol is None else rtol
    )


def _failure(report: Report, seed: int) -> str:
    lines = [
        f"{c.name} differs: {c.reason}; max abs {c.max_abs:.3g}, max rel {c.max_rel:.3g}, "
        f"allowed {c.tolerance}\n    at {c.case}"
        for c in report.comparisons
        if not c.passed
    ]
    lines += [str(finding) for finding in report.findings if finding.severity == "error"]
    return f"{report.title} failed with seed {seed}:\n  " + "\n  ".join(lines)

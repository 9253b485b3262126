"""The verb ``fix`` on a module: by its weights where these do, else by nodes between the calls that it makes."""

from __future__ import annotations

import ast
import copy
import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from torchferry.core.dimension import Dimension
from torchferry.core.errors import ModelError, TorchferryError
from torchferry.exporter.capture import evaluation_mode
from torchferry.exporter.inputs import as_calls, flatten_outputs, to_numpy
from torchferry.exporter.source import Source
from torchferry.graph.provenance import provenance
from torchferry.precision.certificate import Certificate, Evidence
from torchferry.precision.checks import with_checks
from torchferry.precision.modules.calls import keep_numbers_above_zero, with_calls
from torchferry.precision.modules.capture import Captured, capture_plainly
from torchferry.precision.modules.expansions import EXPANSIONS
from torchferry.precision.modules.numbers import find_arguments, find_epsilons, module_limits
from torchferry.precision.modules.weights import keep_epsilons_above_zero, write_epsilons, write_weights
from torchferry.precision.planning import Plan, certificate_of, plan, repair, split_data
from torchferry.precision.prepare import prepare
from torchferry.precision.scales import solve

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torchferry.exporter.dimensions import Dynamic
    from torchferry.exporter.inputs import Call
    from torchferry.precision.ranges import Feeds

_SAME = 1e-5  # relative; the repaired module in FP32 does the same sums, and differs only where eps was raised
_SIZES = 4
_NAMED = re.compile(r"L\['(\w+)'\]")  # how torch names an input in a condition
_REPAIR_GRAPH = "repair the exported graph: ferry.fp16.fix(ferry.export(model, args), calibration)"
_NO_KERNEL = "not implemented for 'Half'"


@dataclass(frozen=True)
class _Task:
    model: torch.nn.Module
    source: Source
    calls: list[Call]
    solved_on: Sequence[Feeds]
    held_out: Sequence[Feeds]
    how: str
    headroom_bits: int
    started: float

    def sizes(self) -> list[Call]:
        """Return a call of each set of sizes, at most four."""
        names = self.source.names
        by_shapes = {
            tuple(tensor.shape for tensor in names.tensors(call).values()): call for call in reversed(self.calls)
        }
        return list(by_shapes.values())[-_SIZES:]

    def free(self, *, batch: bool) -> Dynamic:
        """Return the sizes that differ among the calls, and with ``batch`` the first of every input."""
        names = self.source.names
        found: Dynamic = {}
        for name in names.names:
            shapes = [names.tensors(call)[name].shape for call in self.calls]
            axes = [a for a, sizes in enumerate(zip(*shapes, strict=False)) if len(set(sizes)) > 1 or (batch and not a)]
            found |= {name: {axis: Dimension(f"d{len(found)}_{axis}") for axis in axes}} if axes else {}
        return found

    def certified(self, captured: Captured, found: Plan) -> Certificate:
        repaired = repair(captured.exported, found)
        certificate = certificate_of(
            captured.exported.model.graph.name or "a module",
            found,
            repaired,
            self.headroom_bits,
            self.how,
            time.perf_counter() - self.started,
        )
        return with_checks(certificate, Evidence(captured.exported, repaired.exported, self.solved_on, self.held_out))


def fix_module(
    model: torch.nn.Module, calibration: Any, headroom_bits: int = 2, *, weights_only: bool = False
) -> tuple[torch.nn.Module, Certificate]:
    """Repair a module; see ``ferry.fp16.fix``.

    Args:
        model: The module; it is not changed.
        calibration: Inputs to measure on.
        headroom_bits: See ``ferry.fp16.fix``.
        weights_only: Refuse a module that its weights alone cannot repair.
    """
    calls = as_calls(calibration)
    if not calls:
        raise ModelError("fix needs data to solve the scales on", hint="give one tuple of tensors, or several")
    # The graph shares its constants with the module, and the user may go on with theirs, by half() for one.
    source = Source(copy.deepcopy(model), *calls[0])
    data = [{k: to_numpy(v) for k, v in source.names.tensors(call).items()} for call in calls]
    task = _Task(model, source, calls, *split_data(data), headroom_bits, time.perf_counter())
    with evaluation_mode(source.model):
        by_weights = _by_weights(task, weights_only)
        if by_weights is None:
            return _by_calls(task)
        if by_weights[1].passed or weights_only:
            return by_weights
        try:
            by_calls = _by_calls(task)
        except TorchferryError:  # what the weights' certificate says is the more telling answer
            return by_weights
        return by_calls if by_calls[1].passed else by_weights


_Fixed = tuple[torch.nn.Module, Certificate]


def _by_weights(task: _Task, weights_only: bool) -> _Fixed | None:
    """Write scales into the weights of a copy; None where they do not do."""
    captured = capture_plainly(task.source, task.free(batch=False))
    captured = replace(captured, parameters=captured.parameters & task.model.state_dict().keys())
    prepared = prepare(captured.exported, tied=captured.parameters)
    epsilons = find_epsilons(prepared, task.model)
    limits = module_limits(prepared, captured, epsilons, by_calls=False)
    found = plan(captured.exported, task.solved_on, task.headroom_bits, prepared, limits)
    if found.solution is None or prepared.masks.keys() - captured.parameters:  # numbers in its code stay as they are
        if weights_only:
            raise _needs_nodes(captured, found)
        return None
    fixed = copy.deepcopy(task.model)
    write_weights(fixed, captured.parameters, found)
    write_epsilons(fixed, epsilons, found)
    if not _gives_the_same(task, fixed):
        if weights_only:
            raise ModelError(
                "the repaired module does not give the same outputs: it uses its parameters in a way that its graph "
                "does not show",
                hint="ferry.fp16.fix(model, calibration) repairs the calls that it makes",
            )
        return None
    keep_epsilons_above_zero(fixed, epsilons)
    return fixed, task.certified(captured, found)


def _by_calls(task: _Task) -> _Fixed:
    """Make a module of the calls that the model makes, with nodes between them; write out what would stay FP32."""
    expanded: set[Any] = set()
    while True:
        captured = capture_plainly(task.source, task.free(batch=True), expanded=expanded)
        prepared = prepare(captured.exported, tied=captured.parameters)
        numbers = find_arguments(prepared, captured)
        limits = module_limits(prepared, captured, numbers, by_calls=True)
        found = plan(captured.exported, task.solved_on, task.headroom_bits, prepared, limits)
        assert found.solution is not None  # everything is allowed
        islands = {captured.calls[name].target for name in found.solution.islands.keys() & captured.calls.keys()}
        if not (islands & EXPANSIONS.keys()) - expanded:
            break
        expanded |= islands & EXPANSIONS.keys()
    _settle_guards(task, captured.program)
    fixed = with_calls(captured, numbers, found, frozenset(task.model.state_dict()))
    if not _gives_the_same(task, fixed):
        raise ModelError("the calls of the module do not give what the module gives", hint=_REPAIR_GRAPH)
    keep_numbers_above_zero(fixed)
    certificate = task.certified(captured, found)
    if certificate.passed:
        _require_finite_half(task, fixed, found.problem.outside)
    return fixed, certificate


def _outputs(model: torch.nn.Module, call: Call) -> list[torch.Tensor]:
    with torch.no_grad(), evaluation_mode(model):
        return flatten_outputs(model(*call[0], **call[1]))


def _settle_guards(task: _Task, program: torch.export.ExportedProgram) -> None:
    """Drop those of torch's conditions on sizes that do not matter: runs that break them give the same.

    Runs are the data, and one of its calls with a batch of 1, which torch takes for special.
    """
    for call in task.sizes():
        program._guards_code = _unbroken(program, call)
    single = _single(task)
    if single is None:
        return
    kept, program._guards_code = program._guards_code, _unbroken(program, single)
    if not _are_same(task.model, program.module(check_guards=True), single):
        program._guards_code = kept


def _unbroken(program: torch.export.ExportedProgram, call: Call) -> list[str]:
    """Return torch's conditions on sizes that a call does not break."""
    program = copy.copy(program)
    while True:
        try:
            with torch.no_grad():
                program.module(check_guards=True)(*call[0], **call[1])
        except AssertionError as exc:
            said = {code: ast.unparse(ast.parse(_NAMED.sub(r"\1", code), mode="eval")) for code in program._guards_code}
            kept = [code for code, words in said.items() if str(exc) != f"Guard failed: {words}"]
            if len(kept) == len(program._guards_code):
                raise
            program._guards_code = kept
        else:
            return program._guards_code


def _single(task: _Task) -> Call | None:
    """Return a call of the data with a batch of 1; None if it cannot be told what that would be."""
    tensors = task.source.names.tensors(task.calls[0])
    if {tensor.shape[0] for tensor in tensors.values() if tensor.dim()} & {0, 1} or not tensors:
        return None
    call = task.source.names.replace(task.calls[0], {name: t[:1] if t.dim() else t for name, t in tensors.items()})
    try:
        _outputs(task.model, call)
    except Exception:  # noqa: BLE001 - whatever the user's forward says to sizes that it was not asked about
        return None
    return call


def _are_same(model: torch.nn.Module, other: torch.nn.Module, call: Call) -> bool:
    with torch.no_grad():
        got = flatten_outputs(other(*call[0], **call[1]))
    return all(_is_close(each, want) for each, want in zip(got, _outputs(model, call), strict=True))


def _is_close(got: torch.Tensor, want: torch.Tensor) -> bool:
    scale = float(want.abs().max()) if want.numel() else 0.0
    same_shape = got.shape == want.shape
    return same_shape and torch.allclose(got.to(want.dtype), want, rtol=_SAME, atol=_SAME * scale, equal_nan=True)


def _gives_the_same(task: _Task, fixed: torch.nn.Module) -> bool:
    """Tell whether a module in FP32 does what the user's does, at every set of sizes in the data."""
    with evaluation_mode(fixed):
        return all(_are_same(task.model, fixed, call) for call in task.sizes())


def _require_finite_half(task: _Task, fixed: torch.nn.Module, outside: Collection[str]) -> None:
    """Run a copy in FP16 once, inputs ``outside`` in FP32: it must be finite wherever the module is in FP32."""
    half = copy.deepcopy(fixed).half()
    args, kwargs = task.calls[-1]
    names = task.source.names
    tensors = names.tensors((args, kwargs))
    halved = {
        name: tensor.half() if tensor.dtype == torch.float32 and name not in outside else tensor
        for name, tensor in tensors.items()
    }
    try:
        got = _outputs(half, names.replace((args, kwargs), halved))
    except Exception as exc:
        if _NO_KERNEL in str(exc):  # of torch on this device; another device may have it
            return
        raise ModelError(f"the repaired module does not run in FP16: {exc}", hint=_REPAIR_GRAPH) from exc
    for want, each in zip(_outputs(task.model, (args, kwargs)), got, strict=True):
        if each.is_floating_point() and (want.isfinite() & ~each.isfinite()).any():
            raise ModelError(
                "the repaired module is not finite in FP16 where the module is in FP32", hint=_REPAIR_GRAPH
            )


def _needs_nodes(captured: Captured, found: Plan) -> ModelError:
    full = solve(found.problem)
    assert full is not None  # everything is allowed there
    places = [f"2**{bits} between '{t}' and '{reader}'" for (t, reader), bits in full.shifts.items()]
    places += [f"FP32 at '{name}'" for name in full.islands]
    places += [f"a bound for the mask '{name}'" for name in found.prepared.masks.keys() - captured.parameters]
    nodes = {node.name or "": provenance(node).module for node in captured.exported.model.graph}
    modules = sorted(
        {nodes[r] for _, r in full.shifts if nodes.get(r)} | {nodes[n] for n in full.islands if nodes.get(n)}
    )
    return ModelError(
        f"weights alone cannot bring this module into FP16's range; it needs {len(places)} additions: "
        + "; ".join(places[:4])
        + ("; …" if len(places) > 4 else ""),
        where=", ".join(modules) or None,
        hint="ferry.fp16.fix(model, calibration) makes them, or repair the exported graph",
    )

"""Repairing a module by its weights: scales written into parameters, buffers and the eps of norms."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchferry.core.errors import ModelError
from torchferry.core.signature import Signature
from torchferry.core.target import Target
from torchferry.exporter.capture import evaluation_mode
from torchferry.exporter.failures import export_error
from torchferry.exporter.inputs import as_calls, flatten_outputs, to_numpy
from torchferry.exporter.quiet import quiet
from torchferry.exporter.source import Source
from torchferry.exporter.translations import TRANSLATIONS
from torchferry.graph import Exported
from torchferry.graph.provenance import provenance, record_provenance
from torchferry.graph.reading import tensor_spec
from torchferry.precision.apply import SMALLEST, attribute_scales
from torchferry.precision.certificate import Certificate, Evidence
from torchferry.precision.checks import with_checks
from torchferry.precision.degrees import constant, float_slots, is_float
from torchferry.precision.planning import Plan, certificate_of, plan, repair, split_data
from torchferry.precision.prepare import Prepared, prepare
from torchferry.precision.problem import ModuleLimits
from torchferry.precision.scales import solve

if TYPE_CHECKING:
    import onnx_ir as ir

    from torchferry.exporter.inputs import Call

_EPSILONS = ("eps", "epsilon", "variance_epsilon")
_SAME = 1e-5  # relative; the repaired module in FP32 does the same sums, and differs only where eps was raised


@dataclass(frozen=True)
class Captured:
    """A module as a graph whose constants are its parameters, by their names.

    Attributes:
        exported: The graph, with nothing folded into anything.
        parameters: Names of the constants that are in the module's ``state_dict``.
    """

    exported: Exported
    parameters: frozenset[str]


@dataclass(frozen=True)
class Epsilon:
    """The eps of a module, where the graph has it.

    Attributes:
        module: The module's path.
        attribute: Its name there.
        value: What it is.
        node: The node that has it as an attribute; empty where it is a constant.
        constant: The constant; empty where it is an attribute.
    """

    module: str
    attribute: str
    value: float
    node: str = ""
    constant: str = ""


def fix_module(model: torch.nn.Module, calibration: Any, headroom_bits: int = 2) -> tuple[torch.nn.Module, Certificate]:
    """Repair a module; see ``ferry.fp16.fix``."""
    calls = as_calls(calibration)
    if not calls:
        raise ModelError("fix needs data to solve the scales on", hint="give one tuple of tensors, or several")
    # The graph shares its constants with the module, and the user may go on with theirs, by half() for one.
    source = Source(copy.deepcopy(model), *calls[0])
    with evaluation_mode(source.model):
        captured = capture_plainly(source)
    data = [{k: to_numpy(v) for k, v in source.names.tensors(call).items()} for call in calls]
    solved_on, held_out, how = split_data(data)
    started = time.perf_counter()
    prepared = prepare(captured.exported, tied=captured.parameters)
    epsilons = find_epsilons(prepared.model.graph, model)
    found = plan(captured.exported, solved_on, headroom_bits, prepared, module_limits(prepared, captured, epsilons))
    if found.solution is None:
        raise _needs_nodes(captured, found)
    repaired = repair(captured.exported, found)
    fixed = copy.deepcopy(model)
    write_scales(fixed, captured.parameters, epsilons, found)
    certificate = certificate_of(
        captured.exported.model.graph.name or "a module",
        found,
        repaired,
        headroom_bits,
        how,
        time.perf_counter() - started,
    )
    _require_same(model, fixed, calls)
    keep_epsilons_above_zero(fixed, epsilons)
    evidence = Evidence(captured.exported, repaired.exported, solved_on, held_out)
    return fixed, with_checks(certificate, evidence)


def capture_plainly(source: Source) -> Captured:
    """Export a module with nothing folded, so that its parameters are constants of the graph.

    Raises:
        ModelError: If the module fails on its own example.
        ExportError: If it cannot be exported.
    """
    args, kwargs = source.call
    program = None
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(source.model, args, kwargs or None, strict=False)
            onnx_program = torch.onnx.export(
                program, dynamo=True, optimize=False, custom_translation_table=TRANSLATIONS, verbose=False
            )
    except Exception as exc:
        raise export_error(exc, source, program) from exc
    assert onnx_program is not None
    model = onnx_program.model
    for value, name in zip(model.graph.inputs, source.names.names, strict=True):
        value.name = name
    record_provenance(model)
    signature = Signature(
        tuple(tensor_spec(v) for v in model.graph.inputs), tuple(tensor_spec(v) for v in model.graph.outputs)
    )
    parameters = frozenset(source.model.state_dict()) & model.graph.initializers.keys()
    return Captured(Exported(model, signature, Target()), frozenset(parameters))


def find_epsilons(graph: ir.Graph, model: torch.nn.Module) -> list[Epsilon]:
    """Return the constants and attributes that are the eps of the module that a node belongs to."""
    found: list[Epsilon] = []
    for node in graph:
        path = provenance(node).module
        try:
            module = model.get_submodule(path)
        except AttributeError:  # the path that torch gives need not be one that can be looked up
            continue
        for name in _EPSILONS:
            value = getattr(module, name, None)
            if not isinstance(value, float):
                continue
            own = node.attributes.get("epsilon")
            if own is not None and math.isclose(own.as_float(), value, rel_tol=_SAME):
                found.append(Epsilon(path, name, value, node=node.name or ""))
            for operand in [v for v in node.inputs if v is not None and v.is_initializer() and is_float(v)]:
                array = constant(operand)
                if array is not None and array.size == 1 and math.isclose(array.item(), value, rel_tol=_SAME):
                    found.append(Epsilon(path, name, value, constant=operand.name or ""))
    return found


def module_limits(prepared: Prepared, captured: Captured, epsilons: list[Epsilon]) -> ModuleLimits:
    """Return what only a graph could absorb: constants and attributes that are no parameter and no module's eps."""
    graph = prepared.model.graph
    zeros = {name for name, value in graph.initializers.items() if is_float(value) and not constant(value).any()}
    free = captured.parameters | zeros | {each.constant for each in epsilons}  # nothing shifted is nothing
    by_place: dict[tuple[str, str], list[Epsilon]] = {}
    for each in epsilons:
        by_place.setdefault((each.module, each.attribute), []).append(each)
    return ModuleLimits(
        frozenset(graph.initializers.keys() - free),
        frozenset(node.name or "" for node in graph) - {each.node for each in epsilons},
        tuple(tuple((each.node, each.constant) for each in group) for group in by_place.values()),
    )


def write_scales(model: torch.nn.Module, parameters: frozenset[str], epsilons: list[Epsilon], found: Plan) -> None:
    """Divide parameters and buffers by ``2**k`` in place, and set what eps has to be."""
    assert found.solution is not None  # the caller looked
    scales = found.solution.scales
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    done: set[int] = set()
    with torch.no_grad():
        for name in sorted(parameters):
            tensor = own[name]
            if scales.get(name) and tensor.data_ptr() not in done:
                done.add(tensor.data_ptr())
                tensor.mul_(2.0 ** -scales[name])
    for each in epsilons:
        k = scales.get(each.constant, 0) if each.constant else _attribute_scale(found, each.node)
        if k:
            setattr(model.get_submodule(each.module), each.attribute, each.value * 2.0**-k)


def keep_epsilons_above_zero(model: torch.nn.Module, epsilons: list[Epsilon]) -> None:
    """Raise an eps that a module's own code adds, and FP16 would hold as 0; a norm of torch's adds its own in FP32."""
    for each in epsilons:
        module = model.get_submodule(each.module)
        if each.constant and 0 < getattr(module, each.attribute) < SMALLEST:
            setattr(module, each.attribute, SMALLEST)


def _attribute_scale(found: Plan, name: str) -> int:
    assert found.solution is not None  # the caller looked
    node = next(node for node in found.prepared.model.graph if node.name == name)
    known = {}
    for slot in float_slots(node):
        value = (node.inputs if slot[0] == "in" else node.outputs)[int(slot[1])]
        known[slot] = found.solution.scales.get(value.name or "", 0) if value is not None else 0
    return attribute_scales(node, known).get("epsilon", 0)


def _require_same(model: torch.nn.Module, fixed: torch.nn.Module, calls: list[Call]) -> None:
    """Refuse a module that uses its parameters in a way that its graph does not show."""
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(fixed):
        for args, kwargs in calls[:2]:
            for want, got in zip(
                flatten_outputs(model(*args, **kwargs)), flatten_outputs(fixed(*args, **kwargs)), strict=True
            ):
                if not torch.allclose(got, want, rtol=_SAME, atol=_SAME * float(want.abs().max()), equal_nan=True):
                    raise ModelError(
                        "the repaired module does not give the same outputs: it uses its parameters in a way that its "
                        "graph does not show",
                        hint="repair the exported graph: ferry.fp16.fix(ferry.export(model, args), calibration)",
                    )


def _needs_nodes(captured: Captured, found: Plan) -> ModelError:
    full = solve(found.problem)
    assert full is not None  # everything is allowed there
    places = [f"2**{bits} between '{t}' and '{reader}'" for (t, reader), bits in full.shifts.items()]
    places += [f"FP32 at '{name}'" for name in full.islands]
    nodes = {node.name or "": provenance(node).module for node in captured.exported.model.graph}
    modules = sorted(
        {nodes[r] for _, r in full.shifts if nodes.get(r)} | {nodes[n] for n in full.islands if nodes.get(n)}
    )
    return ModelError(
        f"weights alone cannot bring this module into FP16's range; it needs {len(places)} additions: "
        + "; ".join(places[:4])
        + ("; …" if len(places) > 4 else ""),
        where=", ".join(modules) or None,
        hint="repair the exported graph: ferry.fp16.fix(ferry.export(model, args), calibration)",
    )

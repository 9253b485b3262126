"""From a graph and data to scales, and to the graph that has them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.precision.apply import Repaired, apply_scales
from torchferry.precision.certificate import Certificate
from torchferry.precision.checks import enlarged
from torchferry.precision.limits import limits
from torchferry.precision.opened import open_sums
from torchferry.precision.prepare import Prepared, open_out_of_range, prepare
from torchferry.precision.problem import ModuleLimits, Problem, build
from torchferry.precision.ranges import Range, measure
from torchferry.precision.scales import Solution, solve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchferry.graph import Exported
    from torchferry.precision.ranges import Feeds


@dataclass(frozen=True)
class Plan:
    """Everything that was found out about a graph before it is rewritten.

    Attributes:
        prepared: The graph that scales were solved for.
        problem: The unknowns and what they must satisfy.
        solution: The scales; None where weights alone do not do.
        measured: Ranges on the data.
    """

    prepared: Prepared
    problem: Problem
    solution: Solution | None
    measured: dict[str, Range]


def plan(
    exported: Exported,
    data: Sequence[Feeds],
    headroom_bits: int,
    prepared: Prepared | None = None,
    module: ModuleLimits | None = None,
) -> Plan:
    """Measure a graph and solve its scales.

    Args:
        exported: An FP32 graph.
        data: Inputs by name, to measure on.
        headroom_bits: The scales hold up to ``2**headroom_bits`` times these inputs.
        prepared: The graph's prepared copy, if there is one; it is changed where operators have to be opened.
        module: What is different for a module; without units in it, scales are solved for its weights alone.
    """
    prepared = prepared or prepare(exported)
    larger = [enlarged(feeds, 2.0**headroom_bits) for feeds in data]
    while True:
        opened = prepared.model.clone()
        open_sums(opened)
        measured, beyond = measure(opened, exported.signature, data, larger)
        bounds = {name: limits(measured[name], beyond[name], headroom_bits) for name in measured}
        outside = {name for name, bound in bounds.items() if bound.leaves_range}
        if module is not None or not open_out_of_range(prepared, outside.__contains__):
            break
    problem = build(prepared.model, opened, bounds, module)
    return Plan(prepared, problem, solve(problem, weights_only=module is not None and not module.units), measured)


def repair(exported: Exported, found: Plan, *, keep_io_types: bool = False) -> Repaired:
    """Write the graph in FP16 as planned."""
    assert found.solution is not None  # only a module's plan may lack one
    prepared = dataclasses.replace(found.prepared, model=found.prepared.model.clone())
    return apply_scales(exported, prepared, found.problem, found.solution, keep_io_types=keep_io_types)


def certificate_of(
    name: str, found: Plan, repaired: Repaired, headroom_bits: int, how: str, seconds: float
) -> Certificate:
    """Write down what was done; the checks are made by others."""
    assert found.solution is not None  # as above
    return Certificate(
        title=f"FP16 repair of {name}",
        headroom_bits=headroom_bits,
        scales=repaired.scales,
        constants=repaired.constants,
        added=tuple(repaired.added),
        islands=found.solution.islands,
        outside=tuple(found.problem.outside),
        opened=found.prepared.opened,
        raised=repaired.raised,
        binding=found.solution.binding,
        unknown_operators=tuple(found.problem.unknown_operators),
        held_out=how,
        seconds=seconds,
    )


def split_data(data: Sequence[Feeds]) -> tuple[list[Feeds], list[Feeds], str]:
    """Keep a quarter of the calls back, or make other data from the only one.

    Returns:
        Calls to solve on, calls to judge by, and where the latter come from.
    """
    if len(data) > 1:
        kept = max(1, len(data) // 4)
        return list(data[:-kept]), list(data[-kept:]), f"the last {kept} of {len(data)} calls, not solved on"
    return (
        list(data),
        [_perturbed(feeds) for feeds in data],
        ("the only call, perturbed: noise of a tenth of its standard deviation, integers rolled along the last axis"),
    )


def _perturbed(feeds: Feeds) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    changed: dict[str, Any] = {}
    for name, array in feeds.items():
        if array.dtype.kind == "f" and array.size:
            noise = (
                generator.standard_normal(array.shape)
                * 0.1
                * np.std(array[np.isfinite(array)] if np.isfinite(array).any() else 0.0)
            )
            changed[name] = (array + noise).astype(array.dtype)
        else:
            changed[name] = np.roll(array, 1, axis=-1) if array.ndim and array.dtype.kind in "iu" else array
    return changed

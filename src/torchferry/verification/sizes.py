"""Sizes: which ones to try, how to make inputs of them, and what happens at 0 and 1.

torch.export treats sizes 0 and 1 as special cases and traces as if they never came. Sometimes the graph is right there
(``x + 1``), sometimes wrong with no error (``x.squeeze(0)`` at 1). Nothing but running it tells.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchferry import backends
from torchferry.core.compare import TOLERANCES, Tolerance, compare
from torchferry.core.errors import BackendError, InputError
from torchferry.core.expressions import Expression
from torchferry.core.report import Finding
from torchferry.exporter.capture import evaluation_mode
from torchferry.exporter.inputs import flatten_outputs, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torchferry.core.engine import Session
    from torchferry.core.signature import DimRange, Relation, Signature
    from torchferry.core.target import Target
    from torchferry.exporter.source import Source
    from torchferry.graph import Exported
from torchferry.verification.isolation import run_isolated

_DIFFERS_HINT = "the exporter translated something wrongly; take the suspect operation out and export again"
_SPECIAL = (0, 1)
_CAUTION = re.compile(r"(!= [01]|> [01]|>= [12])$|^([01] (<|!=)|[12] <=) ")  # of a computed size, either way round
_LOOKED_AT = (*range(1, 17), 24, 32, 48, 64, 96, 128, 192, 256)  # sizes at which a relation of torch's own is tried
_MAX_TRIES = 1024  # combinations of sizes looked through for one that the relations allow


def settle(exported: Exported, source: Source, tolerance: Tolerance = TOLERANCES["fp32"]) -> Exported:
    """Run sizes 0 and 1 of every dynamic dimension against PyTorch; let in those that agree, name those that do not.

    Args:
        exported: As captured, with ranges that start at 2 wherever the model does not say otherwise.
        source: What it was captured from; its example supplies the data.
        tolerance: What is asked of the graph.

    Returns:
        The same graph with its ranges settled, and a finding for every size that stays excluded; an error
        finding ``graph-differs`` if the graph disagrees with PyTorch at the example itself.
    """
    open_sizes = {dim: _unsettled(allowed) for dim, allowed in exported.signature.dims.items()}
    if not any(open_sizes.values()):
        return exported
    free = dataclasses.replace(exported.signature, dims={}, relations=())
    trial = _trial_backend(exported.target)
    if trial is None:
        return _unsettled_graph(exported, "no engine is installed to run them on", "pip install 'torchferry[all]'")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="torchferry-"))
        stack.enter_context(evaluation_mode(source.model))
        try:
            session = stack.enter_context(backends.get(trial).trial(exported.replace(signature=free), Path(folder)))
        except BackendError as exc:
            return _unsettled_graph(exported, first_line(exc), "the graph is for an engine that has all its operators")
        return _settle_with(session, exported, source, open_sizes, tolerance)


def _unsettled_graph(exported: Exported, reason: str, hint: str) -> Exported:
    finding = Finding("sizes-not-settled", "warning", f"sizes 0 and 1 are refused: {reason}", hint=hint)
    return exported.replace(report=exported.report.with_findings([finding]))


def _unsatisfied(relations: tuple[Relation, ...], dim: str) -> str:
    binding = [relation.expression for relation in relations if dim in Expression(relation.expression).names]
    return f"the model requires {' and '.join(binding)}"


def _unsettled(allowed: DimRange) -> list[int]:
    return [size for size in _SPECIAL if size < allowed.min and size not in allowed.excluded]


def _trial_backend(target: Target) -> str | None:
    """Choose an engine to run the graph on: the target's own if it is here and general, else the first that is."""
    for name in (target.backend, *backends.names()):
        if name not in backends.names() or not backends.get(name).availability().ok:
            continue
        if backends.get(name).capabilities().general:
            return name
    return None


def _settle_with(
    session: Session, exported: Exported, source: Source, open_sizes: Mapping[str, list[int]], tolerance: Tolerance
) -> Exported:
    signature = exported.signature
    example = source.names.tensors(source.call)
    own = signature.sizes_of({name: to_numpy(tensor) for name, tensor in example.items()})
    base = {dim: max(size, max(_SPECIAL) + 1) for dim, size in own.items()}

    def differs(sizes: Mapping[str, int]) -> str:
        return _differs(session, source, example, signature, sizes, tolerance)

    wrong = differs(base)
    if wrong:
        sized = ", ".join(f"{dim}={size}" for dim, size in base.items())
        finding = Finding("graph-differs", "error", f"at the example's sizes ({sized}) {wrong}", hint=_DIFFERS_HINT)
        return exported.replace(report=exported.report.with_findings([finding]))
    settled, findings = _with_special_sizes(signature, open_sizes, own, base, differs)
    kept = _without_caution(settled, base, differs).relations
    if kept != settled.relations:  # what is gone may be all that refused a size
        without = dataclasses.replace(signature, relations=kept)
        settled, findings = _with_special_sizes(without, open_sizes, own, base, differs)
    gone = [f"right where {each.expression} only" for each in signature.relations if each not in kept]
    told = [found for found in exported.report.findings if not any(words in found.message for words in gone)]
    report = dataclasses.replace(exported.report, findings=(*told, *findings))
    return exported.replace(signature=settled, report=report)


def _with_special_sizes(
    signature: Signature,
    open_sizes: Mapping[str, list[int]],
    own: Mapping[str, int],
    base: Mapping[str, int],
    differs: Callable[[Mapping[str, int]], str],
) -> tuple[Signature, list[Finding]]:
    """Let in the sizes 0 and 1 at which the graph is right; name the others."""
    dims = dict(signature.dims)
    findings: list[Finding] = []
    for dim, sizes in open_sizes.items():
        verdicts: dict[int, str] = {}
        for size in sizes:
            trial = _allowed_sizes({**base, dim: size}, dim, signature.relations)
            verdicts[size] = _unsatisfied(signature.relations, dim) if trial is None else differs(trial)
            if verdicts[size]:
                findings.append(_excluded_finding(dim, size, verdicts[size], own[dim] == size))
        dims[dim] = _with_verdicts(dims[dim], verdicts)
    return dataclasses.replace(signature, dims=dims), findings


def _without_caution(
    signature: Signature, base: Mapping[str, int], differs: Callable[[Mapping[str, int]], str]
) -> Signature:
    """Leave out the relations that are settled, until none is.

    Of maps that halve in size, every one has a relation, and what the largest map's refuses, the smaller ones' do too:
    they go first.
    """
    for relation in reversed(signature.relations):
        if _is_settled(relation, signature, base, differs):
            others = tuple(other for other in signature.relations if other is not relation)
            return _without_caution(dataclasses.replace(signature, relations=others), base, differs)
    return signature


def _is_settled(
    relation: Relation, signature: Signature, base: Mapping[str, int], differs: Callable[[Mapping[str, int]], str]
) -> bool:
    """Tell whether a relation is torch's own caution about a computed size of 0 or 1, and the graph is right there.

    A condition of the model itself may read the same; there the graph is wrong, and the relation stays.

    Two of the sizes that the relation refuses, and nothing else does, are run: the smallest and the largest found.
    """
    if not _CAUTION.search(relation.expression):
        return False
    others = tuple(other for other in signature.relations if other is not relation)
    alone = dataclasses.replace(signature, relations=others)
    names = sorted(Expression(relation.expression).names)
    refused = []
    for choice in itertools.islice(itertools.product(_LOOKED_AT, repeat=len(names)), _MAX_TRIES):
        sizes = {**base, **dict(zip(names, choice, strict=True))}
        if not relation.holds(sizes) and _takes(alone, sizes):
            refused.append(sizes)
    return bool(refused) and not any(differs(sizes) for sizes in (refused[0], refused[-1]))


def _takes(signature: Signature, sizes: Mapping[str, int]) -> bool:
    try:
        signature.check_sizes(sizes)
    except InputError:
        return False
    return True


def _excluded_finding(dim: str, size: int, reason: str, is_example: bool) -> Finding:
    return Finding(
        "example-excluded" if is_example else "size-excluded",
        "error" if is_example else "info",
        f"{dim} = {size} is excluded: {reason}",
        hint="make the model treat this size like any other, or leave the axis out of the dynamic dimensions"
        if is_example
        else None,
    )


def _with_verdicts(allowed: DimRange, verdicts: Mapping[int, str]) -> DimRange:
    right = [size for size, reason in verdicts.items() if not reason]
    excluded = {**allowed.excluded, **{size: reason for size, reason in verdicts.items() if reason}}
    return dataclasses.replace(allowed, min=min([allowed.min, *right]), excluded=excluded)


def _allowed_sizes(wanted: dict[str, int], dim: str, relations: tuple[Relation, ...]) -> dict[str, int] | None:
    """Return the sizes, with others than ``dim`` changed if the relations ask for it; None if none fit."""
    if all(relation.holds(wanted) for relation in relations):
        return wanted
    others = sorted({name for relation in relations for name in Expression(relation.expression).names} - {dim})
    choices = itertools.product(*([wanted[name], 2, 3, 4, 1, 8, 0, 16] for name in others))
    for choice in itertools.islice(choices, _MAX_TRIES):
        sizes = {**wanted, **dict(zip(others, choice, strict=True))}
        if all(relation.holds(sizes) for relation in relations):
            return sizes
    return None


def _differs(
    session: Session,
    source: Source,
    example: Mapping[str, torch.Tensor],
    signature: Signature,
    sizes: Mapping[str, int],
    tolerance: Tolerance,
) -> str:
    """Run PyTorch and the graph at these sizes; return how they differ, empty if they do not."""
    tensors = resized(example, signature, sizes)
    try:
        expected = run_torch(source, tensors)
    except Exception as exc:  # noqa: BLE001 - whatever the user's forward raises at this size
        return f"PyTorch itself refuses it ({first_line(exc)})"
    feeds = {name: to_numpy(tensor) for name, tensor in tensors.items()}
    try:
        # What an engine does with nothing at all may be to crash.
        actual = run_isolated(lambda: session.run(feeds)) if 0 in sizes.values() else session.run(feeds)
    except (BackendError, InputError) as exc:
        return f"the graph fails there ({first_line(exc)})"
    for name, want in zip(signature.output_names, expected, strict=True):
        comparison = compare(to_numpy(want), actual[name], tolerance, name=name)
        if not comparison.passed:
            return f"the graph differs from PyTorch there ('{name}': {comparison.reason})"
    return ""


def first_line(exc: BaseException) -> str:
    """Return the first line of what an exception says, or its class."""
    return (str(exc).strip() or type(exc).__name__).splitlines()[0]


def run_torch(source: Source, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Run the module on copies of the tensors, since a forward may write into its inputs."""
    call = source.names.replace(source.call, {name: tensor.clone() for name, tensor in tensors.items()})
    with torch.no_grad():
        return flatten_outputs(source.model(*call[0], **call[1]))


def resized(
    example: Mapping[str, torch.Tensor], signature: Signature, sizes: Mapping[str, int]
) -> dict[str, torch.Tensor]:
    """Return the example at other sizes, its data repeated or cut, so that it stays the user's own.

    Args:
        example: By input name.
        signature: Says which axis has which name.
        sizes: For every named dimension its size.
    """
    result = {}
    for spec in signature.inputs:
        tensor = example[spec.name]
        for axis, name in enumerate(spec.shape or ()):
            if not isinstance(name, str):
                continue
            size = int(Expression(name).evaluate(sizes))
            if size != tensor.shape[axis]:
                index = torch.arange(size, device=tensor.device) % max(tensor.shape[axis], 1)
                tensor = tensor.index_select(axis, index)
        result[spec.name] = tensor
    return result


def sizes_to_try(signature: Signature, own: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Yield sizes at which to verify.

    First the smallest, usual and largest ones where a usual one was declared; then each dimension at its ends and
    around the example; then all of them changed.

    Args:
        signature: Ranges and relations; what they refuse is left out.
        own: The example's sizes.
    """
    seen = [dict(own)]

    def fresh(sizes: dict[str, int]) -> bool:
        return _takes(signature, sizes) and sizes not in seen and not seen.append(sizes)  # type: ignore[func-returns-value]

    for declared in signature.profile():
        if fresh({**own, **declared}):
            yield seen[-1]
    for dim, allowed in signature.dims.items():
        size = own[dim]
        wanted = {allowed.min, allowed.min + 1, size // 2, size + 1, 2 * size}
        if allowed.max is not None and allowed.max <= 2 * size:
            wanted.add(allowed.max)
        for other in sorted(wanted):
            if fresh({**own, dim: other}):
                yield seen[-1]
    if len(own) > 1:
        every = {dim: size // 2 + 1 + place for place, (dim, size) in enumerate(own.items())}
        if fresh(every):
            yield every

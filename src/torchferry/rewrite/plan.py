"""Which of the registered rewriters a target asks for, and what became of them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.log import RewriteLog, RewriteRow
from torchferry.rewrite.module import MODULE_REWRITER
from torchferry.rewrite.names import Missing, find
from torchferry.rewrite.patching import patched_attribute
from torchferry.rewrite.plugins import load_plugins
from torchferry.rewrite.registry import most_specific
from torchferry.rewrite.symbolic import SYMBOLIC_REWRITER, symbolic_target, torch_records
from torchferry.rewrite.targets import Target, target

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping

    from torchferry.core.report import Finding
    from torchferry.rewrite.function import FunctionRewriter
    from torchferry.rewrite.log import Status
    from torchferry.rewrite.module import ModuleRewriter
    from torchferry.rewrite.registry import Record
    from torchferry.rewrite.symbolic import SymbolicRewriter, SymbolicTarget
    from torchferry.rewrite.tally import Tally

T = TypeVar("T")
Kind = Literal["function", "module", "symbolic"]


@dataclass
class Choice(Generic[T]):
    """The records of one registry, each in one of the three.

    Attributes:
        kind: What they replace.
        records: All of them.
        chosen: With what they replace.
        declined: With the reason.
        missing: Those whose name leads nowhere.
    """

    kind: Kind
    records: tuple[Record, ...]
    chosen: dict[Record, T] = field(default_factory=dict)
    declined: dict[Record, str] = field(default_factory=dict)
    missing: dict[Record, Missing] = field(default_factory=dict)

    def rows(self, tallies: Mapping[Record, Tally] | None) -> Iterator[RewriteRow]:
        """Yield a row for each record; without tallies, what would apply."""
        for record in self.records:
            row: dict[str, Any] = {"status": "applies"}
            if record in self.missing:
                missing = self.missing[record]
                row = {"status": "unknown", "reason": missing.reason, "suggestion": missing.suggestion}
            elif record in self.declined:
                row = {"status": "declined", "reason": self.declined[record]}
            elif tallies is not None and record not in tallies:
                row = {"status": "declined", "reason": "no model was given"}
            elif tallies is not None:
                row = _outcome(record, tallies[record])
            yield RewriteRow(
                record.name,
                record.title,
                record.place,
                self.kind,
                record.backend,
                record.ir,
                record.changes_outputs,
                **row,
            )


@dataclass
class Plan:
    """What a context is going to do.

    Attributes:
        functions: Rewriters of functions.
        modules: Rewriters of module classes.
        symbolics: Symbolic functions.
        troubles: Plugins that do not load.
    """

    functions: Choice[Target]
    modules: Choice[type[torch.nn.Module]]
    symbolics: Choice[SymbolicTarget]
    troubles: tuple[Finding, ...] = ()

    def log(self, tallies: Mapping[Record, Tally] | None = None) -> RewriteLog:
        """Return what became of every record; without tallies, what would apply."""
        choices: tuple[Choice[Any], ...] = (self.functions, self.modules, self.symbolics)
        rows = (row for choice in choices for row in choice.rows(tallies))
        return RewriteLog(tuple(row for row in rows if not row.is_of_another_codebase), self.troubles)


def make_plan(
    functions: FunctionRewriter, modules: ModuleRewriter, symbolics: SymbolicRewriter, env: Mapping[str, Any]
) -> Plan:
    """Choose among all registered rewriters, importing what those that fit refer to.

    Args:
        functions: Rewriters of functions.
        modules: Rewriters of module classes.
        symbolics: Symbolic functions; those registered with torch.onnx stand in for what the standard registry lacks.
        env: ``backend``, ``ir``, ``target``, ``opset``, ``cfg`` and the context's other keywords.

    Raises:
        ConfigError: If two rewriters fit equally well.
    """
    standard = functions is FUNCTION_REWRITER or modules is MODULE_REWRITER or symbolics is SYMBOLIC_REWRITER
    troubles = load_plugins() if standard else ()
    translated = _choose("symbolic", symbolics.records(), env, symbolic_target)
    if symbolics is SYMBOLIC_REWRITER:
        _add_torchs(translated, env)
    rewritten = _choose("function", functions.records(), env, _function)
    _leave_to_symbolics(rewritten, translated)
    return Plan(rewritten, _choose("module", modules.records(), env, _module_class), translated, troubles)


def _leave_to_symbolics(functions: Choice[Target], symbolics: Choice[SymbolicTarget]) -> None:
    """Decline the rules of our own for operators that a symbolic function is registered for."""
    theirs = {_operator_name(target): record for record, target in symbolics.chosen.items()}
    for record in [record for record in functions.chosen if record.is_own_rule]:
        *_, space, name = record.name.split(".")
        symbolic = theirs.get(name.strip("_")) or theirs.get(f"{space}_{name}")
        if symbolic is not None:
            del functions.chosen[record]
            functions.declined[record] = f"the symbolic function {symbolic.title} is registered for it"


def _operator_name(target: SymbolicTarget) -> str:
    """Return an operator's name without its namespace and overload; a Function has none."""
    if isinstance(target, type):
        return ""
    return str(target).split(".")[1].strip("_")


def _add_torchs(choice: Choice[SymbolicTarget], env: Mapping[str, Any]) -> None:
    """Add the symbolic functions registered with torch.onnx, for operators that have none of ours."""
    theirs = _choose("symbolic", torch_records(env["opset"]), env, symbolic_target)
    taken = {operator: record for record, operator in choice.chosen.items()}
    for record, operator in theirs.chosen.items():
        if operator in taken:
            choice.declined[record] = f"{taken[operator].title} is registered with Torchferry"
        else:
            choice.chosen[record] = operator
    choice.missing |= theirs.missing
    choice.records += theirs.records


def _choose(
    kind: Kind,
    records: tuple[Record, ...],
    env: Mapping[str, Any],
    resolve: Callable[[Record], tuple[Hashable, T] | Missing],
) -> Choice[T]:
    choice: Choice[T] = Choice(kind, records)
    rivals: dict[Hashable, dict[Record, T]] = defaultdict(dict)
    for record in choice.records:
        reason = record.objection(env)
        if reason is not None:
            choice.declined[record] = reason
            continue
        resolved = resolve(record)
        if isinstance(resolved, Missing):
            choice.missing[record] = resolved
        else:
            key, value = resolved
            rivals[key][record] = value
    for group in rivals.values():
        best = most_specific(list(group), env)
        choice.chosen[best] = group[best]
        choice.declined |= {other: f"{best.title} is more specific" for other in group if other is not best}
    return choice


def _function(record: Record) -> tuple[Hashable, Target] | Missing:
    found = find(record.name)
    if isinstance(found, Missing):
        return found
    result = patched_attribute(found.parent, found.attribute) or target(found)
    return result if isinstance(result, Missing) else (result, result)


def _module_class(record: Record) -> tuple[Hashable, type[torch.nn.Module]] | Missing:
    found = find(record.name)
    if isinstance(found, Missing):
        return found
    cls = found.value
    if isinstance(cls, type) and issubclass(cls, torch.nn.Module):
        return id(cls), cls
    return Missing("it is not a class of torch.nn.Module")


def _outcome(record: Record, tally: Tally) -> dict[str, Any]:
    sites = tally.sites
    calls = sites.total()
    status: Status = "unused" if not calls else "left" if tally.left == calls else "applied"
    reason = tally.not_compared
    if record.changes_outputs and status == "applied":
        reason = "it is declared to change outputs"
    elif status == "left":
        reason = "it left every call to the original"
    return {
        "status": status,
        "calls": calls,
        "left": tally.left,
        "sites": tuple(sorted(sites.items())),
        "compared": tally.compared,
        "max_abs": tally.max_abs if tally.compared else None,
        "problems": tuple((code, message, place) for code, (message, place) in tally.problems.items()),
        "reason": reason,
    }

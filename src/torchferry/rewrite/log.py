"""What became of every registered rewriter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from torchferry.core.report import Finding

Status = Literal["applies", "applied", "left", "declined", "unused", "unknown"]

_CODEBASES = "torchferry.codebases."
_RULES = ("torchferry.rewrite.rules.", _CODEBASES)
_MEANING = {
    "rewrite-differs": "if that is meant, register it with changes_outputs=True",
    "rewrite-structure": "return what the original returns, or register it with changes_outputs=True",
    "rewrite-mutates-input": "work on a copy of the argument",
}


@dataclass(frozen=True)
class RewriteRow:
    """One registered rewriter.

    Attributes:
        name: What it replaces, as registered.
        replacement: The replacement's module and qualified name.
        file: The replacement's ``file:line``.
        kind: ``function``, ``module`` or ``symbolic``.
        backend: What it is registered for, or ``default``.
        ir: What it is registered for, or ``default``.
        changes_outputs: Its results differ from the original's on purpose.
        status: ``applied``; ``left`` if every call was left to the original; ``declined`` if its conditions do not
            hold or a more specific one was chosen; ``unused`` if nothing called it; ``unknown`` if its name leads
            nowhere; ``applies`` in a plan that was not carried out.
        calls: Calls that it took or translated, or instances of the module class that it replaced.
        left: Those of the calls whose result was the original's own.
        sites: Where the calls came from, as ``file:line``, or the paths of the modules; each with its number.
        compared: Calls that were compared with the original.
        max_abs: The largest absolute difference seen; None if nothing was compared.
        problems: Code, message and place of what is wrong with it.
        reason: Why it did not apply, or was not compared.
        suggestion: For an unknown name, the nearest one that exists.
    """

    name: str
    replacement: str
    file: str
    kind: Literal["function", "module", "symbolic"]
    backend: str
    ir: str
    changes_outputs: bool
    status: Status
    calls: int = 0
    left: int = 0
    sites: tuple[tuple[str, int], ...] = ()
    compared: int = 0
    max_abs: float | None = None
    problems: tuple[tuple[str, str, str], ...] = ()
    reason: str = ""
    suggestion: str = ""

    @property
    def is_idle_rule(self) -> bool:
        """A rule of our own that had nothing to do: they stand ready for every model, so that is no news."""
        return self.status in ("unused", "left") and self.replacement.startswith(_RULES)

    @property
    def is_of_another_codebase(self) -> bool:
        """A rewriter for models of a codebase that this model is not of; such are registered by using the codebase.

        A symbolic function of its own operators applies to nothing else, so that it says nothing before it acted.
        """
        idle = ("unused", "unknown", "declined", *(("applies",) if self.kind == "symbolic" else ()))
        return self.status in idle and self.replacement.startswith(_CODEBASES)

    def __str__(self) -> str:
        text = f"{self.status:8} {self.name} -> {self.replacement} ({self.file})"
        if self.calls:
            noun = "instance" if self.kind == "module" else "call"
            text += f": {self.calls} {noun}{'s' if self.calls > 1 else ''}"
            text += f", {self.left} left to the original" if self.left else ""
            text += f", max abs {self.max_abs:.3g} over {self.compared} compared" if self.max_abs is not None else ""
        if self.reason:
            text += f": {self.reason}"
        return text


@dataclass(frozen=True)
class RewriteLog:
    """What became of every registered rewriter.

    Attributes:
        rows: In the order of registration: functions, modules, symbolic functions.
        troubles: What went wrong apart from any one of them, such as a plugin that does not load.
    """

    rows: tuple[RewriteRow, ...] = ()
    troubles: tuple[Finding, ...] = ()

    def __str__(self) -> str:
        return "\n".join(map(str, (*self.rows, *self.troubles))) or "no rewriter is registered"

    def applied(self) -> tuple[RewriteRow, ...]:
        """Return the rows of those that did something."""
        return tuple(row for row in self.rows if row.status == "applied")

    def with_checks(self, checked: RewriteLog) -> RewriteLog:
        """Return this log with the comparisons of another one, made with the same rewriters on real values.

        Args:
            checked: The log of a context that was entered with ``check=True``.
        """
        known = {_identity(row): row for row in checked.rows}
        rows = tuple(_with_check(row, known.get(_identity(row))) for row in self.rows)
        return dataclasses.replace(self, rows=rows)

    def findings(self) -> tuple[Finding, ...]:
        """Return what deserves attention: a rewriter that is wrong is an error, an unknown name a warning."""
        found = list(self.troubles)
        for row in self.rows:
            for code, message, place in row.problems:
                text = f"the rewriter {row.replacement} of '{row.name}' {message}"
                found.append(Finding(code, "error", text, where=f"{row.file}, called at {place}", hint=_MEANING[code]))
            if row.status == "unknown":
                hint = (
                    f"did you mean '{row.suggestion}'?"
                    if row.suggestion
                    else "check the name that it is registered for"
                )
                text = f"the rewriter {row.replacement} never fires: '{row.name}' cannot be rewritten: {row.reason}"
                found.append(Finding("rewriter-unknown", "warning", text, where=row.file, hint=hint))
            elif row.status == "applied" and row.reason:
                text = f"the rewriter {row.replacement} of '{row.name}' was not compared on every call: {row.reason}"
                found.append(Finding("rewriter-not-compared", "info", text, where=row.file))
        unused = [row.name for row in self.rows if row.status == "unused" and not row.is_idle_rule]
        if unused:
            text = f"nothing called what these rewriters replace: {', '.join(unused)}"
            found.append(Finding("rewriter-unused", "info", text))
        return tuple(found)


def _identity(row: RewriteRow) -> tuple[str, ...]:
    return row.name, row.replacement, row.file, row.backend, row.ir


def _with_check(row: RewriteRow, checked: RewriteRow | None) -> RewriteRow:
    # What a symbolic function gave has no form in PyTorch; the whole graph is compared instead.
    if checked is None or row.status not in ("applied", "left") or row.kind == "symbolic":
        return row
    never = "" if checked.compared or row.status == "left" else "nothing called it where calls are compared"
    return dataclasses.replace(
        row,
        compared=checked.compared,
        max_abs=checked.max_abs,
        problems=checked.problems,
        reason=row.reason or checked.reason or never,
    )

"""A graph that was made ready for the precision that its engine computes in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchferry.core.report import Finding, Report
    from torchferry.graph import Exported


@dataclass(frozen=True)
class Prepared:
    """What is compiled, and what is to be told of how it was made.

    Attributes:
        exported: The graph in the types of its precision.
        findings: What was seen on the way.
        facts: By section, to be shown under the target's name.
        certificate: What was proved about it, as JSON; None if nothing was.
    """

    exported: Exported
    findings: tuple[Finding, ...] = ()
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    certificate: str | None = None

    def added_to(self, report: Report, target: str) -> Report:
        """Return a report that also tells of the preparation."""
        report = report.with_findings(self.findings)
        for section, facts in self.facts.items():
            report = report.with_facts(f"{section} of {target}", facts)
        return report

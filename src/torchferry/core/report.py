"""Findings and reports: what was seen, how bad it is, where, and what to do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from torchferry.core.errors import VerificationError
from torchferry.core.files import write_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchferry.core.compare import Comparison

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing.

    Attributes:
        code: A short fixed name, such as ``output-differs``.
        severity: ``error`` fails the report.
        message: One or two sentences.
        where: The user's line, a module path, an output, or sizes.
        hint: The next step.
    """

    code: str
    severity: Severity
    message: str
    where: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        text = f"{self.severity}: {self.message} [{self.code}]"
        if self.where:
            text += f"\n    at {self.where}"
        if self.hint:
            text += f"\n    hint: {self.hint}"
        return text


@dataclass(frozen=True)
class Picture:
    """Pictures to show side by side, each as an encoded PNG file.

    Attributes:
        caption: What the row shows.
        images: Label and PNG bytes of each.
    """

    caption: str
    images: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class Report:
    """What a stage found.

    Attributes:
        title: What was done to what.
        findings: In the order they were made.
        comparisons: Every output at every case.
        facts: Sections of names and values: environment, graph, sizes, steps.
        pictures: Rows of pictures; only the HTML page shows them.
    """

    title: str
    findings: tuple[Finding, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    pictures: tuple[Picture, ...] = ()

    @property
    def passed(self) -> bool:
        """True if no finding is an error and every comparison agrees."""
        return not any(f.severity == "error" for f in self.findings) and all(c.passed for c in self.comparisons)

    def raise_for_failure(self) -> Self:
        """Return the report itself if it passed.

        Raises:
            VerificationError: If it did not; the message holds every error.
        """
        errors: list[object] = [f for f in self.findings if f.severity == "error"]
        errors = errors or [c for c in self.comparisons if not c.passed]
        if errors:
            count = f"{len(errors)} error" + ("s" if len(errors) > 1 else "")
            raise VerificationError(f"{self.title}: {count}\n" + "\n".join(f"  {f}" for f in errors))
        return self

    def with_findings(self, findings: Iterable[Finding]) -> Self:
        """Return the report with more findings at its end."""
        return dataclasses.replace(self, findings=(*self.findings, *findings))

    def with_facts(self, section: str, facts: Mapping[str, Any]) -> Self:
        """Return the report with one more section of names and values."""
        return dataclasses.replace(self, facts={**self.facts, section: {k: str(v) for k, v in facts.items()}})

    def joined(self, other: Report) -> Self:
        """Return one report with what both hold; facts of the same section and name are this report's."""
        sections = {**other.facts, **self.facts}
        return dataclasses.replace(
            self,
            findings=(*self.findings, *other.findings),
            comparisons=(*self.comparisons, *other.comparisons),
            facts={name: {**other.facts.get(name, {}), **self.facts.get(name, {})} for name in sections},
            pictures=(*self.pictures, *other.pictures),
        )

    def to_text(self) -> str:
        """Render for a terminal or a log."""
        lines = [f"{self.title}: {'passed' if self.passed else 'FAILED'}"]
        lines += [f"  {c}" for c in self.comparisons]
        lines += [f"  {f}" for f in self.findings]
        for section, facts in self.facts.items():
            lines.append(f"  {section}")
            lines += [f"    {name}: {value}" for name, value in facts.items()]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.to_text()

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the pictures as plain JSON values; numbers that JSON lacks become text."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "pictures"}
        return {"passed": self.passed, **plain(shown)}

    def to_json(self) -> str:
        """Render as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """Render as one self-contained page (needs Jinja2, which comes with the ``export`` extra)."""
        from torchferry.core.report_page import render

        return render(self)

    def save(self, path: str | Path) -> None:
        """Write ``.html``, ``.json`` or text, by the name's ending.

        Raises:
            OutputError: If the file cannot be written.
        """
        path = Path(path)
        renderer = {".html": self.to_html, ".json": self.to_json}.get(path.suffix, self.to_text)
        write_text(path, renderer())


def plain(value: Any) -> Any:
    """Return dataclasses, mappings and sequences as plain JSON values; numbers that JSON lacks become text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, float) and not (float("-inf") < value < float("inf")):
        return str(value)
    return value

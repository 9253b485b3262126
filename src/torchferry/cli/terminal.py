"""What the user sees: steps as they run on a terminal, nothing but results elsewhere, JSON for machines."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from rich.status import Status

    from torchferry.core.errors import TorchferryError
    from torchferry.core.report import Finding
    from torchferry.pipeline.steps import Step

_MARKS = {"error": "[red]✗[/]", "warning": "[yellow]![/]", "info": "[blue]i[/]"}


class Terminal:
    """Writes progress to standard error and results to standard output.

    Args:
        as_json: Print one JSON object at the end in place of text.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._out = sys.stdout
        self.shows_progress = sys.stderr.isatty() and not as_json
        self._status: Status | None = None
        if self.shows_progress:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def own_output(self) -> Iterator[None]:
        """While inside, what else prints (a model's own code) goes to standard error, so that our JSON stays whole."""
        with redirect_stdout(sys.stderr) if self.as_json else nullcontext():
            yield

    def started(self, name: str) -> None:
        """Show a step that begins, or what it has come to."""
        if self.shows_progress and self._status is not None:
            self._status.update(name)
        elif self.shows_progress:
            self._status = self._console.status(name)
            self._status.start()

    def finished(self, step: Step) -> None:
        """Show a step that ended well; without a terminal only what must not go unsaid."""
        self.close()
        if self.shows_progress:
            from rich.markup import escape

            detail = f"  [dim]{escape(step.detail)}[/]" if step.detail else ""
            self._console.print(
                f"[green]✓[/] {escape(step.name)}  [cyan]{step.seconds:.1f} s  {step.peak_mib:.0f} MiB[/]{detail}"
            )
        elif step.notable and not self.as_json:
            print(f"{step.name}: {step.detail}", file=sys.stderr)  # noqa: T201

    def findings(self, findings: Iterable[Finding]) -> None:
        """Show what the user should know: errors and warnings anywhere, the rest on a terminal only."""
        for finding in findings:
            if self.as_json or (finding.severity == "info" and not self.shows_progress):
                continue
            if self.shows_progress:
                from rich.markup import escape

                self._console.print(f"{_MARKS[finding.severity]} {escape(str(finding))}")
            else:
                print(finding, file=sys.stderr)  # noqa: T201 - the program's output

    def result(self, text: str, values: dict[str, Any]) -> None:
        """Print the result: the text, or the values as JSON."""
        self.close()
        self._print(json.dumps(values, indent=2, default=_json_value) if self.as_json else text)

    def error(self, exc: TorchferryError) -> None:
        """Print an error, on standard output as JSON where that was asked for."""
        self.close()
        if self.as_json:
            values = {"code": type(exc).__name__, "message": exc.message, "where": exc.where, "hint": exc.hint}
            self._print(json.dumps({"error": values}, indent=2))
        else:
            print(f"error: {exc}", file=sys.stderr)  # noqa: T201

    def _print(self, text: str) -> None:
        # Flushed, so that a reader who left is noticed here and not while Python exits.
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Take down what is being shown."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def _json_value(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)

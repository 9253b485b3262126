"""``torchferry env``: what is installed here and what it can do, to paste into a bug report."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from torchferry.cli.terminal import Terminal


def add(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("env", help="show versions, engines and what each can do here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, terminal: Terminal) -> int:  # noqa: ARG001 - every command takes its options
    """Run the command."""
    from torchferry.pipeline.environment import environment

    found = environment()
    terminal.result(found.to_text(), dataclasses.asdict(found))
    return 0

"""The ``torchferry`` program: finds the command, runs it, and words its errors."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from torchferry import __version__
from torchferry.cli import (
    command_bench,
    command_compile,
    command_deploy,
    command_env,
    command_export,
    command_fp16,
    command_inspect,
    command_op,
    command_partition,
    command_run,
    command_verify,
)
from torchferry.cli.terminal import Terminal
from torchferry.core.errors import ConfigError, TorchferryError

if TYPE_CHECKING:
    from collections.abc import Sequence

# In the order in which they are used. To add one: a file with `add` and `run`, and its name here.
_COMMANDS = (
    command_deploy,
    command_export,
    command_compile,
    command_verify,
    command_run,
    command_partition,
    command_fp16,
    command_bench,
    command_inspect,
    command_op,
    command_env,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program.

    Args:
        arguments: Without the program's name; those of the process if None.

    Returns:
        0; 1 if the command failed or was interrupted; 2 if its flags or config cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="torchferry", description="Carry a PyTorch model to an inference engine and prove that it arrived intact."
    )
    parser.add_argument("--version", action="version", version=f"torchferry {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(commands)
    options = parser.parse_args(arguments)
    terminal = Terminal(as_json=getattr(options, "json", False))
    previous = _stop_on_terminate()
    try:
        return _run(options, terminal)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; say nothing at exit either
        return 1
    finally:
        terminal.close()
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the command and word what it raises; anything else is a bug and keeps its traceback."""
    try:
        with terminal.own_output():
            return int(options.run(options, terminal))
    except BrokenPipeError:
        raise
    except TorchferryError as exc:
        terminal.error(exc)
        return 2 if isinstance(exc, ConfigError) else 1
    except KeyboardInterrupt:
        terminal.error(TorchferryError("interrupted; nothing is half written"))
        return 1
    except (OSError, MemoryError) as exc:  # the machine's limits may be met anywhere
        terminal.error(TorchferryError(str(exc) or "out of memory"))
        return 1


def _stop_on_terminate() -> Any:
    """Let a polite kill end like Ctrl-C, so that half-written folders are cleaned up."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        return None

"""L5: the command line, one file a command."""

from torchferry.cli.main import main

__all__ = ["main"]

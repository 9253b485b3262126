"""Keeping torch's own talk from the user's terminal while it exports."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's log lines, its libraries' deprecation warnings, and the graph that it prints on failure."""
    with ExitStack() as stack:
        for name in ("torch.onnx", "torch.export", "torch._export", "torch._guards", "torch._subclasses", "torch.fx"):
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        stack.enter_context(redirect_stderr(_WithoutPartialGraph(sys.stderr)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


class _WithoutPartialGraph:
    """Standard error without the half-built graph that torch.export prints there when it fails."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._dropping = False

    def write(self, text: str) -> int:
        self._dropping = "def forward(self, arg" in text or (self._dropping and text == "\n")
        return len(text) if self._dropping else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

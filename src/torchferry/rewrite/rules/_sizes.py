"""Which sizes a rule has to care for."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def fixed(*sizes: Any) -> bool:
    """Tell whether all of these are constants of the graph that is being exported.

    Outside of an export nothing is fixed: there a rule always acts, so that it can be compared with the original.

    Args:
        *sizes: Sizes or other numbers; a dynamic one is a ``torch.SymInt`` or ``torch.SymFloat``.
    """
    return torch.compiler.is_exporting() and not any(isinstance(size, torch.SymInt | torch.SymFloat) for size in sizes)


def same(first: Any, second: Any) -> bool:
    """Tell whether two sizes are certainly equal, without tying the graph to the answer."""
    return statically_known_true(first == second)

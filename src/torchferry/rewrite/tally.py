"""What is known of one rewriter's calls."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torchferry.rewrite.sites import Site


class Tally:
    """Counts calls and remembers what comparing them gave.

    Attributes:
        left: Calls whose result was the original's own.
        compared: Calls that were compared with the original.
        max_abs: The largest absolute difference.
        problems: Code and message of each kind of problem, from the first call that had it, and its place.
        not_compared: Why a call could not be compared; empty if all could.
    """

    def __init__(self) -> None:
        self.left = 0
        self.compared = 0
        self.max_abs = 0.0
        self.problems: dict[str, tuple[str, str]] = {}
        self.not_compared = ""
        self._places: Counter[str] = Counter()
        self._traced: dict[Hashable, tuple[int, Counter[str]]] = {}

    @property
    def sites(self) -> Counter[str]:
        """How many calls came from each place."""
        return sum((places for _, places in self._traced.values()), self._places)

    def count(self, site: Site) -> None:
        """Count a call. When Dynamo starts over, what it had traced before does not count."""
        if site.trace is None:
            if site.counts:
                self._places[site.place] += 1
            return
        what, attempt = site.trace
        known, places = self._traced.get(what, (attempt, Counter[str]()))
        if known != attempt:
            places = Counter()
        places[site.place] += 1
        self._traced[what] = attempt, places

    def problem(self, code: str, message: str, place: str) -> None:
        """Note what is wrong with a call."""
        self.problems.setdefault(code, (message, place))

"""Solving the scales: a small integer program, fewest FP32 nodes first, then fewest multiplications, then most room.

Attempts, each with more freedom: weights alone; multiplications by powers of two at the problem's edges; both again
where divisors may lose bits; single nodes in FP32. Within the first that has a solution, the number of additions is
brought to its least, and then, with the additions settled, headroom and the share of subnormal numbers are improved.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from torchferry.core.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torchferry.precision.limits import Limits
    from torchferry.precision.problem import Edge, Problem, Row, Unknown

REACH = 64
"""Scales lie between ``2**-REACH`` and ``2**REACH``."""
FACTOR_BITS = (-24, 15)
"""FP16 holds these powers of two, so one multiplication can shift a tensor by as much."""
_OPTIONAL = ("candidate", "log")
_ISLAND = 1000.0
_HEADROOM, _FLOOR, _AWAY = 1.0, 0.25, 0.01
_SECONDS = 20.0


@dataclass(frozen=True)
class Solution:
    """Scales for every tensor.

    Attributes:
        scales: The k of each tensor, those inside norms and constants too.
        shifts: For each edge that needs one, by how many bits the tensor is shifted before that reader.
        islands: Nodes that stay FP32, with the reason.
        binding: For each node added, and each island: which requirements could not be met without it.
        is_optimal: False if the solver ran out of time; the scales then hold, but with more additions than needed.
    """

    scales: dict[str, int]
    shifts: dict[tuple[str, str], int] = field(default_factory=dict)
    islands: dict[str, str] = field(default_factory=dict)
    binding: dict[str, str] = field(default_factory=dict)
    is_optimal: bool = True


_ATTEMPTS = (  # edges, islands, precise divisors
    (False, False, True),
    (True, False, True),
    (False, False, False),
    (True, False, False),
    (True, True, False),
)


def solve(problem: Problem, *, weights_only: bool = False) -> Solution | None:
    """Solve for scales.

    Args:
        problem: From ``problem.build``.
        weights_only: Add nothing; for a module that is to be repaired by its weights.

    Returns:
        The scales, or None if there are none with weights alone and nothing else was allowed.

    Raises:
        ExportError: If the solver fails even where every node may stay FP32.
    """
    for edges, islands, precise in _ATTEMPTS:
        if weights_only and edges:
            continue
        program = _Program(problem, use_edges=edges, use_islands=islands, precise=precise)
        if program.is_contradiction:
            continue
        chosen = program.fewest_additions()
        if chosen is not None:
            return program.improved(chosen)
    if weights_only:
        return None
    raise ExportError("no power-of-two scales were found for the graph", hint="raise the time limit of the solver")


class _Program:
    """One attempt as an integer program, equal unknowns merged beforehand."""

    def __init__(self, problem: Problem, *, use_edges: bool, use_islands: bool, precise: bool) -> None:
        self.problem = problem
        self.edges = [e for e in problem.edges if e.kind not in _OPTIONAL or use_edges]
        self.owners = [o for o in problem.owners if o not in problem.islands] if use_islands else []
        self._parent: dict[Unknown, Unknown] = {}
        self._merge(use_edges)
        self._collect_limits(precise)
        self._columns: dict[Any, int] = {}
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._is_integer: list[bool] = []
        self._rows: list[tuple[dict[int, float], float, float]] = []
        self._build()

    @property
    def is_contradiction(self) -> bool:
        """True if bounds exclude each other already."""
        return any(low > high for low, high in zip(self._lower, self._upper, strict=True))

    def root(self, unknown: Unknown) -> Unknown:
        """Return what an unknown was merged into."""
        path = []
        while unknown in self._parent:
            path.append(unknown)
            unknown = self._parent[unknown]
        for each in path:
            self._parent[each] = unknown
        return unknown

    def _join(self, a: Unknown, b: Unknown) -> None:
        a, b = self.root(a), self.root(b)
        if a != b:
            self._parent[a] = b

    def _merge(self, use_edges: bool) -> None:
        if not use_edges:
            for edge in self.problem.edges:
                if edge.kind in _OPTIONAL:
                    self._join(edge.unknown, ("t", edge.tensor))
        relaxed = set(self.owners)
        for row in self._active_rows():
            if row.owner not in relaxed and len(row.terms) == 2 and sorted(row.terms.values()) == [-1, 1]:
                self._join(*row.terms)

    def _active_rows(self) -> Iterable[Row]:
        return (row for row in self.problem.rows if row.owner not in self.problem.islands)

    def _collect_limits(self, precise: bool) -> None:
        """Bring the bounds of merged tensors together; the soft ones keep how many tensors ask for each."""
        self.least: dict[Unknown, int] = {}
        self.most: dict[Unknown, int] = {}
        self.wanted: dict[Unknown, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self.floor: dict[Unknown, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        named: list[tuple[Unknown, Limits]] = [(("t", name), limits) for name, limits in self.problem.limits.items()]
        named += [
            (edge.unknown, self.problem.limits[edge.tensor])
            for edge in self.edges
            if edge.kind == "candidate" and edge.tensor in self.problem.limits
        ]
        for unknown, limits in named:
            if self.problem.inner.get(unknown[1]) in self.problem.islands:
                continue
            root = self.root(unknown)
            if limits.least is not None:
                self.least[root] = max(limits.least, self.least.get(root, -REACH))
            most = limits.precise if precise else limits.most
            if most is not None:
                self.most[root] = min(most, self.most.get(root, REACH))
            if limits.wanted is not None:
                self.wanted[root][limits.wanted] += 1
            if limits.floor is not None:
                self.floor[root][limits.floor] += 1

    def _column(self, key: Any, low: float = -np.inf, high: float = np.inf, *, integer: bool = True) -> int:
        if key not in self._columns:
            self._columns[key] = len(self._lower)
            self._lower.append(low)
            self._upper.append(high)
            self._is_integer.append(integer)
        return self._columns[key]

    def _scale(self, unknown: Unknown) -> int:
        root = self.root(unknown)
        return self._column(root, max(-REACH, self.least.get(root, -REACH)), min(REACH, self.most.get(root, REACH)))

    def _build(self) -> None:
        for unknown in [*self.least, *self.most, *self.wanted, *self.floor]:
            self._scale(unknown)
        relaxed = set(self.owners)
        for row in self._active_rows():
            terms: dict[int, float] = defaultdict(float)
            for unknown, coefficient in row.terms.items():
                terms[self._scale(unknown)] += coefficient
            terms = {column: c for column, c in terms.items() if c}
            if not terms:
                continue
            if row.owner in relaxed:
                slack = sum(abs(c) for c in terms.values()) * REACH
                island = self._column(("island", row.owner), 0, 1)
                self._rows.append(({**terms, island: -slack}, -np.inf, 0))
                self._rows.append(({**terms, island: slack}, 0, np.inf))
            elif len(terms) == 1:
                ((column, _),) = terms.items()
                self._lower[column], self._upper[column] = max(self._lower[column], 0), min(self._upper[column], 0)
            else:
                self._rows.append((terms, 0, 0))
        self._relax_inner(relaxed)
        for edge in self.edges:
            self._add_edge(edge)

    def _relax_inner(self, relaxed: set[str]) -> None:
        """Let what is inside a node that may stay FP32 be as large as it likes."""
        for name in self.problem.limits:
            column = self._columns.get(self.root(("t", name)))
            owner = self.problem.inner.get(name)
            if column is None or owner not in relaxed:
                continue
            low, high = self._lower[column], self._upper[column]
            self._lower[column], self._upper[column] = -REACH, REACH
            island = self._column(("island", owner), 0, 1)
            self._rows.append(({column: 1, island: 2 * REACH}, low, np.inf))
            self._rows.append(({column: 1, island: -2 * REACH}, -np.inf, high))

    def _add_edge(self, edge: Edge) -> None:
        before, after = self._scale(("t", edge.tensor)), self._scale(edge.unknown)
        if edge.kind == "boundary" or before == after:
            return
        low, high = FACTOR_BITS if edge.kind != "log" else (-REACH, REACH)
        if edge.kind == "clip":
            self._rows.append(({before: 1, after: -1}, low, high))
            return
        used = self._column(("edge", edge), 0, 1)
        self._rows.append(({before: 1, after: -1, used: -high}, -np.inf, 0))
        self._rows.append(({before: 1, after: -1, used: -low}, 0, np.inf))

    def fewest_additions(self) -> dict[int, int] | None:
        """Return which edges and islands are used, by column, in the cheapest solution; None if there is none."""
        cost = np.zeros(len(self._lower))
        for key, column in self._columns.items():
            if key[0] == "edge":
                cost[column] = 1.0
            elif key[0] == "island":
                cost[column] = _ISLAND
        found = self._solve(cost)
        if found is None:
            return None
        return {column: round(found[column]) for key, column in self._columns.items() if key[0] in ("edge", "island")}

    def improved(self, chosen: dict[int, int]) -> Solution:
        """Return the best scales with these additions."""
        for column, value in chosen.items():
            self._lower[column] = self._upper[column] = value
        cost: dict[int, float] = defaultdict(float)
        for root, column in list(self._columns.items()):
            if root[0] not in ("t", "use"):
                continue
            for kind, wishes, weight in (("above", self.wanted, _HEADROOM), ("below", self.floor, _FLOOR)):
                for bound, tensors in wishes.get(root, {}).items():
                    deficit = self._column((kind, root, bound), 0, integer=False)
                    sign = 1 if kind == "above" else -1
                    self._rows.append(({column: sign, deficit: 1}, sign * bound, np.inf))
                    cost[deficit] += weight * tensors
            away = self._column(("away", root), 0, integer=False)
            self._rows.append(({away: 1, column: -1}, 0, np.inf))
            self._rows.append(({away: 1, column: 1}, 0, np.inf))
            cost[away] += _AWAY
        values = self._solve(np.array([cost[column] for column in range(len(self._lower))]))
        if values is None:
            raise ExportError("the scales were found and lost again", hint="please report this graph")
        return self._solution(values)

    def _solve(self, cost: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        entries = [
            (number, column, c) for number, (terms, _, _) in enumerate(self._rows) for column, c in terms.items()
        ]
        matrix = sparse.csr_array(
            ([c for _, _, c in entries], ([n for n, _, _ in entries], [k for _, k, _ in entries])),
            shape=(len(self._rows), len(self._lower)),
        )
        constraints = (
            [LinearConstraint(matrix, [low for _, low, _ in self._rows], [high for _, _, high in self._rows])]
            if self._rows
            else []
        )
        found = milp(
            cost,
            integrality=np.array(self._is_integer, int),
            bounds=Bounds(np.array(self._lower), np.array(self._upper)),
            constraints=constraints,
            options={"time_limit": _SECONDS},
        )
        self.is_optimal = found.status == 0
        return found.x  # type: ignore[no-any-return]

    def _solution(self, values: np.ndarray[Any, Any]) -> Solution:
        def scale(unknown: Unknown) -> int:
            column = self._columns.get(self.root(unknown))
            return 0 if column is None else round(values[column])

        names = {unknown[1] for row in self.problem.rows for unknown in row.terms if unknown[0] == "t"}
        scales = {name: scale(("t", name)) for name in sorted(names | set(self.problem.limits))}
        islands = dict(self.problem.islands)
        for owner in self.owners:
            column = self._columns.get(("island", owner))
            if column is not None and round(values[column]):
                islands[owner] = "no scale of its operands keeps it in range"
        shifts = {
            (edge.tensor, edge.reader): scales.get(edge.tensor, 0) - scale(edge.unknown)
            for edge in self.problem.edges
            if scales.get(edge.tensor, 0) != scale(edge.unknown) and edge.reader not in islands
        }
        return Solution(scales, shifts, islands, self._binding(shifts, islands), self.is_optimal)

    def _binding(self, shifts: Mapping[tuple[str, str], int], islands: Mapping[str, str]) -> dict[str, str]:
        """Say of each addition which requirements meet there."""
        members: dict[Unknown, list[str]] = defaultdict(list)
        for name in self.problem.limits:
            members[self.root(("t", name))].append(name)

        def demand(unknown: Unknown) -> str:
            root = self.root(unknown)
            column = self._columns.get(root)
            if column is not None and self._lower[column] == self._upper[column] == 0:
                return f"{self._who_fixes(root)} needs k = 0"
            limits = self.problem.limits
            least = [(bound, name) for name in members[root] if (bound := limits[name].least) is not None]
            most = [(bound, name) for name in members[root] if (bound := limits[name].precise) is not None]
            words = [f"'{max(least)[1]}' needs k >= {max(least)[0]}"] if least else []
            words += [f"'{min(most)[1]}' needs k <= {min(most)[0]}"] if most else []
            return " and ".join(words) or f"'{unknown[1]}' has no bound"

        binding = {
            f"{tensor} -> {reader}": f"{demand(('t', tensor))}; {demand(('use', tensor, reader))}"
            for tensor, reader in shifts
        }
        for owner in islands.keys() - self.problem.islands.keys():
            unknowns = {u for row in self.problem.rows if row.owner == owner for u in row.terms if u[0] in ("t", "use")}
            binding[owner] = "; ".join(sorted({demand(unknown) for unknown in unknowns}))
        return binding

    def _who_fixes(self, root: Unknown) -> str:
        rows = (row for row in self.problem.rows if len(row.terms) == 1)
        owners = [row.owner for row in rows if self.root(next(iter(row.terms))) == root]
        return f"'{owners[0]}'" if owners else "the graph"

"""Measuring contenders: each in a process of its own, asked in turn for some runs."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from torchferry.core.engine import LayerTime
from torchferry.pipeline.bench_report import BenchRow, Measured, ratios
from torchferry.pipeline.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType
    from typing import Self

    from torchferry.core.engine import Array

_T = TypeVar("_T")
WORKER = ("-m", "torchferry.pipeline.bench_worker")
_ROUND_SECONDS = 0.1  # long against the clock's noise, short against what else happens on a machine
_LONGEST_ROUND = 0.5  # where a machine that is busy makes runs take far longer than they did at the warm-up
_MOST_RUNS = 1000
_LEAST_ROUNDS = 5  # before anything is left out of a race
_HOPELESS = 1.5  # times as long as the fastest in three quarters of the rounds


@dataclass(frozen=True)
class Contender:
    """Something to be measured.

    Attributes:
        name: What its row is called.
        spec: What its worker is to open; see ``bench_worker``.
        inputs: What it is run on.
        failed: Why it cannot be measured; empty if it can be tried.
        compile_seconds: What compiling it took.
        worker: Python's arguments that start its worker.
    """

    name: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Array] = field(default_factory=dict)
    failed: str = ""
    compile_seconds: float | None = None
    worker: Sequence[str] = WORKER


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        threads: Threads of each contender.
        rounds: How often each is asked.
        runs: Runs a round; None for about a tenth of a second.
        warm_up: Runs before the first round.
        profile: Measure the layers as well, where an engine tells them.
        race: Only the fastest is looked for: those that are hopelessly slower are soon left out of the rounds, which
            end when one is left.
    """

    threads: int
    rounds: int = 20
    runs: int | None = None
    warm_up: int = 5
    profile: bool = False
    race: bool = False


class _FailedError(Exception):
    """A contender cannot go on."""


class _Worker:
    """The process of one contender; leaving the block ends it, with all that it has started."""

    def __init__(self, contender: Contender, threads: int, scratch: Path) -> None:
        self.contender = contender
        self.outputs = scratch / "outputs.npz"
        self.rounds: list[tuple[float, ...]] = []
        self.cpu: list[float] = []
        self.opened: dict[str, Any] = {}
        self.runs = 1
        self.longest: float | None = None
        self._threads = threads
        self._scratch = scratch
        self._errors = scratch / "stderr.txt"

    def __enter__(self) -> Self:
        count = str(self._threads)
        # What it leaves on disk goes with the scratch folder, torch's compiled kernels included.
        places = {"TMPDIR": self._scratch, "TORCHINDUCTOR_CACHE_DIR": self._scratch / "torchinductor"}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
        path = os.pathsep.join(entry or "." for entry in sys.path)
        environment = {**os.environ, **threads, "PYTHONPATH": path, **{k: str(v) for k, v in places.items()}}
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603 - our own Python
                [sys.executable, *self.contender.worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # a group of its own, to be ended as a whole; Ctrl-C reaches us alone
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(ProcessLookupError):  # it has ended and was waited for
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # a request that it did not live to read
                if pipe is not None:
                    pipe.close()
        self._process.wait()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and return its answer.

        Raises:
            _FailedError: If the contender cannot do it, or its process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise _FailedError(self._ending())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _FailedError(answer["error"])
        return answer

    def _ending(self) -> str:
        status = self._process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        last = self._errors.read_text(errors="replace").strip().splitlines()[-1:]
        return f"its process ended with {how}" + "".join(f": {line}" for line in last)

    def start(self, plan: Plan) -> None:
        """Open the contender and warm it up."""
        inputs = self._scratch / "inputs.npz"
        np.savez(inputs, **self.contender.inputs)  # type: ignore[arg-type]
        self.opened = self.ask(
            open=dict(self.contender.spec), inputs=str(inputs), outputs=str(self.outputs), threads=plan.threads
        )
        taken = self.ask(run=max(1, plan.warm_up))["seconds"]
        fitting = int(_ROUND_SECONDS / max(statistics.median(taken), 1e-9))
        self.runs = plan.runs or min(_MOST_RUNS, max(1, fitting))
        self.longest = None if plan.runs else _LONGEST_ROUND

    def play(self) -> None:
        """Run one round."""
        answer = self.ask(run=self.runs, within=self.longest)
        self.rounds.append(tuple(answer["seconds"]))
        self.cpu.append(answer["cpu_seconds"])

    def finish(self, plan: Plan) -> Measured:
        """Return what was measured."""
        peak = self.ask(peak=True)["mib"]
        layers = self.ask(profile=max(1, plan.warm_up, self.runs))["layers"] if plan.profile else []
        return Measured(
            rounds=tuple(self.rounds),
            cpu_seconds=statistics.median(self.cpu),
            open_seconds=self.opened["open_seconds"],
            first_seconds=self.opened["first_seconds"],
            peak_mib=peak,
            layers=tuple(LayerTime(*layer) for layer in layers),
        )


def measure(contenders: Sequence[Contender], plan: Plan, steps: Steps | None = None) -> tuple[BenchRow, ...]:
    """Measure contenders side by side, and return a row for each.

    All are opened first, one after the other. Then every round asks each for some runs, beginning with another one each
    time, so that all of them meet the same disturbances. One that fails takes no further part.
    """
    steps = steps or Steps()
    failed = {place: contender.failed for place, contender in enumerate(contenders) if contender.failed}
    with (
        tempfile.TemporaryDirectory(prefix="torchferry-", ignore_cleanup_errors=True) as folder,
        ExitStack() as stack,
    ):
        workers: dict[int, _Worker] = {}

        def each(places: list[int], do: Callable[[_Worker], _T]) -> dict[int, _T]:
            done = {}
            for place in places:
                try:
                    done[place] = do(workers[place])
                except _FailedError as exc:
                    failed[place] = str(exc)
            return done

        for place, contender in enumerate(contenders):
            if place in failed:
                continue
            scratch = Path(folder) / str(place)
            scratch.mkdir()
            with steps.step(f"open {contender.name}"):
                workers[place] = stack.enter_context(_Worker(contender, plan.threads, scratch))
                each([place], lambda worker: worker.start(plan))
        with steps.step("measure"):
            beaten: set[int] = set()
            for turn in range(plan.rounds):
                alive = [place for place in workers if place not in failed and place not in beaten]
                shift = turn % max(1, len(alive))
                each(alive[shift:] + alive[:shift], _Worker.play)
                if plan.race and turn + 1 >= _LEAST_ROUNDS:
                    beaten |= _beaten({place: workers[place].rounds for place in alive if place not in failed})
                    if len(workers.keys() - failed.keys() - beaten) < 2:
                        break
            alive = [place for place in workers if place not in failed]
            measured = each(alive, lambda worker: worker.finish(plan))
        outputs = {place: workers[place].outputs for place in measured}
        return tuple(
            BenchRow(
                name=contender.name,
                version=workers[place].opened.get("version", "") if place in workers else "",
                measured=_compared(measured[place], outputs, place) if place in measured else None,
                failed=failed.get(place, ""),
                compile_seconds=contender.compile_seconds,
            )
            for place, contender in enumerate(contenders)
        )


def _beaten(rounds: Mapping[int, Sequence[Sequence[float]]]) -> set[int]:
    """Return those that are hopelessly slower than the fastest."""
    best = min(rounds.values(), key=lambda taken: statistics.median(map(statistics.median, taken)), default=())
    return {place for place, own in rounds.items() if ratios(own, best).first > _HOPELESS}


def _compared(measured: Measured, outputs: Mapping[int, Path], place: int) -> Measured:
    """Add how far a contender's outputs are from the first one's, where these have the same shapes."""
    first = min(outputs)
    if place == first:
        return measured
    ours, theirs = (_arrays(outputs[key]) for key in (place, first))
    if [array.shape for array in ours] != [array.shape for array in theirs]:
        return measured
    worst = 0.0
    for own, other in zip(ours, theirs, strict=True):
        if own.size:
            with np.errstate(invalid="ignore"):
                apart = np.abs(own.astype(np.float64) - other.astype(np.float64))
            worst = max(worst, float(np.where(np.isnan(own) & np.isnan(other), 0.0, apart).max()))
    return replace(measured, difference=worst)


def _arrays(path: Path) -> list[Array]:
    with np.load(path, allow_pickle=False) as file:
        return [file[str(place)] for place in range(len(file.files))]

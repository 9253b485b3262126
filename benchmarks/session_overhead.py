"""Time of ``Session.run`` over ONNX Runtime's own ``run``, on a model that does next to nothing.

Both run the same file in one process, call by call in turn; the figure is the median of the differences.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

import torchferry as ferry

CALLS = 20_000
WARM_UP = 500


class Sum(torch.nn.Module):
    """Two inputs, one output, and nothing to do."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Add."""
        return left + right


def main() -> None:
    """Measure and print."""
    feeds = {name: np.random.default_rng(0).random((4, 8), np.float32) for name in ("left", "right")}
    example = tuple(torch.from_numpy(array) for array in feeds.values())
    exported = ferry.export(Sum().eval(), example, dynamic_shapes={"left": {0: "batch"}, "right": {0: "batch"}})
    with tempfile.TemporaryDirectory() as folder:
        engine = ferry.compile(exported, ferry.Target(), Path(folder) / "engine")
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        bare = ort.InferenceSession(str(engine.path("model.onnx")), options, providers=["CPUExecutionProvider"])
        with engine.open(threads=1) as session:
            times = measured([lambda: bare.run(None, feeds), lambda: session.run(feeds)])
    difference = statistics.median(b - a for a, b in zip(*times, strict=True))
    medians = [statistics.median(t) for t in times]
    print(f"onnxruntime.InferenceSession.run  {medians[0] * 1e6:6.2f} us (median of {CALLS})")
    print(f"torchferry Session.run            {medians[1] * 1e6:6.2f} us")
    print(f"overhead                          {difference * 1e6:6.2f} us a call")


def measured(calls: list[Callable[[], object]]) -> list[list[float]]:
    """Return the seconds of every call, the calls taking turns."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(CALLS + WARM_UP):
        for kept, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            if turn >= WARM_UP:
                kept.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()

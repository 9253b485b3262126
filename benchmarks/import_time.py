"""Time to import Torchferry, and what loading a package needs, over starting Python with numpy.

Each is a fresh process; they take turns, and the figure is the median.
"""

import statistics
import subprocess
import sys
import time

ROUNDS = 15
CASES = {
    "python": "pass",
    "python with numpy": "import numpy",
    "import torchferry": "import torchferry",
    "ferry.load": "import torchferry; torchferry.load",
    "import torch": "import torch",
}


def seconds(code: str) -> float:
    """Run a fresh process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, code in CASES.items():
            times[name].append(seconds(code))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:18} {value * 1e3:7.0f} ms, {(value - medians['python']) * 1e3:7.0f} ms over bare python")


if __name__ == "__main__":
    main()

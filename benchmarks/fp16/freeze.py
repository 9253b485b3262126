"""Writes `frozen.json`: what the frozen nets are, so that a change to one is seen.

Usage: python benchmarks/fp16/freeze.py

It refuses to write over a seal. Whoever has a reason to change a frozen net deletes the seal, and says so in README.md.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from zoo import FROZEN

if TYPE_CHECKING:
    from zoo import Net

HERE = Path(__file__).parent
SEAL = HERE / "frozen.json"


def sources() -> dict[str, str]:
    """SHA-256 of every file that a frozen net is made of, by its path below `zoo`."""
    zoo = HERE / "zoo"
    files = [zoo / "common.py", *sorted((zoo / "frozen").glob("*.py"))]
    return {file.relative_to(zoo).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def figures(net: Net) -> list[dict[str, Any]]:
    """Shape, mean magnitude and largest magnitude of each output on the first held-out batch, in FP32.

    Sums differ in their last bits between machines, so that these are compared with a tolerance.
    """
    with torch.no_grad():
        outputs = net.build()(*net.held_out(1)[0])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [
        {"shape": list(output.shape), "mean": float(output.abs().mean()), "largest": float(output.abs().max())}
        for output in outputs
    ]


def main() -> int:
    """Write the seal."""
    if SEAL.exists():
        print(f"{SEAL.name} is there already; nothing was written", file=sys.stderr)
        return 1
    seal = {"sources": sources(), "outputs": {name: figures(net) for name, net in FROZEN.items()}}
    SEAL.write_text(json.dumps(seal, indent=1) + "\n", encoding="utf-8")
    print(f"sealed {len(FROZEN)} nets")
    return 0


if __name__ == "__main__":
    sys.exit(main())

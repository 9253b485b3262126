"""Runs an engine on saved arrays, as a program: ncnn may crash on a graph that it should have refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from torchferry.backends.ncnn.session import NcnnSession
from torchferry.core.errors import TorchferryError
from torchferry.core.signature import Signature


def main(folder: Path, scratch: Path) -> None:
    """Run the cases in ``scratch/in.npz``, whose keys are ``case/place``, and write ``scratch/out.npz`` likewise."""
    signature = Signature.from_json((scratch / "signature.json").read_text())
    with np.load(scratch / "in.npz") as file:
        given = dict(file)
    results: dict[str, Any] = {}
    with NcnnSession(signature, folder, "fp32", threads=1) as session:
        for case in sorted({key.partition("/")[0] for key in given}):
            feeds = {name: given[f"{case}/{place}"] for place, name in enumerate(signature.input_names)}
            try:
                outputs = session.run(feeds)
            except TorchferryError as exc:
                results[f"{case}/error"] = np.array(exc.message)
                continue
            results.update({f"{case}/{place}": array for place, array in enumerate(outputs.values())})
    np.savez(scratch / "out.npz", **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Time of ``torchferry deploy`` without its verification over a bare ``torch.onnx.export`` and one ONNX Runtime run.

The model is the super-resolution example. Both are run in turn in one process, after one round of warming up, and the
figure is the ratio of the medians. Steps that prove something (settling sizes 0 and 1, verifying) are timed apart.
"""

import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

import torchferry as ferry
from torchferry import backends
from torchferry.exporter import capture
from torchferry.exporter.checkpoint import load_checkpoint
from torchferry.exporter.reference import load_model
from torchferry.pipeline.export import rewriter_context
from torchferry.verification import settle

EXAMPLE = Path(__file__).parents[1] / "examples" / "super_resolution"
ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 7
SHAPES = {"image": {0: "batch", 2: "height", 3: "width"}}


def bare(model: torch.nn.Module, image: torch.Tensor, folder: Path) -> dict[str, float]:
    """What a user without Torchferry does."""
    start = time.perf_counter()
    dim = torch.export.Dim.DYNAMIC
    path = folder / "m.onnx"
    name = next(iter(SHAPES))
    torch.onnx.export(
        model, (image,), path, dynamo=True, dynamic_shapes={name: {0: dim, 2: dim, 3: dim}}, verbose=False
    )
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    session.run(None, {session.get_inputs()[0].name: image.numpy()})
    return {"all": time.perf_counter() - start}


def ours(model: torch.nn.Module, image: torch.Tensor, folder: Path) -> dict[str, float]:
    """The verbs of ``deploy`` one by one."""
    marks = [time.perf_counter()]
    source = ferry.Source(model, image, dynamic_shapes=SHAPES)
    exported, _ = capture(source, ferry.Target(), functools.partial(rewriter_context, source, ferry.Target()))
    marks.append(time.perf_counter())
    exported = settle(exported, source)
    marks.append(time.perf_counter())
    engine = backends.compile(exported, ferry.Target(), folder / "engine")
    with engine.open() as session:
        session.run({"image": image.numpy()})
    marks.append(time.perf_counter())
    report = ferry.verify(engine, source)
    marks.append(time.perf_counter())
    ferry.pack(engine, folder / "package", report=report, exported=exported)
    marks.append(time.perf_counter())
    steps = dict(zip(("capture", "settle", "compile", "verify", "pack"), np.diff(marks).tolist(), strict=True))
    return {"all": sum(steps.values()), "proof": steps["settle"] + steps["verify"], **steps}


def main() -> None:
    """Measure and print."""
    model = load_model(f"{EXAMPLE / 'srcnn.py'}:srcnn_x3").eval()
    load_checkpoint(model, EXAMPLE / "srcnn_x3.safetensors")
    image = torch.rand(1, 3, 100, 150)
    rows: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(ROUNDS + 1):
        with tempfile.TemporaryDirectory() as folder:
            rows.append((bare(model, image, Path(folder)), ours(model, image, Path(folder))))
    kept = rows[1:]
    base = statistics.median(b["all"] for b, _ in kept)
    print(f"torch.onnx.export and one run      {base:.2f} s (median of {ROUNDS})")
    medians = {step: statistics.median(o[step] for _, o in kept) for step in kept[0][1]}
    for step, seconds in medians.items():
        print(f"  {step:8} {seconds:.2f} s")
    beyond = statistics.median(o["all"] - o["proof"] for _, o in kept)
    print(f"deploy without its proof           {beyond:.2f} s, {beyond / base:.2f} x")
    print(f"deploy                             {medians['all']:.2f} s, {medians['all'] / base:.2f} x")


if __name__ == "__main__":
    main()

"""Our session against direct use of the same engine, plain torch.onnx.export, PyTorch and torch.compile.

Every network's contenders take turns, each in a process of its own; the ratios are medians over the rounds, with
quartiles, and that of the CPU time, which other processes disturb less. OpenVINO and bf16 take part where they are, and
what ``deploy`` chooses as ``auto``, without a budget and within one of 1 %, on as many cores as there are threads.

    python benchmarks/engines.py [NAME …] [--rounds 10] [--no-compile] [--json FILE]
"""

import argparse
import contextlib
import importlib.util
import io
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch

import torchferry as ferry
from engine_models import NAMES, build
from torchferry import backends
from torchferry.core.target import AUTO
from torchferry.pipeline.bench_driver import Contender, Plan, measure
from torchferry.pipeline.bench_report import BenchReport
from torchferry.pipeline.environment import machine

BUDGETS = {"auto": None, "auto, 1 %": ferry.Budget(relative=0.01)}
DIRECT = (str(Path(__file__).with_name("engine_direct.py")),)
FILES = {"onnxruntime": "model.onnx", "openvino": "model.xml"}  # what each engine's folder holds


def contenders(name: str, folder: Path, *, compiles: bool) -> list[Contender]:
    """Export and compile a network in every way."""
    model, shape = build(name)
    example = torch.rand(shape)
    exported = ferry.export(model, example, input_names=["x"])
    inputs = {"x": example.numpy()}
    found = []
    for engine, file in FILES.items():
        if not backends.get(engine).availability().ok:
            continue
        for precision in backends.get(engine).capabilities().precisions:
            if precision == "int8":  # which only a budget allows: ``chosen`` tries it
                continue
            target = ferry.Target(engine, precision)
            compiled = ferry.compile(exported, target, folder / str(target))
            found.append(Contender(str(target), {"kind": "engine", "folder": str(compiled.folder)}, inputs))
            if precision == "fp32":
                spec = {"engine": engine, "file": str(compiled.folder / file)}
                found.append(Contender(f"{engine} direct", spec, inputs, worker=DIRECT))
    plain = str(folder / "plain.onnx")
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), plain, input_names=["x"], dynamo=True, verbose=False)
    found.append(Contender("torch.onnx + onnxruntime", {"engine": "onnxruntime", "file": plain}, inputs, worker=DIRECT))
    reference = {"kind": "torch", "file": str(folder / "model.pt"), "modules": {}}
    # The positions are what the worker goes by, for forward's parameters have other names.
    torch.save(model, folder / "model.pt")
    found.append(Contender("torch", {**reference, "compiled": False}, inputs))
    if compiles:
        found.append(Contender("torch.compile", {**reference, "compiled": True}, inputs))
    return found


def chosen(name: str, folder: Path, threads: int) -> tuple[dict[str, str], list[Contender]]:
    """Return what ``auto`` chooses under each budget, and contenders for it."""
    model, shape = build(name)
    example = torch.rand(shape)
    picks, found = {}, []
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(usable)[:threads])  # what it measures with is as many threads as there are cores
    try:
        for label, budget in BUDGETS.items():
            source = ferry.Source(model, (example,), input_names=("x",))
            package = ferry.deploy(source, AUTO, folder / label, budget=budget)
            picks[label] = package.manifest.engines[0].id
            spec = {"kind": "package", "folder": str(package.folder), "id": picks[label]}
            found.append(Contender(picks[label], spec, {"x": example.numpy()}))
    finally:
        os.sched_setaffinity(0, usable)
    return picks, found


def auto_summary(report: BenchReport, picks: dict[str, str]) -> list[str]:
    """Word what was chosen, and its ratio to everything else in the run."""
    rows = {row.name: row for row in report.rows if row.measured}
    lines = []
    for label, target in picks.items():
        others = {n: report.ratio(rows[target], to=row) for n, row in rows.items() if n != target and target in rows}
        ratios = ", ".join(f"{ratio.median:.3f} {other}" for other, ratio in others.items() if ratio)
        lines.append(f"  {label}: {target}; ÷ {ratios}")
    return lines


def summary(report: BenchReport) -> list[str]:
    """Word the ratios that matter."""
    rows = {row.name: row for row in report.rows if row.measured}
    own = {name: row for name, row in rows.items() if name.endswith(("-fp32", "-bf16"))}
    pairs = [(name, f"{name.removesuffix('-fp32')} direct") for name in own if name.endswith("-fp32")]
    if own:
        best = min(own, key=lambda name: own[name].measured.latency.median)
        best32 = min((n for n in own if n.endswith("-fp32")), key=lambda name: own[name].measured.latency.median)
        others = ("torch.onnx + onnxruntime", "torch", "torch.compile")
        pairs += [(mine, other) for mine in dict.fromkeys((best32, best)) for other in others]
    lines = []
    for mine, other in pairs:
        if mine in rows and other in rows:
            ratio = report.ratio(rows[mine], to=rows[other])
            cpu = rows[mine].measured.cpu_seconds / rows[other].measured.cpu_seconds
            lines.append(
                f"  {mine} ÷ {other}: {ratio.median:.3f} ({ratio.first:.3f}..{ratio.third:.3f}), CPU {cpu:.3f}"
            )
    return lines


def main() -> None:
    """Measure and print."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is not there is no matter
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--threads", type=int, default=1, help="more than one tells little where other processes use the cores as well"
    )
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes most of the time")
    parser.add_argument("--json", metavar="FILE", help="write every figure")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"unknown network '{unknown[0]}'; there are {', '.join(NAMES)}")
    reports = {}
    for name in options.names:
        if name == "YOLOv3" and importlib.util.find_spec("mmdet") is None:
            print("YOLOv3: left out, mmdet is not installed\n")
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = contenders(name, Path(folder), compiles=not options.no_compile)
            picks, more = chosen(name, Path(folder), options.threads)
            names = {contender.name for contender in found}
            found += {contender.name: contender for contender in more if contender.name not in names}.values()
            rows = measure(found, Plan(options.threads, rounds=options.rounds))
        shown = f"{name}: float32{list(found[0].inputs['x'].shape)}"
        reports[name] = BenchReport(rows, (shown,), options.threads, {"load": machine().get("load", "unknown")})
        print(reports[name])
        print("\n".join([*summary(reports[name]), *auto_summary(reports[name], picks)]), end="\n\n", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({name: found.to_dict() for name, found in reports.items()}, indent=1))


if __name__ == "__main__":
    sys.exit(main())

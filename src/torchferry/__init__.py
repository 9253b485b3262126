"""Torchferry carries a PyTorch model to an inference engine and proves that it arrived intact.

The walk::

    exported = ferry.export(model, args)
    engine = ferry.compile(exported, ferry.Target("onnxruntime"), "out/engine")
    report = ferry.verify(engine, model, args)
    package = ferry.pack(engine, "out/package", report=report)
    session = ferry.load("out/package").open()

Everything is imported when it is first used, so that loading a package needs neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchferry import fp16, testing
    from torchferry import rewrite as rewriters
    from torchferry.backends import compile
    from torchferry.core.compare import Budget, Tolerance
    from torchferry.core.engine import Engine, Session
    from torchferry.core.errors import TorchferryError
    from torchferry.core.report import Finding, Report
    from torchferry.core.samples import read_samples
    from torchferry.core.signature import DimRange, Signature
    from torchferry.core.target import Target
    from torchferry.exporter.custom_op import custom_op
    from torchferry.exporter.marks import mark, mark_tensors
    from torchferry.exporter.source import Source
    from torchferry.graph.exported import Exported
    from torchferry.package import Package, Postprocess, Preprocess, load, pack
    from torchferry.partitioning import PartitionPlan, partition, plan_partition
    from torchferry.pipeline.bench import bench
    from torchferry.pipeline.bench_report import BenchReport
    from torchferry.pipeline.chain import Chain, compile_parts
    from torchferry.pipeline.deploy import deploy
    from torchferry.pipeline.export import export
    from torchferry.precision.quantize import quantize
    from torchferry.rewrite import (
        FUNCTION_REWRITER,
        MODULE_REWRITER,
        SYMBOLIC_REWRITER,
        RewriterContext,
        patch_model,
        register_op,
    )
    from torchferry.verification import record_calibration, verify, verify_parts

__version__ = "0.1.0"

_MODULES = {"fp16": "torchferry.fp16", "rewriters": "torchferry.rewrite", "testing": "torchferry.testing"}
_HOMES = {
    "FUNCTION_REWRITER": "torchferry.rewrite",
    "MODULE_REWRITER": "torchferry.rewrite",
    "SYMBOLIC_REWRITER": "torchferry.rewrite",
    "RewriterContext": "torchferry.rewrite",
    "partition": "torchferry.partitioning",
    "plan_partition": "torchferry.partitioning",
    "PartitionPlan": "torchferry.partitioning",
    "patch_model": "torchferry.rewrite",
    "register_op": "torchferry.rewrite",
    "BenchReport": "torchferry.pipeline.bench_report",
    "Budget": "torchferry.core.compare",
    "Chain": "torchferry.pipeline.chain",
    "DimRange": "torchferry.core.signature",
    "Engine": "torchferry.core.engine",
    "Exported": "torchferry.graph.exported",
    "Finding": "torchferry.core.report",
    "Package": "torchferry.package",
    "Postprocess": "torchferry.package",
    "Preprocess": "torchferry.package",
    "Report": "torchferry.core.report",
    "Session": "torchferry.core.engine",
    "Signature": "torchferry.core.signature",
    "Source": "torchferry.exporter.source",
    "Target": "torchferry.core.target",
    "Tolerance": "torchferry.core.compare",
    "TorchferryError": "torchferry.core.errors",
    "bench": "torchferry.pipeline.bench",
    "compile": "torchferry.backends",
    "compile_parts": "torchferry.pipeline.chain",
    "custom_op": "torchferry.exporter.custom_op",
    "deploy": "torchferry.pipeline.deploy",
    "export": "torchferry.pipeline.export",
    "load": "torchferry.package",
    "mark": "torchferry.exporter.marks",
    "mark_tensors": "torchferry.exporter.marks",
    "pack": "torchferry.package",
    "quantize": "torchferry.precision.quantize",
    "read_samples": "torchferry.core.samples",
    "record_calibration": "torchferry.verification",
    "verify": "torchferry.verification",
    "verify_parts": "torchferry.verification",
}

__all__ = [
    "FUNCTION_REWRITER",
    "MODULE_REWRITER",
    "SYMBOLIC_REWRITER",
    "BenchReport",
    "Budget",
    "Chain",
    "DimRange",
    "Engine",
    "Exported",
    "Finding",
    "Package",
    "PartitionPlan",
    "Postprocess",
    "Preprocess",
    "Report",
    "RewriterContext",
    "Session",
    "Signature",
    "Source",
    "Target",
    "Tolerance",
    "TorchferryError",
    "__version__",
    "bench",
    "compile",
    "compile_parts",
    "custom_op",
    "deploy",
    "export",
    "fp16",
    "load",
    "mark",
    "mark_tensors",
    "pack",
    "partition",
    "patch_model",
    "plan_partition",
    "quantize",
    "read_samples",
    "record_calibration",
    "register_op",
    "rewriters",
    "testing",
    "verify",
    "verify_parts",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(_MODULES[name])
    elif name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'torchferry' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

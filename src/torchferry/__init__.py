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
    from torchferry import rewrite as rewriters
    from torchferry import testing
    from torchferry.backends import compile
    from torchferry.core.compare import Tolerance
    from torchferry.core.engine import Engine, Session
    from torchferry.core.errors import TorchferryError
    from torchferry.core.report import Finding, Report
    from torchferry.core.signature import DimRange, Signature
    from torchferry.core.target import Target
    from torchferry.exporter.custom_op import custom_op
    from torchferry.exporter.marks import mark, mark_tensors
    from torchferry.exporter.source import Source
    from torchferry.graph.exported import Exported
    from torchferry.package import Package, Postprocess, Preprocess, load, pack
    from torchferry.partitioning import partition
    from torchferry.pipeline.deploy import deploy
    from torchferry.pipeline.export import export
    from torchferry.rewrite import (
        FUNCTION_REWRITER,
        MODULE_REWRITER,
        SYMBOLIC_REWRITER,
        RewriterContext,
        patch_model,
        register_op,
    )
    from torchferry.verification import verify

__version__ = "0.1.0"

_MODULES = {"rewriters": "torchferry.rewrite", "testing": "torchferry.testing"}
_HOMES = {
    "FUNCTION_REWRITER": "torchferry.rewrite",
    "MODULE_REWRITER": "torchferry.rewrite",
    "SYMBOLIC_REWRITER": "torchferry.rewrite",
    "RewriterContext": "torchferry.rewrite",
    "partition": "torchferry.partitioning",
    "patch_model": "torchferry.rewrite",
    "register_op": "torchferry.rewrite",
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
    "compile": "torchferry.backends",
    "custom_op": "torchferry.exporter.custom_op",
    "deploy": "torchferry.pipeline.deploy",
    "export": "torchferry.pipeline.export",
    "load": "torchferry.package",
    "mark": "torchferry.exporter.marks",
    "mark_tensors": "torchferry.exporter.marks",
    "pack": "torchferry.package",
    "verify": "torchferry.verification",
}

__all__ = [
    "FUNCTION_REWRITER",
    "MODULE_REWRITER",
    "SYMBOLIC_REWRITER",
    "DimRange",
    "Engine",
    "Exported",
    "Finding",
    "Package",
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
    "compile",
    "custom_op",
    "deploy",
    "export",
    "load",
    "mark",
    "mark_tensors",
    "pack",
    "partition",
    "patch_model",
    "register_op",
    "rewriters",
    "testing",
    "verify",
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

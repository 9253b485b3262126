"""Exports a deformable convolution in three ways, and runs each on every engine, at sizes never exported."""

import re
import tempfile
from pathlib import Path
from typing import Any

import torch

import torchferry as ferry
import ways
from deformable import DeformableConv2d

WAYS: dict[str, dict[str, Any]] = {
    "standard": {"symbolic_rewriter": ways.STANDARD},
    "custom": {"symbolic_rewriter": ways.CUSTOM},
    "composed": {"function_rewriter": ways.COMPOSED},
}
BACKENDS = ("onnxruntime", "openvino", "reference")
SIZES = ((1, 3, 7, 9), (3, 3, 15, 6))
TOLERANCE = 1e-4


def run(model: torch.nn.Module, exported: ferry.Exported, target: ferry.Target) -> str:
    """Compile for an engine and compare with PyTorch.

    Returns:
        What came of it, in words.

    Raises:
        SystemExit: If the engine differs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            engine = ferry.compile(exported, target, Path(scratch, "engine"))
        except ferry.TorchferryError as error:
            # The engine itself must say so: it might have failed for another reason.
            lacking = next((node for node in exported.model.graph if is_named(node, error.message)), None)
            if lacking is None:
                raise
            name = f"{lacking.domain}::{lacking.op_type}" if lacking.domain else lacking.op_type
            return f"cannot, for it has no operator {name}"
        with engine.open() as session:
            for size in SIZES:
                image = torch.randn(size)
                got = torch.from_numpy(session.run({"image": image.numpy()})["convolved"])
                difference = (got - model(image)).abs().max().item()
                if difference > TOLERANCE:
                    raise SystemExit(f"{target} differs by {difference:.2g} at {size}")
    return "agrees with PyTorch"


def is_named(node: Any, message: str) -> bool:
    """Tell whether an engine's message names a node's operator."""
    return node.domain in message and re.search(rf"\b{node.op_type}\b", message) is not None


@torch.no_grad()
def main() -> None:
    """Export in each way for each engine; print the operators, and what became of them."""
    torch.manual_seed(0)
    model, example = DeformableConv2d().eval(), torch.randn(1, 3, 12, 10)
    dynamic_shapes = {"image": {0: "batch", 2: "height", 3: "width"}}
    for way, registry in WAYS.items():
        for backend in BACKENDS:
            target = ferry.Target(backend)
            exported = ferry.export(
                model, example, target=target, dynamic_shapes=dynamic_shapes, output_names=["convolved"], **registry
            )
            exported.report.raise_for_failure()
            if backend == BACKENDS[0]:
                print(f"{way}: {', '.join(sorted({node.op_type for node in exported.model.graph}))}")
            print(f"  {backend}: {run(model, exported, target)}")


if __name__ == "__main__":
    main()

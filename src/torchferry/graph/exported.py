"""The exported graph with everything that is known about it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnx_ir.serde import SerdeError

from torchferry.core.errors import FormatError
from torchferry.core.files import new_files
from torchferry.core.report import Report
from torchferry.graph.provenance import Provenance, provenance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchferry.core.signature import Signature
    from torchferry.core.target import Target

SIGNATURE_KEY = "torchferry.signature"
# A protobuf message ends at 2 GiB, and writing one takes four times its size in memory, which external data does not.
EXTERNAL_DATA_BYTES = 256 << 20
_QUANTIZING = frozenset((
    "QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"
))  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A model as an ONNX graph.

    Attributes:
        model: The graph; ``ir.Model``, whose weights may share memory with the module that was exported.
        signature: Names, dtypes, shapes, and the sizes for which the graph is right.
        target: What it was exported for.
        report: What was found on the way: frozen or bounded dimensions, training mode, sizes 0 and 1.
        rewrites: Name and number of uses of every rewriter that acted.
        outputs_changed_by: Names of those that change outputs on purpose; the graph then agrees with the rewritten
            model, not with the original.
    """

    model: ir.Model
    signature: Signature
    target: Target
    report: Report = field(default_factory=lambda: Report("export"))
    rewrites: Mapping[str, int] = field(default_factory=dict)
    outputs_changed_by: tuple[str, ...] = ()

    def provenance(self, node: ir.Node) -> Provenance:
        """Return the module path and source line that a node came from."""
        return provenance(node)

    @property
    def weights_bytes(self) -> int:
        """Size of all initializers in bytes."""
        return sum(v.const_value.nbytes for g in self.model.graphs() for v in g.initializers.values() if v.const_value)

    @property
    def is_quantized(self) -> bool:
        """Whether tensors are made integers to compute with; weights that are only kept as integers do not count."""
        graphs = (*self.model.graphs(), *self.model.functions.values())
        return any(node.op_type in _QUANTIZING and not node.domain for graph in graphs for node in graph)

    def statistics(self) -> dict[str, str]:
        """Return nodes, operators, opset, parameters and weights as names and values."""
        operators = Counter(
            node.op_type if not node.domain else f"{node.domain}::{node.op_type}"
            for graph in self.model.graphs()
            for node in graph
        )
        parameters = sum(v.const_value.size for v in self.model.graph.initializers.values() if v.const_value)
        return {
            "nodes": str(sum(operators.values())),
            "operators": ", ".join(f"{name} x{count}" for name, count in operators.most_common()),
            "opset": ", ".join(f"{d or 'ai.onnx'} {v}" for d, v in self.model.opset_imports.items()),
            "parameters": f"{parameters:,}",
            "weights": f"{self.weights_bytes / 2**20:.2f} MiB",
        }

    def save(self, path: str | Path) -> None:
        """Write the ONNX file whole or not at all.

        Above 256 MiB of weights, and where they were read from external data, it becomes ``path`` and ``path.data``.

        Args:
            path: The ``.onnx`` file; replaced if it exists.

        Raises:
            OutputError: If it cannot be written.
            FormatError: If it was read from a damaged file.
        """
        path = Path(path).absolute()
        self.model.metadata_props[SIGNATURE_KEY] = self.signature.to_json()
        # What was read from external data goes there again: a copy elsewhere must not refer to the old place.
        is_external = self.weights_bytes > EXTERNAL_DATA_BYTES or any(
            isinstance(value.const_value, ir.ExternalTensor)
            for graph in self.model.graphs()
            for value in graph.initializers.values()
        )
        external = f"{path.name}.data" if is_external else None
        with new_files(path.parent) as partial:
            try:
                ir.save(self.model, partial / path.name, external_data=external)
            except SerdeError as exc:
                raise FormatError(f"the graph cannot be written: {exc}", hint="export or download it again") from exc

    def replace(self, **changes: Any) -> Exported:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        inputs = ", ".join(map(str, self.signature.inputs))
        outputs = ", ".join(map(str, self.signature.outputs))
        dims = "; ".join(
            [f"{name} {allowed}" for name, allowed in self.signature.dims.items()]
            + [relation.expression for relation in self.signature.relations]
        )
        nodes = sum(len(g) for g in self.model.graphs())
        return f"({inputs}) -> ({outputs}), {nodes} nodes" + (f", {dims}" if dims else "")

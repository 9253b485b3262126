"""L1: the exported graph, on onnx-ir."""

from torchferry.graph.exported import Exported
from torchferry.graph.provenance import Provenance
from torchferry.graph.reading import as_exported

__all__ = ["Exported", "Provenance", "as_exported"]

"""L2: from a PyTorch module to an ``Exported``, by torch.export."""

from torchferry.exporter.capture import capture
from torchferry.exporter.source import Source

__all__ = ["Source", "capture"]

"""L3: proving that an engine gives what PyTorch gives."""

from torchferry.verification.parity import verify
from torchferry.verification.sizes import settle

__all__ = ["settle", "verify"]

"""L3: proving that an engine gives what PyTorch gives, whole and in parts."""

from torchferry.verification.parity import verify
from torchferry.verification.parts import record_calibration, verify_parts
from torchferry.verification.sizes import settle

__all__ = ["record_calibration", "settle", "verify", "verify_parts"]

"""Small networks that leave FP16's range the way real ones do.

The nets of `zoo.development` are there to be looked at. Those of `zoo.frozen` were fixed before any repair was tuned,
and are only ever measured.
"""

from zoo.common import Net
from zoo.development import attention, classifiers, language, restoration, sequence, vision
from zoo.frozen import attention as frozen_attention
from zoo.frozen import convolutions, other
from zoo.frozen import restoration as frozen_restoration

_DEVELOPMENT = (classifiers, vision, restoration, attention, language, sequence)
_FROZEN = (convolutions, other, frozen_attention, frozen_restoration)

DEVELOPMENT: dict[str, Net] = {net.name: net for module in _DEVELOPMENT for net in module.NETS}
FROZEN: dict[str, Net] = {net.name: net for module in _FROZEN for net in module.NETS}
ZOO: dict[str, Net] = {**DEVELOPMENT, **FROZEN}

__all__ = ["DEVELOPMENT", "FROZEN", "ZOO", "Net"]

"""Which k's keep a tensor inside FP16: from its range to bounds on one integer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchferry.precision.ranges import Range

FP16_MAX = 65504.0
OTHER_DATA = 1.5
"""How much larger inputs may be besides the headroom: what was not measured is not quite what was."""
_HIGHEST_DEGREE = 6
_SMALLEST_NORMAL = -14  # log2; below it FP16 loses bits
_SMALLEST = -24  # log2 of the smallest number above 0
_PRECISE = -16  # log2; a divisor keeps eight bits there
_BITS_ABOVE = 3  # a typical element should keep as many bits above the smallest normal number, less those it may lose
_TYPICAL_FLOOR = _SMALLEST_NORMAL + _BITS_ABOVE


@dataclass(frozen=True)
class Limits:
    """Bounds on the k of one tensor.

    Attributes:
        least: Below this the tensor overflows on the data, or within the headroom, or its sums may; must hold.
        wanted: Below this its sums, in the worst order, may overflow within the headroom.
        most: Above this something divides by zero; must hold.
        precise: Above this a divisor, or what a root is taken of, keeps few bits; worth a node.
        floor: Above this typical elements lose bits to the subnormal range.
    """

    least: int | None = None
    wanted: int | None = None
    most: int | None = None
    precise: int | None = None
    floor: int | None = None

    @property
    def leaves_range(self) -> bool:
        """True if the tensor cannot be stored as it is."""
        return self.least is not None and self.least > 0


def limits(measured: Range, enlarged: Range, headroom_bits: int) -> Limits:
    """Return the bounds for a tensor.

    Args:
        measured: On the data.
        enlarged: On the data times ``2**headroom_bits``.
        headroom_bits: How many bits to keep free.
    """
    room = 2.0**headroom_bits
    degree = _degree(measured.largest, enlarged.largest, headroom_bits)
    largest = measured.largest * max(room, room**degree) * OTHER_DATA**degree
    summed = max(measured.any_order * room, _finite(enlarged.any_order))
    least = max(_shift(largest, FP16_MAX), _shift(_finite(measured.any_order), FP16_MAX))
    least = min(least, _FARTHEST)
    wanted = min(max(least, _shift(summed, FP16_MAX)), _FARTHEST)
    most = _room_below(measured.smallest, _SMALLEST + 1)
    precise = _room_below(measured.smallest, _PRECISE)
    floors = [_room_below(measured.typical, _TYPICAL_FLOOR), _room_below(measured.smallest, _SMALLEST_NORMAL)]
    floor = min((each for each in floors if each is not None), default=None)
    if least <= _NOTHING:
        return Limits(None, None, most, precise, floor)
    return Limits(least, wanted, most, precise, floor)


def constant_limits(measured: Range) -> Limits:
    """Return the bounds for a constant: it must fit, and should keep its bits."""
    least = _shift(measured.largest, FP16_MAX)
    floor = _room_below(measured.typical, _TYPICAL_FLOOR)
    return Limits(None if least <= _NOTHING else least, floor=floor)


_NOTHING = -1000
_FARTHEST = 56  # what grows beyond this within the headroom, an exponential, no scale holds; the certificate tells


def _degree(value: float, enlarged: float, headroom_bits: int) -> float:
    """Return d if a tensor grows with the d-th power of the input; nothing that fits grows faster than the sixth."""
    if not headroom_bits or not value > 0:
        return 1.0
    if not math.isfinite(enlarged):
        return _HIGHEST_DEGREE
    return min(max(math.log2(max(enlarged, value) / value) / headroom_bits, 0.0), _HIGHEST_DEGREE)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _shift(value: float, limit: float) -> int:
    """Return the least k with value / 2**k <= limit."""
    if not value > 0 or not math.isfinite(value):
        return _NOTHING
    return math.ceil(math.log2(value / limit))


def _room_below(value: float, floor: int) -> int | None:
    """Return the most k with value / 2**k >= 2**floor."""
    return math.floor(math.log2(value)) - floor if value > 0 and math.isfinite(value) else None

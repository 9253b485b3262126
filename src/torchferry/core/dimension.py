"""A dynamic dimension as the user declares it: its name, and perhaps its sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torchferry.core.errors import ConfigError

_FORM = re.compile(r"(?P<name>.+?)(=(?P<min>\d+)\.\.((?P<opt>\d+)\.\.)?(?P<max>\d+))?")


@dataclass(frozen=True)
class Dimension:
    """A name, with the sizes that are wanted.

    Attributes:
        name: The dimension's name.
        min: The smallest size, inclusive; None where nobody says.
        max: The largest size, inclusive; None where nobody says.
        opt: The size that it will mostly have, for engines that choose their kernels by one; None where nobody says.

    Raises:
        ConfigError: If the sizes do not rise.

    >>> Dimension.parse("batch=1..4..8")
    Dimension(name='batch', min=1, max=8, opt=4)
    """

    name: str
    min: int | None = None
    max: int | None = None
    opt: int | None = None

    def __post_init__(self) -> None:
        sizes = [size for size in (self.min, self.opt, self.max) if size is not None]
        if sizes != sorted(sizes):
            raise ConfigError(
                f"the sizes of '{self.name}' must rise from the smallest to the largest, got "
                + ", ".join(f"{which} {size}" for which, size in self._sizes().items())
            )

    @staticmethod
    def parse(text: str) -> Dimension:
        """Read ``batch``, ``batch=1..8``, or ``batch=1..4..8``, whose middle number is the optimum.

        What has no such ending is taken for a name.

        Raises:
            ConfigError: If the text is empty, or the sizes do not rise.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ConfigError(f"'{text}' cannot name a dimension")
        sizes = {which: int(found[which]) for which in ("min", "max", "opt") if found[which]}
        return Dimension(found["name"], **sizes)

    @property
    def is_bare(self) -> bool:
        """True if nothing is said about its sizes."""
        return not self._sizes()

    def _sizes(self) -> dict[str, int]:
        every = {"min": self.min, "opt": self.opt, "max": self.max}
        return {which: size for which, size in every.items() if size is not None}

    def __contains__(self, size: int) -> bool:
        return (self.min is None or self.min <= size) and (self.max is None or size <= self.max)

    def __str__(self) -> str:
        sizes = ("" if size is None else str(size) for size in (self.min, self.opt, self.max))
        return self.name if self.is_bare else f"{self.name}={'..'.join(sizes)}".replace("....", "..")

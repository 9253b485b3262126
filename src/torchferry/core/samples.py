"""Recorded inputs in a file: a ``.npz`` archive with one array for each input of each sample.

The key of an array is the sample's number and the input's name: ``0/image``, ``1/image``. Samples may so differ in
their sizes, and nothing need be stacked along an axis that may not be a batch. An archive without numbers, as
``numpy.savez`` makes it, is one sample.
"""

from __future__ import annotations

import re
import zipfile
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from torchferry.core.errors import FormatError
from torchferry.core.files import require_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike
    from pathlib import Path

    Array = np.ndarray[Any, np.dtype[Any]]

_KEY = re.compile(r"(?P<number>\d+)/(?P<name>.+)", re.DOTALL)


class SampleWriter:
    """Writes samples one by one, so that no more than one need be in memory. Use it as a context manager.

    Args:
        path: The file, which is replaced.
    """

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path, "w")
        self._count = 0

    def add(self, sample: Mapping[str, Array]) -> None:
        """Write one sample.

        Raises:
            FormatError: If an array is of a dtype that a ``.npz`` file cannot hold, such as bfloat16.
        """
        for name, array in sample.items():
            if array.dtype.kind in "OV":
                raise FormatError(f"'{name}' is {array.dtype.name}, which a .npz file cannot hold")
            with self._archive.open(f"{self._count}/{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        self._count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._archive.close()


def read_samples(path: str | PathLike[str]) -> list[dict[str, Array]]:
    """Read the samples of a file, in the order in which they were written; nothing in the file is run.

    Args:
        path: What ``record_calibration`` or ``numpy.savez`` wrote.

    Returns:
        One dictionary of arrays by input name for each sample.

    Raises:
        MissingFileError: If there is no such file.
        FormatError: If it is no whole archive of plain arrays, or mixes numbered keys with others.
    """
    path = require_file(path, "samples")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except Exception as exc:  # numpy's and zipfile's readers raise anything on damaged data
        raise FormatError(f"'{path}' is not a whole .npz file of plain arrays: {exc}") from exc
    return grouped(arrays, str(path))


def grouped(arrays: Mapping[str, Array], origin: str) -> list[dict[str, Array]]:
    """Sort the arrays of an archive into samples.

    Args:
        arrays: By key.
        origin: Where they are from, for the message.

    Raises:
        FormatError: If some keys hold a sample's number and others do not.

    >>> [list(sample) for sample in grouped({"1/x": np.ones(2), "0/x": np.ones(3), "0/y": np.ones(1)}, "a.npz")]
    [['x', 'y'], ['x']]
    """
    matches = {key: _KEY.fullmatch(key) for key in arrays}
    if not any(matches.values()):
        return [dict(arrays)]
    samples: dict[int, dict[str, Array]] = {}
    for key, match in matches.items():
        if match is None:
            raise FormatError(f"'{origin}' holds numbered samples, and '{key}' without a number")
        samples.setdefault(int(match["number"]), {})[match["name"]] = arrays[key]
    return [samples[number] for number in sorted(samples)]

"""From ``--input picture.png``, ``--input name=file.npz`` and ``--input factor=1,1,3,3`` to tensors."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchferry.core.errors import ConfigError, FormatError
from torchferry.core.files import require_file
from torchferry.package import Preprocess
from torchferry.package.pictures import load_picture, to_array

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchferry.core.engine import Array


@dataclass(frozen=True)
class InputData:
    """The user's data.

    Attributes:
        arrays: By input name one array or, where several pictures were given, several.
        pictures: Names of the inputs that came from a picture.
    """

    arrays: Mapping[str, tuple[Array, ...]]
    pictures: tuple[str, ...]

    def calls(self) -> list[dict[str, Array]]:
        """Return one dictionary of arrays for each set of data; an input given once serves all of them."""
        count = max(len(values) for values in self.arrays.values())
        return [
            {name: values[min(i, len(values) - 1)] for name, values in self.arrays.items()} for i in range(count)
        ]


def read_inputs(items: Sequence[str], names: Sequence[str], how: Mapping[str, Preprocess]) -> InputData:
    """Read what ``--input`` named.

    Args:
        items: A picture or ``.npz`` file, or ``name=`` with a picture, ``.npz``, ``.npy`` or numbers. Numbers are
            float32 unless a dtype follows: ``sizes=64,64:int64``. A picture without a name belongs to the first input
            that no other item names.
        names: The model's input names, in order.
        how: How a picture becomes each input; ``Preprocess()`` where not said.

    Raises:
        ConfigError: If an item cannot be understood or names an unknown input, or an input gets no data.
        MissingFileError: If a file does not exist.
        FormatError: If a file is not what its name says.
    """
    given: dict[str, list[Array]] = {}
    pictures: list[str] = []
    named = {item.partition("=")[0] for item in items if "=" in item}
    free = [name for name in names if name not in named]
    for item in items:
        name, equals, value = item.partition("=") if "=" in item and not Path(item).exists() else ("", "", item)
        suffix = Path(value).suffix.lower()
        if suffix == ".npz":
            arrays = _read_npz(Path(value))
            found = {name: arrays[name] if name in arrays else _only(arrays, name, value)} if name else arrays
            for key, array in found.items():
                given.setdefault(key, []).append(array)
            continue
        if not name:
            if not free:
                raise ConfigError(f"'{item}' belongs to no input: all of them are named", hint="say name=" + item)
            name = free[0]
        if suffix == ".npy":
            given.setdefault(name, []).append(_read_npy(Path(value)))
        elif (numbers := _numbers(value)) is not None:
            given.setdefault(name, []).append(numbers)
        else:
            given.setdefault(name, []).append(to_array(load_picture(value), how.get(name, Preprocess())))
            pictures.append(name)
    return InputData({name: tuple(values) for name, values in given.items()}, tuple(dict.fromkeys(pictures)))


def _read_npz(path: Path) -> dict[str, Array]:
    require_file(path, "input")
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as exc:
        raise FormatError(f"'{path}' is not a whole .npz file of plain arrays: {exc}") from exc


def _read_npy(path: Path) -> Array:
    require_file(path, "input")
    try:
        array: Array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as exc:
        raise FormatError(f"'{path}' is not a whole .npy file of a plain array: {exc}") from exc
    return array


def _only(arrays: Mapping[str, Array], name: str, path: str) -> Array:
    if len(arrays) != 1:
        raise ConfigError(f"'{path}' holds {', '.join(arrays)}, none of them '{name}'")
    return next(iter(arrays.values()))


def _numbers(text: str) -> Array | None:
    values, _, dtype = text.partition(":")
    try:
        parsed = [float(part) for part in values.split(",")]
        return np.array(parsed, dtype=dtype or "float32")
    except (ValueError, TypeError):
        return None

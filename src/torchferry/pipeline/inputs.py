"""From ``--input picture.png``, ``--input name=file.npz`` and ``--input factor=1,1,3,3`` to tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from torchferry.core.errors import ConfigError, FormatError, did_you_mean
from torchferry.core.files import require_file
from torchferry.core.samples import grouped
from torchferry.package import Preprocess
from torchferry.package.pictures import load_picture, to_array

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torchferry.core.engine import Array


_DTYPES = (
    "bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"
)  # fmt: skip


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
        """Return one dictionary of arrays for each set of data; an input given once serves all of them.

        Raises:
            ConfigError: If two inputs were given several times, but not equally often.
        """
        counts = {name: len(values) for name, values in self.arrays.items()}
        most = max(counts.values(), default=1)
        odd = [f"'{name}' {count} times" for name, count in counts.items() if count > 1]
        if any(1 < count < most for count in counts.values()):
            raise ConfigError(
                f"inputs were given unequally often: {', '.join(odd)}", hint="give each once, or equally often"
            )
        return [{name: values[i % len(values)] for name, values in self.arrays.items()} for i in range(most)]


def read_inputs(
    items: Sequence[str],
    names: Sequence[str],
    how: Mapping[str, Preprocess],
    aliases: Mapping[str, str] | None = None,
) -> InputData:
    """Read what ``--input`` named.

    Args:
        items: A picture or ``.npz`` file, or ``name=`` with a picture, ``.npz``, ``.npy`` or numbers. Numbers are
            float32 unless a dtype follows: ``sizes=64,64:int64``. A picture without a name belongs to the first input
            that no other item names.
        names: The model's input names, in order.
        how: How a picture becomes each input; ``Preprocess()`` where not said.
        aliases: Other names that the items may use, each with the name among ``names`` that it means.

    Raises:
        ConfigError: If an item cannot be understood, or belongs to no input.
        MissingFileError: If a file does not exist.
        FormatError: If a file is not what its name says.
    """
    given: dict[str, list[Array]] = {}
    pictures: list[str] = []
    aliases = aliases or {}
    pairs = [split_item(item) for item in items]
    pairs = [(aliases.get(name, name), value) for name, value in pairs]
    named = {name for name, _ in pairs}
    free = [name for name in names if name not in named]
    for item, pair in zip(items, pairs, strict=True):
        name, value = pair
        suffix = Path(value).suffix.lower()
        if suffix == ".npz":
            for sample in grouped(_read_npz(Path(value)), value):
                arrays = {aliases.get(key, key): array for key, array in sample.items()}
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


def split_item(item: str) -> tuple[str, str]:
    """Return an item's input name, empty if it has none, and its value."""
    if "=" not in item or Path(item).exists():  # a file may have = in its name
        return "", item
    name, _, value = item.partition("=")
    return name, value


def _read_npz(path: Path) -> dict[str, Array]:
    arrays = _read_numpy(path)
    if not isinstance(arrays, dict):
        raise FormatError(f"'{path}' holds one array, not an archive of them", hint="rename it to .npy")
    if not arrays:
        raise FormatError(f"'{path}' holds no arrays")
    return arrays


def _read_npy(path: Path) -> Array:
    array = _read_numpy(path)
    if isinstance(array, dict):
        raise FormatError(f"'{path}' is an archive of arrays, not one array", hint="rename it to .npz")
    return array


def _read_numpy(path: Path) -> Array | dict[str, Array]:
    """Read what numpy.save or numpy.savez wrote; nothing in the file is run."""
    require_file(path, "input")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except Exception as exc:  # numpy's and zipfile's readers raise anything on damaged data
        raise FormatError(f"'{path}' is not a whole {path.suffix} file of plain arrays: {exc}") from exc


def _only(arrays: Mapping[str, Array], name: str, path: str) -> Array:
    if len(arrays) != 1:
        raise ConfigError(f"'{path}' holds {', '.join(arrays)}, none of them '{name}'")
    return next(iter(arrays.values()))


def are_numbers(text: str) -> bool:
    """Tell whether a value is numbers, with or without a dtype, rather than a path."""
    try:
        _parsed(text.partition(":")[0])
    except ValueError:
        return False
    return True


def _numbers(text: str) -> Array | None:
    if not are_numbers(text):
        return None
    values, _, dtype = text.partition(":")
    parsed = np.array(_parsed(values))
    if dtype and dtype not in _DTYPES:
        raise ConfigError(f"cannot read '{text}': unknown dtype '{dtype}'", hint=did_you_mean(dtype, _DTYPES))
    try:
        with np.errstate(invalid="ignore", over="ignore"):
            array: Array = parsed.astype(dtype or "float32")
        held = array.dtype.kind == "f" or bool((array == parsed).all())
    except OverflowError:  # more digits than any of numpy's whole numbers
        held = False
    if not held:
        raise ConfigError(f"cannot read '{text}': {dtype or 'float32'} cannot hold these numbers")
    return array


def _parsed(values: str) -> list[int] | list[float]:
    """Read whole numbers as such, since a large one would not survive as a float."""
    parts = values.split(",")
    try:
        return [int(part) for part in parts]
    except ValueError:
        return [float(part) for part in parts]

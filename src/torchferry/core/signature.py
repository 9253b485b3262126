"""What goes into a model and comes out: names, dtypes, shapes, and the sizes for which the graph is known to be right.

torch.export assumes things about the sizes that it traced (``if x.shape[0] >= 4``); an ONNX file forgets them. A
``Signature`` carries them, and a session refuses what lies outside.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping  # noqa: TC003 - pydantic reads the annotations
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.core.errors import ConfigError, InputError, did_you_mean
from torchferry.core.expressions import Expression

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchferry.core.dimension import Dimension


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: As in the graph.
        dtype: numpy's name, such as ``float32``.
        shape: One entry an axis: a fixed size, a dimension's name, an expression of names (``2*batch``), or None where
            the size is known only after running. None in place of the tuple means an unknown rank.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def shape_at(self, sizes: Mapping[str, int]) -> tuple[int | None, ...] | None:
        """Return the shape at these sizes of the named dimensions; None for what they do not tell.

        >>> TensorSpec("x", "float32", ("batch", 3, "2*height", None)).shape_at({"batch": 1, "height": 8})
        (1, 3, 16, None)
        """
        return None if self.shape is None else tuple(_size_at(entry, sizes) for entry in self.shape)

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name}: {self.dtype}[...]"
        return f"{self.name}: {self.dtype}[{', '.join('?' if s is None else str(s) for s in self.shape)}]"


def _size_at(entry: int | str | None, sizes: Mapping[str, int]) -> int | None:
    if not isinstance(entry, str):
        return entry
    try:
        return sizes[entry] if entry in sizes else int(Expression(entry).evaluate(sizes))
    except (ArithmeticError, LookupError, ValueError):
        return None


@dataclass(frozen=True)
class DimRange:
    """The sizes for which the graph is known to be right.

    Attributes:
        min: The smallest size, inclusive.
        max: The largest size, inclusive; None for no bound.
        excluded: Sizes from 0 up that are refused although no bound of the model says so, each with its reason.
        where: The user's line that set the bounds, if the model did.
        opt: The size that it will mostly have, if the user said so: engines that choose kernels by a size take this.
    """

    min: int = 0
    max: int | None = None
    excluded: Mapping[int, str] = field(default_factory=dict)
    where: str | None = None
    opt: int | None = None

    def __contains__(self, size: int) -> bool:
        return self.min <= size and (self.max is None or size <= self.max) and size not in self.excluded

    def __str__(self) -> str:
        usual = "" if self.opt is None or self.max is None else f"{self.opt}.."
        text = f"{self.min}..{usual}{'' if self.max is None else self.max}"
        inside = [size for size in sorted(self.excluded) if size >= self.min]
        return text + (f" without {', '.join(map(str, inside))}" if inside else "")


@dataclass(frozen=True)
class Relation:
    """A condition between dimensions under which the graph is right, such as ``n > m`` or ``height % 4 == 0``.

    Attributes:
        expression: See ``Expression``.
        where: The user's line that asks for it.
    """

    expression: str
    where: str | None = None

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Tell whether these sizes are allowed by this relation."""
        try:
            return bool(Expression(self.expression).evaluate(sizes))
        except (ArithmeticError, ValueError):
            return False  # undefined at these sizes


@dataclass(frozen=True)
class Signature:
    """Inputs, outputs, and the valid sizes of every named dimension.

    Attributes:
        inputs: In the graph's order.
        outputs: In the graph's order.
        dims: For every free dimension name its range.
        relations: Conditions between dimensions.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, DimRange] = field(default_factory=dict)
    relations: tuple[Relation, ...] = ()

    def to_json(self) -> str:
        """Return the signature as JSON, for ``from_json``."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Signature:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: If the text is anything else.
        """
        signature: Signature = _adapter().validate_json(text)
        return signature

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs in the graph's order."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs in the graph's order."""
        return tuple(spec.name for spec in self.outputs)

    def narrowed(self, wanted: Iterable[Dimension]) -> Signature:
        """Return the signature with narrower ranges, for engines that want a largest size.

        Args:
            wanted: Dimensions of the graph with the sizes that they shall have.

        Raises:
            ConfigError: If there is no such dimension, or nothing of its range is left.
        """
        dims = dict(self.dims)
        for dim in wanted:
            if dim.name not in dims:
                raise ConfigError(f"the graph has no dynamic dimension '{dim.name}'", hint=did_you_mean(dim.name, dims))
            known = dims[dim.name]
            lower = known.min if dim.min is None else max(known.min, dim.min)
            upper = min((size for size in (known.max, dim.max) if size is not None), default=None)
            if upper is not None and lower > upper:
                raise ConfigError(f"no size of '{dim.name}' is in {dim} and in {known} as well")
            dims[dim.name] = replace(known, min=lower, max=upper, opt=known.opt if dim.opt is None else dim.opt)
        return replace(self, dims=dims)

    def profile(self) -> list[dict[str, int]]:
        """Return the smallest, the usual and the largest sizes of the dimensions whose usual one the user said."""
        usual = {name: allowed.opt for name, allowed in self.dims.items() if allowed.opt is not None}
        ranges = {name: (self.dims[name].min, self.dims[name].max) for name in usual}
        bounded = {name: (least, most) for name, (least, most) in ranges.items() if most is not None}
        least, most = ({name: ends[end] for name, ends in bounded.items()} for end in (0, 1))
        profile = [{**usual, **least}, usual, {**usual, **most}] if usual else []
        return [sizes for place, sizes in enumerate(profile) if sizes not in profile[:place]]

    def sizes_of(self, arrays: Mapping[str, Any]) -> dict[str, int]:
        """Read the size of every named dimension off the arrays, checking names, dtypes, ranks and fixed sizes.

        Args:
            arrays: For every input an object with ``shape`` and ``dtype``.

        Raises:
            InputError: If an input is missing, unknown, or of another dtype, rank or size than the signature's, or if
                two axes of one name differ.
        """
        _check_names(self.input_names, arrays)
        sizes: dict[str, int] = {}
        seen: dict[str, str] = {}
        derived: list[tuple[str, int, str, int]] = []
        for spec in self.inputs:
            array = arrays[spec.name]
            if not isinstance(array, np.ndarray):
                raise InputError(f"input '{spec.name}' must be a numpy array, got {type(array).__name__}")
            if array.dtype.name != spec.dtype or not array.dtype.isnative:
                order = "" if array.dtype.isnative else " in the other byte order"
                raise InputError(
                    f"input '{spec.name}' must be {spec.dtype}, got {array.dtype.name}{order}",
                    hint=f"convert it with array.astype('{spec.dtype}')",
                )
            if spec.shape is None:
                continue
            if len(array.shape) != len(spec.shape):
                raise InputError(
                    f"input '{spec.name}' must have {len(spec.shape)} dimensions ({spec}), "
                    f"got {len(array.shape)} (shape {tuple(array.shape)})"
                )
            for axis, (want, got) in enumerate(zip(spec.shape, array.shape, strict=True)):
                place = f"axis {axis} of '{spec.name}'"
                if want is None:
                    continue
                if isinstance(want, int):
                    if want != got:
                        raise InputError(f"{place} must be {want}, got {got} (shape {tuple(array.shape)}, want {spec})")
                elif want.isidentifier():
                    if sizes.setdefault(want, got) != got:
                        raise InputError(f"'{want}' is {sizes[want]} at {seen[want]} but {got} at {place}")
                    seen.setdefault(want, place)
                else:
                    derived.append((spec.name, axis, want, got))
        for name, axis, expression, got in derived:
            try:
                want = Expression(expression).evaluate(sizes)
            except (ArithmeticError, ValueError) as exc:
                raise InputError(
                    f"axis {axis} of '{name}' must be {expression}, which has no value at {sizes}"
                ) from exc
            if want != got:
                raise InputError(f"axis {axis} of '{name}' must be {expression} = {want}, got {got}")
        return sizes

    def check(self, arrays: Mapping[str, Any]) -> dict[str, int]:
        """Check the arrays against everything that is known; return the size of every named dimension.

        Raises:
            InputError: As ``sizes_of``, and if a size lies outside its range or a relation does not hold.
        """
        sizes = self.sizes_of(arrays)
        self.check_sizes(sizes)
        return sizes

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Check sizes against ranges and relations.

        Raises:
            InputError: If a size lies outside its range or a relation does not hold.
        """
        for name, size in sizes.items():
            allowed = self.dims.get(name)
            if allowed is None or size in allowed:
                continue
            reason = allowed.excluded.get(size)
            raise InputError(
                f"'{name}' = {size} is outside what this model was exported for ({name}: {allowed})"
                + (f": {reason}" if reason else ""),
                where=allowed.where,
                hint="export it again with an example of this size to get a graph that is right there",
            )
        for relation in self.relations:
            if not relation.holds(sizes):
                named = {n: sizes[n] for n in sorted(Expression(relation.expression).names) if n in sizes}
                raise InputError(
                    f"sizes {named} break '{relation.expression}', which this model was exported under",
                    where=relation.where,
                    hint="export it again with an example of these sizes to get a graph that is right there",
                )


@functools.cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Signature)


def _check_names(names: tuple[str, ...], arrays: Mapping[str, Any]) -> None:
    unknown = [name for name in arrays if name not in names]
    if unknown:
        raise InputError(f"unknown input '{unknown[0]}'", hint=did_you_mean(unknown[0], names))
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InputError(f"input '{missing[0]}' is missing", hint="the inputs are " + ", ".join(names))

"""The section ``backend_config`` with MMDeploy's keys: an engine, its options, the sizes of its inputs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from torchferry.core.dimension import Dimension
from torchferry.core.errors import ConfigError, did_you_mean
from torchferry.core.report import Finding
from torchferry.core.target import DEFAULT_BACKEND, Precision, Target

Shape = tuple[int, ...]
_KEY = "backend_config.model_inputs.0"
_MODES: dict[str, Precision] = {"int8_mode": "int8", "fp16_mode": "fp16"}  # int8 first: beside it, fp16 is for the rest
_ENDS: dict[str, Literal["min", "opt", "max"]] = {"min_shape": "min", "opt_shape": "opt", "max_shape": "max"}
_WHY_NOT = {
    "backend_config.use_vulkan": "this engine runs on the CPU here",
    "backend_config.mo_options": "the graph is compiled without a model optimizer",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shapes(_Section):
    """Sizes of one input.

    Attributes:
        min_shape: The smallest.
        opt_shape: The usual one, for which the engine chooses its kernels.
        max_shape: The largest.
    """

    min_shape: Shape | None = None
    opt_shape: Shape | None = None
    max_shape: Shape | None = None

    def given(self) -> dict[str, Shape]:
        """Return the shapes that are given, by key, from the smallest to the largest."""
        every = {key: getattr(self, key) for key in _ENDS}
        return {key: shape for key, shape in every.items() if shape is not None}


class ModelInputs(_Section):
    """Sizes of the inputs of one graph.

    Attributes:
        input_shapes: By input.
        opt_shapes: By input, the usual one alone.
    """

    input_shapes: dict[str, Shapes] = {}
    opt_shapes: dict[str, Shape] = {}

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        twice = self.input_shapes.keys() & self.opt_shapes.keys()
        if twice:
            raise ValueError(f"'{min(twice)}' stands in input_shapes and in opt_shapes")
        return self

    def shapes(self) -> Iterator[tuple[str, str, dict[str, Shape]]]:
        """Yield for every input its key, its name, and its shapes by their keys."""
        for name, shapes in self.input_shapes.items():
            key = f"{_KEY}.input_shapes.{name}"
            yield key, name, {f"{key}.{which}": shape for which, shape in shapes.given().items()}
        for name, shape in self.opt_shapes.items():
            yield f"{_KEY}.opt_shapes.{name}", name, {f"{_KEY}.opt_shapes.{name}": shape}


class BackendConfig(_Section):
    """The engine.

    Attributes:
        type: Its name.
        precision: What it computes in, in small or capital letters.
        common_config: Its options; ``fp16_mode``, ``int8_mode`` and ``precision`` set the precision.
        model_inputs: The sizes of the graph's inputs.
        use_vulkan: Has no effect.
        mo_options: Has no effect.
    """

    type: str = DEFAULT_BACKEND
    precision: Precision = "fp32"
    common_config: dict[str, Any] = {}
    model_inputs: tuple[ModelInputs, ...] = ()
    use_vulkan: bool = False
    mo_options: dict[str, Any] = {}

    @field_validator("precision", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _from_common(cls, values: Any) -> Any:
        """Take the precision from the options, where they say one."""
        if not isinstance(values, Mapping) or not isinstance(values.get("common_config"), Mapping):
            return values
        common = values["common_config"]
        set_by = {mode: precision for mode, precision in _MODES.items() if common.get(mode)}
        set_by |= {"precision": common["precision"]} if isinstance(common.get("precision"), str) else {}
        if not set_by:
            return values
        option, precision = next(iter(set_by.items()))
        given = values.get("precision", precision)
        if isinstance(given, str) and given.lower() != precision.lower():
            raise ValueError(f"precision is {given.lower()}, but common_config.{option} asks for {precision.lower()}")
        return {**values, "precision": precision}

    def target(self, options: Collection[str] | None, *, opset: int | None = None) -> Target:
        """Return what the section asks for.

        Args:
            options: The names of options that the engine takes; None if it is not here.
            opset: The graph's.

        Raises:
            ConfigError: If the value of an option is no number from 0 up.
        """
        taken = {name: value for name, value in self.common_config.items() if name in (options or ())}
        return Target(self.type, self.precision, opset=opset, options=taken)

    def dimensions(
        self, dynamic: Mapping[str, Mapping[int, str]], shapes: Mapping[str, Shape], *, naming: str
    ) -> dict[str, dict[int, Dimension]]:
        """Give the dynamic axes the sizes that ``model_inputs`` says.

        Args:
            dynamic: By input, then by axis, the dimensions' names, perhaps with sizes.
            shapes: The example's, by input.
            naming: The key under which users name axes, for the hint.

        Raises:
            ConfigError: If an input is unknown; or a shape has another rank than the example's, another size at an axis
                without a name, or sizes that do not rise; or the sizes of an axis are said twice.
        """
        found = {name: {axis: Dimension.parse(text) for axis, text in axes.items()} for name, axes in dynamic.items()}
        for key, name, given in self.model_inputs[0].shapes() if self.model_inputs else ():
            if name not in shapes:
                raise ConfigError(f"'{key}': the graph has no input '{name}'", hint=did_you_mean(name, shapes))
            example = shapes[name]
            for where, shape in given.items():
                if len(shape) != len(example):
                    raise ConfigError(
                        f"'{where}' has {len(shape)} sizes, {list(shape)}, the example of '{name}' {list(example)}"
                    )
            axes = found.setdefault(name, {})
            for axis, size in enumerate(example):
                place = axis if axis in axes else axis - len(example)  # an axis may be counted from the end
                sizes = {where: shape[axis] for where, shape in given.items()}
                if place in axes:
                    axes[place] = _ranged(axes[place], sizes, key)
                elif wrong := next((where for where, other in sizes.items() if other != size), None):
                    raise ConfigError(
                        f"'{wrong}' has {sizes[wrong]} at axis {axis}, which is not dynamic and {size} in the example",
                        hint=f"name the axis in {naming} to make it dynamic, or let both sizes be the same",
                    )
        return found

    def findings(self, options: Collection[str] | None) -> tuple[Finding, ...]:
        """Say what stands in the section and has no effect; ``options`` as for ``target``."""
        taken = {*_MODES, "precision", *(options or ())}
        idle = sorted(name for name in self.common_config if name not in taken)
        reason = f"'{self.type}' is not installed here" if options is None else f"'{self.type}' has no such option here"
        because = {f"backend_config.common_config.{name}": reason for name in idle}
        because |= {key: why for key, why in _WHY_NOT.items() if getattr(self, key.rpartition(".")[2])}
        if len(self.model_inputs) > 1:
            because["backend_config.model_inputs.1"] = "the sizes of a part follow from those of the whole"
        return ignored(because)


def ignored(because: Mapping[str, str]) -> tuple[Finding, ...]:
    """Return a finding for every key of a config that has no effect, with the reason."""
    return tuple(
        Finding("config-ignored", "info", f"'{key}' has no effect: {reason}") for key, reason in because.items()
    )


def _ranged(dim: Dimension, sizes: Mapping[str, int], key: str) -> Dimension:
    """Give a dimension its sizes; where both ends and no optimum are said, that is the middle."""
    if not sizes:
        return dim
    if not dim.is_bare:
        raise ConfigError(f"'{key}' says sizes of '{dim.name}', and so does '{dim}'", hint="say them once")
    ends = {_ENDS.get(where.rpartition(".")[2], "opt"): size for where, size in sizes.items()}
    if ends.keys() == {"min", "max"}:
        ends["opt"] = (ends["min"] + ends["max"]) // 2
    try:
        return Dimension(dim.name, **ends)
    except ConfigError as exc:
        raise ConfigError(f"'{key}': {exc.message}") from exc

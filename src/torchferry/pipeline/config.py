"""The deploy config: what ``deploy.toml`` and the command line's flags may say."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from torchferry import backends
from torchferry.core.backend_config import BackendConfig
from torchferry.core.errors import ConfigError
from torchferry.core.files import require_file
from torchferry.core.sections import read_section
from torchferry.core.target import DEFAULT_BACKEND, Precision, Target
from torchferry.package import Postprocess, Preprocess
from torchferry.pipeline.inputs import are_numbers

if TYPE_CHECKING:
    from torchferry.core.report import Finding


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """The model.

    Attributes:
        factory: ``module:factory`` or ``file.py:factory``.
        arguments: Keyword arguments of the factory.
        checkpoint: safetensors, or a file that torch.save wrote; None for the weights that the factory makes.
        unsafe_checkpoint: Let a pickled checkpoint run its code.
    """

    factory: str
    arguments: dict[str, Any] = {}
    checkpoint: Path | None = None
    unsafe_checkpoint: bool = False


class TargetSection(_Section):
    """Where it goes; see ``core.target.Target``."""

    backend: str = DEFAULT_BACKEND
    precision: Precision = "fp32"
    device: str = "cpu"
    opset: int | None = None
    options: dict[str, int] = {}

    def target(self) -> Target:
        """Return the target; what was not said is left to it."""
        return Target(**self.model_dump(exclude_unset=True))


class ExportSection(_Section):
    """Names and dynamic dimensions of the graph.

    Attributes:
        input_names: In order; forward's parameters where not given.
        output_names: In order.
        dynamic: ``{input: {axis: name}}``; a name may have sizes, ``batch=1..8`` or ``batch=1..4..8``.
    """

    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    dynamic: dict[str, dict[int, str]] = {}


class VerifySection(_Section):
    """What is asked of the engine.

    Attributes:
        atol: Absolute tolerance; the precision's own by default.
        rtol: Relative tolerance; the precision's own by default.
        sizes: Sizes of each dynamic dimension to run; chosen from the ranges by default.
    """

    atol: float | None = Field(default=None, ge=0)
    rtol: float | None = Field(default=None, ge=0)
    sizes: dict[str, tuple[int, ...]] | None = None


class BudgetSection(_Section):
    """The error that every output may have, in place of tolerances; see ``core.compare.Budget``."""

    max_abs: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    relative: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if self.max_abs is None and self.relative is None:
            raise ValueError("needs max_abs, relative or both")
        return self


class PartSection(_Section):
    """A part of the model.

    Attributes:
        save_file: A file name; ``name.onnx`` by default.
        start: Selectors of what goes in.
        end: Selectors of what comes out.
        name: The part's name; the file's without its ending by default.
        output_names: What the tensors of the end are called.
        dynamic_axes: Axes that must be dynamic in the part, by tensor: with names, or a list.
    """

    save_file: str | None = None
    start: tuple[str, ...] | None = None
    end: tuple[str, ...] | None = None
    name: str | None = None
    output_names: tuple[str, ...] | None = None
    dynamic_axes: dict[str, dict[int, str] | tuple[int, ...]] = {}

    @field_validator("start", "end", "output_names", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class PartitionSection(_Section):
    """The parts of the model.

    Attributes:
        apply_marks: Keep the model's marks in the graph, for selectors to find.
        type: The name of a cut that a codebase knows; not looked at where ``partition_cfg`` is given.
        partition_cfg: The parts.
        rest: Write what remains as parts of their own.
    """

    apply_marks: bool = True
    type: str | None = None
    partition_cfg: tuple[PartSection, ...] = ()
    rest: bool = False

    @model_validator(mode="after")
    def _some_parts(self) -> Self:
        if not self.partition_cfg and self.type is None:
            raise ValueError("needs partition_cfg, or the type of a cut that has a name")
        return self


HEADROOM_BITS = 2


class Fp16Section(_Section):
    """How graphs for targets of precision fp16 are repaired.

    Attributes:
        headroom_bits: Powers of two that inputs may be larger than those given before FP16 overflows.
    """

    headroom_bits: int = Field(default=HEADROOM_BITS, ge=0, le=10)


class DeployConfig(_Section):
    """Everything that ``torchferry deploy`` needs.

    Attributes:
        name: The package's name; the factory's by default.
        model: The model.
        inputs: ``picture.png``, ``name=picture.png``, ``name=file.npz``, ``name=file.npy`` or ``name=1,1,3,3``.
        targets: One or more engines; the first is the package's default.
        backend_config: One engine and its sizes, in MMDeploy's words and in place of ``targets``.
        export: Names and dynamic dimensions.
        verify: Tolerances and sizes.
        budget: The error that every output may have; the precision's tolerances by default.
        fp16: How graphs for FP16 are repaired.
        preprocess: How a picture becomes each input.
        postprocess: How each output becomes a picture.
        partition_config: Parts that ``torchferry export`` writes beside the whole.
        out: The package's folder.
    """

    name: str | None = None
    model: ModelSection
    inputs: tuple[str, ...] = Field(min_length=1)
    targets: tuple[TargetSection, ...] = Field(default=(TargetSection(),), min_length=1)
    backend_config: BackendConfig | None = None
    export: ExportSection = ExportSection()
    verify: VerifySection = VerifySection()
    budget: BudgetSection | None = None
    fp16: Fp16Section = Fp16Section()
    preprocess: Mapping[str, Preprocess] = {}
    postprocess: Mapping[str, Postprocess] = {}
    partition_config: PartitionSection | None = None
    out: Path

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.backend_config is not None and "targets" in self.model_fields_set:
            raise ValueError("'targets' and 'backend_config' are two ways to name engines; use one")
        return self

    def engines(self) -> list[Target]:
        """Return the targets, whichever table names them.

        Raises:
            ConfigError: If one cannot be.
            MissingBackendError: If ``backend_config`` names an engine that nobody knows.
        """
        if self.backend_config is None:
            return [target.target() for target in self.targets]
        return [self.backend_config.target(backends.options(self.backend_config.type))]

    def findings(self) -> tuple[Finding, ...]:
        """Say what stands in the config and has no effect."""
        backend = self.backend_config
        return () if backend is None else backend.findings(backends.options(backend.type))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a config file and its bases into one dictionary; paths in it become relative to the current folder.

    ``base = ["a.toml", …]`` is read first, in order; tables merge, everything else is replaced.

    Raises:
        MissingFileError: If the file or a base does not exist.
        ConfigError: If one is not TOML, or the bases run in a circle.
    """
    return _read(Path(path), ())


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """Read a file for those whose base it is, the outermost first."""
    require_file(path, "config")
    chain = (*readers, Path(os.path.normpath(path.absolute())))
    if chain[-1] in readers:
        raise ConfigError("bases run in a circle: " + " -> ".join(f"'{step}'" for step in chain))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"'{path}' is not TOML: {exc}") from exc
    bases = values.pop("base", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"'base' in '{path}' must be a list of paths, got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, _read(path.parent / base, chain))
    return merge(merged, _anchored(values, path.parent))


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``old`` with ``new`` on top: tables merge, everything else is replaced."""
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _anchored(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the paths of one config file relative to that file's folder."""

    def anchor(path: Any) -> Any:
        return os.path.normpath(folder / path) if isinstance(path, str) else path

    model = values.get("model")
    if isinstance(model, dict):
        if isinstance(model.get("checkpoint"), str):
            model["checkpoint"] = anchor(model["checkpoint"])
        factory = model.get("factory")
        if isinstance(factory, str) and factory.rpartition(":")[0].endswith(".py"):
            model["factory"] = anchor(factory)
    if "out" in values:
        values["out"] = anchor(values["out"])
    if isinstance(values.get("inputs"), list):
        values["inputs"] = [_anchored_input(item, folder) for item in values["inputs"]]
    return values


def _anchored_input(item: Any, folder: Path) -> Any:
    if not isinstance(item, str):
        return item
    name, equals, value = item.rpartition("=")
    return item if are_numbers(value) else f"{name}{equals}{os.path.normpath(folder / value)}"


def validate(values: Mapping[str, Any], origin: str) -> DeployConfig:
    """Check a dictionary against the config's fields.

    Args:
        values: As ``read_toml`` gives it, with the flags on top.
        origin: Where it came from, for the message.

    Raises:
        ConfigError: If a key is unknown (the nearest valid one is named), missing, or has a wrong value; also for a
            budget beside tolerances.
    """
    config = read_section(DeployConfig, values, origin, also=("base",))
    if config.budget is not None and (config.verify.atol, config.verify.rtol) != (None, None):
        raise ConfigError(
            f"{origin}: 'budget' and 'verify.atol' or 'verify.rtol' both say which error is allowed",
            hint="keep the budget or the tolerances",
        )
    return config


def toml_value(text: str) -> Any:
    """Read the value of ``--set key=value``: TOML where it is TOML, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text

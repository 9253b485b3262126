"""Deploy configs with MMDeploy's keys, from Python with ``_base_`` or from TOML."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from torchferry import backends
from torchferry.codebases.openmmlab.libraries import mmengine, names, quiet, replaced
from torchferry.core.backend_config import BackendConfig, ignored
from torchferry.core.errors import ConfigError, did_you_mean
from torchferry.core.files import require_file
from torchferry.core.report import Finding
from torchferry.core.sections import read_section

if TYPE_CHECKING:
    from torchferry.core.dimension import Dimension
    from torchferry.core.target import Precision, Target

OWN_CONFIGS = Path(__file__).parent / "configs"
OWN_PREFIX = "torchferry::"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OnnxConfig(_Section):
    """The graph.

    Attributes:
        type: ``onnx``.
        input_names: Names of the graph's inputs.
        output_names: Names of its outputs; the codebase's own where not given.
        input_shape: Width and height of the picture; the test pipeline's where not given.
        dynamic_axes: ``{tensor: {axis: name}}`` or ``{tensor: [axis, …]}``; of inputs, since those of outputs follow.
        opset_version: The opset; the exporter's own where not given.
        save_file: The file of the whole graph.
        export_params: Always true.
        keep_initializers_as_inputs: Always false.
        optimize: Always true.
        verbose: Has no effect.
    """

    type: Literal["onnx"] = "onnx"
    input_names: tuple[str, ...] = ("input",)
    output_names: tuple[str, ...] = ()
    input_shape: tuple[int, int] | None = None
    dynamic_axes: dict[str, dict[int, str]] | None = None
    opset_version: int | None = Field(default=None, ge=1)
    save_file: str = "end2end.onnx"
    export_params: Literal[True] = True
    keep_initializers_as_inputs: Literal[False] = False
    optimize: bool = True
    verbose: bool = False

    @field_validator("dynamic_axes", mode="before")
    @classmethod
    def _named(cls, axes: Any) -> Any:
        """Name the axes of a list as MMDeploy's own configs do: batch, height, width."""
        usual = {0: "batch", 2: "height", 3: "width"}
        if not isinstance(axes, Mapping):
            return axes
        return {
            name: {axis: usual.get(axis, f"{name}_{axis}") for axis in each} if isinstance(each, list | tuple) else each
            for name, each in axes.items()
        }


class CodebaseConfig(_Section):
    """Where the model comes from.

    Attributes:
        type: The library.
        task: Its task.
        model_type: Has no effect.
        post_processing: Thresholds for what the model's own ``test_cfg`` does not say.
    """

    type: str
    task: str | None = None
    model_type: str | None = None
    post_processing: dict[str, Any] = {}
    export_postprocess_mask: bool | None = None

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in names():
            raise ValueError(f"unknown codebase ({did_you_mean(value, names())})")
        return value


class CalibConfig(_Section):
    """Calibration.

    Attributes:
        create_calib: Whether it is wanted.
        calib_file: Its file.
    """

    create_calib: bool = False
    calib_file: str | None = None


class CodebaseDeployConfig(_Section):
    """A deploy config.

    Attributes:
        onnx_config: The graph; also ``ir_config``.
        backend_config: The engine.
        codebase_config: Where the model comes from.
        calib_config: Calibration.
        partition_config: How the graph is cut; read by ``pipeline``, as that of a ``deploy.toml``.
    """

    onnx_config: OnnxConfig = OnnxConfig()
    backend_config: BackendConfig = BackendConfig()
    codebase_config: CodebaseConfig
    calib_config: CalibConfig = CalibConfig()
    partition_config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "ir_config" in values:
            if "onnx_config" in values:
                raise ValueError("'ir_config' and 'onnx_config' are two names of one section")
            return {("onnx_config" if key == "ir_config" else key): value for key, value in values.items()}
        return values

    @property
    def target(self) -> Target:
        """The engine, for the exporter."""
        backend = self.backend_config
        return backend.target(backends.options(backend.type), opset=self.onnx_config.opset_version)

    @property
    def verified_in(self) -> Precision:
        """The precision in which an engine runs the graph, which is written in FP32."""
        precision = self.backend_config.precision
        return precision if precision in ("fp32", "bf16") else "fp32"

    def dynamic_shapes(self, shape: tuple[int, ...]) -> dict[str, dict[int, Dimension]]:
        """Return the dynamic axes of the inputs, with the sizes that ``model_inputs`` says.

        Args:
            shape: The example's.

        Raises:
            ConfigError: As ``BackendConfig.dimensions``.
        """
        onnx = self.onnx_config
        axes = {name: each for name, each in (onnx.dynamic_axes or {}).items() if name in onnx.input_names}
        return self.backend_config.dimensions(axes, {onnx.input_names[0]: shape}, naming="onnx_config.dynamic_axes")

    def findings(self) -> tuple[Finding, ...]:
        """Say what stands in the config and has no effect here."""
        onnx, backend, codebase = self.onnx_config, self.backend_config, self.codebase_config
        outputs = [name for name in onnx.dynamic_axes or {} if name not in onnx.input_names]
        because = {
            "onnx_config.optimize": "the graph is always simplified" if not onnx.optimize else "",
            "onnx_config.verbose": "there is nothing to print" if onnx.verbose else "",
            "onnx_config.dynamic_axes": f"the axes of {', '.join(outputs)} follow from the inputs'" if outputs else "",
            "codebase_config.model_type": "it chooses a class of MMDeploy's own runtime" if codebase.model_type else "",
            "codebase_config.export_postprocess_mask": "masks are not exported"
            if codebase.export_postprocess_mask is not None
            else "",
            "calib_config": "no calibration file is written; fp16 and int8 take their data directly"
            if self.calib_config.create_calib or self.calib_config.calib_file
            else "",
        }
        because = {key: reason for key, reason in because.items() if reason}
        found = (*ignored(because), *backend.findings(backends.options(backend.type)))
        if self.verified_in == backend.precision:
            return found
        fp32 = Finding(
            "written-in-fp32",
            "warning",
            f"the graph is written and verified in fp32; an engine in {backend.precision} wants another one",
            hint="`torchferry fp16 fix` makes an fp16 graph of the file" if backend.precision == "fp16" else None,
        )
        return (*found, fp32)


def read_python(path: str | Path) -> dict[str, Any]:
    """Read a Python config with everything it inherits. This runs the file, and the bases that it names.

    A base ``torchferry::detection/x.py`` is one of our own; ``mmdet::…`` is mmengine's form for those of a library.

    Raises:
        MissingFileError: If there is no such file.
        ConfigError: If it, or a base, cannot be read.
    """
    file = require_file(path, "config")
    config = mmengine("mmengine.config").Config
    theirs = config._get_cfg_path

    def base_path(base: str, filename: str) -> tuple[str, str | None]:
        if not base.startswith(OWN_PREFIX):
            found: tuple[str, str | None] = theirs(base, filename)
            return found
        return str(own_config(base.removeprefix(OWN_PREFIX))), None

    with quiet(), replaced(config, "_get_cfg_path", staticmethod(base_path)):
        try:
            values: dict[str, Any] = config.fromfile(str(file), format_python_code=False).to_dict()
        except Exception as exc:  # whatever the file does, and mmengine's own errors
            traceback.clear_frames(exc.__traceback__)  # mmengine leaves its copy of the file open
            if isinstance(exc, ConfigError):
                raise
            raise ConfigError(
                f"config '{file}' cannot be read: {type(exc).__name__}: {exc}", hint="run it with Python to see where"
            ) from exc
    return values


def own_config(name: str) -> Path:
    """Return the file of a base config that comes with Torchferry.

    Raises:
        ConfigError: If there is none of this name.
    """
    known = [path.relative_to(OWN_CONFIGS).as_posix() for path in OWN_CONFIGS.rglob("*.py")]
    if name not in known:
        raise ConfigError(f"Torchferry has no base config '{name}'", hint=did_you_mean(name, known))
    return OWN_CONFIGS / name


def validate_deploy_config(values: Mapping[str, Any], origin: str) -> CodebaseDeployConfig:
    """Check the keys and values of a deploy config.

    Args:
        values: As ``read_python`` gives them, or a TOML file's.
        origin: Where they came from, for the message.

    Raises:
        ConfigError: If a key is unknown (the nearest valid one is named), missing, or has a wrong value.
    """
    return read_section(CodebaseDeployConfig, values, origin)

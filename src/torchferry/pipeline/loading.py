"""From a deploy config to a ``Source`` with the user's data."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab.libraries import is_model_reference
from torchferry.core.errors import ConfigError, InputError, ModelError, did_you_mean
from torchferry.exporter.checkpoint import load_checkpoint
from torchferry.exporter.reference import load_model
from torchferry.exporter.source import Source
from torchferry.package import Preprocess
from torchferry.pipeline.inputs import read_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchferry.core.engine import Array
    from torchferry.pipeline.config import DeployConfig, ModelSection


@dataclass(frozen=True)
class Loaded:
    """A config brought to life.

    Attributes:
        source: The model with its first set of data as the example.
        calls: Every set of data, as keyword arguments.
        preprocess: How a picture becomes each input that was declared as one, or given as one.
        notes: What was done to the checkpoint.
    """

    source: Source
    calls: list[dict[str, Any]]
    preprocess: Mapping[str, Preprocess]
    notes: tuple[str, ...]


def load_source(config: DeployConfig) -> Loaded:
    """Build the model, load its weights, and read its inputs.

    Raises:
        ModelError: If the model cannot be built, or its forward takes nothing by name.
        CheckpointError: If the weights do not fit or may not be read.
        ConfigError: If the inputs do not fit the model's parameters.
        MissingFileError, FormatError, InputError: If an input cannot be read, or be a tensor.
    """
    model, notes = build_model(config.model)
    parameters = _parameters(model)
    if not parameters:
        raise ModelError(
            f"forward{inspect.signature(model.forward)} takes no input by name",
            hint="give forward a parameter for each input, not *args",
        )
    # The graph's names and forward's may differ; data may be given under either.
    to_parameter = dict(zip(config.export.input_names, parameters, strict=False))
    how = {to_parameter.get(name, name): value for name, value in config.preprocess.items()}
    data = read_inputs(config.inputs, parameters, how, to_parameter)
    unknown = [name for name in (*data.arrays, *how) if name not in parameters]
    if unknown:
        known = {*parameters, *to_parameter}
        raise ConfigError(f"the model has no parameter '{unknown[0]}'", hint=did_you_mean(unknown[0], known))
    calls = [{name: _tensor(name, call[name]) for name in parameters if name in call} for call in data.calls()]
    to_input = {parameter: name for name, parameter in to_parameter.items()}
    source = Source(model, (), calls[0], None, config.export.input_names, config.export.output_names)
    source = dataclasses.replace(source, dynamic_shapes=_dynamic(config, source) or None)
    pictures = how | {name: Preprocess() for name in data.pictures if name not in how}
    return Loaded(source, calls, {to_input.get(name, name): value for name, value in pictures.items()}, tuple(notes))


def _dynamic(config: DeployConfig, source: Source) -> dict[str, dict[int, Any]]:
    """Return the dynamic axes by the graph's names, with the sizes of ``backend_config``."""
    names = source.names
    to_graph = dict(zip(names.parameter_names, names.names, strict=True))
    dynamic = {
        name if name in names.names else to_graph.get(name, name): axes for name, axes in config.export.dynamic.items()
    }
    if config.backend_config is None:
        return dynamic
    shapes = {name: tuple(tensor.shape) for name, tensor in names.tensors(source.call).items()}
    return config.backend_config.dimensions(dynamic, shapes, naming="export.dynamic")


def build_model(section: ModelSection) -> tuple[torch.nn.Module, list[str]]:
    """Build the model and load its weights; return what was done to these.

    Raises:
        ModelError: If the model cannot be built.
        CheckpointError: If the weights do not fit or may not be read.
        ConfigError: If arguments are given to a model that takes none.
        MissingFileError: If a file does not exist.
    """
    if is_model_reference(section.factory):
        if section.arguments:
            raise ConfigError(f"'{section.factory}' takes no arguments", hint="change its config instead")
        from torchferry.codebases.openmmlab.source import build_reference  # registers its rewriters

        built = build_reference(section.factory, section.checkpoint, unsafe=section.unsafe_checkpoint)
        return built.model, list(built.notes)
    model = load_model(section.factory, section.arguments).eval()
    if section.checkpoint is None:
        return model, []
    return model, load_checkpoint(model, section.checkpoint, unsafe=section.unsafe_checkpoint)


def _parameters(model: torch.nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]


def _tensor(name: str, array: Array) -> torch.Tensor:
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as exc:  # text, structures, another machine's byte order
        raise InputError(f"input '{name}' of dtype {array.dtype} cannot be a tensor: {exc}") from exc

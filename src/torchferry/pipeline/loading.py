"""From a deploy config to a ``Source`` with the user's data."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchferry.core.errors import ConfigError, did_you_mean
from torchferry.exporter.checkpoint import load_checkpoint
from torchferry.exporter.reference import load_model
from torchferry.exporter.source import Source
from torchferry.package import Preprocess
from torchferry.pipeline.inputs import read_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchferry.pipeline.config import DeployConfig


@dataclass(frozen=True)
class Loaded:
    """A config brought to life.

    Attributes:
        source: The model with its first set of data as the example.
        calls: Every set of data, as keyword arguments.
        preprocess: How a picture becomes each input that was given as one.
        notes: What was done to the checkpoint.
    """

    source: Source
    calls: list[dict[str, Any]]
    preprocess: Mapping[str, Preprocess]
    notes: tuple[str, ...]


def load_source(config: DeployConfig) -> Loaded:
    """Build the model, load its weights, and read its inputs.

    Raises:
        ModelError: If the model cannot be built.
        CheckpointError: If the weights do not fit or may not be read.
        ConfigError: If the inputs do not fit the model's parameters.
    """
    model = load_model(config.model.factory, config.model.arguments).eval()
    notes: list[str] = []
    if config.model.checkpoint is not None:
        notes = load_checkpoint(model, config.model.checkpoint, unsafe=config.model.unsafe_checkpoint)
    parameters = _parameters(model)
    # The graph's names and forward's may differ; data may be given under either.
    to_parameter = dict(zip(config.export.input_names, parameters, strict=False))
    items = [_renamed(item, to_parameter) for item in config.inputs]
    how = {to_parameter.get(name, name): value for name, value in config.preprocess.items()}
    data = read_inputs(items, parameters, how)
    unknown = [name for name in (*data.arrays, *how) if name not in parameters]
    if unknown:
        raise ConfigError(f"forward has no parameter '{unknown[0]}'", hint=did_you_mean(unknown[0], parameters))
    calls = [{name: torch.from_numpy(array) for name, array in call.items()} for call in data.calls()]
    calls = [{name: call[name] for name in parameters if name in call} for call in calls]
    to_input = {parameter: name for name, parameter in to_parameter.items()}
    source = Source(
        model, (), calls[0], config.export.dynamic or None, config.export.input_names, config.export.output_names
    )
    shown = {to_input.get(name, name): how.get(name, Preprocess()) for name in data.pictures}
    return Loaded(source, calls, shown, tuple(notes))


def _parameters(model: torch.nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]


def _renamed(item: str, to_parameter: Mapping[str, str]) -> str:
    name, equals, value = item.partition("=")
    return f"{to_parameter.get(name, name)}{equals}{value}" if equals else item

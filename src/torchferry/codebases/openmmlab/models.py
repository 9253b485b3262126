"""Models of OpenMMLab's libraries: finding their configs, and building what these describe."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab.deploy_config import read_python
from torchferry.codebases.openmmlab.libraries import library, mmengine, names, quiet
from torchferry.core.errors import ConfigError, ModelError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

SEED = 0
# What the model's test_cfg calls what post_processing says.
_THRESHOLDS = {"score_threshold": "score_thr", "confidence_threshold": "conf_thr", "keep_top_k": "max_per_img"}


@dataclass(frozen=True)
class ModelConfig:
    """A model config.

    Attributes:
        name: What it was called.
        library: The library that it belongs to.
        values: Its keys, with everything that it inherits.
    """

    name: str
    library: str
    values: dict[str, Any]

    @property
    def pipeline(self) -> list[dict[str, Any]]:
        """The test pipeline."""
        if "test_pipeline" in self.values:
            return list(self.values["test_pipeline"])
        data = self.values.get("test_dataloader") or {}
        while "dataset" in data:
            data = data["dataset"]
        return list(data.get("pipeline", []))


def find_model_config(reference: str, default_library: str) -> ModelConfig:
    """Read a model config. This runs the file.

    Args:
        reference: A path; ``mmdet::yolo/x.py`` or ``mmdet:yolo/x``, one of those that come with a library; or
            ``yolo/x.py``, one of the default library's.
        default_library: Whose model it is where neither reference nor config says.

    Raises:
        ConfigError: If there is none of this name (the nearest are named), or it cannot be read.
        ModelError: If the library is not installed.
    """
    scope, colons, name = reference.partition(":")
    if colons and scope in names():
        file = _shipped(scope, name.lstrip(":"))
    elif Path(reference).is_file():
        file, scope = Path(reference), ""
    else:
        scope = default_library
        file = _shipped(scope, reference)
    values = read_python(file)
    if "model" not in values:
        raise ConfigError(
            f"'{file}' describes no model", hint="give the model's config, and the deploy config before it"
        )
    return ModelConfig(file.stem, scope or values.get("default_scope") or default_library, values)


def _shipped(scope: str, name: str) -> Path:
    """Return a config that comes with a library."""
    folder = _config_folder(scope)
    name = name if name.endswith(".py") else f"{name}.py"
    file = folder / name
    if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
        known = _config_names(scope)
        same = [each for each in known if Path(each).name == Path(name).name]
        hint = f"did you mean '{same[0]}'?" if same else did_you_mean(name, known)
        if not hint.startswith("did"):
            hint = f"the configs lie under '{folder}'"
        raise ConfigError(f"there is no file '{name}', and '{scope}' has no model config of this name", hint=hint)
    return file


def _config_folder(scope: str) -> Path:
    spec = importlib.util.find_spec(scope)
    if spec is None or spec.origin is None:
        library(scope)  # says how it is installed
        raise ModelError(f"OpenMMLab's '{scope}' brings no configs")
    return Path(spec.origin).parent / ".mim" / "configs"


@functools.cache
def _config_names(scope: str) -> tuple[str, ...]:
    folder = _config_folder(scope)
    return tuple(path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if "_base_" not in path.parts)


def build_model(config: ModelConfig, post_processing: Mapping[str, Any] | None = None) -> torch.nn.Module:
    """Build the model of a config with weights from a fixed seed, in eval mode; nothing is downloaded.

    Args:
        config: The model's.
        post_processing: Thresholds of a deploy config, for what the model's ``test_cfg`` does not say.

    Raises:
        ModelError: If the library is not installed, or building raises.
    """
    registry = _registry(config.library)
    described = _without_downloads(config.values["model"])
    if "test_cfg" in described or post_processing:  # mmocr's detectors do not take one
        described["test_cfg"] = _test_cfg(described.get("test_cfg"), post_processing or {})
    with quiet(), torch.random.fork_rng(devices=[]), in_scope(config.library):
        torch.manual_seed(SEED)
        try:
            model = registry.build(mmengine("mmengine.config").ConfigDict(described))
        except Exception as exc:  # whatever the constructors do
            raise ModelError(
                f"the model of '{config.name}' cannot be built: {type(exc).__name__}: {exc}",
                hint="build it with its own library first",
            ) from exc
        # In eval mode the same, and batch statistics can be taken on one machine.
        plain: torch.nn.Module = mmengine("mmengine.model").revert_sync_batchnorm(model)
    _complete(plain)
    return plain.eval()


def _complete(model: torch.nn.Module) -> None:
    """Give a head that lacks it the attribute that its own predict reads: mmdet 3.3's SSDHead has no ``loss_cls``."""
    head = getattr(model, "bbox_head", None)
    if isinstance(head, torch.nn.Module) and type(head).__name__ == "SSDHead" and not hasattr(head, "loss_cls"):
        vars(head)["loss_cls"] = None


def in_scope(name: str) -> Any:
    """Return a context in which names of classes are looked up in a library first."""
    return mmengine("mmengine.registry").DefaultScope.overwrite_default_scope(name)


def _registry(name: str) -> Any:
    library(name)
    return mmengine(f"{name}.registry").MODELS


def _without_downloads(value: Any) -> Any:
    """Return a copy of a part of a config in which nothing asks for pre-trained weights."""
    if isinstance(value, dict):
        return {
            key: None
            if key == "pretrained" or (key == "init_cfg" and "Pretrained" in str(inner))
            else _without_downloads(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(_without_downloads(inner) for inner in value)
    return value


def _test_cfg(own: Any, post_processing: Mapping[str, Any]) -> Any:
    """Return the model's thresholds with what a deploy config says besides."""
    told = {key: post_processing[name] for name, key in _THRESHOLDS.items() if name in post_processing}
    return {**told, **own} if isinstance(own, dict) and "rpn" not in own else own


def unused_thresholds(config: ModelConfig, post_processing: Mapping[str, Any]) -> dict[str, str]:
    """Return the entries of ``post_processing`` that have no effect, with the reason."""
    own = config.values["model"].get("test_cfg") or {}
    reasons = {}
    for name, value in post_processing.items():
        key = _THRESHOLDS.get(name)
        if key is None:
            reasons[name] = "the model's own test_cfg decides"
        elif key in own and own[key] != value:
            reasons[name] = f"the model's own test_cfg says {key}={own[key]}"
    return reasons

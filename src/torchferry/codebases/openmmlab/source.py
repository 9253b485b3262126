"""From a model config, weights and a picture to a ``Source``."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab import detectors, heads
from torchferry.codebases.openmmlab.checkpoints import fetch, is_address, load_weights
from torchferry.codebases.openmmlab.detectors import Boundaries, Detector, last_head, mmdet_samples
from torchferry.codebases.openmmlab.heads.candidates import DEFAULT_MAX_PER_IMG
from torchferry.codebases.openmmlab.libraries import library
from torchferry.codebases.openmmlab.models import build_model, find_model_config, unused_thresholds
from torchferry.codebases.openmmlab.pictures import read_picture
from torchferry.codebases.openmmlab.weights import calibrate_statistics, spread_classes, spread_scores
from torchferry.core.compare import TOLERANCES, Tolerance
from torchferry.core.errors import ConfigError
from torchferry.core.report import Finding
from torchferry.exporter.source import Source
from torchferry.partitioning import register_policy

if TYPE_CHECKING:
    from pathlib import Path

    from torchferry.codebases.openmmlab.checkpoints import Progress
    from torchferry.codebases.openmmlab.deploy_config import CodebaseDeployConfig
    from torchferry.codebases.openmmlab.models import ModelConfig

NO_CHECKPOINT = "none"
_REGIONS = "model.roi_head.bbox_head"
CANDIDATES = 100
"""How many candidates a detector without a checkpoint finds on its picture, unless ``none:COUNT`` says."""


class Network(torch.nn.Module):
    """A model of OpenMMLab behind its data preprocessor, without post-processing.

    Args:
        model: In eval mode.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input: torch.Tensor) -> Any:  # noqa: A002 - the graph's name for it
        """Return what ``mode="tensor"`` gives for normalised pictures, float32 (batch, 3, height, width)."""
        return self.model(input, mode="tensor")


@dataclass(frozen=True)
class Prepared:
    """A model ready to be exported.

    Attributes:
        source: The model with the picture as its example.
        config: The model's config.
        findings: What was done besides, and what of the deploy config has no effect.
    """

    source: Source
    config: ModelConfig
    findings: tuple[Finding, ...]

    @property
    def tolerance(self) -> Tolerance | None:
        """What is asked of outputs in pixels, whose errors are measured by the picture; None for other outputs."""
        if not isinstance(self.source.model, Detector):
            return None
        usual = TOLERANCES["fp32"]
        return Tolerance(usual.atol * max(self.source.args[0].shape[2:]), usual.rtol)

    def at_cuts(self) -> Source:
        """Return the source for comparing the tensors at cuts: detections are not compared with them, but as sets."""
        model = self.source.model
        return (
            self.source.with_model(Boundaries(model.model, model.rows).eval())
            if isinstance(model, Detector)
            else self.source
        )


@dataclass(frozen=True)
class Built:
    """A model that a reference named.

    Attributes:
        model: A module whose forward takes ``input``.
        notes: What was done to the checkpoint.
    """

    model: torch.nn.Module
    notes: tuple[str, ...]


def register() -> None:
    """Register the rewriters and named partitions of OpenMMLab's models; a second time changes nothing."""
    for module in pkgutil.iter_modules(heads.__path__):
        importlib.import_module(f"{heads.__name__}.{module.name}")
    head = {"save_file": "partition0.onnx", "start": ["detector_forward:input"], "end": ["multiclass_nms:input"]}
    register_policy("mmdet", "single_stage", [head])
    proposals = {**head, "end": ["model.neck:output", "multiclass_nms[0]:input"]}
    regions = {"save_file": "partition1.onnx", "start": [f"{_REGIONS}:input"], "end": [f"{_REGIONS}:output"]}
    register_policy("mmdet", "two_stage", [proposals, regions])


def prepare(
    deploy: CodebaseDeployConfig,
    model_config: str,
    checkpoint: str,
    picture: str | Path,
    *,
    unsafe_checkpoint: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Build a model, load its weights, and read a picture for it.

    Args:
        deploy: The deploy config.
        model_config: See ``find_model_config``.
        checkpoint: A path; an https address; ``none`` for weights from a seed that suit the picture, where a detector
            finds 100 candidates, or ``none:COUNT`` for as many.
        picture: The picture.
        unsafe_checkpoint: Let a pickled checkpoint run its code.
        progress: As for ``fetch``.

    Raises:
        TorchferryError: As ``find_model_config``, ``build_model``, ``fetch``, ``load_weights`` and ``read_picture``.
    """
    codebase = deploy.codebase_config
    count = _candidates(checkpoint)
    config = find_model_config(model_config, codebase.type)
    if config.library != codebase.type:
        raise ConfigError(
            f"'{model_config}' is a model of '{config.library}', the deploy config is for '{codebase.type}'",
            hint=f"set codebase_config.type to '{config.library}', or give another model config",
        )
    library(config.library)
    register()
    model = build_model(config, codebase.post_processing)
    findings = [*deploy.findings(), *_threshold_findings(config, deploy)]
    if count is None:
        path = fetch(checkpoint, progress=progress) if is_address(checkpoint) else checkpoint
        notes = load_weights(model, path, unsafe=unsafe_checkpoint)
        findings += [Finding("checkpoint-note", "info", note) for note in notes]
    batch = read_picture(picture, model, config, deploy.onnx_config.input_shape)
    if count is not None:
        findings.append(_random(model, batch, count))
    module, outputs = _as_module(model)
    outputs = deploy.onnx_config.output_names or outputs
    dynamic = deploy.dynamic_shapes(tuple(batch.shape))
    source = Source(module, (batch,), {}, dynamic, deploy.onnx_config.input_names, outputs)
    return Prepared(source, config, tuple(findings))


def build_reference(reference: str, checkpoint: str | Path | None = None, *, unsafe: bool = False) -> Built:
    """Build the model that ``codebase:name`` names, as a module of one input.

    Args:
        reference: As ``find_model_config`` takes it.
        checkpoint: A path or an https address; None for weights from a seed, as they are.
        unsafe: Let a pickled checkpoint run its code.

    Raises:
        TorchferryError: As ``find_model_config``, ``build_model``, ``fetch`` and ``load_weights``.
    """
    config = find_model_config(reference, reference.partition(":")[0])
    library(config.library)
    register()
    model = build_model(config)
    notes: list[str] = []
    if checkpoint is not None:
        path = fetch(str(checkpoint)) if is_address(str(checkpoint)) else checkpoint
        notes = load_weights(model, path, unsafe=unsafe)
    return Built(_as_module(model)[0], tuple(notes))


def _candidates(checkpoint: str) -> int | None:
    """Return how many candidates are wanted without a checkpoint; None if there is one."""
    word, colon, count = checkpoint.partition(":")
    if word != NO_CHECKPOINT:
        return None
    if colon and not (count.isdecimal() and int(count) > 0):
        raise ConfigError(f"checkpoint '{checkpoint}' must be 'none' or 'none:COUNT' with a number above 0")
    return int(count) if colon else CANDIDATES


def _random(model: torch.nn.Module, batch: torch.Tensor, count: int) -> Finding:
    told = () if last_head(model) is None else (mmdet_samples(batch),)

    def forward() -> Any:
        return model(batch, *told, mode="tensor")

    norms = calibrate_statistics(model, forward)
    two_stages = hasattr(model, "roi_head")
    spread = spread_classes(model, forward, count) if two_stages else spread_scores(model, batch, count)
    found = f"scores spread for {count} candidates" if spread else "scores as they come"
    return Finding(
        "random-weights",
        "info",
        f"weights come from a fixed seed: statistics of {norms} normalisations taken from the picture, {found}",
        hint="give a checkpoint for a model that finds something",
    )


def _as_module(model: Any) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Return the module to export and the names of its outputs."""
    head = last_head(model)
    if head is None:
        return Network(model).eval(), ()
    most = (head.test_cfg or {}).get("max_per_img", -1)
    return Detector(model, most if most > 0 else DEFAULT_MAX_PER_IMG).eval(), detectors.OUTPUTS[:2]


def _threshold_findings(config: ModelConfig, deploy: CodebaseDeployConfig) -> list[Finding]:
    unused = unused_thresholds(config, deploy.codebase_config.post_processing)
    return [
        Finding("threshold-ignored", "warning", f"'codebase_config.post_processing.{name}' has no effect: {reason}")
        for name, reason in unused.items()
    ]

"""From a picture to the tensor that a model takes, by the test pipeline of its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab.libraries import mmengine, quiet
from torchferry.codebases.openmmlab.models import in_scope
from torchferry.core.errors import FormatError, InputError, ModelError
from torchferry.core.files import require_file

if TYPE_CHECKING:
    from pathlib import Path

    from torchferry.codebases.openmmlab.models import ModelConfig


def read_picture(
    path: str | Path, model: Any, config: ModelConfig, input_shape: tuple[int, int] | None = None
) -> torch.Tensor:
    """Read a picture as the model takes it: resized, normalised by its data preprocessor, padded.

    Args:
        path: The picture.
        model: Whose ``data_preprocessor`` normalises it.
        config: Whose test pipeline is run, without what loads annotations.
        input_shape: Width and height in place of the pipeline's: the picture is resized into them, its sides' ratio
            kept where the pipeline keeps it, and padded on the right and below.

    Returns:
        float32 (1, 3, height, width).

    Raises:
        MissingFileError: If there is no such file.
        FormatError: If it is no picture.
        ModelError: If the config has no pipeline, or it fails.
        InputError: If the pipeline leaves the picture larger than ``input_shape``.
    """
    file = require_file(path, "picture")
    steps = [_sized(step, input_shape) for step in config.pipeline if "Annotation" not in str(step["type"])]
    if not steps:
        raise ModelError(f"'{config.name}' has no test pipeline", hint="add test_pipeline to the model's config")
    transforms = mmengine(f"{config.library}.registry").TRANSFORMS
    with quiet(), in_scope(config.library):
        _require_picture(file)
        data: Any = {"img_path": str(file), "img_id": 0}
        try:
            for step in steps:
                data = transforms.build(step)(data)
            batch: torch.Tensor = model.data_preprocessor(
                {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}, False
            )["inputs"]
        except Exception as exc:  # whatever the transforms do
            raise ModelError(
                f"the test pipeline of '{config.name}' fails on '{file}': {type(exc).__name__}: {exc}",
                hint="run it with the model's own library first",
            ) from exc
    return (
        batch if input_shape is None else _padded(batch, input_shape, getattr(model.data_preprocessor, "pad_value", 0))
    )


def _require_picture(file: Path) -> None:
    import cv2

    if cv2.imread(str(file)) is None:
        raise FormatError(f"'{file}' is not a picture", hint="give a PNG or JPEG file")


def _sized(step: dict[str, Any], input_shape: tuple[int, int] | None) -> dict[str, Any]:
    """Return a step of the pipeline that makes pictures of this size, where it makes a size."""
    step = dict(step)
    if input_shape is not None and step["type"] in ("Resize", "mmdet.Resize"):
        step["scale"] = tuple(input_shape)
    if input_shape is not None and step["type"] in ("Pad", "mmdet.Pad") and "size" in step:
        step["size"] = tuple(input_shape)
    return step


def _padded(batch: torch.Tensor, input_shape: tuple[int, int], value: float) -> torch.Tensor:
    width, height = input_shape
    right, below = width - batch.shape[3], height - batch.shape[2]
    if right < 0 or below < 0:
        raise InputError(
            f"the pipeline makes pictures of {batch.shape[3]}x{batch.shape[2]}, "
            f"onnx_config.input_shape is {width}x{height}",
            hint="make input_shape a multiple of what the model pads to, such as 32",
        )
    return torch.nn.functional.pad(batch, (0, right, 0, below), value=value)

"""Pictures for a report: what went in, what PyTorch gave, what the engine gave, and their difference."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from torchferry.core.report import Picture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchferry.core.engine import Array

_SMALLEST = 16  # shorter sides are feature maps or vectors, not pictures
_LARGEST = 512  # pixels; larger ones are reduced, the page stays small


def picture_rows(
    label: str, inputs: Mapping[str, Array], expected: Mapping[str, Array], actual: Mapping[str, Array]
) -> list[Picture]:
    """Return a row for every output that looks like a picture: float NCHW with 1 or 3 channels.

    Args:
        label: The case.
        inputs: By name; the first that looks like a picture is shown as well.
        expected: PyTorch's outputs by name.
        actual: The engine's outputs by name.
    """
    shown = next((_picture(array) for array in inputs.values() if _is_picture(array)), None)
    rows = []
    for name, want in expected.items():
        got = actual[name]
        if not (_is_picture(want) and want.shape == got.shape):
            continue
        with np.errstate(invalid="ignore"):
            difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
        peak = float(difference[np.isfinite(difference)].max(initial=0.0))
        images = [("input", shown)] if shown is not None else []
        images += [("PyTorch", _picture(want)), ("engine", _picture(got))]
        images.append((f"difference, white = {peak:.2g}", _picture(difference / peak if peak else difference)))
        rows.append(Picture(f"{name}, {label}", tuple(images)))
    return rows


def _is_picture(array: Array) -> bool:
    return (
        array.ndim == 4
        and array.shape[0] >= 1
        and array.shape[1] in (1, 3)
        and min(array.shape[2:]) >= _SMALLEST
        and array.dtype.kind == "f"
    )


def _picture(array: Array) -> bytes:
    """Encode the first of a batch as PNG; values are taken as 0..1, or as 0..255 where they go far beyond 1."""
    pixels = np.nan_to_num(array[0].astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    if pixels.max(initial=0.0) > 8.0:
        pixels = pixels / 255.0
    bytes_ = (np.clip(pixels, 0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(bytes_[:, :, 0] if bytes_.shape[2] == 1 else bytes_)
    picture.thumbnail((_LARGEST, _LARGEST))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()

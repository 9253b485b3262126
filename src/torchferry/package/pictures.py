"""From a picture file to a model's input, and from its output to a picture file, as declared in a manifest.

What a picture is, whatever its file says:

- **Orientation.** A photograph is turned as its EXIF orientation asks.
- **Bit depth.** Eight bits a channel. A 16-bit picture is read at its upper eight bits, a 1-bit picture as 0 and 255.
  Pictures of floating-point or 32-bit values are refused, since nothing says what white is in them.
- **Palette, CMYK and the like** are turned into RGB.
- **Alpha** is dropped, as ``Image.open(path).convert("RGB")`` and ``cv2.imread(path)`` drop it, so that the model sees
  what it was trained on; colours below transparent pixels come to light.
- **Animations and pages.** The first frame.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from torchferry.core.errors import ConfigError, FormatError, InputError, OutputError
from torchferry.core.files import new_files, require_file

if TYPE_CHECKING:
    import os

    from torchferry.core.engine import Array
    from torchferry.core.signature import TensorSpec

Channels = Literal["RGB", "BGR", "L"]
Layout = Literal["NCHW", "NHWC", "CHW", "HWC"]
Side = Annotated[int, Field(ge=1, le=65535)]
Values = tuple[float, ...]

# Others that Pillow reads may start programs (EPS) or hold no picture of pixels.
_READ = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
    ".bmp": ("BMP", {}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
}
_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Canvas:
    """Where a picture lies in what the model sees: in the upper left corner, the rest is padding.

    Attributes:
        content: Height and width of the picture after resizing.
        size: Height and width with the padding.
    """

    content: tuple[int, int]
    size: tuple[int, int]


class _Declared(BaseModel):
    """What both directions declare: the channels, where they lie, and their statistics."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    channels: Channels = "RGB"
    layout: Layout = "NCHW"
    mean: Values | None = None
    std: Values | None = None

    @property
    def count(self) -> int:
        """Number of channels."""
        return 1 if self.channels == "L" else 3

    @model_validator(mode="after")
    def _check_statistics(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.count:
                raise ValueError(
                    f"{name} must have {self.count} values, one for each of {self.channels}, got {len(values)}"
                )
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {list(self.std)}")
        return self

    def check(self, spec: TensorSpec) -> None:
        """Check that a tensor can hold such a picture.

        Args:
            spec: The input or output.

        Raises:
            ConfigError: If its rank or its number of channels is another.
        """
        if spec.shape is None:
            return
        if len(spec.shape) != len(self.layout):
            raise ConfigError(
                f"a picture in the layout {self.layout} cannot be '{spec}', which has {len(spec.shape)} axes"
            )
        size = spec.shape[self.layout.index("C")]
        if isinstance(size, int) and size != self.count:
            raise ConfigError(
                f"a picture of {self.channels} in the layout {self.layout} cannot be '{spec}': "
                f"expected {self.count} channels, got {size}",
                hint="set channels or layout",
            )

    def __str__(self) -> str:
        fields = type(self).model_fields
        shown = [f"{k} {v}" for k, v in self if k not in {"channels", "layout"} and v != fields[k].default]
        return f"{self.channels} {self.layout}" + (f" ({', '.join(shown)})" if shown else "")


class Preprocess(_Declared):
    """How a picture becomes an input: resize, pad, then ``(value * scale - mean) / std`` for every channel.

    Attributes:
        channels: Which channels, in which order; ``L`` is luminance (ITU-R 601-2).
        layout: Order of the axes; N is a batch of one.
        resize: Height and width to resize to; None keeps the picture's.
        keep_ratio: Resize to the largest picture of the same ratio that fits into ``resize``.
        resample: The filter for resizing, Pillow's.
        pad_to: Height and width to pad to, at the right and at the bottom.
        pad_multiple: Pad to multiples of this instead.
        pad_value: What to pad with, in the picture's values (0..255), so before ``scale``; one number, or one for each
            channel.
        scale: Factor on the picture's values (0..255).
        mean: Subtracted after ``scale``; one for each channel, in the order of ``channels``.
        std: Divides after ``mean``; one for each channel, in the order of ``channels``.
        dtype: Of the input. ``uint8`` takes the values as they are, so ``scale`` must be 1, without mean and std.
    """

    resize: tuple[Side, Side] | None = None
    keep_ratio: bool = False
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    pad_to: tuple[Side, Side] | None = None
    pad_multiple: Side | None = None
    pad_value: float | Values = 0.0
    scale: float = Field(default=1 / 255, gt=0)
    dtype: Literal["float32", "float16", "float64", "uint8"] = "float32"

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.keep_ratio and self.resize is None:
            raise ValueError("keep_ratio needs resize")
        if self.pad_to is not None and self.pad_multiple is not None:
            raise ValueError("give pad_to or pad_multiple, not both")
        if isinstance(self.pad_value, tuple) and len(self.pad_value) != self.count:
            raise ValueError(f"pad_value must be one number or {self.count}, got {len(self.pad_value)}")
        if self.dtype == "uint8":
            if self.scale != 1 or self.mean is not None or self.std is not None:
                raise ValueError("dtype uint8 takes the values as they are: set scale to 1, and neither mean nor std")
            if any(not 0 <= v <= 255 or v % 1 for v in self._padding):
                raise ValueError("with dtype uint8, pad_value must be a whole number from 0 to 255")
            return self
        largest = np.abs(_normalize(np.array([[0.0] * self.count, [255.0] * self.count, self._padding]), self)).max()
        if not largest <= np.finfo(self.dtype).max:
            raise ValueError(f"the values would reach {largest:g}, more than {self.dtype} holds")
        return self

    @property
    def _padding(self) -> Values:
        return self.pad_value if isinstance(self.pad_value, tuple) else (self.pad_value,) * self.count

    def check(self, spec: TensorSpec) -> None:
        """Check that an input takes what this makes.

        Raises:
            ConfigError: If its rank, number of channels or dtype is another.
        """
        super().check(spec)
        if spec.dtype != self.dtype:
            raise ConfigError(f"a picture of {self.dtype} cannot be '{spec}'", hint=f"set dtype to {spec.dtype}")

    def canvas(self, height: int, width: int) -> Canvas:
        """Tell how large a picture of this size becomes.

        Raises:
            InputError: If it is larger than ``pad_to``, or becomes too large for memory's sake (Pillow's limit).
        """
        if self.resize is not None:
            fit = min(self.resize[0] / height, self.resize[1] / width)
            kept = (max(1, int(height * fit + 0.5)), max(1, int(width * fit + 0.5)))
            height, width = kept if self.keep_ratio else self.resize
        size = (height, width)
        if self.pad_multiple is not None:
            size = (
                -(-height // self.pad_multiple) * self.pad_multiple,
                -(-width // self.pad_multiple) * self.pad_multiple,
            )
        elif self.pad_to is not None:
            size = self.pad_to
            if height > size[0] or width > size[1]:
                raise InputError(
                    f"a picture of {height}x{width} (height x width) does not fit into pad_to {size[0]}x{size[1]}",
                    hint="make it smaller, or declare a resize",
                )
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and size[0] * size[1] > 2 * limit:
            raise InputError(f"the picture would become {size[0]}x{size[1]}, more than {2 * limit:,} pixels")
        return Canvas((height, width), size)


class Postprocess(_Declared):
    """How an output becomes a picture: ``(value * std + mean) * scale``, clip, round to the nearest whole number.

    Attributes:
        channels: As the model gives them.
        layout: As the model gives it; N must be 1.
        mean: Added after ``std``; one for each channel, in the order of ``channels``.
        std: Factor on the output; one for each channel, in the order of ``channels``.
        scale: Factor after ``mean``.
        clip: The smallest and the largest value kept.
        dtype: Of the picture.
        crop_padding: Cut off what the input's ``Preprocess`` padded, where the output is a whole multiple as large as
            the input.
    """

    scale: float = Field(default=255.0, gt=0)
    clip: tuple[Annotated[float, Field(ge=0, le=255)], Annotated[float, Field(ge=0, le=255)]] = (0.0, 255.0)
    dtype: Literal["uint8"] = "uint8"
    crop_padding: bool = True

    @model_validator(mode="after")
    def _check_clip(self) -> Self:
        if self.clip[0] > self.clip[1]:
            raise ValueError(f"clip must be (smallest, largest), got {self.clip}")
        return self


def load_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file; see the module for depth, alpha and orientation.

    Args:
        path: A PNG, JPEG, WebP, BMP, TIFF, GIF or PPM file; the content decides, not the name.

    Returns:
        A picture of mode ``RGB`` or ``L``.

    Raises:
        MissingFileError: If there is no file.
        FormatError: If it is no such picture, is truncated or damaged, or has too many pixels (twice Pillow's
            ``MAX_IMAGE_PIXELS``).
    """
    path = require_file(path, "picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the limit is an error anyway
            with Image.open(path, formats=_READ) as image:
                return _eight_bit(ImageOps.exif_transpose(image), image.format)
    except FormatError as exc:
        raise FormatError(f"picture '{path}' {exc.message}", hint="convert it to an 8-bit PNG") from exc
    except UnidentifiedImageError as exc:
        raise FormatError(
            f"'{path}' is not a picture that can be read", hint=f"give one of {', '.join(_READ)}"
        ) from exc
    except Image.DecompressionBombError as exc:
        raise FormatError(f"picture '{path}' has too many pixels: {exc}", hint="make it smaller") from exc
    except Exception as exc:  # Pillow's decoders raise anything on damaged data
        raise FormatError(
            f"picture '{path}' cannot be read: {exc}", hint="it may be truncated; fetch it again"
        ) from exc


def _eight_bit(image: Image.Image, file_format: str | None) -> Image.Image:
    image.load()
    # Up to Pillow 11, and still from PPM, a 16-bit picture comes in the 32-bit mode.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in {"PNG", "PPM"}):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise FormatError("holds 32-bit values, and nothing says which of them is white")
    if image.mode in {"1", "L", "LA", "La"}:
        return image.convert("L")
    # By RGBA, since Pillow warns where a palette has transparent entries.
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def to_array(picture: Image.Image, preprocess: Preprocess) -> Array:
    """Turn a picture into a model's input.

    Args:
        picture: Of mode ``RGB`` or ``L``, as from ``load_picture``.
        preprocess: What to do.

    Returns:
        An array of the declared layout and dtype.

    Raises:
        InputError: If the picture has another mode, or does not fit (see ``Preprocess.canvas``).
    """
    if picture.mode not in {"RGB", "L"}:
        raise InputError(f"a picture must be of mode RGB or L, got {picture.mode}", hint="read it with load_picture")
    canvas = preprocess.canvas(picture.height, picture.width)
    height, width = canvas.content
    picture = picture.convert("L" if preprocess.channels == "L" else "RGB")
    if (width, height) != picture.size:
        picture = picture.resize((width, height), _RESAMPLE[preprocess.resample])
    pixels = np.asarray(picture).reshape(height, width, preprocess.count)
    if preprocess.channels == "BGR":
        pixels = pixels[..., ::-1]

    # There are 256 values only, so the arithmetic is done once for each, in float64, and rounded once.
    dtype = np.dtype(preprocess.dtype)
    table = _normalize(np.arange(256.0)[:, None], preprocess).astype(dtype)
    padding = _normalize(np.array([preprocess._padding]), preprocess).astype(dtype)[0]
    channels_last = preprocess.layout.endswith("C")
    array = np.empty((*canvas.size, preprocess.count) if channels_last else (preprocess.count, *canvas.size), dtype)
    for channel, plane in enumerate(np.moveaxis(array, -1, 0) if channels_last else array):
        plane[:height, :width] = table[:, channel][pixels[..., channel]]
        plane[height:] = plane[:, width:] = padding[channel]
    return array[None] if preprocess.layout.startswith("N") else array


def _normalize(values: Array, preprocess: Preprocess) -> Array:
    """Apply scale, mean and std to values of shape (n, 1) or (n, channels); return (n, channels)."""
    mean = np.array(preprocess.mean or (0.0,) * preprocess.count)
    std = np.array(preprocess.std or (1.0,) * preprocess.count)
    with np.errstate(over="ignore", invalid="ignore"):  # Preprocess refuses what overflows
        normalized: Array = (values * preprocess.scale - mean) / std
    return normalized


def to_picture(array: Array, postprocess: Postprocess, *, canvas: Canvas | None = None) -> Image.Image:
    """Turn a model's output into a picture.

    Args:
        array: The output: real numbers in the declared layout.
        postprocess: What to do.
        canvas: Where the input picture lay, to cut off the padding; None cuts nothing.

    Returns:
        A picture of mode ``RGB`` or ``L``.

    Raises:
        InputError: If the array has another rank, number of channels or a batch other than 1, is empty, holds NaN, or
            its padding cannot be cut off because it is not a whole multiple as large as the input.
    """
    got = f"{array.dtype.name} array of shape {array.shape}"
    if array.ndim != len(postprocess.layout):
        raise InputError(
            f"a picture in the layout {postprocess.layout} has {len(postprocess.layout)} axes, got a {got}"
        )
    if postprocess.layout.startswith("N"):
        if len(array) != 1:
            raise InputError(f"one picture is a batch of 1, got a {got}", hint="save each of the batch by itself")
        array = array[0]
    if postprocess.layout.endswith("CHW"):
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] != postprocess.count or array.size == 0 or array.dtype.kind not in "biuf":
        raise InputError(
            f"a picture of {postprocess.channels} in the layout {postprocess.layout} cannot be made of a {got}"
        )
    if canvas is not None and postprocess.crop_padding:
        array = _crop(array, canvas)

    with np.errstate(over="ignore"):  # what overflows is clipped
        values = array.astype(np.result_type(array.dtype, np.float32))
        if postprocess.std is not None:
            values *= np.asarray(postprocess.std, values.dtype)
        if postprocess.mean is not None:
            values += np.asarray(postprocess.mean, values.dtype)
        values *= postprocess.scale
    missing = int(np.count_nonzero(np.isnan(values)))
    if missing:
        raise InputError(f"no picture can be made of the output: {missing} of {values.size} values are NaN")
    pixels = np.rint(np.clip(values, *postprocess.clip)).astype(postprocess.dtype)
    if postprocess.channels == "BGR":
        pixels = pixels[..., ::-1]
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if postprocess.count == 1 else pixels))


def _crop(array: Array, canvas: Canvas) -> Array:
    """Cut the padding off an array of layout HWC."""
    if canvas.content == canvas.size:
        return array
    height, width = array.shape[:2]
    if height % canvas.size[0] or width % canvas.size[1]:
        raise InputError(
            f"the padding cannot be cut off: the output of {height}x{width} is not a whole multiple of the input, "
            f"which was padded to {canvas.size[0]}x{canvas.size[1]}",
            hint="set crop_padding to false to keep it",
        )
    return array[: canvas.content[0] * (height // canvas.size[0]), : canvas.content[1] * (width // canvas.size[1])]


def check_picture_path(path: str | os.PathLike[str]) -> Path:
    """Return the path if ``save_picture`` knows its suffix.

    Raises:
        OutputError: If it does not.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITTEN:
        raise OutputError(
            f"cannot write picture '{path}': unknown suffix '{path.suffix}'", hint=f"use one of {', '.join(_WRITTEN)}"
        )
    return path


def save_picture(
    array: Array, path: str | os.PathLike[str], postprocess: Postprocess, *, canvas: Canvas | None = None
) -> None:
    """Write a model's output as a picture file, whole or not at all.

    Args:
        array: See ``to_picture``.
        path: The file; its suffix chooses the format. JPEG is written at quality 95, all others without loss.
        postprocess: See ``to_picture``.
        canvas: See ``to_picture``.

    Raises:
        InputError: See ``to_picture``.
        OutputError: If the suffix is unknown or the file cannot be written.
    """
    path = check_picture_path(path)
    file_format, options = _WRITTEN[path.suffix.lower()]
    picture = to_picture(array, postprocess, canvas=canvas)
    with new_files(path.parent) as partial:
        try:
            picture.save(partial / path.name, format=file_format, **options)
        except (ValueError, KeyError) as exc:  # more pixels than the format holds; a Pillow built without it
            raise OutputError(f"cannot write picture '{path}' as {file_format}: {exc}", hint="use .png") from exc

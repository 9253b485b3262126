"""Pictures in, pictures out: depth, order, layout, statistics, padding, and files that are no pictures."""

import contextlib
import errno
import io

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from pydantic import ValidationError

from torchferry.core.errors import ConfigError, FormatError, InputError, MissingFileError, OutputError
from torchferry.core.signature import TensorSpec
from torchferry.package.pictures import (
    Canvas,
    Postprocess,
    Preprocess,
    load_picture,
    save_picture,
    to_array,
    to_picture,
)

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def picture(height=5, width=7, mode="RGB", seed=0):
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def same(a, b):
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


# From a picture to an array


def test_default_is_what_torchvisions_to_tensor_gives():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    want = np.asarray(ramp).transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    got = to_array(ramp, Preprocess())
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)


def test_mean_and_std_come_after_scale_in_the_order_of_the_channels():
    red = Image.new("RGB", (1, 1), (255, 0, 51))
    got = to_array(red, Preprocess(channels="BGR", mean=(0.2, 0, 0.5), std=(1, 2, 0.25)))
    np.testing.assert_allclose(got.ravel(), [0.2 - 0.2, 0, (1 - 0.5) / 0.25], atol=1e-7)


@pytest.mark.parametrize(
    ("layout", "channels", "shape"),
    [
        ("NCHW", "RGB", (1, 3, 5, 7)), ("NHWC", "BGR", (1, 5, 7, 3)), ("CHW", "RGB", (3, 5, 7)),
        ("HWC", "RGB", (5, 7, 3)), ("NCHW", "L", (1, 1, 5, 7)), ("HWC", "L", (5, 7, 1)),
    ],
)  # fmt: skip
def test_layouts(layout, channels, shape):
    got = to_array(picture(), Preprocess(layout=layout, channels=channels, scale=1, dtype="uint8"))
    assert got.shape == shape
    assert got.flags.c_contiguous
    row = np.asarray(picture().convert("L") if channels == "L" else picture())[1, 2].reshape(-1)
    pixel = got[(0,) * layout.startswith("N")]
    pixel = pixel[1, 2] if layout.endswith("C") else pixel[:, 1, 2]
    np.testing.assert_array_equal(pixel, row[::-1] if channels == "BGR" else row)


def test_grey_picture_fills_three_channels():
    got = to_array(picture(mode="L"), Preprocess(layout="HWC", scale=1))
    np.testing.assert_array_equal(got, np.asarray(picture(mode="L"))[..., None].repeat(3, -1))


@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_resize_is_pillows(resample):
    got = to_array(picture(), Preprocess(layout="HWC", resize=(4, 9), resample=resample, scale=1, dtype="uint8"))
    np.testing.assert_array_equal(got, np.asarray(picture().resize((9, 4), Image.Resampling[resample.upper()])))


@pytest.mark.parametrize(
    ("settings", "height", "width", "content", "size"),
    [
        ({}, 5, 7, (5, 7), (5, 7)),
        ({"resize": (10, 20)}, 5, 7, (10, 20), (10, 20)),
        ({"resize": (10, 20), "keep_ratio": True}, 5, 7, (10, 14), (10, 14)),
        ({"resize": (10, 20), "keep_ratio": True}, 7, 500, (1, 20), (1, 20)),
        ({"resize": (640, 640), "keep_ratio": True, "pad_to": (640, 640)}, 480, 640, (480, 640), (640, 640)),
        ({"pad_multiple": 4}, 5, 8, (5, 8), (8, 8)),
        ({"resize": (30, 30), "keep_ratio": True, "pad_multiple": 32}, 10, 20, (15, 30), (32, 32)),
    ],
)
def test_sizes(settings, height, width, content, size):
    preprocess = Preprocess(**settings)
    assert preprocess.canvas(height, width) == Canvas(content, size)
    assert to_array(picture(height, width), preprocess).shape == (1, 3, *size)


@pytest.mark.parametrize(("value", "want"), [(114, [114.0] * 3), ((1, 2, 3), [1.0, 2.0, 3.0])])
def test_padding_lies_right_and_below_in_the_pictures_values(value, want):
    got = to_array(picture(), Preprocess(layout="HWC", pad_to=(6, 9), pad_value=value, scale=1))
    np.testing.assert_array_equal(got[:5, :7], np.asarray(picture()))
    assert (got[5:] == want).all()
    assert (got[:, 7:] == want).all()


def test_padding_with_the_mean_is_zero():
    got = to_array(
        picture(),
        Preprocess(pad_multiple=8, scale=1, mean=(123.675, 116.28, 103.53), pad_value=(123.675, 116.28, 103.53)),
    )
    assert (got[..., 5:, :] == 0).all()


def test_picture_larger_than_pad_to():
    with pytest.raises(InputError, match=r"5x7 .* does not fit into pad_to 5x6"):
        to_array(picture(), Preprocess(pad_to=(5, 6)))


def test_size_that_no_memory_holds():
    with pytest.raises(InputError, match="pixels"):
        to_array(picture(), Preprocess(resize=(65535, 65535)))


def test_to_array_refuses_other_modes():
    with pytest.raises(InputError, match="RGBA"):
        to_array(picture().convert("RGBA"), Preprocess())


# From an array to a picture


def test_clip_round_and_infinities():
    values = np.float32([[[-1, 0.5 / 255, 1.5 / 255, 0.999, 2, np.inf, -np.inf]]])
    got = to_picture(values, Postprocess(channels="L", layout="CHW"))
    assert np.asarray(got).tolist() == [[0, 0, 2, 255, 255, 255, 0]]


def test_clip_to_a_narrower_range():
    got = to_picture(np.float32([[[0, 0.5, 1]]]), Postprocess(channels="L", layout="CHW", clip=(16, 235)))
    assert np.asarray(got).tolist() == [[16, 128, 235]]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float64"])
def test_outputs_of_any_real_dtype(dtype):
    array = np.array([[[0, 1, 1]]], dtype)
    got = to_picture(array, Postprocess(channels="L", layout="CHW"))
    assert np.asarray(got).tolist() == [[0, 255, 255]]


def test_to_picture_leaves_the_array_alone():
    array = np.full((1, 3, 2, 2), 0.5, np.float32)
    to_picture(array, Postprocess(**IMAGENET))
    assert (array == 0.5).all()


@pytest.mark.parametrize(
    ("array", "settings", "message"),
    [
        (np.zeros((3, 4, 4)), {}, "has 4 axes, got a float64 array of shape"),
        (np.zeros((2, 3, 4, 4)), {}, "a batch of 1"),
        (np.zeros((1, 4, 4, 4)), {}, r"RGB in the layout NCHW .* \(1, 4, 4, 4\)|RGB in the layout NCHW .* \(4, 4, 4\)"),
        (np.zeros((1, 3, 4, 4)), {"channels": "L"}, "a picture of L"),
        (np.zeros((1, 3, 0, 4)), {}, "cannot be made"),
        (np.zeros((1, 3, 4, 4), complex), {}, "complex128"),
        (np.full((1, 3, 4, 4), np.nan), {}, "48 of 48 values are NaN"),
    ],
)
def test_arrays_that_are_no_picture(array, settings, message):
    with pytest.raises(InputError, match=message):
        to_picture(array, Postprocess(**settings))


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("layout", ["NCHW", "HWC"])
def test_padding_is_cut_off_at_the_outputs_scale(factor, layout):
    before = Preprocess(pad_multiple=8, pad_value=255, layout=layout)
    axes = (2, 3) if layout == "NCHW" else (0, 1)
    array = to_array(picture(), before)
    for axis in axes:
        array = array.repeat(factor, axis)
    got = to_picture(array, Postprocess(layout=layout), canvas=before.canvas(5, 7))
    assert same(got, picture().resize((7 * factor, 5 * factor), Image.Resampling.NEAREST))


def test_padding_of_another_scale():
    canvas = Canvas((5, 7), (8, 8))
    array = np.zeros((1, 3, 12, 16), np.float32)
    with pytest.raises(InputError, match=r"12x16 is not a whole multiple .* 8x8"):
        to_picture(array, Postprocess(), canvas=canvas)
    assert to_picture(array, Postprocess(crop_padding=False), canvas=canvas).size == (16, 12)
    assert to_picture(array, Postprocess(), canvas=Canvas((8, 8), (8, 8))).size == (16, 12)


# Both ways


@st.composite
def both_ways(draw):
    channels = draw(st.sampled_from(["RGB", "BGR", "L"]))
    count = 1 if channels == "L" else 3
    dtype = draw(st.sampled_from(["float32", "float16", "float64", "uint8"]))
    common = {"channels": channels, "layout": draw(st.sampled_from(["NCHW", "NHWC", "CHW", "HWC"]))}
    scale = 1.0
    if dtype != "uint8":
        scale = draw(st.sampled_from([1 / 255, 1.0, 1 / 127.5]))
        span = 255 * scale
        one = lambda low, high: st.tuples(*[st.floats(low, high)] * count)  # noqa: E731
        common["mean"] = draw(st.none() | one(0, span))
        common["std"] = draw(st.none() | one(span / 10, span))
    pad = draw(st.sampled_from([{}, {"pad_multiple": 4}, {"pad_to": (9, 8)}]))
    before = Preprocess(**common, scale=scale, dtype=dtype, pad_value=draw(st.integers(0, 255)), **pad)
    after = Postprocess(**common, scale=1 / scale)
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 8))
    pixels = draw(npst.arrays(np.uint8, (height, width) if count == 1 else (height, width, 3)))
    return Image.fromarray(pixels), before, after


@given(both_ways())
@example((picture(), Preprocess(**IMAGENET), Postprocess(**IMAGENET)))
@example((picture(), Preprocess(dtype="float16", **IMAGENET), Postprocess(**IMAGENET)))
def test_there_and_back_changes_no_bit(case):
    original, before, after = case
    array = to_array(original, before)
    assert array.dtype == before.dtype
    assert same(to_picture(array, after, canvas=before.canvas(original.height, original.width)), original)


@given(both_ways())
def test_declarations_survive_json(case):
    for declared in case[1:]:
        assert type(declared).model_validate_json(declared.model_dump_json()) == declared


# Declarations


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (Preprocess, {"mean": (0.5,)}, "mean must have 3 values"),
        (Preprocess, {"channels": "L", "std": (1, 1, 1)}, "std must have 1 values"),
        (Preprocess, {"std": (1, 0, 1)}, "std must be positive"),
        (Preprocess, {"mean": (float("nan"), 0, 0)}, "finite"),
        (Preprocess, {"keep_ratio": True}, "keep_ratio needs resize"),
        (Preprocess, {"pad_to": (8, 8), "pad_multiple": 8}, "not both"),
        (Preprocess, {"pad_value": (1, 2)}, "pad_value must be one number or 3"),
        (Preprocess, {"resize": (0, 8)}, "greater than or equal to 1"),
        (Preprocess, {"resize": (8,)}, "resize"),
        (Preprocess, {"scale": 0}, "greater than 0"),
        (Preprocess, {"dtype": "uint8"}, "set scale to 1"),
        (Preprocess, {"dtype": "uint8", "scale": 1, "mean": (1, 1, 1)}, "neither mean nor std"),
        (Preprocess, {"dtype": "uint8", "scale": 1, "pad_value": 0.5}, "whole number"),
        (Preprocess, {"dtype": "float16", "scale": 1000}, "more than float16 holds"),
        (Preprocess, {"scale": 1e308}, "more than float32 holds"),
        (Preprocess, {"layout": "NHCW"}, "NCHW"),
        (Preprocess, {"resampling": "nearest"}, "Extra inputs"),
        (Postprocess, {"clip": (200, 100)}, "smallest, largest"),
        (Postprocess, {"clip": (0, 256)}, "less than or equal to 255"),
        (Postprocess, {"dtype": "uint16"}, "uint8"),
    ],
)
def test_declarations_that_mean_nothing(model, settings, message):
    with pytest.raises(ValidationError, match=message):
        model(**settings)


@pytest.mark.parametrize(
    ("declared", "spec", "message"),
    [
        (Preprocess(), TensorSpec("x", "float32", ("n", 3, "h")), "has 3 axes"),
        (Preprocess(), TensorSpec("x", "float32", ("n", 1, "h", "w")), "expected 3 channels, got 1"),
        (Preprocess(layout="NHWC"), TensorSpec("x", "float32", (1, 3, 8, 8)), "expected 3 channels, got 8"),
        (Preprocess(), TensorSpec("x", "float16", ("n", 3, "h", "w")), "set dtype to float16"),
        (Postprocess(), TensorSpec("y", "float32", ("n", 3)), "has 2 axes"),
    ],
)
def test_declarations_that_do_not_fit_the_tensor(declared, spec, message):
    with pytest.raises(ConfigError, match=message):
        declared.check(spec)


@pytest.mark.parametrize("shape", [None, ("n", 3, "h", "w"), (1, None, 8, 8)])
def test_declarations_that_fit_the_tensor(shape):
    Preprocess().check(TensorSpec("x", "float32", shape))
    Postprocess().check(TensorSpec("y", "int64", shape))


# Reading files


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tif", ".gif", ".ppm", ".PNG"])
def test_load_picture(tmp_path, suffix):
    original = picture().quantize() if suffix == ".gif" else picture()
    original.save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    assert same(load_picture(tmp_path / f"a{suffix}"), original.convert("RGB"))


def test_content_decides_not_the_name(tmp_path):
    picture().save(tmp_path / "a.jpg", format="PNG")
    assert same(load_picture(str(tmp_path / "a.jpg")), picture())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "a.png", exif=exif)
    want = picture().transpose(turn[orientation]) if orientation in turn else picture()
    assert same(load_picture(tmp_path / "a.png"), want)


def _palette_with_transparency():
    image = picture().quantize(8)
    image.info["transparency"] = bytes([0, 128, 255])
    return image, picture().quantize(8).convert("RGB")


def _rgba():
    image = picture()
    image.putalpha(Image.new("L", image.size, 0))
    return image, picture()


def _deep():
    values = np.uint16([[0, 255, 256, 65535], [1000, 30000, 256 * 77, 256 * 77 + 255]])
    return Image.fromarray(values), Image.fromarray((values >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("make", "suffix"),
    [
        (_palette_with_transparency, ".png"),
        (_rgba, ".png"),
        (_deep, ".png"),
        (_deep, ".tif"),
        (_deep, ".ppm"),
        (lambda: (picture(mode="L").convert("LA"), picture(mode="L")), ".png"),
        (lambda: (picture(mode="L").convert("1"), picture(mode="L").convert("1").convert("L")), ".png"),
        (lambda: (picture().convert("CMYK"), picture().convert("CMYK").convert("RGB")), ".tif"),
    ],
)
def test_depth_palette_and_alpha(tmp_path, make, suffix):
    image, want = make()
    image.save(tmp_path / f"a{suffix}")
    assert same(load_picture(tmp_path / f"a{suffix}"), want)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_pictures_of_unknown_range(tmp_path, dtype):
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(FormatError, match=r"a\.tif' holds 32-bit values"):
        load_picture(tmp_path / "a.tif")


def test_missing_picture(tmp_path):
    with pytest.raises(MissingFileError, match=r"picture '.*none\.png' does not exist"):
        load_picture(tmp_path / "none.png")
    with pytest.raises(MissingFileError, match="is a folder"):
        load_picture(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_not_a_picture(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(FormatError, match=r"a\.png' is not a picture"):
        load_picture(tmp_path / "a.png")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_truncated_picture(tmp_path, file_format):
    buffer = io.BytesIO()
    picture(40, 40).save(buffer, file_format)
    (tmp_path / "a").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(FormatError, match="a'"):
        load_picture(tmp_path / "a")


def test_decompression_bomb(tmp_path, monkeypatch):
    picture(30, 30).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 450)
    assert load_picture(tmp_path / "a.png").size == (30, 30)  # Pillow warns only
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 449)
    with pytest.raises(FormatError, match="too many pixels"):
        load_picture(tmp_path / "a.png")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "a"


@given(data=st.data(), file_format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"]))
def test_damaged_picture_is_read_or_refused(damaged, data, file_format):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(buffer, file_format, **({"exif": exif} if file_format in {"PNG", "JPEG", "WEBP"} else {}))
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged.write_bytes(content)
    with contextlib.suppress(FormatError):  # and no other error
        assert load_picture(damaged).mode in {"RGB", "L"}


# Writing files


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tif", ".tiff", ".PNG"])
@pytest.mark.parametrize("channels", ["RGB", "L"])
def test_save_picture_without_loss(tmp_path, suffix, channels):
    original = picture(mode=channels)
    array = to_array(original, Preprocess(channels=channels))
    save_picture(array, tmp_path / f"a{suffix}", Postprocess(channels=channels))
    with Image.open(tmp_path / f"a{suffix}") as read:
        assert same(read.convert(channels), original)


def test_save_picture_as_jpeg(tmp_path):
    smooth = Image.linear_gradient("L").convert("RGB")
    save_picture(to_array(smooth, Preprocess()), str(tmp_path / "a.jpg"), Postprocess())
    assert np.abs(np.asarray(load_picture(tmp_path / "a.jpg")).astype(int) - np.asarray(smooth)).max() <= 4


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.eps"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(OutputError, match="unknown suffix") as caught:
        save_picture(to_array(picture(), Preprocess()), tmp_path / name, Postprocess())
    assert ".png" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_picture_into_a_missing_folder(tmp_path):
    with pytest.raises(OutputError, match="none"):
        save_picture(to_array(picture(), Preprocess()), tmp_path / "none" / "a.png", Postprocess())


def test_more_pixels_than_the_format_holds(tmp_path):
    with pytest.raises(OutputError, match="WEBP"):
        save_picture(np.zeros((1, 3, 1, 16384), np.float32), tmp_path / "a.webp", Postprocess())
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_the_old_picture(tmp_path, monkeypatch):
    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    array = to_array(picture(), Preprocess())
    save_picture(array, tmp_path / "a.png", Postprocess())
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="the disk is full"):
        save_picture(array * 0, tmp_path / "a.png", Postprocess())
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert same(load_picture(tmp_path / "a.png"), picture())

"""Packing, and refusing every package that is not the one that was packed."""

import dataclasses
import errno
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from torchferry import backends
from torchferry.core.engine import Availability
from torchferry.core.errors import (
    BackendError,
    ConfigError,
    FormatError,
    InputError,
    IntegrityError,
    MissingBackendError,
    MissingFileError,
    OutputError,
)
from torchferry.core.signature import DimRange
from torchferry.core.target import Target
from torchferry.package import Postprocess, Preprocess, load, pack
from torchferry.package.pictures import load_picture

ORT = "engines/onnxruntime-fp32/model.onnx"
IMAGE = np.arange(24, dtype=np.float32).reshape(1, 3, 2, 4)
DOUBLED = IMAGE.repeat(2, 2).repeat(2, 3)


def edit(package, change):
    path = package.folder / "deploy.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def rename(package, old, new):
    """List a file under another name."""
    edit(package, lambda plain: plain["files"].update({new: plain["files"].pop(old)}))


# Packing


def test_everything_is_in_the_folder(packed, engine):
    files = {p.relative_to(packed.folder).as_posix() for p in packed.folder.rglob("*") if p.is_file()}
    assert files == {ORT, "report.json", "report.html", "deploy.json"}
    assert set(packed.manifest.files) == files - {"deploy.json"}
    assert (packed.folder / ORT).read_bytes() == (engine.folder / "model.onnx").read_bytes()
    assert packed.manifest.name == "double"
    assert packed.manifest.rewrites == {"torch.Tensor.repeat": 2}
    assert packed.manifest.verified.passed
    assert {"torchferry", "python", "platform", "numpy", "torch"} == set(packed.manifest.versions)
    assert packed.manifest.engines[0].versions == engine.versions


def test_load_gives_what_was_packed(packed):
    assert load(packed.folder) == packed
    assert load(str(packed.folder)) == packed


def test_the_least_package(engine, tmp_path):
    package = pack(engine, tmp_path / "a", name="least")
    assert load(tmp_path / "a") == package
    assert list(package.manifest.files) == [ORT]
    assert package.manifest.verified is None
    assert package.manifest.name == "least"


def test_engines_are_the_compiled_ones(packed, engine):
    [got] = packed.engines
    assert got == dataclasses.replace(engine, folder=packed.folder / "engines/onnxruntime-fp32")
    assert packed.signature == engine.signature
    with got.open() as session:
        np.testing.assert_array_equal(session.run({"image": IMAGE})["big"], DOUBLED)


def test_package_can_be_moved(packed, tmp_path):
    shutil.move(packed.folder, tmp_path / "moved" / "there")
    with load(tmp_path / "moved" / "there").open() as session:
        np.testing.assert_array_equal(session.run({"image": IMAGE})["big"], DOUBLED)


def test_exported_graph_comes_along(engine, onnx_file, tmp_path):
    from torchferry.graph.reading import as_exported

    package = pack(engine, tmp_path / "a", exported=as_exported(onnx_file))
    assert as_exported(package.folder / "exported/model.onnx").signature == engine.signature
    assert "exported/model.onnx" in package.manifest.files


def test_several_engines_of_one_target(engine, tmp_path):
    package = pack([engine, engine, engine], tmp_path / "a")
    assert [e.id for e in package.manifest.engines] == ["onnxruntime-fp32", "onnxruntime-fp32-2", "onnxruntime-fp32-3"]
    assert load(tmp_path / "a") == package


def test_engine_in_subfolders(engine, tmp_path):
    (tmp_path / "e" / "deep").mkdir(parents=True)
    (tmp_path / "e" / "deep" / "w.bin").write_bytes(b"w")
    shutil.copy(engine.folder / "model.onnx", tmp_path / "e")
    (tmp_path / "e" / "stray.txt").touch()
    package = pack(
        dataclasses.replace(engine, folder=tmp_path / "e", files=("deep/w.bin", "model.onnx")), tmp_path / "a"
    )
    assert set(package.manifest.files) == {ORT, "engines/onnxruntime-fp32/deep/w.bin"}
    load(tmp_path / "a").open().close()


def test_existing_folder_is_kept_unless_told(packed, engine):
    before = sorted(packed.folder.rglob("*"))
    with pytest.raises(OutputError, match="exists"):
        pack(engine, packed.folder)
    assert sorted(packed.folder.rglob("*")) == before
    again = pack(engine, packed.folder, overwrite=True)
    assert load(packed.folder) == again
    assert not (packed.folder / "report.json").exists()


def test_repacking_a_package_in_place(packed):
    again = pack(load(packed.folder).engines, packed.folder, overwrite=True)
    assert load(packed.folder).manifest.files == again.manifest.files


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["shutil.copyfile", "torchferry.package.store.write_text"])
def test_whole_or_absent(engine, tmp_path, monkeypatch, place, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(place, fail)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        pack(engine, tmp_path / "new" / "a")
    assert not list(tmp_path.iterdir())


def test_manifest_is_written_last(engine, tmp_path, monkeypatch):
    def seen(path, text):
        assert (path.parent / ORT).is_file()
        assert (path.parent / "exported/model.onnx").is_file()
        raise KeyboardInterrupt

    class Graph:
        signature = engine.signature

        def save(self, path):
            path.write_bytes(b"onnx")

    monkeypatch.setattr("torchferry.package.store.write_text", seen)
    with pytest.raises(KeyboardInterrupt):
        pack(engine, tmp_path / "a", exported=Graph())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preprocess": {"imago": Preprocess()}}, "did you mean 'image'"),
        ({"preprocess": {"image": Preprocess(dtype="float16")}}, "set dtype to float32"),
        ({"postprocess": {"big": Postprocess(channels="L")}}, "expected 1 channels, got 3"),
        ({"rewrites": {"x": -1}}, "rewrites"),
    ],
)
def test_what_cannot_be_packed(engine, tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        pack(engine, tmp_path / "a", **arguments)
    assert not list(tmp_path.iterdir())


def test_engines_that_cannot_be_packed(engine, tmp_path):
    dims = {**engine.signature.dims, "height": DimRange(2)}
    other = dataclasses.replace(engine, signature=dataclasses.replace(engine.signature, dims=dims))
    for engines, error, message in [
        ([], ConfigError, "at least one engine"),
        ([engine, other], ConfigError, "must have one signature"),
        (dataclasses.replace(engine, files=()), ConfigError, "lists no files"),
        (dataclasses.replace(engine, files=("none.bin",)), MissingFileError, "none.bin"),
        (dataclasses.replace(engine, files=("../ort/model.onnx",)), IntegrityError, "leaves the folder"),
    ]:
        with pytest.raises(error, match=message):
            pack(engines, tmp_path / "a")
        assert not list(tmp_path.iterdir())


# Refusing


@pytest.fixture
def full(engine, reference_engine, report, onnx_file, tmp_path):
    """A package with every kind of file."""
    from torchferry.graph.reading import as_exported

    return pack([engine, reference_engine], tmp_path / "full", report=report, exported=as_exported(onnx_file))


FILES = [ORT, "engines/reference-fp32/model.onnx", "exported/model.onnx", "report.html", "report.json"]


def test_files_are_all_of_them(full):
    assert sorted(full.manifest.files) == FILES


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("place", [0, -1])
def test_one_changed_bit(full, file, place):
    content = bytearray((full.folder / file).read_bytes())
    content[place] ^= 1
    (full.folder / file).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"file '{file}' .* has changed: expected sha256"):
        load(full.folder)


@pytest.mark.parametrize("file", FILES)
def test_one_byte_more(full, file):
    with (full.folder / file).open("ab") as opened:
        opened.write(b"\n")
    with pytest.raises(IntegrityError, match=f"file '{file}' .* has changed: expected .* bytes"):
        load(full.folder)


@pytest.mark.parametrize("file", FILES)
def test_one_file_missing(full, file):
    (full.folder / file).unlink()
    with pytest.raises(IntegrityError, match=f"file '{file}' .* is missing"):
        load(full.folder)
    (full.folder / file).mkdir()
    with pytest.raises(IntegrityError, match=f"file '{file}' .* is missing"):
        load(full.folder)


def test_manifest_missing(full):
    (full.folder / "deploy.json").unlink()
    with pytest.raises(FormatError, match=r"it has no deploy\.json"):
        load(full.folder)


def test_any_changed_byte_of_the_manifest_is_refused_or_means_the_same(packed):
    path = packed.folder / "deploy.json"
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            load(packed.folder)
        except (FormatError, IntegrityError):
            refused += 1
    assert refused > len(content) / 7 / 3  # all but free text such as versions, and spaces


def test_digest_of_another_file(full):
    edit(full, lambda plain: plain["files"]["report.json"].update(sha256="0" * 64))
    with pytest.raises(IntegrityError, match=r"report\.json"):
        load(full.folder)


def test_other_files_are_not_minded(packed):
    (packed.folder / ".DS_Store").mkdir()
    (packed.folder / "engines" / "notes.txt").symlink_to("/nowhere")
    assert load(packed.folder) == packed


@pytest.mark.parametrize("how", ["absolute", "up", "hidden up", "backslash", "file link", "folder link"])
def test_path_that_leaves_the_folder(packed, tmp_path, how):
    """The file outside is the very one that was packed, so that nothing but its place is wrong with it."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (packed.folder / "report.json").rename(secret / "report.json")
    name = {
        "absolute": str(secret / "report.json"),
        "up": "../secret/report.json",
        "hidden up": "engines/../../secret/report.json",
        "backslash": "..\\secret\\report.json",
        "file link": "report.json",
        "folder link": "link/report.json",
    }[how]
    if how == "file link":
        (packed.folder / "report.json").symlink_to(secret / "report.json")
    if how == "folder link":
        (packed.folder / "link").symlink_to(secret)
    rename(packed, "report.json", name)
    with pytest.raises(IntegrityError, match="leaves the folder") as caught:
        load(packed.folder)
    assert f"'{name}'" in caught.value.message


def test_links_inside_are_followed(packed):
    (packed.folder / "report.json").rename(packed.folder / "really.json")
    (packed.folder / "report.json").symlink_to("really.json")
    assert load(packed.folder) == packed


@pytest.mark.parametrize("name", ["a\x00b", "a" * 5000, "ring", ""])
def test_names_that_no_file_has(packed, name):
    (packed.folder / "ring").symlink_to("ring")
    rename(packed, "report.json", name)
    with pytest.raises(IntegrityError, match=r"cannot be read|is missing"):
        load(packed.folder)


@pytest.mark.parametrize("path", ["/tmp", "..", "engines/../.."])
def test_engine_that_leaves_the_folder(packed, path):
    edit(packed, lambda plain: plain["engines"][0].update(path=path))
    with pytest.raises(IntegrityError, match="leaves the folder"):
        load(packed.folder)


@pytest.mark.parametrize(
    ("path", "file"), [("engines", "model.onnx"), ("engines/onnxruntime-fp32", "../../report.json")]
)
def test_engine_file_without_a_digest(packed, path, file):
    edit(packed, lambda plain: plain["engines"][0].update(path=path, files=[file]))
    with pytest.raises(IntegrityError, match=f"{file}' of engine 'onnxruntime-fp32' has no digest"):
        load(packed.folder)


# Opening


class Absent:
    def availability(self):
        return Availability(False, reason="no such engine (pip install it)")


@pytest.fixture
def both(engine, reference_engine, tmp_path):
    return pack([reference_engine, engine], tmp_path / "both")


@pytest.mark.parametrize(
    ("asked", "backend"),
    [
        (None, "reference"),
        ("onnxruntime", "onnxruntime"),
        ("onnxruntime-fp32", "onnxruntime"),
        ("reference", "reference"),
    ],
)
def test_open(both, asked, backend):
    with both.open(asked) as session:
        assert type(session).__module__ == f"torchferry.backends.{backend}.session"
        np.testing.assert_array_equal(session.run({"image": IMAGE})["big"], DOUBLED)


def test_open_passes_options(packed):
    packed.open(threads=1, spinning=True).close()
    with pytest.raises(TypeError, match="thread_count"):
        packed.open(thread_count=1)


def test_open_unknown_engine(both):
    with pytest.raises(ConfigError, match=r"no engine 'onnxrutime'\n  hint: did you mean 'onnxruntime'"):
        both.open("onnxrutime")


def test_open_takes_the_first_that_is_here(both, monkeypatch):
    get = backends.get
    monkeypatch.setattr(backends, "get", lambda name: Absent() if name == "reference" else get(name))
    with both.open() as session:
        assert "onnxruntime" in type(session).__module__
    with pytest.raises(MissingBackendError, match=r"reference-fp32: no such engine \(pip install it\)"):
        both.open("reference")


def test_open_says_why_none_can_be_used(both, monkeypatch):
    monkeypatch.setattr(backends, "get", lambda name: Absent())
    with pytest.raises(MissingBackendError) as caught:
        both.open()
    for name in ("reference-fp32", "onnxruntime-fp32"):
        assert f"{name}: no such engine (pip install it)" in caught.value.message


@pytest.fixture
def narrow(onnx_file, engine, tmp_path):
    """An engine in bf16 before one in fp32."""
    openvino = backends.get("openvino")
    if not openvino.availability().ok or "bf16" not in openvino.capabilities().precisions:
        pytest.skip("this machine has no OpenVINO that computes in bf16")
    first = backends.compile(onnx_file, Target("openvino", "bf16"), tmp_path / "bf16")
    return pack([first, engine], tmp_path / "narrow")


def test_open_goes_on_where_the_machine_lacks_the_precision(narrow, monkeypatch):
    with narrow.open() as session:
        assert "openvino" in type(session).__module__
    openvino = backends.get("openvino")
    here = dataclasses.replace(openvino.capabilities(), precisions=("fp32",))
    monkeypatch.setattr(type(openvino), "capabilities", lambda _: here)
    with narrow.open() as session:
        assert "onnxruntime" in type(session).__module__
    reason = "openvino-bf16: 'openvino' does not compute in bf16 here; it offers fp32"
    with pytest.raises(MissingBackendError, match=reason):
        narrow.open("openvino-bf16")
    monkeypatch.setattr(type(backends.get("onnxruntime")), "availability", lambda _: Availability(False, reason="gone"))
    with pytest.raises(MissingBackendError, match=f"{reason}\n  onnxruntime-fp32: gone"):
        narrow.open()


def test_open_goes_on_where_the_machine_lacks_the_device(both):
    edit(both, lambda plain: plain["engines"][0]["target"].update(device="warp"))
    with load(both.folder).open() as session:
        assert "onnxruntime" in type(session).__module__
    with pytest.raises(MissingBackendError, match="reference-fp32: 'reference' runs on 'cpu' here, not on 'warp'"):
        load(both.folder).open("reference")


def test_open_engine_of_a_newer_torchferry(packed):
    edit(packed, lambda plain: plain["engines"][0]["target"].update(backend="warp"))
    with pytest.raises(MissingBackendError, match="onnxruntime-fp32: unknown backend 'warp'"):
        load(packed.folder).open()


def test_session_keeps_the_valid_sizes(packed):
    edit(packed, lambda plain: plain["signature"]["dims"]["height"].update(max=3, where="model.py:7"))
    with load(packed.folder).open() as session:
        session.run({"image": IMAGE})
        with pytest.raises(InputError, match=r"'height' = 4 is outside[^\0]*model\.py:7"):
            session.run({"image": np.zeros((1, 3, 4, 4), np.float32)})


def test_session_keeps_the_relations(packed):
    edit(packed, lambda plain: plain["signature"]["relations"].append({"expression": "width > height"}))
    with load(packed.folder).open() as session:
        session.run({"image": IMAGE})
        with pytest.raises(InputError, match="break 'width > height'"):
            session.run({"image": np.zeros((1, 3, 4, 4), np.float32)})


# Pictures


@pytest.fixture
def photo(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    image.save(tmp_path / "photo.png")
    return image


@pytest.mark.parametrize("before", [{}, {"pad_multiple": 8}, {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.3, 0.4)}])
def test_run_picture(engine, photo, tmp_path, before):
    after = {k: v for k, v in before.items() if k != "pad_multiple"}
    package = pack(
        engine, tmp_path / "a", preprocess={"image": Preprocess(**before)}, postprocess={"big": Postprocess(**after)}
    )
    with load(package.folder).open() as session:
        outputs = package.run_picture(session, tmp_path / "photo.png", tmp_path / "big.png")
    assert outputs["big"].shape == ((1, 3, 16, 16) if "pad_multiple" in before else (1, 3, 10, 14))
    want = photo.resize((14, 10), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(load_picture(tmp_path / "big.png")), np.asarray(want))


def test_run_picture_with_other_inputs(tmp_path):
    """The picture goes to the input that has no array."""
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    shape = [1, 3, "h", "w"]
    nodes = [("Mul", ["image", "factor"], ["scaled"]), ("Add", ["scaled", "other"], ["sum"])]
    graph = helper.make_graph(
        [helper.make_node(*node) for node in nodes],
        "g",
        [value(n, TensorProto.FLOAT, s) for n, s in [("image", shape), ("other", shape), ("factor", [1])]],
        [value("sum", TensorProto.FLOAT, shape)],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "g.onnx")
    engine = backends.compile(tmp_path / "g.onnx", Target("onnxruntime"), tmp_path / "e")
    package = pack(
        engine,
        tmp_path / "a",
        preprocess={"image": Preprocess(), "other": Preprocess()},
        postprocess={"sum": Postprocess()},
    )
    Image.new("RGB", (4, 2), (100, 100, 100)).save(tmp_path / "in.png")
    extra = {"factor": np.float32([2]), "other": np.full((1, 3, 2, 4), 20 / 255, np.float32)}
    with package.open() as session:
        package.run_picture(session, tmp_path / "in.png", tmp_path / "out.png", extra)
        assert load_picture(tmp_path / "out.png").getpixel((0, 0)) == (220, 220, 220)
        with pytest.raises(ConfigError, match=r"one preprocess .* several \(image, other\)"):
            package.run_picture(session, tmp_path / "in.png", tmp_path / "out.png", {"factor": extra["factor"]})
        with pytest.raises(InputError, match="'factor' is missing"):
            package.run_picture(session, tmp_path / "in.png", tmp_path / "out.png", {"other": extra["other"]})


@pytest.mark.parametrize("missing", ["preprocess", "postprocess"])
def test_run_picture_without_a_declaration(engine, photo, tmp_path, missing):
    declared = {"preprocess": {"image": Preprocess()}, "postprocess": {"big": Postprocess()}}
    del declared[missing]
    package = pack(engine, tmp_path / "a", **declared)
    with package.open() as session, pytest.raises(ConfigError, match=f"must declare one {missing} .* it has none"):
        package.run_picture(session, tmp_path / "photo.png", tmp_path / "big.png")


def test_run_picture_refuses_before_it_runs(packed, photo, tmp_path):
    session = packed.open()
    session.close()  # whoever runs it gets a BackendError
    for source, target, error in [
        ("photo.png", "big.xyz", OutputError),
        ("none.png", "big.png", MissingFileError),
        ("photo.png", "big.png", BackendError),
    ]:
        with pytest.raises(error):
            packed.run_picture(session, tmp_path / source, tmp_path / target)
        assert not (tmp_path / target).exists()


# Printing


def test_str(packed):
    size = packed.manifest.files[ORT].size / 2**20
    version = packed.manifest.engines[0].versions["onnxruntime"]
    assert str(packed).splitlines() == [
        f"double: package of {packed.manifest.created:%Y-%m-%d %H:%M} UTC, 4 files",
        "  input   image: float32[batch, 3, height, width], from a picture RGB NCHW",
        "  output  big: float32[batch, 3, 2*height, 2*width], to a picture RGB NCHW",
        "  sizes   batch 0..",
        "  sizes   height 0..",
        "  sizes   width 0..",
        f"  engine  onnxruntime-fp32 (version {version}, {size:.2f} MiB)",
        "  proof   passed, 2 cases; big max abs 0.25, relative 0.25 (atol 0.5, rtol 0)",
        "  rewrite torch.Tensor.repeat x2",
    ]


def test_str_of_the_least_package(engine, tmp_path):
    text = str(pack(engine, tmp_path / "a", preprocess={"image": Preprocess(pad_multiple=8, mean=(0, 0, 1))}))
    assert "from a picture RGB NCHW (mean (0.0, 0.0, 1.0), pad_multiple 8)" in text
    assert "proof   none" in text

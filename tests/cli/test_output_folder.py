"""The output folder is whole or absent, and what was there stays until the new one is whole."""

import os
import resource
import shutil
import subprocess

import pytest

from torchferry.package import load


def _mount(folder, options):
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")


@pytest.fixture
def mount(place):
    """Mount a small file system at a folder of the place."""
    mounted = []

    def at(name, options):
        _mount(place / name, options)
        mounted.append(place / name)
        return place / name

    yield at
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def unwritable(place, request):
    """A folder in which nothing can be made, by this user either."""
    if os.geteuid() == 0:
        return request.getfixturevalue("mount")("locked", "size=4k,ro")
    (place / "locked").mkdir(mode=0o555)
    return place / "locked"


@pytest.fixture
def model_onnx(package, place):
    shutil.copyfile(package / "exported" / "model.onnx", place / "net.onnx")


def _making(command, out, *flags):
    if command == "compile":
        return ["compile", "net.onnx", "-o", out, *flags]
    return ["deploy", "--model", "net.py:net", "--input", "picture.png", "-o", out, *flags]


COMMANDS = pytest.mark.parametrize("command", ["deploy", "compile"])


@COMMANDS
def test_a_missing_parent_is_made_and_an_empty_folder_is_filled(ferry, place, model_onnx, command):
    (place / "empty").mkdir()
    for out in ("new/parents/out", "empty"):
        assert ferry(*_making(command, out)).status == 0
        load(place / out)


@COMMANDS
def test_an_existing_package_is_kept_unless_told(ferry, place, tree, model_onnx, command):
    assert ferry(*_making("compile", "out")).status == 0
    (place / "out" / "note.txt").write_text("mine")
    before = tree(place)
    refusal = ferry(*_making(command, "out")).refusal
    assert f"'{place}/out' exists" in refusal
    assert "--overwrite" in refusal
    assert tree(place) == before

    assert ferry(*_making(command, "out", "--overwrite")).status == 0
    assert not (place / "out" / "note.txt").exists()
    load(place / "out")
    assert sorted(path.name for path in place.iterdir()) == ["net.onnx", "net.py", "out", "picture.png"]


@COMMANDS
@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_what_is_not_a_package_is_never_replaced(ferry, place, tree, model_onnx, command, flags):
    (place / "file").write_text("mine")
    (place / "folder").mkdir()
    (place / "folder" / "thesis.txt").write_text("mine")
    before = tree(place)
    for out, fragment in (("file", "is a file"), ("file/out", "is a file"), ("folder", f"'{place}/folder'")):
        assert fragment in ferry(*_making(command, out, *flags)).refusal
    assert tree(place) == before


@COMMANDS
def test_not_writable(ferry, tree, unwritable, model_onnx, command):
    refusal = ferry(*_making(command, unwritable / "out")).refusal
    assert f"cannot write '{unwritable}/out': permission denied in '{unwritable}'" in refusal
    assert tree(unwritable) == {}


def test_single_files_that_cannot_be_written(ferry, place, package, unwritable):
    given = ["--model", "net.py:net", "--input", "picture.png"]
    for out, fragment in (
        ("nowhere/x.{}", "there is no folder 'nowhere'"),
        (".", "it is a folder"),
        (f"{unwritable}/x.{{}}", "permission denied"),
    ):
        assert fragment in ferry("export", *given, "-o", out.format("onnx")).refusal
        assert fragment in ferry("run", package, "--input", "picture.png", "--output", out.format("png")).refusal
        assert fragment in ferry("run", package, "--input", "picture.png", "--output", out.format("npz")).refusal
        assert fragment in ferry("verify", package, *given, "--report", out.format("html")).refusal


@pytest.mark.parametrize("pages", [1, 4])
@COMMANDS
def test_disk_full(ferry, tree, mount, model_onnx, command, pages):
    disk = mount("disk", f"size={4 * pages}k")
    ran = ferry(*_making(command, disk / "sub" / "out"))
    if ran.status == 0:  # this one fits
        assert pages > 1
        load(disk / "sub" / "out")
        assert [path.name for path in (disk / "sub").iterdir()] == ["out"]
    else:
        assert f"cannot write '{disk}/sub/" in ran.refusal
        assert "the disk is full" in ran.refusal
        assert tree(disk) == {}


def test_disk_full_while_replacing(ferry, tree, mount, model_onnx):
    disk = mount("disk", "size=24k")
    assert ferry(*_making("compile", disk / "out")).status == 0
    before = tree(disk)
    assert "the disk is full" in ferry(*_making("deploy", disk / "out", "--overwrite")).refusal
    assert tree(disk) == before
    load(disk / "out")


@COMMANDS
def test_no_room_for_temporary_files(ferry, place, mount, model_onnx, command, monkeypatch):
    disk = mount("disk", "size=4k")
    (disk / "filler").write_bytes(b"0" * 4096)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    assert str(disk) in ferry(*_making(command, "out")).refusal
    assert not (place / "out").exists()
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.fixture
def file_limit():
    """Let no file grow beyond a number of bytes, so that writing fails half way for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("size", "old"), [(0, True), (1500, False), (8000, True)])
def test_a_write_that_fails_half_way(ferry, place, scratch, left_in, tree, model_onnx, file_limit, size, old):
    if old:
        assert ferry(*_making("compile", "out")).status == 0
    before = tree(place)
    file_limit(size)
    ran = ferry(*_making("deploy", "out", "--overwrite"))
    file_limit(resource.RLIM_INFINITY)
    assert "File too large" in ran.refusal
    assert tree(place) == before
    assert left_in(scratch) == []


@pytest.mark.parametrize("output", ["y.npz", "y.png"])
def test_results_are_whole_or_as_they_were(ferry, place, package, tree, file_limit, output):
    (place / output).write_text("old")
    before = tree(place)
    file_limit(50)
    ran = ferry("run", package, "--input", "picture.png", "--output", output)
    file_limit(resource.RLIM_INFINITY)
    assert "File too large" in ran.refusal
    assert tree(place) == before

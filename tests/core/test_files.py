"""Writing and reading files: whole or absent, and never outside the folder."""

import errno
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from torchferry.core.errors import IntegrityError, MissingFileError, OutputError
from torchferry.core.files import check_free, inside, new_files, new_folder, require_file, sha256, write_text

MARKER = "deploy.json"
FAILURES = {
    "exception": ValueError("a step failed"),
    "Ctrl-C": KeyboardInterrupt(),
    "exit": SystemExit(1),
    "disk full": OSError(errno.ENOSPC, "No space left on device"),
    "torchferry's own": MissingFileError("checkpoint 'c' does not exist"),
}


def tree(folder: Path) -> dict[str, str]:
    """Every file and empty folder below, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


def fill(folder: Path, text: str = "new") -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "engine").write_text(text)
    (folder / "deploy.json").write_text(text)


def fill_and_raise(folder: Path, failure: BaseException) -> None:
    folder.mkdir(exist_ok=True)
    fill(folder)
    raise failure


FILLED = {"out/deploy.json": "new", "out/sub/engine": "new"}


@pytest.mark.parametrize("before", ["absent", "empty"])
def test_a_folder_appears_whole_at_the_end(tmp_path: Path, before: str) -> None:
    out = tmp_path / "out"
    if before == "empty":
        out.mkdir()
    with new_folder(out, marker=MARKER) as partial:
        fill(partial)
        assert not (out / "deploy.json").exists()
        assert partial.stat().st_dev == tmp_path.stat().st_dev
    assert tree(tmp_path) == FILLED


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_folder_is_absent_after_a_failure_and_so_are_its_parents(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "kept").mkdir()
    with (
        pytest.raises(OutputError if type(failure) is OSError else type(failure)) as caught,
        new_folder(tmp_path / "kept" / "made" / "too" / "out", marker=MARKER) as partial,
    ):
        fill_and_raise(partial, failure)
    assert tree(tmp_path) == {"kept": ""}
    if type(failure) is OSError:
        assert "the disk is full" in str(caught.value)
        assert "out" in str(caught.value)
    else:
        assert caught.value is failure


def test_parents_are_kept_if_somebody_else_used_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError), new_folder(tmp_path / "made" / "too" / "out", marker=MARKER) as partial:
        fill_and_raise(partial.parent / "theirs", ValueError())
    assert tree(tmp_path) == {f"made/too/theirs/{name.removeprefix('out/')}": "new" for name in FILLED}


def test_parents_are_removed_if_a_later_one_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(OutputError), new_folder(tmp_path / "made" / ("x" * 300) / "out", marker=MARKER):
        pass
    assert tree(tmp_path) == {}


def test_overwrite_keeps_the_old_folder_until_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out, marker=MARKER) as partial:
        (partial / "old").write_text("old")
        (partial / MARKER).write_text("old")
    with new_folder(out, overwrite=True, marker=MARKER) as partial:
        fill(partial)
        assert (out / "old").read_text() == "old"
    assert tree(tmp_path) == FILLED


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_overwrite_keeps_the_old_folder_after_a_failure(tmp_path: Path, failure: BaseException) -> None:
    out = tmp_path / "out"
    with new_folder(out, marker=MARKER) as partial:
        fill(partial, "old")
    with pytest.raises((OutputError, type(failure))), new_folder(out, overwrite=True, marker=MARKER) as partial:
        fill_and_raise(partial, failure)
    assert tree(tmp_path) == dict.fromkeys(FILLED, "old")


@pytest.mark.parametrize("moment", [1, 2])
def test_a_failed_rename_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    out = tmp_path / "out"
    with new_folder(out, marker=MARKER) as partial:
        fill(partial, "old")
    _fail_rename(monkeypatch, moment, OSError(errno.EIO, "Input/output error"), done=False)
    with (
        pytest.raises(OutputError, match="Input/output error"),
        new_folder(out, overwrite=True, marker=MARKER) as partial,
    ):
        fill(partial)
    assert tree(tmp_path) == dict.fromkeys(FILLED, "old")


@pytest.mark.parametrize("moment", [1, 2])
def test_ctrl_c_right_after_a_rename_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    out = tmp_path / "out"
    with new_folder(out, marker=MARKER) as partial:
        fill(partial, "old")
    _fail_rename(monkeypatch, moment, KeyboardInterrupt(), done=True)
    with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True, marker=MARKER) as partial:
        fill(partial)
    assert tree(tmp_path) in (dict.fromkeys(FILLED, "old"), FILLED)


def _fail_rename(monkeypatch: pytest.MonkeyPatch, moment: int, failure: BaseException, *, done: bool) -> None:
    """Raise at the given call of ``Path.rename``, before or after it has done its work."""
    rename: Callable[[Path, Path], Path] = Path.rename
    calls = []

    def failing(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) != moment:
            return rename(path, target)
        if done:
            rename(path, target)
        raise failure

    monkeypatch.setattr(Path, "rename", failing)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; mounting one needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("cannot mount a small file system here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_nothing(tiny_disk: Path) -> None:
    with (
        pytest.raises(OutputError, match="the disk is full"),
        new_folder(tiny_disk / "made" / "out", marker=MARKER) as partial,
    ):
        (partial / "engine").write_bytes(bytes(1 << 20))
    assert not list(tiny_disk.iterdir())
    (tiny_disk / "report.txt").write_text("old")
    with pytest.raises(OutputError, match="the disk is full"):
        write_text(tiny_disk / "report.txt", "x" * (1 << 20))
    assert tree(tiny_disk) == {"report.txt": "old"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["file", "file/out", "file/deep/out"])
def test_a_file_in_the_way_is_refused_and_kept(tmp_path: Path, place: str, overwrite: bool) -> None:
    (tmp_path / "file").write_text("mine")
    for attempt in (check_free, lambda path, **how: new_folder(path, **how).__enter__()):
        with pytest.raises(OutputError, match="file"):
            attempt(tmp_path / place, overwrite=overwrite, marker=MARKER)
    assert tree(tmp_path) == {"file": "mine"}


def test_a_full_folder_is_refused_and_kept(tmp_path: Path) -> None:
    fill(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="exists") as caught, new_folder(tmp_path, marker=MARKER):
        pass
    assert "--overwrite" in str(caught.value)
    assert tree(tmp_path) == before
    check_free(tmp_path, overwrite=True, marker=MARKER)
    check_free(tmp_path / "new" / "deep", overwrite=False, marker=MARKER)


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(OutputError, match="holds no 'deploy.json'"),
        new_folder(tmp_path, overwrite=True, marker=MARKER),
    ):
        pass
    assert tree(tmp_path) == {"thesis.tex": "years of work"}


@pytest.mark.parametrize("path", ["/", "a\0b"])
def test_an_impossible_path_is_refused(path: str) -> None:
    with pytest.raises(OutputError), new_folder(Path(path), overwrite=True, marker=MARKER):
        pass


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write anywhere")
    with pytest.raises(OutputError, match="permission denied"), new_folder(closed / "out", marker=MARKER):
        pass
    with pytest.raises(OutputError, match="permission denied"):
        write_text(closed / "report.txt", "x")


def test_a_folder_that_the_system_calls_read_only_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="permission denied") as caught:
        check_free(tmp_path / "made" / "out", overwrite=False, marker=MARKER)
    assert str(tmp_path) in str(caught.value)


def test_new_files_come_together_over_the_old_ones(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_text("old")
    (tmp_path / "other").write_text("theirs")
    with new_files(tmp_path) as partial:
        (partial / "m.onnx").write_text("new")
        (partial / "m.onnx.data").write_text("new")
        assert (tmp_path / "m.onnx").read_text() == "old"
    assert tree(tmp_path) == {"m.onnx": "new", "m.onnx.data": "new", "other": "theirs"}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_new_files_leave_the_old_ones_after_a_failure(tmp_path: Path, failure: BaseException) -> None:
    (tmp_path / "deploy.json").write_text("old")
    with pytest.raises(OutputError if type(failure) is OSError else type(failure)), new_files(tmp_path) as partial:
        fill_and_raise(partial, failure)
    assert tree(tmp_path) == {"deploy.json": "old"}


def test_new_files_moves_data_before_the_file_that_refers_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: moved.append(path.name) or replace(path, target))
    with new_files(tmp_path) as partial:
        (partial / "m.onnx").write_text("graph")
        (partial / "m.onnx.data").write_text("weights")
    assert moved == ["m.onnx.data", "m.onnx"]


def test_write_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(Path("größe.txt"), "grün")
    assert (tmp_path / "größe.txt").read_bytes() == "grün".encode()
    with pytest.raises(OutputError, match="nowhere"):
        write_text(tmp_path / "nowhere" / "x.txt", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["größe.txt"]


@pytest.mark.parametrize("relative", ["engine", "sub/engine", "./sub//engine", "link", "not-there", "a..b/..c"])
def test_inside_gives_the_path(tmp_path: Path, relative: str) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    fill(folder)
    (folder / "link").symlink_to("deploy.json")
    assert inside(folder, relative) == folder / relative


@pytest.mark.parametrize(
    "relative",
    [
        "..",
        "../secret",
        "sub/../../secret",
        "sub/../engine",
        "/etc/passwd",
        "//etc/passwd",
        "..\\secret",
        "sub\\engine",
        "C:\\secret",
        "out",
        "out/secret",
        "file-out",
        "loop",
        "loop/x",
        "a\0b",
    ],
)
def test_inside_refuses_a_way_out(tmp_path: Path, relative: str) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    fill(folder)
    (tmp_path / "secret").write_text("secret")
    (folder / "out").symlink_to(tmp_path)
    (folder / "file-out").symlink_to("../secret")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(IntegrityError, match=r"leaves the folder|cannot|link|null") as caught:
        inside(folder, relative)
    assert relative in str(caught.value)


def test_inside_takes_a_folder_that_is_itself_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert inside(tmp_path / "link", "engine") == tmp_path / "link" / "engine"


def test_require_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with pytest.raises(MissingFileError, match=r"checkpoint '.*weights' does not exist"):
        require_file(path, "checkpoint")
    with pytest.raises(MissingFileError, match="is a folder"):
        require_file(tmp_path, "checkpoint")
    path.write_text("x")
    assert require_file(str(path), "checkpoint") == path


def test_sha256_of_more_than_one_chunk(tmp_path: Path) -> None:
    data = bytes(range(256)) * 8192
    (tmp_path / "f").write_bytes(data)
    assert sha256(tmp_path / "f") == hashlib.sha256(data).hexdigest()

"""Writing and reading files so that nothing is ever half written and nothing outside a folder is ever read."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from torchferry.core.errors import IntegrityError, MissingFileError, OutputError, TorchferryError

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 1 << 20


def require_file(path: str | os.PathLike[str], what: str) -> Path:
    """Return the path if a file is there.

    Args:
        path: Where it should be.
        what: What it is, for the message ("checkpoint").

    Raises:
        MissingFileError: If there is none.
    """
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise MissingFileError(f"{what} '{path}' {kind}", hint="check the path; it is taken from the current folder")
    return path


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def inside(folder: Path, relative: str) -> Path:
    """Return ``folder/relative`` if that is inside the folder, after following links.

    Raises:
        IntegrityError: If the path is absolute, climbs out, or leads out through a link.
    """
    pure = PurePosixPath(relative)
    path = folder / pure
    try:
        within = path.resolve().is_relative_to(folder.resolve())
    except (RuntimeError, ValueError, OSError) as exc:  # links in a circle, a NUL in the name
        raise IntegrityError(f"path '{relative}' in '{folder}' cannot be read: {exc}") from exc
    if pure.is_absolute() or ".." in pure.parts or "\\" in relative or not within:
        raise IntegrityError(f"path '{relative}' leaves the folder '{folder}'")
    return path


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` while writing into an ``OutputError`` that says what is wrong with the path."""
    try:
        yield
    except TorchferryError:
        raise
    except OSError as exc:
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.EROFS: "the file system is read-only",
            errno.ENOTDIR: "a part of the path is a file",
        }.get(exc.errno or 0, exc.strerror or str(exc))
        raise OutputError(
            f"cannot write '{path}': {reason}", hint="nothing was changed; free some space or choose another place"
        ) from exc


def check_free(path: Path, *, overwrite: bool, marker: str) -> None:
    """Check that an output folder may be written, before any work is done.

    Args:
        path: The folder.
        overwrite: Whether it may replace what is there.
        marker: The file by which a folder that we wrote is known; no other folder is ever replaced.

    Raises:
        OutputError: If something is there that may not be replaced, or the parent cannot be written.
    """
    if "\0" in str(path):
        raise OutputError(f"cannot write {str(path)!r}: a path cannot hold a NUL character")
    path = path.absolute()
    with output_errors(path):
        if path.exists() and not path.is_dir():
            raise OutputError(f"'{path}' is a file, not a folder", hint="choose another folder")
        if path.is_dir() and any(path.iterdir()):
            if not overwrite:
                raise OutputError(f"'{path}' exists", hint="choose another folder, or replace it with --overwrite")
            if not (path / marker).is_file():
                raise OutputError(
                    f"'{path}' is not replaced: it holds no '{marker}', so Torchferry did not write it",
                    hint="choose another folder, or remove this one yourself",
                )
        parent = next((p for p in path.parents if p.exists()), None)
    if parent is None:
        raise OutputError(f"'{path}' cannot be an output folder", hint="choose another folder")
    if not parent.is_dir():
        raise OutputError(f"cannot write '{path}': '{parent}' is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write '{path}': permission denied in '{parent}'", hint="choose another folder")


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False, marker: str) -> Iterator[Path]:
    """Give a folder to write into that becomes ``path`` at the end, or vanishes if the block raises.

    Args:
        path: The final folder. Missing parents are made.
        overwrite: Replace what is there; the old folder goes only once the new one is whole.
        marker: See ``check_free``.

    Raises:
        OutputError: As ``check_free``, and for any ``OSError`` while writing.
    """
    check_free(path, overwrite=overwrite, marker=marker)
    path = path.absolute()
    with output_errors(path):
        first_made = next((p for p in reversed(path.parents) if not p.exists()), None)
        partial = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir()
            yield partial
            _swap(partial, path)
        except BaseException as exc:
            if isinstance(exc, OutputError):  # the user knows the folder by its final name
                exc.message = exc.message.replace(str(partial), str(path))
            shutil.rmtree(partial, ignore_errors=True)
            if first_made is not None:
                _remove_empty(path.parent, first_made)
            raise


def _swap(partial: Path, path: Path) -> None:
    """Put the new folder in the place of the old one; whatever interrupts, one of the two is there whole."""
    old = path.parent / f".{path.name}.partial-{secrets.token_hex(4)}"
    try:
        if path.exists():
            path.rename(old)
        partial.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _remove_empty(folder: Path, last: Path) -> None:
    """Remove the parents that we made, as long as nobody put anything there."""
    while folder.is_relative_to(last):
        try:
            folder.rmdir()
        except OSError as exc:
            if exc.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return  # somebody else has put something there
        folder = folder.parent


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Give a folder to write into whose files move into ``folder`` at the end, or vanish if the block raises.

    Files of the same name are replaced; ``x.onnx.data`` moves before the ``x.onnx`` that refers to it.

    Raises:
        OutputError: For any ``OSError`` while writing.
    """
    folder = folder.absolute()
    with output_errors(folder):
        partial = folder / f".partial-{secrets.token_hex(4)}"
        try:
            partial.mkdir()
            yield partial
            for file in sorted(partial.iterdir(), reverse=True):
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OutputError: If it cannot be written.
    """
    with new_files(path.parent) as partial:
        (partial / path.name).write_text(text, encoding="utf-8")

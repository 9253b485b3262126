"""Packing engines into a folder, and opening such a folder anywhere."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from torchferry.core.engine import Engine, get_backend, platform_versions
from torchferry.core.errors import ConfigError, IntegrityError, MissingBackendError, UnsupportedError, did_you_mean
from torchferry.core.files import inside, new_folder, require_file, sha256, write_text
from torchferry.package.manifest import (
    MANIFEST_FILE,
    EngineEntry,
    FileEntry,
    Manifest,
    Verification,
    check_pictures,
    read_manifest,
)
from torchferry.package.pictures import (
    Postprocess,
    Preprocess,
    check_picture_path,
    load_picture,
    save_picture,
    to_array,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from os import PathLike

    from torchferry.core.engine import Array, Graph, Session
    from torchferry.core.report import Report
    from torchferry.core.signature import Signature


@dataclass(frozen=True)
class Package:
    """A folder with engines and all that is known about them.

    Attributes:
        folder: Where it is.
        manifest: What ``deploy.json`` says.
    """

    folder: Path
    manifest: Manifest

    @property
    def signature(self) -> Signature:
        """Names, dtypes, shapes and valid sizes."""
        return self.manifest.signature

    @property
    def engines(self) -> tuple[Engine, ...]:
        """The engines in the order of preference."""
        return tuple(
            Engine(self.folder / entry.path, entry.target, self.signature, entry.versions, entry.files)
            for entry in self.manifest.engines
        )

    def open(self, engine: str | None = None, **options: Any) -> Session:
        """Load an engine.

        Args:
            engine: Its id, or the name of its backend; None for the first that this machine can run: its engine is
                installed, and computes here in its precision and on its device.
            **options: The backend's own, such as ``threads=2``.

        Returns:
            The session, to be used as a context manager.

        Raises:
            ConfigError: If the package has no such engine.
            MissingBackendError: If none that is asked for can be used here; the message says why for each.
            BackendError: If the engine cannot load its files.
        """
        entries = {entry.id: item for entry, item in zip(self.manifest.engines, self.engines, strict=True)}
        if engine is not None:
            asked = {k: v for k, v in entries.items() if engine == k} or {
                k: v for k, v in entries.items() if engine == v.target.backend
            }
            if not asked:
                known = {*entries, *(item.target.backend for item in entries.values())}
                raise ConfigError(f"package '{self.folder}' has no engine '{engine}'", hint=did_you_mean(engine, known))
            entries = asked
        refused: list[str] = []
        for name, candidate in entries.items():
            reason = _why_not(candidate)
            if not reason:
                try:
                    return candidate.open(**options)
                except UnsupportedError as exc:  # installed, and not able to do it on this machine
                    reason = exc.message
            refused.append(f"  {name}: {reason}")
        raise MissingBackendError(
            f"no engine of package '{self.folder}' can be used here:\n" + "\n".join(refused),
            hint="install one of these engines, or deploy for one that runs here",
        )

    def run_picture(
        self,
        session: Session,
        input_path: str | PathLike[str],
        output_path: str | PathLike[str],
        extra_inputs: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Run the model on a picture file and save the picture that it gives.

        Args:
            session: From ``open``.
            input_path: The picture for the one input with a ``preprocess`` that is not among ``extra_inputs``.
            output_path: Where the one output with a ``postprocess`` is saved; replaced if it exists.
            extra_inputs: Arrays for all other inputs.

        Returns:
            All outputs as the model gave them.

        Raises:
            ConfigError: If the package declares no picture input or output, or several.
            MissingFileError, FormatError: See ``load_picture``.
            InputError: If the model does not take the inputs, or the output is no picture.
            OutputError: If the picture cannot be written.
            BackendError: If the engine fails.
        """
        extra = dict(extra_inputs or {})
        taken = self._only("preprocess", (name for name in self.manifest.preprocess if name not in extra))
        given = self._only("postprocess", self.manifest.postprocess)
        before, after = self.manifest.preprocess[taken], self.manifest.postprocess[given]
        check_picture_path(output_path)
        picture = load_picture(input_path)
        outputs = session.run({**extra, taken: to_array(picture, before)})
        canvas = before.canvas(picture.height, picture.width)
        save_picture(outputs[given], output_path, after, canvas=canvas)
        return outputs

    def _only(self, declared: str, names: Iterable[str]) -> str:
        found = list(names)
        if len(found) != 1:
            several = f"several ({', '.join(found)})" if found else "none"
            raise ConfigError(
                f"package '{self.folder}' must declare one {declared} to run on a picture, it has {several}",
                hint="run it on arrays, or pack it with a declaration of how its pictures are made",
            )
        return found[0]

    def __str__(self) -> str:
        manifest = self.manifest
        lines = [f"{manifest.name}: package of {manifest.created:%Y-%m-%d %H:%M} UTC, {len(manifest.files) + 1} files"]
        for spec in manifest.signature.inputs:
            picture = manifest.preprocess.get(spec.name)
            lines.append(f"  input   {spec}" + (f", from a picture {picture}" if picture else ""))
        for spec in manifest.signature.outputs:
            made = manifest.postprocess.get(spec.name)
            lines.append(f"  output  {spec}" + (f", to a picture {made}" if made else ""))
        lines += [f"  sizes   {name} {allowed}" for name, allowed in manifest.signature.dims.items()]
        lines += [f"  sizes   {relation.expression}" for relation in manifest.signature.relations]
        for entry in manifest.engines:
            size = sum(manifest.files[f"{entry.path}/{file}"].size for file in entry.files)
            version = entry.versions.get(entry.target.backend, "unknown")
            lines.append(f"  engine  {entry.id} (version {version}, {size / 2**20:.2f} MiB)")
        lines.append(f"  proof   {manifest.verified or 'none'}")
        lines += [f"  rewrite {name} x{count}" for name, count in manifest.rewrites.items()]
        return "\n".join(lines)


def _why_not(engine: Engine) -> str:
    """Tell why an engine cannot be used here; empty if it can."""
    try:
        available = get_backend(engine.target.backend).availability()
    except MissingBackendError as exc:
        return exc.message
    return "" if available.ok and available.can_run else available.reason


def pack(
    engine: Engine | Sequence[Engine],
    path: str | PathLike[str],
    *,
    report: Report | None = None,
    exported: Graph | None = None,
    preprocess: Mapping[str, Preprocess] | None = None,
    postprocess: Mapping[str, Postprocess] | None = None,
    name: str | None = None,
    rewrites: Mapping[str, int] | None = None,
    versions: Mapping[str, str] | None = None,
    certificates: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Package:
    """Put engines into one folder that can be carried to another machine; whole or not at all.

    Args:
        engine: One engine, or several of one model in the order of preference.
        path: The folder; must not exist, or be empty.
        report: What was verified; saved as JSON and HTML beside the engines.
        exported: The graph that the engines were compiled from; saved as ``exported/model.onnx``.
        preprocess: For an input that takes a picture, how it is made from one.
        postprocess: For an output that is a picture, how it is made into one.
        name: The package's name; the folder's if None.
        rewrites: Name and number of uses of every rewriter that acted.
        versions: Of what else made the package, such as torch; Python's, numpy's and torchferry's are added.
        certificates: For an engine's id what was proved about its graph, as JSON; saved as ``certificates/ID.json``.
        overwrite: Replace the folder if it exists.

    Returns:
        The package.

    Raises:
        ConfigError: If there is no engine, the engines differ in their signature, or a picture is declared for
            something that cannot hold it.
        MissingFileError: If a file of an engine is missing.
        IntegrityError: If a file of an engine lies outside its folder.
        OutputError: If the folder cannot be written.
    """
    engines = tuple(engine) if isinstance(engine, Sequence) else (engine,)
    path = Path(path)
    if not engines:
        raise ConfigError("a package needs at least one engine, got none")
    signature = engines[0].signature
    for other in engines[1:]:
        if other.signature != signature:
            raise ConfigError(
                f"all engines must have one signature, but those of '{engines[0].folder}' and '{other.folder}' differ",
                hint="compile both from the same exported graph",
            )
    check_pictures(signature, preprocess or {}, postprocess or {})
    for item in engines:
        _check_engine(item)
    with new_folder(path, overwrite=overwrite, marker=MANIFEST_FILE) as partial:
        entries = _copy_engines(engines, partial)
        if report is not None:
            report.save(partial / "report.json")
            report.save(partial / "report.html")
        if exported is not None:
            (partial / "exported").mkdir()
            exported.save(partial / "exported" / "model.onnx")
        for engine_id, text in (certificates or {}).items():
            (partial / "certificates").mkdir(exist_ok=True)
            write_text(partial / "certificates" / f"{engine_id}.json", text)
        try:
            manifest = Manifest(
                name=name or path.absolute().name,
                created=datetime.now(UTC).replace(microsecond=0),
                signature=signature,
                engines=entries,
                preprocess=dict(preprocess or {}),
                postprocess=dict(postprocess or {}),
                rewrites=dict(rewrites or {}),
                verified=Verification.of(report) if report is not None else None,
                versions={
                    "torchferry": importlib.metadata.version("torchferry"),
                    **platform_versions(),
                    **(versions or {}),
                },
                files=_files(partial),
            )
        except ValidationError as exc:
            raise ConfigError(f"package '{path}' cannot be described: {exc}") from exc
        write_text(partial / MANIFEST_FILE, manifest.to_json())
    return Package(path, manifest)


def _check_engine(engine: Engine) -> None:
    if not engine.files:
        raise ConfigError(f"the engine in '{engine.folder}' lists no files", hint="take the one that compile returned")
    for file in engine.files:
        require_file(inside(engine.folder, file), f"file of the engine {engine.target}")


def _copy_engines(engines: Iterable[Engine], folder: Path) -> tuple[EngineEntry, ...]:
    entries: list[EngineEntry] = []
    for engine in engines:
        name = str(engine.target)
        same = sum(str(entry.target) == name for entry in entries)
        if same:  # on another device, or at another opset
            name += f"-{same + 1}"
        for file in engine.files:
            copy = folder / "engines" / name / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(engine.folder / file, copy)
        versions = dict(engine.versions)
        entries.append(
            EngineEntry(id=name, path=f"engines/{name}", target=engine.target, versions=versions, files=engine.files)
        )
    return tuple(entries)


def _files(folder: Path) -> dict[str, FileEntry]:
    found = sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file())
    return {relative: FileEntry(sha256=sha256(p), size=p.stat().st_size) for relative, p in found}


def load(path: str | PathLike[str]) -> Package:
    """Read a package and check that every file is the one that was packed.

    Files that the manifest does not list are neither read nor minded. Nothing in a package is executed by loading it.

    Args:
        path: The folder.

    Raises:
        MissingFileError: If there is no such folder.
        FormatError: If it is not a package, its manifest cannot be understood, or was written by a newer torchferry.
        IntegrityError: If a file is missing, has changed, or lies outside the folder; the message names it.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_file(folder, name, entry)
    for engine in manifest.engines:
        inside(folder, engine.path)
        for file in engine.files:
            if f"{engine.path}/{file}" not in manifest.files:
                raise IntegrityError(
                    f"file '{engine.path}/{file}' of engine '{engine.id}' has no digest in '{folder / MANIFEST_FILE}'"
                )
    return Package(folder, manifest)


def _check_file(folder: Path, name: str, entry: FileEntry) -> None:
    try:
        path = inside(folder, name)
        size = path.stat().st_size if path.is_file() else None
        digest = sha256(path) if size == entry.size else None
    except IntegrityError:
        raise
    except (OSError, RuntimeError, ValueError) as exc:  # no permission; a ring of links; a name that no file can have
        raise IntegrityError(f"file '{name}' of package '{folder}' cannot be read: {exc}") from exc
    if digest == entry.sha256:
        return
    if size is None:
        problem = "is missing"
    elif digest is None:
        problem = f"has changed: expected {entry.size:,} bytes, got {size:,}"
    else:
        problem = f"has changed: expected sha256 {entry.sha256}, got {digest}"
    raise IntegrityError(f"file '{name}' of package '{folder}' {problem}", hint="copy or build the package again")

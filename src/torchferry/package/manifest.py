"""The manifest ``deploy.json``: what a package holds, what it takes and gives, and what was proved about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from torchferry.core.compare import Criterion  # pydantic reads the annotations
from torchferry.core.errors import ConfigError, FormatError, IntegrityError, MissingFileError, did_you_mean
from torchferry.core.expressions import Expression
from torchferry.core.files import inside
from torchferry.core.signature import Signature
from torchferry.core.target import Target
from torchferry.package.pictures import Postprocess, Preprocess

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torchferry.core.compare import Comparison
    from torchferry.core.report import Report

FORMAT: Final = 1
"""The newest format that this version reads and the one that it writes."""
MANIFEST_FILE = "deploy.json"
_MAX_BYTES = 16 << 20  # a hundred thousand files; nobody has them

_CONFIG = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class FileEntry(BaseModel):
    """One file of a package.

    Attributes:
        sha256: Its digest, 64 hexadecimal digits.
        size: Its size in bytes.
    """

    model_config = _CONFIG

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class EngineEntry(BaseModel):
    """One engine of a package.

    Attributes:
        id: Its name in the package, such as ``onnxruntime-fp32``.
        path: Its folder inside the package.
        target: What it was compiled for.
        versions: Of the engine and everything that made its files.
        files: Its files, relative to its folder.
    """

    model_config = _CONFIG

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    path: str
    target: Target
    versions: dict[str, str] = {}
    files: tuple[str, ...] = Field(min_length=1)


class Verification(BaseModel):
    """What was verified before packing.

    Attributes:
        title: What was compared with what.
        passed: True if nothing failed.
        cases: Every case that was run, in order.
        max_abs: For every output the largest absolute error over all cases.
        relative: For every output the largest L2 error ÷ the L2 norm of what was expected; older packages lack it.
        tolerances: For every output what was asked; if the cases differ, where the absolute error is largest.
    """

    model_config = _CONFIG

    title: str
    passed: bool
    cases: tuple[str, ...] = ()
    max_abs: dict[str, float] = {}
    relative: dict[str, float] = {}
    tolerances: dict[str, Criterion] = {}

    @classmethod
    def of(cls, report: Report) -> Self:
        """Sum up a report."""
        worst: dict[str, Comparison] = {}
        relative: dict[str, float] = {}
        for item in report.comparisons:
            worst[item.name] = max(worst.get(item.name, item), item, key=lambda comparison: comparison.max_abs)
            relative[item.name] = max(item.relative, relative.get(item.name, 0.0))
        return cls(
            title=report.title,
            passed=report.passed,
            cases=tuple(dict.fromkeys(item.case for item in report.comparisons)),
            max_abs={name: item.max_abs for name, item in worst.items()},
            relative=relative,
            tolerances={name: item.tolerance for name, item in worst.items()},
        )

    def __str__(self) -> str:
        if self.passed and not self.cases:
            return "none, for nothing was run"
        text = f"{'passed' if self.passed else 'FAILED'}, {len(self.cases)} case{'s' * (len(self.cases) != 1)}"
        relative = {name: f", relative {value:.3g}" for name, value in self.relative.items()}
        errors = [
            f"{name} max abs {value:.3g}{relative.get(name, '')} ({self.tolerances[name]})"
            for name, value in self.max_abs.items()
        ]
        return "; ".join([text, *errors])


class Manifest(BaseModel):
    """The contents of ``deploy.json``.

    Attributes:
        format: The format's version.
        name: The package's name.
        created: When it was packed, in UTC.
        signature: Names, dtypes, shapes and valid sizes, common to all engines.
        engines: In the order of preference.
        preprocess: For an input that takes a picture, how it is made from one.
        postprocess: For an output that is a picture, how it is made into one.
        rewrites: Name and number of uses of every rewriter that acted.
        verified: What was verified; None if nothing was.
        versions: Of everything that made the package.
        files: Digest and size of every file but this one, by its path relative to the package.
    """

    model_config = _CONFIG

    format: Literal[1] = FORMAT
    name: str = Field(min_length=1)
    created: AwareDatetime
    signature: Signature
    engines: tuple[EngineEntry, ...] = Field(min_length=1)
    preprocess: dict[str, Preprocess] = {}
    postprocess: dict[str, Postprocess] = {}
    rewrites: dict[str, Annotated[int, Field(ge=0)]] = {}
    verified: Verification | None = None
    versions: dict[str, str] = {}
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _check(self) -> Self:
        ids = [engine.id for engine in self.engines]
        if len(set(ids)) != len(ids):
            raise ValueError(f"two engines have one id: {', '.join(ids)}")
        proof = self.verified
        if proof and not proof.max_abs.keys() == proof.tolerances.keys() >= proof.relative.keys():
            raise ValueError("verified: max_abs, relative and tolerances must name the same outputs")
        _check_signature(self.signature)
        check_pictures(self.signature, self.preprocess, self.postprocess)
        return self

    def to_json(self) -> str:
        """Return the text of ``deploy.json``."""
        return self.model_dump_json(indent=2) + "\n"


def check_pictures(
    signature: Signature, preprocess: Mapping[str, Preprocess], postprocess: Mapping[str, Postprocess]
) -> None:
    """Check that every declared picture is an input or output that can hold it.

    Raises:
        ConfigError: If there is no such input or output, or it has another rank, number of channels or dtype.
    """
    inputs = {spec.name: spec for spec in signature.inputs}
    outputs = {spec.name: spec for spec in signature.outputs}
    for name, before in preprocess.items():
        if name not in inputs:
            raise ConfigError(f"preprocess names '{name}', which is no input", hint=did_you_mean(name, inputs))
        before.check(inputs[name])
    for name, after in postprocess.items():
        if name not in outputs:
            raise ConfigError(f"postprocess names '{name}', which is no output", hint=did_you_mean(name, outputs))
        after.check(outputs[name])


def _check_signature(signature: Signature) -> None:
    """Check that all sizes and relations can be computed, so that a session never meets one that cannot."""
    sizes = [size for spec in signature.inputs for size in spec.shape or () if isinstance(size, str)]
    named = {size for size in sizes if size.isidentifier()}
    for text in (*sizes, *(relation.expression for relation in signature.relations)):
        unknown = sorted(Expression(text).names - named)
        if unknown:
            raise ValueError(f"signature: '{text}' needs the size '{unknown[0]}', which no axis of an input has")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a package; looks at no other file.

    Args:
        folder: The package.

    Raises:
        MissingFileError: If there is no such folder.
        FormatError: If it is not a package, its manifest cannot be understood, or was written by a newer torchferry.
        IntegrityError: If its manifest is a link that leads out.
    """
    if not folder.exists():
        raise MissingFileError(f"package '{folder}' does not exist", hint="check the path")
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise FormatError(
            f"'{folder}' is not a package: it has no {MANIFEST_FILE}", hint="give the folder that pack or deploy wrote"
        )
    try:
        size = inside(folder, MANIFEST_FILE).stat().st_size
        if size > _MAX_BYTES:
            raise FormatError(f"'{path}' has {size:,} bytes, more than a manifest ever has ({_MAX_BYTES:,})")
        text = path.read_bytes()
    except OSError as exc:
        raise IntegrityError(f"'{path}' cannot be read: {exc.strerror}") from exc
    try:
        plain = from_json(text)
    except ValueError as exc:
        raise FormatError(f"'{path}' is not JSON: {exc}") from exc
    # First of all, since a newer format may differ in anything else.
    version = plain.get("format") if isinstance(plain, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise FormatError(f"'{path}' is not a manifest: it has no format version")
    if version > FORMAT:
        raise FormatError(
            f"'{path}' has format {version}, and this torchferry reads up to {FORMAT}",
            hint="upgrade torchferry (pip install --upgrade torchferry)",
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as exc:
        raise FormatError(f"'{path}' is not a valid manifest: {_first(exc)}") from exc


def _first(exc: ValidationError) -> str:
    """Word the first of pydantic's errors, with the number of the others."""
    error, *others = exc.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(map(str, error["loc"]))
    text = f"{place}: {error['msg']}" if place else error["msg"]
    return text + (f" (and {len(others)} more)" if others else "")

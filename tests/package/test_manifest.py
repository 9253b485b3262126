"""deploy.json: what is written is what is read, and nothing else is."""

import errno
import json
from datetime import UTC
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchferry.core.compare import Budget, Tolerance
from torchferry.core.errors import FormatError, IntegrityError, MissingFileError
from torchferry.core.report import Finding, Report
from torchferry.core.signature import DimRange, Relation, Signature, TensorSpec
from torchferry.core.target import PRECISIONS, Target
from torchferry.package import Manifest, Postprocess, Preprocess
from torchferry.package.manifest import EngineEntry, FileEntry, Verification, read_manifest

text = st.text(max_size=20)
label = st.text(min_size=1, max_size=10)
dim_name = st.sampled_from(["batch", "height", "width", "größe"])
counts = st.integers(0, 2**53)


def mapping(values, keys=text):
    return st.dictionaries(keys, values, max_size=3)


@st.composite
def signatures(draw):
    names = draw(st.lists(dim_name, min_size=1, unique=True))
    sizes = st.none() | st.integers(0, 2**40) | st.sampled_from([*names, *(f"2*{n} + 1" for n in names)])
    spec = st.builds(
        TensorSpec, label, st.sampled_from(["float32", "float16", "int64", "bool"]), st.lists(sizes).map(tuple)
    )
    unranked = st.builds(TensorSpec, label, st.just("float32"), st.none())
    # Every name is the size of some axis, as in a graph.
    inputs = (TensorSpec("first", "float32", tuple(names)), *draw(st.lists(spec | unranked, max_size=2)))
    dims = st.builds(DimRange, counts, st.none() | counts, mapping(text, counts), st.none() | text)
    expressions = st.sampled_from([f"{names[0]} % 4 == 0", f"max({names[-1]}, 3) > {names[0]}"])
    relation = st.builds(Relation, expressions, st.none() | text)
    return Signature(
        inputs,
        tuple(draw(st.lists(spec | unranked, max_size=2))),
        draw(mapping(dims, dim_name)),
        tuple(draw(st.lists(relation, max_size=2))),
    )


engines = st.builds(
    EngineEntry,
    id=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,10}", fullmatch=True),
    path=text,
    target=st.builds(Target, label, st.sampled_from(PRECISIONS), text, st.none() | st.integers(1, 99)),
    versions=mapping(text),
    files=st.lists(text, min_size=1, max_size=3).map(tuple),
)


@st.composite
def verifications(draw):
    names = draw(st.lists(label, unique=True, max_size=3))
    numbers = st.floats(min_value=0, allow_nan=False)
    limits = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
    asked = st.builds(Tolerance, numbers, numbers) | st.builds(Budget, limits, st.none() | limits)
    return Verification(
        title=draw(text),
        passed=draw(st.booleans()),
        cases=tuple(draw(st.lists(text, max_size=3))),
        max_abs={name: draw(numbers) for name in names},
        relative={name: draw(numbers) for name in names},
        tolerances={name: draw(asked) for name in names},
    )


manifests = st.builds(
    Manifest,
    name=label,
    created=st.datetimes(timezones=st.just(UTC)),
    signature=signatures(),
    engines=st.lists(engines, min_size=1, max_size=2, unique_by=lambda e: e.id).map(tuple),
    rewrites=mapping(counts),
    verified=st.none() | verifications(),
    versions=mapping(text),
    files=mapping(st.builds(FileEntry, sha256=st.from_regex(r"[0-9a-f]{64}", fullmatch=True), size=counts)),
)


@given(manifests)
def test_round_trip(manifest):
    assert Manifest.model_validate_json(manifest.to_json()) == manifest


def test_it_is_readable(packed):
    written = (packed.folder / "deploy.json").read_text()
    assert written == packed.manifest.to_json()
    assert written.startswith('{\n  "format": 1,\n  "name": "double",\n  "created": "20')
    plain = json.loads(written)
    assert plain["created"].endswith("Z")
    assert plain["engines"][0]["id"] == "onnxruntime-fp32"
    assert plain["preprocess"]["image"]["channels"] == "RGB"
    assert plain["signature"]["dims"]["height"]["min"] == 0


def test_pictures_survive(packed):
    changed = packed.manifest.model_copy(
        update={
            "preprocess": {"image": Preprocess(channels="BGR", mean=(1, 2, 3), pad_multiple=32)},
            "postprocess": {"big": Postprocess(std=(1, 2, 0.1))},
        }
    )
    assert Manifest.model_validate_json(changed.to_json()) == changed


def test_it_cannot_be_changed(packed):
    with pytest.raises(ValidationError, match="frozen"):
        packed.manifest.name = "other"


def test_verification_sums_up_a_report(report):
    got = Verification.of(report)
    assert got == Verification(
        title=report.title,
        passed=True,
        cases=("2x2", "5x7"),
        max_abs={"big": 0.25},
        relative={"big": 0.25},
        tolerances={"big": Tolerance(0.5, 0)},
    )
    assert str(got) == "passed, 2 cases; big max abs 0.25, relative 0.25 (atol 0.5, rtol 0)"
    failed = Verification.of(report.with_findings([Finding("output-differs", "error", "it differs")]))
    assert not failed.passed
    assert str(Verification.of(Report("nothing"))) == "none, for nothing was run"


# Manifests that are none


def damage(packed, change):
    path = packed.folder / "deploy.json"
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


def set_at(*place):
    *keys, last, value = place

    def change(plain):
        for key in keys:
            plain = plain[key]
        plain[last] = value

    return change


@pytest.mark.parametrize("version", [2, 10**30])
def test_newer_format(packed, version):
    def change(plain):
        plain.clear()
        plain.update({"format": version, "all": "else is different"})

    damage(packed, change)
    with pytest.raises(FormatError, match=f"format {version}, and this torchferry reads up to 1") as caught:
        read_manifest(packed.folder)
    assert "upgrade torchferry" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"garbage", b"[" * 100_000, b'{"format": 1', b'"\\ud800"', b"\x00" * 100],
)
def test_garbage(packed, content):
    (packed.folder / "deploy.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"deploy\.json' is not JSON"):
        read_manifest(packed.folder)


@pytest.mark.parametrize("content", ["[]", "1", "null", "{}", '{"format": "1"}', '{"format": true}', '{"format": 1.5}'])
def test_json_that_is_no_manifest(packed, content):
    (packed.folder / "deploy.json").write_text(content)
    with pytest.raises(FormatError, match="no format version"):
        read_manifest(packed.folder)


def test_huge_json_is_not_even_read(packed):
    with (packed.folder / "deploy.json").open("r+b") as file:
        file.truncate(100 << 30)  # a hole; reading it would take all memory
    with pytest.raises(FormatError, match="107,374,182,400 bytes"):
        read_manifest(packed.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("format", 0), "format"),
        (set_at("format", -1), "format"),
        (set_at("extra", 1), "extra: Extra inputs"),
        (set_at("signature", "extra", 1), r"signature\.extra"),
        (set_at("signature", "inputs", 0, "extra", 1), r"signature\.inputs\.0\.extra"),
        (set_at("signature", "dims", "height", "extra", 1), r"signature\.dims\.height\.extra"),
        (set_at("engines", 0, "target", "extra", 1), r"engines\.0\.target\.extra"),
        (set_at("engines", 0, "target", "precision", "fp99"), r"engines\.0\.target"),
        (set_at("engines", 0, "id", "../x"), r"engines\.0\.id"),
        (set_at("engines", 0, "files", []), r"engines\.0\.files"),
        (set_at("engines", []), "engines"),
        (set_at("preprocess", "image", "extra", 1), r"preprocess\.image\.extra"),
        (set_at("preprocess", "image", "dtype", "float16"), "set dtype to float32"),
        (set_at("preprocess", "picture", {}), "preprocess names 'picture', which is no input"),
        (set_at("postprocess", "big", "layout", "CHW"), "in the layout CHW cannot be 'big"),
        (set_at("postprocess", "image", {}), "postprocess names 'image', which is no output"),
        (set_at("files", "report.json", "sha256", "0" * 63), r"files\.report\.json\.sha256"),
        (set_at("files", "report.json", "size", -1), r"files\.report\.json\.size"),
        (set_at("files", []), "files"),
        (set_at("created", "2025-01-01T00:00:00"), "created"),
        (set_at("name", None), "name"),
        (set_at("rewrites", "torch.Tensor.repeat", -1), "rewrites"),
        (set_at("verified", "max_abs", {}), "must name the same outputs"),
        (set_at("signature", "inputs", 0, "shape", 0, "__import__('os')"), "calls something other"),
        (set_at("signature", "inputs", 0, "shape", 0, "2*depth"), "needs the size 'depth'"),
        (set_at("signature", "relations", [{"expression": "9**9**9 > 1"}]), "raises to a power"),
        (set_at("signature", "relations", [{"expression": "depth > 1"}]), "needs the size 'depth'"),
    ],
)
def test_refused_by_name(packed, change, message):
    damage(packed, change)
    with pytest.raises(FormatError, match=message) as caught:
        read_manifest(packed.folder)
    assert "deploy.json" in str(caught.value)


def test_two_engines_of_one_id(packed):
    damage(packed, lambda plain: plain["engines"].append(plain["engines"][0]))
    with pytest.raises(FormatError, match="two engines have one id: onnxruntime-fp32, onnxruntime-fp32"):
        read_manifest(packed.folder)


@pytest.mark.parametrize("key", ["format", "name", "created", "signature", "engines", "files"])
def test_missing_keys(packed, key):
    damage(packed, lambda plain: plain.pop(key))
    with pytest.raises(FormatError, match=key):
        read_manifest(packed.folder)


def test_errors_are_counted(packed):
    def change(plain):
        plain.update(name="", one=1, two=2)

    damage(packed, change)
    with pytest.raises(FormatError, match=r"name: .*\(and 2 more\)"):
        read_manifest(packed.folder)


# Places that hold none


def test_no_folder(tmp_path):
    with pytest.raises(MissingFileError, match=r"package '.*none' does not exist"):
        read_manifest(tmp_path / "none")


def test_not_a_package(tmp_path):
    with pytest.raises(FormatError, match=r"is not a package: it has no deploy\.json"):
        read_manifest(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match=r"file' is not a package"):
        read_manifest(tmp_path / "file")


def test_manifest_that_is_a_link_out(packed, tmp_path):
    (packed.folder / "deploy.json").rename(tmp_path / "outside.json")
    (packed.folder / "deploy.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(IntegrityError, match=r"deploy\.json' leaves the folder"):
        read_manifest(packed.folder)


def test_manifest_that_may_not_be_read(packed, monkeypatch):
    def refused(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(IntegrityError, match=r"deploy\.json' cannot be read: Permission denied"):
        read_manifest(packed.folder)

"""Reports: verdict, text, JSON, files."""

import json
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from torchferry.core.compare import Tolerance, compare
from torchferry.core.errors import OutputError, VerificationError
from torchferry.core.report import Finding, Picture, Report

ERROR = Finding("output-differs", "error", "output 'y' differs", where="net.py:3", hint="use fp32")
OTHER = Finding("size-refused", "error", "batch = 1 is wrong")
WARNING = Finding("eval-mode", "warning", "the model was in training mode")
BAD = compare(np.float32([1, np.nan]), np.float32([2, 1]), Tolerance(0, 0), name="y", case="photo")
GOOD = compare(np.int64([1]), np.int64([1]), Tolerance(0, 0), name="n", case="photo")
REPORT = Report(
    "verify net on reference-fp32",
    (WARNING, ERROR, OTHER),
    (BAD, GOOD),
    {"environment": {"python": "3.11"}},
    (Picture("photo", (("input", b"png"),)),),
)


def test_verdict() -> None:
    assert not REPORT.passed
    assert Report("t", (WARNING,)).passed
    good = Report("t", (WARNING,))
    assert good.raise_for_failure() is good


def test_a_failure_names_every_error_and_no_warning() -> None:
    with pytest.raises(VerificationError) as caught:
        REPORT.raise_for_failure()
    text = str(caught.value)
    assert "verify net on reference-fp32: 2 errors" in text
    for part in ("output 'y' differs", "net.py:3", "use fp32", "[output-differs]", "batch = 1 is wrong"):
        assert part in text
    assert "training mode" not in text
    with pytest.raises(VerificationError, match=r"t: 1 error\n"):
        Report("t", (OTHER,)).raise_for_failure()


def test_text() -> None:
    assert REPORT.to_text().splitlines() == [
        "verify net on reference-fp32: FAILED",
        f"  {BAD}",
        "  n [photo] max abs 0, mean abs 0, relative 0: agrees",
        "  warning: the model was in training mode [eval-mode]",
        "  error: output 'y' differs [output-differs]",
        "    at net.py:3",
        "    hint: use fp32",
        "  error: batch = 1 is wrong [size-refused]",
        "  environment",
        "    python: 3.11",
    ]
    assert str(Report("t")) == "t: passed"


def test_additions_leave_the_report_as_it_was() -> None:
    first = Report("t", facts={"a": {"x": "1"}})
    second = first.with_findings([WARNING]).with_facts("b", {"n": 2})
    assert (first.findings, first.facts) == ((), {"a": {"x": "1"}})
    assert (second.findings, second.facts) == ((WARNING,), {"a": {"x": "1"}, "b": {"n": "2"}})


def strict_json(text: str) -> object:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json() -> None:
    read = strict_json(REPORT.to_json())
    assert read == REPORT.to_dict()
    assert read["passed"] is False
    assert read["findings"][1] == {
        "code": "output-differs",
        "severity": "error",
        "message": "output 'y' differs",
        "where": "net.py:3",
        "hint": "use fp32",
    }
    assert read["comparisons"][0]["mismatched"] == 2
    assert read["comparisons"][0]["tolerance"] == {"atol": 0, "rtol": 0}
    assert read["comparisons"][0]["shape"] == [2]
    assert "pictures" not in read


def test_json_has_no_token_that_json_lacks() -> None:
    huge = np.finfo(np.float64).max
    infinite = compare(np.array([1.0]), np.array([1.0]), Tolerance(np.inf, np.nan), name="y")
    overflowing = compare(np.array([huge]), np.array([-huge]), Tolerance(0, 0), name="y")
    read = strict_json(Report("t", comparisons=(infinite, overflowing)).to_json())
    assert read["comparisons"][0]["tolerance"] == {"atol": "inf", "rtol": "nan"}
    assert read["comparisons"][1]["max_abs"] == "inf"


def test_facts_may_be_any_mapping() -> None:
    facts = MappingProxyType({"environment": MappingProxyType({"python": "3.11"})})
    assert strict_json(Report("t", facts=facts).to_json())["facts"] == {"environment": {"python": "3.11"}}


@pytest.mark.parametrize(
    ("name", "start"), [("r.html", "<!doctype html>"), ("r.json", "{"), ("r.txt", "verify net"), ("r", "verify net")]
)
def test_save_by_ending(tmp_path: Path, name: str, start: str) -> None:
    REPORT.save(tmp_path / name)
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


def test_save_where_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        REPORT.save(tmp_path / "nowhere" / "r.json")

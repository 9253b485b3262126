"""The report's page: self-contained, escaped, complete."""

import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from torchferry.core.compare import Budget, Comparison, Tolerance, compare
from torchferry.core.errors import OutputError
from torchferry.core.report import Finding, Picture, Report

TOLERANCE = Tolerance(1e-4, 1e-4)


class Page(HTMLParser):
    """The tags, attributes and visible text of a page; fails on a tag that is not closed."""

    VOID = ("meta", "img")

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.html = report.to_html()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(self.html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style" and data.strip():
            self.texts.append(" ".join(data.split()))

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    @property
    def bars(self) -> dict[str, int]:
        """Label and count of every bar of every histogram."""
        found = re.findall(r"<title>([^<]*): ([\d,]+) elements</title>", self.html)
        return {label: int(count.replace(",", "")) for label, count in found}


def one(error: float = 0.0, *, name: str = "y", case: str = "photo", size: int = 4) -> Comparison:
    want = np.zeros(size)
    got = want.copy()
    got[0] = error
    return compare(want, got, TOLERANCE, name=name, case=case)


def everything(text: str) -> Report:
    """A report that shows this text in every place that holds a user's text."""
    nan = compare(np.float32([1, np.nan]), np.float32([2, 3]), TOLERANCE, name=text, case=text)
    return Report(
        text,
        tuple(Finding(text, severity, text, where=text, hint=text) for severity in ("info", "warning", "error")),
        (nan,),
        {text: {text: text}},
        (Picture(text, ((text, b"\x89PNG"), (text, b"\x89PNG"))),),
    )


def test_shows_everything() -> None:
    report = Report(
        "verify net on reference-fp32",
        (
            Finding("output-differs", "error", "output 'y' differs", where="net.py:3: x / y", hint="use fp32"),
            Finding("eval-mode", "warning", "the model was in training mode"),
        ),
        (one(0.5, size=1000),),
        {"environment": {"python": "3.11"}, "steps": {"export": "2 s"}},
        (Picture("at size 3", (("PyTorch", b"one"), ("engine", b"two"))),),
    )
    page = Page(report)
    for text in (
        "verify net on reference-fp32", "Failed", "error", "output-differs", "output 'y' differs", "net.py:3: x / y",
        "use fp32", "eval-mode", "y", "photo", "float64[1000]", "0.5", "0.0005", "1 of 1,000",
        "atol 0.0001, rtol 0.0001", "differs", "1 of 1 differ", "environment", "python", "3.11", "steps", "export",
        "at size 3", "PyTorch", "engine", "absolute error (decades)", "elements (log scale)", "10⁻¹⁰", "10²", "allowed",
    ):  # fmt: skip
        assert text in page.texts, text
    assert "1 of 1000 elements, worst at (0,): expected 0, got 0.5" in page.text
    assert [value for name, value in page.attributes if name == "src"] == [
        "data:image/png;base64,b25l",
        "data:image/png;base64,dHdv",
    ]


def test_an_empty_report_is_a_page() -> None:
    page = Page(Report("nothing to do"))
    assert "Passed" in page.texts
    assert "svg" not in page.tags
    assert "table" not in page.tags


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "' onmouseover='alert(1)",
        "</title></style></svg><b>",
        "{{ 7 * 7 }}{% for x in y %}",
        "<!-- ",
        "javascript:alert(1)",
    ],
)
def test_hostile_text_stays_text(hostile: str) -> None:
    page, harmless = Page(everything(hostile)), Page(everything("harmless"))
    assert page.tags == harmless.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in harmless.attributes]
    assert page.text.count(" ".join(hostile.split())) == harmless.text.count("harmless")


def test_the_page_needs_nothing_else() -> None:
    page = Page(everything("text"))
    assert not {"script", "link", "iframe", "object", "base", "form", "a"} & set(page.tags)
    links = [value for name, value in page.attributes if name in {"src", "href", "srcset", "action", "xlink:href"}]
    assert links
    assert all(value.startswith("data:image/png;base64,") for value in links)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not re.search(r"https?:|@import|url\(", page.html)
    assert "default-src 'none'" in page.html


def test_many_cases_of_one_output_share_one_histogram() -> None:
    cases = [one(3 * 10.0 ** (-5 - i % 3), case=f"height={i}", size=i) for i in range(1, 31)]
    page = Page(Report("t", comparisons=(*cases, one(name="z"))))
    assert page.tags.count("svg") == 2
    assert page.tags.count("table") == 2
    assert "agrees in all 30 cases" in page.texts
    total = sum(range(1, 31)) + 4
    assert f"{total:,}" in page.texts
    plot = page.html.split("<svg")[1]
    counts = dict(re.findall(r"<title>([^<]*): ([\d,]+) elements</title>", plot))
    assert counts == {"exactly 0": "435", "10⁻⁷ to 10⁻⁶": "10", "10⁻⁶ to 10⁻⁵": "10", "10⁻⁵ to 10⁻⁴": "10"}


def test_cases_that_differ_come_first() -> None:
    page = Page(Report("t", comparisons=(one(case="good"), one(0.5, case="bad"), one(case="fine"))))
    assert [text for text in page.texts if text in {"good", "bad", "fine"}] == ["bad", "good", "fine"]
    assert "1 of 3 differ" in page.texts


@pytest.mark.parametrize(
    ("error", "label"),
    [
        (0, "exactly 0"),
        (1e-12, "below 10⁻¹⁰"),
        (3e-10, "10⁻¹⁰ to 10⁻⁹"),
        (0.5, "10⁻¹ to 10⁰"),
        (50, "10¹ to 10²"),
        (5e3, "10² and above"),
    ],
)
def test_bars_are_labelled_with_their_decade(error: float, label: str) -> None:
    assert Page(Report("t", comparisons=(one(error, size=1),))).bars == {label: 1}


def test_bars_grow_with_the_logarithm_of_the_count_and_stay_in_the_drawing() -> None:
    want = np.zeros(111_111)
    got = np.repeat([3e-9, 3e-7, 3e-5, 3e-3, 0.3, 30.0], [1, 10, 100, 1000, 10_000, 100_000])
    page = Page(Report("t", comparisons=(compare(want, got, TOLERANCE, name="y"),)))
    rects = [
        [float(v) for v in rect]
        for rect in re.findall(r'x="([\d.]+)" y="([\d.]+)" width="28" height="([\d.]+)"', page.html)
    ]
    heights = [height for _, _, height in rects]
    steps = np.diff(heights)
    assert len(heights) == 6
    assert heights[0] > 0
    assert np.allclose(steps, steps[0], atol=0.2)
    width, height = (float(v) for v in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', page.html).groups())
    assert all(0 <= x <= width - 28 and y >= 0 and y + h <= height for x, y, h in rects)


def test_figures_that_do_not_exist_are_not_invented() -> None:
    nan = compare(np.float32([1, 1]), np.float32([np.nan, np.nan]), TOLERANCE, name="y")
    shape = compare(np.float32([1]), np.float32([1, 1, 1]), TOLERANCE, name="y")
    page = Page(Report("t", comparisons=(nan, shape)))
    assert "svg" not in page.tags
    assert page.texts.count("\N{EN DASH}") == 10  # four figures and a missing case, twice
    assert "5 elements have no error to plot" in page.text


def test_the_tolerance_is_drawn_where_it_decides() -> None:
    whole = compare(np.arange(3), np.arange(3), TOLERANCE, name="y")
    off_the_axis = compare(np.zeros(1), np.zeros(1), Tolerance(1e9, 0), name="y")
    other = compare(np.zeros(1), np.zeros(1), Tolerance(1e-2, 0), name="y")
    assert "allowed" in Page(Report("t", comparisons=(one(), one()))).texts
    for comparisons in [
        (whole,),
        (off_the_axis,),
        (one(), other),
        (compare(np.zeros(1), np.zeros(1), Tolerance(0, 0)),),
    ]:
        assert "allowed" not in Page(Report("t", comparisons=comparisons)).texts
    by_budget = compare(np.ones(1), np.ones(1) * 1.25, Budget(max_abs=1e-2, relative=1), name="y")
    page = Page(Report("t", comparisons=(by_budget,)))
    assert {"allowed", "0.25", "budget max_abs 0.01, relative 1"} <= set(page.texts)
    assert "allowed" not in Page(Report("t", comparisons=(compare(np.ones(1), np.ones(1), Budget(relative=1)),))).texts
    assert "exact" in Page(Report("t", comparisons=(whole,))).texts


def test_infinite_figures_are_shown() -> None:
    huge = np.finfo(np.float64).max
    page = Page(Report("t", comparisons=(compare(np.array([huge]), np.array([-huge]), TOLERANCE, name="y"),)))
    assert "inf" in page.texts
    assert page.bars == {"10² and above": 1}


def test_without_jinja2_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(OutputError, match="Jinja2 is not installed") as caught:
        Report("t").to_html()
    assert "pip install jinja2" in str(caught.value)

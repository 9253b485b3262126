"""Pages that list what the code has: they list all of it, nothing else, and say the same."""

import ast
import builtins
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from markdown_blocks import blocks
from pydantic import BaseModel

import torchferry
from torchferry.core import errors
from torchferry.core.compare import TOLERANCES
from torchferry.graph.exported import EXTERNAL_DATA_BYTES
from torchferry.pipeline.config import DeployConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCE = Path(torchferry.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("examples/*/README.md")]
PAGES += sorted(DOCS.rglob("*.md"))


def _rows(page: Path, heading: str = "") -> Iterator[list[str]]:
    """Return the cells of every table row below a heading, without the tables' own headings."""
    text = page.read_text(encoding="utf-8")
    part = text[text.index(f"\n{heading}\n") :] if heading else text
    part = re.split(r"\n## ", part[1:])[0] if heading else part
    for line in part.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def _sections(annotation: Any) -> list[type[BaseModel]]:
    candidates = [annotation, *get_args(annotation)]
    return [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]


def _fields(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return every key of the config by its full name, with the default or the words of the page."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        inner = _sections(field.annotation)
        if inner:
            found |= _fields(inner[0], f"{prefix}{name}.")
        elif field.is_required():
            found[prefix + name] = "required"
        else:
            found[prefix + name] = "none" if field.default is None else field.default
    return found


def _default(cell: str) -> Any:
    value = tomllib.loads(f"value = {cell.strip('`')}")["value"] if cell.startswith("`") else cell
    return tuple(value) if isinstance(value, list) else value


def test_the_config_page_lists_every_key_with_its_default() -> None:
    listed = {cells[0].strip("`"): _default(cells[1]) for cells in _rows(DOCS / "reference" / "config.md")}
    assert listed == _fields(DeployConfig)


def test_every_flag_of_the_config_page_exists() -> None:
    flags = set(re.findall(r"`(--[\w-]+)", (DOCS / "reference" / "config.md").read_text()))
    known = set(re.findall(r'"(--[\w-]+)"', "".join(p.read_text() for p in (SOURCE / "cli").glob("*.py"))))
    assert flags <= known


def test_the_errors_page_lists_every_error() -> None:
    listed = {
        cells[0].strip("`"): cells[1].strip("`") for cells in _rows(DOCS / "reference" / "errors.md", "## Errors")
    }
    raised = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.TorchferryError) and value is not errors.TorchferryError
    }
    assert listed.keys() == raised.keys()
    for name, base in listed.items():
        assert issubclass(raised[name], getattr(errors, base, None) or getattr(builtins, base)), name


def _finding_codes() -> tuple[dict[str, str], set[str]]:
    """Return code and severity of every finding that the source makes by constants, and all texts in the source."""
    found: dict[str, str] = {}
    texts: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            if not isinstance(node, ast.Call) or len(node.args) < 2:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("Finding", "_find"):
                found |= dict(zip(*(_alternatives(argument) for argument in node.args[:2]), strict=False))
    return found, texts


def _alternatives(node: ast.expr) -> list[str]:
    """Return the values that an argument may have, none if it is computed."""
    if isinstance(node, ast.IfExp):
        return [*_alternatives(node.body), *_alternatives(node.orelse)]
    return [str(node.value)] if isinstance(node, ast.Constant) else []


def test_the_errors_page_lists_every_finding() -> None:
    listed = {cells[0].strip("`"): cells[1] for cells in _rows(DOCS / "reference" / "errors.md", "## Findings")}
    made, texts = _finding_codes()
    assert listed.keys() <= texts
    assert made.items() <= listed.items()


def test_the_concepts_page_states_the_tolerances() -> None:
    rows = [cells for cells in _rows(DOCS / "concepts.md") if cells[0].strip("`") in TOLERANCES]
    listed = {cells[0].strip("`"): (float(cells[1]), float(cells[2])) for cells in rows}
    assert listed == {precision: (t.atol, t.rtol) for precision, t in TOLERANCES.items()}


def test_the_export_page_states_when_weights_leave_the_file() -> None:
    page = (DOCS / "how-to" / "export.md").read_text(encoding="utf-8")
    assert f"more than {EXTERNAL_DATA_BYTES >> 20} MiB of weights" in page


@pytest.mark.parametrize("page", [DOCS / "design" / "0000-house.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_the_drawn_tree_is_the_real_one(page: Path) -> None:
    tree = next(block.text for block in blocks(page) if block.words == ("diagram",) and "src/torchferry" in block.text)
    part = tree[tree.index("src/torchferry") :].split("\n\n")[0]
    drawn = re.findall(r"^ {2}(\w+)/ ", part, re.MULTILINE)
    real = [folder.name for folder in SOURCE.iterdir() if any(folder.glob("*.py"))]
    assert sorted(drawn) == sorted(real)
    for package, rest in re.findall(r"^ {2}(\w+)/ +(.*(?:\n {12,}.*)*)", part, re.MULTILINE):
        for module in re.findall(r"\b(\w+)\.py\b", rest):
            assert (SOURCE / package / f"{module}.py").exists(), f"{package}/{module}.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page}: {target}"
        assert not anchor or anchor in _anchors(linked), f"{page}: {target}"


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub makes them of its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

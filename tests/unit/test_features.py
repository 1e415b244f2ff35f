"""`docs/features.md`: every row of ours is held by a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "features.md"
LINK = re.compile(r'\[yes\]\(\.\./(tests/(?:unit|oracle|e2e|faults|full)/test_\w+\.py) "(test_\w+)"\)')
PEERS = 5


def read_rows() -> list[list[str]]:
    """The cells of every row of the tables of features, without their heads."""
    body = PAGE.read_text(encoding="utf-8").partition("\n## ")[2]
    lines = [line for line in body.splitlines() if line.startswith("|") and not line.startswith(("| | ", "| ---"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def list_tests(path: Path) -> set[str]:
    """The tests that a file defines, by their names."""
    return {node.name for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_every_row_has_a_test_that_exists_and_says_something_of_everybody():
    rows = read_rows()
    assert len(rows) > 50
    for what, ours, *theirs in rows:
        link = LINK.fullmatch(ours)
        assert link is not None, f"{what}: our column is no link to a test: {ours}"
        path = ROOT / link[1]
        assert path.is_file(), f"{what}: {link[1]} is not there"
        assert link[2] in list_tests(path), f"{what}: {link[1]} has no {link[2]}"
        assert len(theirs) == PEERS, what
        assert all(theirs), what


def test_no_feature_is_listed_twice():
    names = [row[0] for row in read_rows() if not row[0].startswith("…")]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "peer", ["sd-scripts", "OneTrainer", "ai-toolkit", "SimpleTuner", "diffusers' example scripts"]
)
def test_what_is_said_of_others_names_the_commit_its_date_and_the_files(peer):
    opening = PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    (row,) = [line for line in opening.splitlines() if line.startswith(f"| {peer} (")]
    assert re.search(r"\| [0-9a-f]{8,10} \| 20\d\d-\d\d-\d\d \| .*`", row)


def test_a_test_that_is_gone_or_a_row_without_one_would_be_found(monkeypatch):
    """The checks above see what they are for."""
    text = PAGE.read_text(encoding="utf-8")
    some = LINK.search(text)
    assert some is not None
    for broken in (text.replace(some[2], "test_that_nobody_wrote"), text.replace(some[0], "yes")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", _reading(broken))
            with pytest.raises(AssertionError):
                test_every_row_has_a_test_that_exists_and_says_something_of_everybody()


def _reading(page: str):
    original = Path.read_text
    return lambda path, *a, **k: page if path == PAGE else original(path, *a, **k)


def test_every_test_that_the_page_of_formats_names_is_there():
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    links = re.findall(r'\]\(\.\./(tests/\S+\.py) "(\w+)"\)', text)
    assert len(links) >= 25
    assert not re.search(r"\|\s*\?\s*\|", text), "a cell of the page of formats says nothing"
    for file, name in links:
        assert name in list_tests(ROOT / file), f"{file} has no {name}"


def test_every_cell_of_the_page_of_formats_is_tried_or_names_its_source():
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    notes = set(re.findall(r"^- (\[\d\]) ", text, re.M))
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 17
    for what, ours, *theirs in rows:
        assert "](../tests/" in ours, what
        assert len(theirs) == 3, what
        for cell in theirs:
            assert "](../tests/" in cell or set(re.findall(r"\[\d\]", cell)) & notes, f"{what}: {cell}"
    assert re.search(r"^- \[2\] .*`extensions-builtin/Lora/.*\([0-9a-f]{7}", text, re.M)

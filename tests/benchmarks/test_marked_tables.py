"""A table is found by its marks, and what is around it stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.marked_tables import markdown, marked, replaced, update

PAGE = "# A\n<!-- table: x -->\n| a |\n<!-- end: x -->\nend\n"


def test_only_what_is_between_the_marks_changes() -> None:
    assert marked(PAGE, "x") == "| a |\n"
    assert replaced(PAGE, "x", "new\n") == "# A\n<!-- table: x -->\nnew\n<!-- end: x -->\nend\n"


@pytest.mark.parametrize("text", ["", PAGE + PAGE, "<!-- end: x -->\n<!-- table: x -->\n", "<!-- table: x -->\n"])
def test_marks_that_are_not_there_once_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no table 'x'"):
        marked(text, "x")


def test_a_bar_in_a_cell_stays_one() -> None:
    assert markdown(["a", "b"], [["1", "x|y"]], right=(1,)) == "| a | b |\n| --- | ---: |\n| 1 | x\\|y |\n"


def test_a_check_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(PAGE)
    assert update(path, "x", "| a |\n", is_check=True)
    assert not update(path, "x", "| b |\n", is_check=True)
    assert path.read_text() == PAGE
    assert not update(path, "x", "| b |\n", is_check=False)
    assert update(path, "x", "| b |\n", is_check=True)

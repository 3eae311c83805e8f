"""docs/faults.md: every fault has a row, every row has tests, and every test is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "faults.md"
NUM_FAULTS = 42


def read_table(text: str) -> dict[int, list[tuple[str, str]]]:
    """The tests of every row, as (file, name), by the number of the fault."""
    rows: dict[int, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        match = re.match(r"\| (\d+) \|", line)
        if match:
            assert int(match[1]) not in rows, f"row {match[1]} is there twice"
            rows[int(match[1])] = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line)
    return rows


@cache
def asserting_tests(path: Path) -> set[str]:
    """The tests of a file that assert something, themselves or in a function of the same file that they call."""
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    asserting = {name for name, node in functions.items() if _asserts(node)}
    return {
        name
        for name, node in functions.items()
        if name.startswith("test_") and (name in asserting or _names(node) & asserting)
    }


def _asserts(node: ast.FunctionDef) -> bool:
    return any(isinstance(child, ast.Assert) for child in ast.walk(node)) or "raises" in ast.unparse(node)


def _names(node: ast.FunctionDef) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


@cache
def skipped_tests(path: Path) -> set[str]:
    """Tests that are marked to be skipped or to fail."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in nodes for mark in node.decorator_list if re.search("skip|xfail", ast.unparse(mark))}


def test_every_fault_has_a_row_and_every_row_a_test() -> None:
    rows = read_table(TABLE.read_text())
    assert list(rows) == list(range(1, NUM_FAULTS + 1))
    assert [number for number, tests in rows.items() if not tests] == []


def test_every_named_test_is_there_and_asserts_something() -> None:
    missing = []
    for number, tests in read_table(TABLE.read_text()).items():
        for file, name in tests:
            if not (ROOT / file).is_file() or name not in asserting_tests(ROOT / file) - skipped_tests(ROOT / file):
                missing.append(f"{number}: {file}::{name}")
    assert missing == []


def test_a_missing_a_hollow_and_a_skipped_test_are_found(tmp_path: Path) -> None:
    path = tmp_path / "test_x.py"
    path.write_text(
        "def check(x):\n    assert x\n"
        "def test_a():\n    check(1)\n"
        "def test_b():\n    print(1)\n"
        "@pytest.mark.skip\ndef test_c():\n    assert 1\n"
        "def test_d():\n    with pytest.raises(ValueError):\n        int('x')\n"
    )
    assert asserting_tests(path) - skipped_tests(path) == {"test_a", "test_d"}
    assert read_table(
        "| 3 | fault | expected | `tests/a/b.py::test_c`, `x.py::test_d` |\n| 4 | fault | x | none |"
    ) == {
        3: [("tests/a/b.py", "test_c")],
        4: [],
    }
    with pytest.raises(AssertionError, match="row 3 is there twice"):
        read_table("| 3 | a |\n| 3 | b |")

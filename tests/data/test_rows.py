from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data import rows as rows_module
from qlora_trainer.data.rows import Message, read_rows
from qlora_trainer.errors import DataError

GOOD = b'{"prompt": "Hi", "completion": "Hello"}'


def write(folder: Path, data: bytes) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "data, lines",
    [
        (GOOD, [1]),
        (GOOD + b"\n", [1]),
        (b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD, [1, 2]),
        (GOOD + b"\r\n\r\n" + GOOD + b"\r\n", [1, 3]),
        (b"\n  \n" + GOOD + b"\n\t\n" + GOOD + b"\n\n", [3, 5]),
    ],
)
def test_bom_crlf_and_blank_lines_are_read(tmp_path: Path, data: bytes, lines: list[int]) -> None:
    rows = read_rows(write(tmp_path, data))
    assert [row.line for row in rows] == lines
    assert [row.index for row in rows] == list(range(len(lines)))
    assert rows[0].messages == (Message("user", "Hi"), Message("assistant", "Hello"))
    assert rows[0].where == f"{tmp_path / 'train.jsonl'}:{lines[0]}"


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"prompt": "Hi"', "broken JSON"),
        (b"nonsense", "broken JSON"),
        (GOOD + GOOD, "broken JSON (Extra data"),
        (b'{"prompt": "Hi", "prompt": "Ho", "completion": "x"}', "key 'prompt' given twice"),
        (b'{"messages": [{"role": "user", "role": "user", "content": "x"}]}', "key 'role' given twice"),
        (b'{"id": NaN, "prompt": "Hi", "completion": "x"}', "NaN is not JSON"),
        (b'{"id": -Infinity, "prompt": "Hi", "completion": "x"}', "-Infinity is not JSON"),
        (b'{"id": ' + b"9" * 10_000 + b', "prompt": "Hi", "completion": "x"}', "broken JSON"),
        (b'{"id": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "JSON nested too deeply"),
        (b"3", "found 3; expected one complete JSON object"),
        (b'"Hi"', "found 'Hi'"),
        (b"null", "found None"),
        (b'{"prompt": "caf\xe9", "completion": "x"}', "byte 0xe9 at position 15"),
        (b"\x1f\x8b\x08\x00", "byte 0x8b at position 1"),
        (b'{"prompt": "\\ud800", "completion": "x"}', "half of a surrogate pair"),
        (b'{"prompt": "Hi", "completion": ""}', "an empty assistant text"),
        (b"[" + GOOD + b"]", "a JSON array; expected JSON Lines"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path, GOOD + b"\n\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:3: found ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_json_array_file_is_told_what_is_expected(tmp_path: Path) -> None:
    path = write(tmp_path, b"[\n  " + GOOD + b"\n]\n")
    with pytest.raises(DataError, match=r"train\.jsonl:1: found a JSON array; expected JSON Lines"):
        read_rows(path)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"  \r\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match="found no rows"):
        read_rows(write(tmp_path, data))


def test_an_overlong_line_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 2**20)
    path = tmp_path / "train.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b"\n")
        file.truncate(2**33)  # a sparse 8 GiB line: reading it whole would end in an out-of-memory error
    with pytest.raises(DataError, match=r"train\.jsonl:2: found a line longer than 1 MiB"):
        read_rows(path)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="Is a directory"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="null byte"):
        read_rows("a\0b")


@given(st.lists(st.tuples(st.text(), st.text().filter(str.strip)), min_size=1, max_size=5), st.booleans())
def test_any_text_comes_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], escape: bool
) -> None:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": answer}, ensure_ascii=escape) for prompt, answer in pairs]
    path.write_bytes("\n".join(lines).encode("utf-8"))
    assert [tuple(message.content for message in row.messages) for row in read_rows(path)] == pairs


def test_reading_rows_imports_no_torch() -> None:
    program = (
        "import sys, qlora_trainer.data.rows, qlora_trainer.data.split, qlora_trainer.data.stdlib_docs; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'jinja2') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert finished.stdout.strip() == "[]"


def test_bad_rows_are_counted_and_the_first_of_them_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation tried: a row that keeps its number in the file would be another document after a line is repaired."""
    monkeypatch.setattr(rows_module, "MAX_REASONS", 3)
    bad = [b"nonsense", b'{"prompt": "Hi"}', b'{"prompt": "caf\xe9", "completion": "x"}', b"3", b"[]"]
    path = write(tmp_path, b"\n".join([GOOD, *bad, b"", GOOD]))
    read = rows_module.read_rows_and_bad(path, stop=False)
    assert [(row.index, row.line) for row in read.rows] == [(0, 1), (1, 8)]
    assert read.num_bad == 5
    assert [reason.split(": ")[0] for reason in read.reasons] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert "broken JSON" in read.reasons[0]
    assert "byte 0xe9" in read.reasons[2]
    with pytest.raises(DataError, match=r"train\.jsonl:2: found broken JSON"):
        rows_module.read_rows_and_bad(path, stop=True)


def test_a_file_of_bad_rows_only_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, b"a,b\n1,2\n")
    with pytest.raises(DataError, match=r"found no rows but 2 bad ones, the first .*train\.jsonl:1: broken JSON"):
        rows_module.read_rows_and_bad(path, stop=False)


def test_an_overlong_line_is_passed_over_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_LINE_BYTES", 1000)
    for length in (1001, 2002, 5000):
        path = write(tmp_path, b"\n".join([GOOD, b"x" * length, GOOD]) + b"\n" + b"y" * length)
        read = rows_module.read_rows_and_bad(path, stop=False)
        assert [row.line for row in read.rows] == [1, 3]
        assert read.num_bad == 2

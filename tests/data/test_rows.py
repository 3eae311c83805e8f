from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data import json_text
from qlora_trainer.data import rows as rows_module
from qlora_trainer.data.rows import (
    FileRead,
    Message,
    Reading,
    Row,
    RowsRead,
    collect,
    in_batches,
    iter_files,
    read_rows,
)
from qlora_trainer.data.tool_calls import ToolCall
from qlora_trainer.errors import DataError

GOOD = b'{"prompt": "Hi", "completion": "Hello"}'


def write(folder: Path, data: bytes) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(data)
    return path


def read_one(path: Path) -> RowsRead:
    return collect(iter_files([path], stop=False))


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
        (b'{"id": ' + b"9" * 5_000 + b', "prompt": "Hi", "completion": "x"}', "an integer of 5,000 digits"),
        (b'{"id": -1e999, "prompt": "Hi", "completion": "x"}', "the number -1e999 is beyond all floats"),
        (b'{"id": ' + b"9" * 400 + b'.0, "prompt": "Hi", "completion": "x"}', "9999… is beyond all floats"),
        (b'{"id": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "JSON nested too deeply"),
        (b"3", "found 3; expected one complete JSON object"),
        (b'"Hi"', "found 'Hi'"),
        (b"null", "found None"),
        (b'{"prompt": "caf\xe9", "completion": "x"}', "byte 0xe9 at position 15"),
        (b"\x1f\x8b\x08\x00", "byte 0x8b at position 1"),
        (b'{"prompt": "\\ud800", "completion": "x"}', "half of a surrogate pair"),
        (b'{"prompt": "Hi", "completion": ""}', "an empty assistant text"),
        (b"[" + GOOD + b"]", "found [{'prompt': 'Hi', 'completion': 'Hello'}]; expected one complete JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path, GOOD + b"\n\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}:3: found ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"  \r\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match="found no rows"):
        read_rows(write(tmp_path, data))


def test_an_overlong_line_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_LINE_BYTES", 2**20)
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
        "import sys, qlora_trainer.data.named, qlora_trainer.data.stdlib_docs; "
        "heavy = ('torch', 'transformers', 'numpy', 'jinja2', 'pyarrow', 'datasets'); "
        "print([name for name in heavy if name in sys.modules])"
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
    read = read_one(path)
    assert [(row.index, row.line) for row in read.rows] == [(0, 1), (1, 8)]
    [file] = read.files
    assert (file.num_rows, file.num_bad) == (2, 5)
    assert [reason.split(": ")[0] for reason in file.reasons] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert "broken JSON" in file.reasons[0]
    assert "byte 0xe9" in file.reasons[2]
    with pytest.raises(DataError, match=r"train\.jsonl:2: found broken JSON"):
        read_rows(path)


def test_a_file_of_bad_rows_only_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, b"a,b\n1,2\n")
    with pytest.raises(DataError, match=r"found no rows but 2 bad ones, the first .*train\.jsonl:1: broken JSON"):
        read_one(path)


def test_an_overlong_line_is_passed_over_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_LINE_BYTES", 1000)
    for length in (1001, 2002, 5000):
        path = write(tmp_path, b"\n".join([GOOD, b"x" * length, GOOD]) + b"\n" + b"y" * length)
        read = read_one(path)
        assert [row.line for row in read.rows] == [1, 3]
        assert read.files[0].num_bad == 2


def test_rows_of_several_files_are_numbered_through(tmp_path: Path) -> None:
    """Draws and the held-out part are keyed by the number. Mutation tried: each file counted from 0."""
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + GOOD)
    (tmp_path / "b.jsonl").write_bytes(b'\nnonsense\n{"question": "Hi", "answer": "Hello"}')
    read = collect(iter_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], stop=False))
    assert [(Path(row.path).name, row.index, row.line) for row in read.rows] == [
        ("a.jsonl", 0, 1),
        ("a.jsonl", 1, 2),
        ("b.jsonl", 2, 3),
    ]
    assert [(file.format_name, file.num_rows, file.num_bad) for file in read.files] == [
        ("prompt_completion", 2, 0),
        ("question_answer", 1, 1),
    ]
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: found no rows"):
        collect(iter_files([tmp_path / "a.jsonl", tmp_path / "empty.jsonl"]))


def test_the_first_row_tells_the_form_of_its_file(tmp_path: Path) -> None:
    path = write(tmp_path, b"nonsense\n" + GOOD + b'\n{"text": "Hi"}\n' + GOOD)
    assert read_one(path).files[0] == FileRead(
        path=str(path),
        format_name="prompt_completion",
        num_rows=2,
        num_bad=2,
        reasons=read_one(path).files[0].reasons,
    )
    with pytest.raises(DataError, match=r"train\.jsonl:2: found a row with keys \['prompt', .*the form text of this"):
        collect(iter_files([write(tmp_path, b'{"text": "Hi"}\n' + GOOD)]))
    path = write(tmp_path, b'{"text": "Hi", "title": "x"}')
    columns = (("question", "title"), ("answer", "text"))
    [row] = collect(iter_files([path], row_format="question_answer", columns=columns)).rows
    assert row.messages == (Message("user", "x"), Message("assistant", "Hi"))
    with pytest.raises(DataError, match=r"train\.jsonl:1: found a row with keys .*the form alpaca of this file"):
        collect(iter_files([path], row_format="alpaca"))


def test_batches_end_with_the_file_or_when_they_are_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation tried: long rows are not counted, and 256 books are tokenised at once."""
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 3)
    monkeypatch.setattr(rows_module, "BATCH_CHARACTERS", 100)
    messages = (
        Message("user", "u" * 20),
        Message("assistant", "a" * 10),
        Message("user", "u"),
        Message("assistant", "a"),
    )
    lengths = [1, 1, 1, 1, 60, 60, 1]
    read: list[Row | Reading | FileRead] = [
        Row("a", number, number + 1, (), text="x" * length) for number, length in enumerate(lengths)
    ]
    conversation = Row("a", 7, 8, messages)
    assert conversation.num_tokenized_characters == 32 + 20 + 31
    asked = replace(messages[1], tool_calls=(ToolCall("add", "{" + " " * 20 + "}"),))
    with_tools = replace(conversation, messages=(messages[0], asked, *messages[2:]), tools="[{}]")
    assert with_tools.num_tokenized_characters == (4 + 32 + 22) + (4 + 20) + (4 + 31 + 22)
    end = FileRead("a", "text", 8, 0, ())
    read = [*read[:2], Reading("a", 2, 0.5), *read[2:], conversation, end, Row("b", 8, 1, (), text="y"), end]
    batches = [[row.index for row in item] for item in in_batches(read) if isinstance(item, list)]
    assert batches == [[0, 1, 2], [3, 4, 5], [6, 7], [8]]
    assert [item for item in in_batches(read) if not isinstance(item, list)] == [Reading("a", 2, 0.5), end, end]


def test_a_file_without_a_good_row_says_what_its_first_one_lacks(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"foo": 1}\n{"foo": 2}\n')
    with pytest.raises(DataError) as skipped:
        collect(iter_files([path], stop=False))
    with pytest.raises(DataError) as stopped:
        collect(iter_files([path], stop=True))
    assert str(skipped.value).startswith(f"{path}: found no rows but 2 bad ones, the first {path}:1: a row with keys")
    assert (skipped.value.expected, skipped.value.fix) == (stopped.value.expected, stopped.value.fix)

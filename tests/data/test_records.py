from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.data import json_text
from qlora_trainer.data.json_text import iter_array
from qlora_trainer.data.records import iter_records
from qlora_trainer.data.rows import BadRow, Place, Row, collect, iter_files, read_rows
from qlora_trainer.errors import DataError

ROWS = [{"question": f"Hi {number}", "answer": "Hel\nlo, „you“"} for number in range(3)]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def write(path: Path, data: bytes | str) -> Path:
    raw = data if isinstance(data, bytes) else data.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def as_csv(rows: list[dict[str, str]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def pairs(rows: list[Row]) -> list[dict[str, str]]:
    return [{"question": row.messages[0].content, "answer": row.messages[1].content} for row in rows]


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "name, text, wheres",
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)), ["1", "2", "3"]),
        ("a.json", "\n\n".join(map(json.dumps, ROWS)), ["1", "3", "5"]),
        ("a.json", json.dumps(ROWS), ["row 1", "row 2", "row 3"]),
        ("a.jsonl", "\ufeff \n" + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n\n", ["row 1", "row 2", "row 3"]),
        ("a.csv", as_csv(ROWS), ["2", "4", "6"]),
        ("A.CSV", "\ufeff" + as_csv(ROWS).replace("\r\n", "\n\n"), ["3", "6", "9"]),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, name: str, text: str, wheres: list[str], suffix: str
) -> None:
    path = write(tmp_path / (name + suffix), text)
    rows = read_rows(path)
    assert pairs(rows) == ROWS
    assert [row.where for row in rows] == [f"{path}:{where}" for where in wheres]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    """A column that only some rows have is null in the others; the keys of a struct too."""
    rows = read_rows(write_parquet(tmp_path / "a.parquet", [{**row, "system": None, "id": 7} for row in ROWS]))
    assert pairs(rows) == ROWS
    assert rows[2].where.endswith("a.parquet:row 3")
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    conversations: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 0}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]},
    ]
    first, second = read_rows(write_parquet(tmp_path / "b.parquet", conversations))
    assert (first.messages[1].weight, first.messages[1].tool_calls) == (0, ())
    assert second.messages[1].tool_calls[0].name == "add"


@given(st.lists(VALUES, max_size=6), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
def test_an_array_is_read_in_pieces_of_any_size(
    values: list[object], indent: int | None, escape: bool, chunk: int
) -> None:
    """Mutation tried: an element that ends where the piece ends is taken at once; 12 becomes 1 and a broken array."""
    raw = json.dumps(values, indent=indent, ensure_ascii=escape).encode()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(json_text, "_FIRST_CHUNK_BYTES", chunk)
        read = list(iter_array(io.BytesIO(raw), "a.json"))
    assert [item for item in read if isinstance(item, dict)] == [value for value in values if isinstance(value, dict)]
    assert len(read) == len(values)


def test_a_quote_that_swallows_rows_of_csv_stops_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    """Each was one bad row, and 500 good ones behind it were gone without a word."""
    good = "Hi,Hello\n" * 500
    unclosed = write(tmp_path / "a.csv", f'question,answer\n{good}Hi,"Hello\n{good}')
    with pytest.raises(DataError, match=r"a\.csv:502: found a quote that is not closed, in 501 lines from here on;"):
        collect(iter_files([unclosed], stop=False))
    closed_late = write(tmp_path / "b.csv", f'question,answer\nHi,"Hello\n{good}Hi,He"llo\n')
    with pytest.raises(DataError, match=r"b\.csv:2: found .*, in 502 lines from here on;"):
        collect(iter_files([closed_late], stop=False))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("[\n" + json.dumps(ROWS[0]) + ",\n", r"a\.json:3: found the end of the file inside"),
        ("[\n" + json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "]", r"a\.json:3: found '{' in the array"),
        ('[\n{"question": "Hi",\n "answer": nonsense}]', r"a\.json:3: found broken JSON"),
        ('[\n{"question": "Hi"', r"a\.json:2: found broken JSON"),
        ("[" + json.dumps(ROWS[0]) + ",]", r"a\.json:1: found broken JSON"),
        ("[" + json.dumps(ROWS[0]) + "]\n[]", r"a\.json:2: found text after the end of the array"),
        ("[" + "[" * 200_000, r"a\.json:1: found JSON nested too deeply"),
        (b'[{"question": "caf\xe9"}]', r"a\.json:1: found byte 0xe9"),
        ("[]", r"a\.json: found no rows"),
    ],
)
def test_a_broken_array_is_refused_even_where_bad_rows_are_skipped(
    tmp_path: Path, text: bytes | str, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        collect(iter_files([write(tmp_path / "a.json", text)], stop=False))


def test_bad_elements_of_an_array_are_passed_over(tmp_path: Path) -> None:
    twice = '{"question": "x", "question": "y", "answer": "z"}'
    text = f'[{json.dumps(ROWS[0])}, 3, {twice}, {{"id": NaN}}, {{}}, {json.dumps(ROWS[1])}]'
    path = write(tmp_path / "a.json", text)
    read = collect(iter_files([path], stop=False))
    assert [row.line for row in read.rows] == [1, 6]
    assert [reason.partition(": ")[0] for reason in read.files[0].reasons] == [f"{path}:row {n}" for n in (2, 3, 4, 5)]
    assert "key 'question' given twice" in read.files[0].reasons[1]
    assert "NaN is not JSON" in read.files[0].reasons[2]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
@pytest.mark.parametrize(
    "number, reason", [("-" + "9" * 5_000, "an integer of 5,000 digits"), ("1e999", "the number 1e999 is beyond")]
)
def test_a_number_that_nothing_holds_is_one_bad_row_of_any_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: str, reason: str
) -> None:
    """Of an array, an integer of 5,000 digits ended the file, and 1e999 was an infinity. Also where pieces are cut."""
    monkeypatch.setattr(json_text, "_FIRST_CHUNK_BYTES", 100)
    good = [json.dumps(row) for row in ROWS[:2]]
    lines = [good[0], f'{{"id": [{number}], "question": "Hi", "answer": "Hello"}}', number, good[1]]
    is_array = ".json" in name and "jsonl" not in name
    text = "[" + ",\n".join(lines) + "]" if is_array else "\n".join(lines)
    path = write(tmp_path / name, text)
    place = "row " if is_array else ""
    with pytest.raises(DataError, match=rf"{name}:{place}2: found broken JSON \({reason}") as caught:
        collect(iter_files([path]))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    read = collect(iter_files([path], stop=False))
    assert [row.line for row in read.rows] == [1, 4]
    assert [row.where for row in read.rows] == [f"{path}:{place}{n}" for n in (1, 4)]
    wanted = [f"{path}:{place}{n}: broken JSON ({reason}" for n in (2, 3)]
    assert all(told.startswith(start) for told, start in zip(read.files[0].reasons, wanted, strict=True))
    later = collect(iter_files([path], stop=False, start=Place(after=2, row=1)))
    assert [row.line for row in later.rows] == [4], "a stream that goes on behind it"
    assert later.files[0].num_bad == 1


def test_an_element_without_end_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "MAX_LINE_BYTES", 2**20)
    path = write(tmp_path / "a.json", '[{"question": "')
    with path.open("r+b") as file:
        file.truncate(2**33)  # sparse: 8 GiB of NUL characters would end in an out-of-memory error
    with pytest.raises(DataError, match=r"a\.json:1: found broken JSON"):
        read_rows(path)


def test_bad_lines_of_csv_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'question,answer\nHi,"Hel\nlo"\nHi\nHi,Hello,x\nHi,"Hel"lo\nHi,\nHi,Hello\n"Hi')
    read = collect(iter_files([path], stop=False))
    assert [row.line for row in read.rows] == [2, 8]
    reasons = [reason.removeprefix(f"{path}:") for reason in read.files[0].reasons]
    assert reasons[0] == "4: 1 fields"
    assert reasons[1] == "5: 3 fields"
    assert reasons[2].startswith("6: ")
    assert reasons[3] == "7: an empty assistant text in a row of question_answer form"
    assert reasons[4] == "9: a quote that is not closed"
    with pytest.raises(DataError, match=r"a\.csv:4: found 1 fields; expected 2, as in the header"):
        read_rows(path)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("question,question\nx,y", r"a\.csv:1: found the header"),
        ("question,\nx,y", r"a\.csv:1: found the header"),
        ("query,reply\nx,y", r"a\.csv:2: found a row with keys \['query', 'reply'\].*data\.columns"),
        (b"question,answer\ncaf\xe9,x", r"a\.csv:2: found byte 0xe9"),
        ("question,answer\n", r"a\.csv: found no rows"),
    ],
)
def test_csv_that_cannot_be_read_is_refused(tmp_path: Path, text: bytes | str, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read_rows(write(tmp_path / "a.csv", text))


def test_a_number_that_never_ends_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation tried: the cap is only looked at where JSON is broken; a file of gigabytes is held in memory."""
    monkeypatch.setattr(json_text, "MAX_LINE_BYTES", 2**12)
    monkeypatch.setattr(json_text, "_FIRST_CHUNK_BYTES", 2**10)
    path = write(tmp_path / "a.json", "[1x" + " " * 2**16 + "]")
    with path.open("rb") as file:
        with pytest.raises(DataError, match="a value that goes on after 1"):
            list(iter_array(file, "a.json"))
        assert file.tell() <= 2**14


def test_a_line_of_csv_that_is_no_text_is_one_bad_row(tmp_path: Path) -> None:
    """Mutation tried: the line stops the file, whatever `on_bad_row` says."""
    path = write(tmp_path / "a.csv", b'question,answer\nHi,Hello\ncaf\xe9,x\nHo,"Hal\nl\xe9"\nBye,Bye\n')
    found = list(iter_files([path], stop=False))
    assert [item.messages[0].content for item in found if isinstance(item, Row)] == ["Hi", "Bye"]
    assert [item.error.where for item in found if isinstance(item, BadRow)] == [f"{path}:3", f"{path}:5"]


def test_the_row_numbers_that_pandas_writes_are_no_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ",question,answer\n0,Hi,Hello\n1,Ho,Hallo\n")
    assert pairs(read_rows(path)) == [{"question": "Hi", "answer": "Hello"}, {"question": "Ho", "answer": "Hallo"}]


def test_long_fields_of_csv_are_read(tmp_path: Path) -> None:
    rows = [{"question": "Hi", "answer": "x" * 1_000_000}]
    assert pairs(read_rows(write(tmp_path / "a.csv", as_csv(rows)))) == rows


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_a_cut_or_wrong_gz_is_refused(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path / name, as_csv(ROWS) if "csv" in name else "".join(json.dumps(row) + "\n" for row in ROWS) * 1000
    )
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"gz: found a file that cannot be read"):
        read_rows(path)
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"gz: found a file that cannot be read"):
        read_rows(path)


def test_a_cut_or_wrong_parquet_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"a\.parquet: found broken Parquet"):
        read_rows(path)
    with pytest.raises(DataError, match="No such file"):
        read_rows(tmp_path / "none.parquet")


def test_records_are_read_one_by_one(tmp_path: Path) -> None:
    """A file larger than memory can be looked at: the first row comes before the last, broken one is read."""
    text = json.dumps(ROWS[0]) + ","
    path = write(tmp_path / "a.json", "[" + text * 50_000 + "nonsense")
    records = iter_records(path)
    assert next(records).fields == ROWS[0]
    with path.open("rb") as file:
        assert next(iter_array(file, "a.json")) == ROWS[0]
        assert file.tell() < path.stat().st_size / 2
    with pytest.raises(DataError, match="broken JSON"):
        list(records)

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_trainer.data import accepted_rows
from qlora_trainer.data.accepted_rows import accepted_schema, iter_accepted, write_accepted
from qlora_trainer.data.array_file import nameless_file
from qlora_trainer.data.messages import ROLES, Message
from qlora_trainer.data.rows import BadRow, FileRead, Reading, Row
from qlora_trainer.data.tool_calls import ToolCall
from qlora_trainer.errors import DataError, StorageError

Read = list[Row | BadRow | Reading | FileRead]
TEXT = st.text(max_size=12) | st.sampled_from(["", "\x00", "\u2028", "\U0001f600" * 3, "null", "\ufeff"])
CALLS = st.builds(ToolCall, name=TEXT, arguments=TEXT, call_id=TEXT)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(ROLES),
    content=TEXT,
    tool_calls=st.lists(CALLS, max_size=2).map(tuple),
    name=TEXT,
    tool_call_id=TEXT,
    weight=st.integers(0, 1),
    reasoning=TEXT,
)
ROWS = st.builds(
    Row,
    path=st.just(""),
    index=st.just(0),
    line=st.integers(1, 2**40),
    messages=st.lists(MESSAGES, max_size=3).map(tuple),
    tools=TEXT,
    text=TEXT,
    is_line=st.booleans(),
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def file() -> Iterator[IO[bytes]]:
    with nameless_file() as opened:
        yield opened


def in_files(*rows: list[Row]) -> Read:
    """What `iter_files` yields for files of these rows, named and numbered."""
    read: Read = []
    index = 0
    for name, of_file in zip("abc", rows, strict=False):
        for row in of_file:
            read.append(replace(row, path=name, index=index, form=f"form of {name}"))
            index += 1
        read.append(FileRead(name, f"form of {name}", len(of_file), 0, ()))
    return read


def texts(lengths: list[int]) -> list[Row]:
    return [Row("", 0, line, (), text=chr(97 + line % 26) * length) for line, length in enumerate(lengths, start=1)]


def written(read: Read, file: IO[bytes]) -> tuple[FileRead, ...]:
    writing = write_accepted(read, file)
    while True:
        try:
            next(writing)
        except StopIteration as end:
            files: tuple[FileRead, ...] = end.value
            return files


def written_and_read(read: Read, file: IO[bytes]) -> Read:
    return list(iter_accepted(file, written(read, file)))


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.lists(ROWS, min_size=1, max_size=4), min_size=1, max_size=3))
def test_rows_come_back_as_they_were(rows: list[list[Row]]) -> None:
    """Mutation tried, for each field of a message and a call: it is not written."""
    with nameless_file() as file:
        assert written_and_read(in_files(*rows), file) == in_files(*rows)


def test_every_field_has_a_column() -> None:
    """One that is added to a message would not be written, and no row would be refused for it."""
    message = accepted_schema().field("messages").type.value_type
    call = message.field("tool_calls").type.value_type
    assert [field.name for field in message] == [field.name for field in fields(Message)]
    assert [field.name for field in call] == [field.name for field in fields(ToolCall)]
    told_by_the_file = {"path", "form", "index"}
    assert {*accepted_schema().names, *told_by_the_file} == {field.name for field in fields(Row)}


def test_rows_are_kept_in_order_whatever_batches_they_lie_in(file: IO[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of the file, of the library and of the tokenizer end in different places; 2,500 rows in three files."""
    monkeypatch.setattr(accepted_rows, "ARROW_BATCH_BYTES", 50_000)
    read = in_files(texts([7] * 700), texts([3] * 299), texts([1, 60_000, 5] * 500 + [200_000]))
    seen = written_and_read(read, file)
    assert [item for item in seen if not isinstance(item, Reading)] == read
    assert [item for item in seen if isinstance(item, Reading)] == [
        Reading("c", 1000, 1 / 1501, doing="tokenising"),
        Reading("c", 2000, 1001 / 1501, doing="tokenising"),
    ]


def test_bad_rows_are_left_out_and_readings_go_on(file: IO[bytes]) -> None:
    good = in_files(texts([1, 2]))
    bad = BadRow(DataError(where="a:2", found="x", expected="y", fix="z"))
    far = Reading("a", 1000, 0.5)
    writing = write_accepted([good[0], bad, far, *good[1:]], file)
    assert next(writing) == replace(far, doing="checking")
    with pytest.raises(StopIteration) as ended:
        next(writing)
    assert ended.value.value == (good[-1],)
    assert list(iter_accepted(file, ended.value.value)) == good


def test_datasets_maps_the_file_and_copies_nothing(
    file: IO[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A type that the library has no feature for would be cast, which takes the memory of all rows.

    Mutation tried: a column that is a dictionary.
    """
    opened: list[datasets.Dataset] = []
    from_file = datasets.Dataset.from_file

    def seen(*arguments: Any, **how: Any) -> datasets.Dataset:
        opened.append(from_file(*arguments, **how))
        return opened[-1]

    def connects(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(datasets.Dataset, "from_file", seen)
    monkeypatch.setattr(socket.socket, "connect", connects)
    monkeypatch.setattr(socket, "getaddrinfo", connects)
    read = in_files(texts([5] * 3))
    before = pa.total_allocated_bytes()
    assert written_and_read(read, file) == read
    [dataset] = opened
    assert isinstance(dataset.data, datasets.table.MemoryMappedTable)
    assert dataset.data.schema == accepted_schema()
    assert len(dataset) == 3
    assert pa.total_allocated_bytes() == before
    assert list(tmp_path.rglob("*.*")) == [], "a file with a name"


def test_memory_is_that_of_a_batch(file: IO[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """96 MiB of rows. Mutation tried: no page is given back."""
    monkeypatch.setattr(accepted_rows, "ARROW_BATCH_BYTES", 2**22)
    read = in_files(texts([2**16] * 1536))
    files = written(read, file)
    del read
    before = most = resident()
    mapped = False
    for number, _ in enumerate(iter_accepted(file, files)):
        if number % 64 == 0:
            most = max(most, resident())
            mapped = mapped or is_mapped(file)
    assert mapped
    assert most - before < 40 * 2**20
    assert not is_mapped(file), "its room on the disk would stay taken"


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmRSS")))


def is_mapped(file: IO[bytes]) -> bool:
    name = os.readlink(f"/proc/self/fd/{file.fileno()}")
    return bool(re.search(re.escape(name.removesuffix(" (deleted)")) + r"\b", Path("/proc/self/maps").read_text()))


def test_what_the_disk_has_changed_is_told(file: IO[bytes]) -> None:
    """A file that ends early would be read as far as it goes, offsets that point beyond the text would be followed."""
    files = written(in_files(texts([9] * 40)), file)
    with pytest.raises(StorageError, match=r"found rows that are not those that were written \(40 of 41\)"):
        list(iter_accepted(file, [replace(files[0], num_rows=41)]))
    raw = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
    offsets = b"".join((9 * number).to_bytes(8, "little") for number in range(41))
    assert raw.count(offsets) == 1
    os.pwrite(file.fileno(), (2**40).to_bytes(8, "little"), raw.index(offsets) + 8 * 20)
    with pytest.raises(StorageError, match=r"the accepted rows .*: found rows that are not those that were written \("):
        list(iter_accepted(file, files))

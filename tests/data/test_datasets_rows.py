"""Folders of `datasets`: the library's own writer makes them, and its own reader is the oracle."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.config.data_files import data_files
from qlora_trainer.config.dataset_folder import DatasetFolder
from qlora_trainer.data import datasets_rows
from qlora_trainer.data.arrow_rows import iter_rows
from qlora_trainer.data.datasets_rows import iter_dataset
from qlora_trainer.data.records import ARROW_BATCH_ROWS, Record
from qlora_trainer.data.rows import Row, collect, iter_files
from qlora_trainer.data.sources import source_hash
from qlora_trainer.errors import DataError
from tests.data.saved_sets import chats, save, save_splits


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def source(name: str) -> DatasetFolder:
    [found] = data_files(name, key="data.train")
    assert isinstance(found, DatasetFolder)
    return found


def rows(name: str) -> list[Row]:
    return collect(iter_files([source(name)])).rows


def asked(read: list[Row]) -> list[str]:
    return [row.messages[0].content for row in read]


def test_rows_come_in_order_over_all_files_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets_rows, "ARROW_BATCH_ROWS", 4)
    save(Path("set"), chats(23), num_shards=3)
    read = rows("set")
    assert asked(read) == [f"Hi {number}" for number in range(23)]
    assert [row.where for row in read] == [f"set:row {number}" for number in range(1, 24)]
    assert [round(record.share, 6) for record in iter_dataset(source("set"))][::22] == [round(1 / 23, 6), 1]


def test_a_shuffled_and_filtered_set_is_read_as_the_library_reads_it() -> None:
    from datasets import Dataset, load_from_disk

    chosen = Dataset.from_list(chats(20)).shuffle(seed=3).select(range(15)).filter(lambda row: True)
    assert chosen._indices is not None
    chosen.save_to_disk("set", num_shards=2)
    expected = [row["messages"][0]["content"] for row in load_from_disk("set")]
    assert len(expected) == 15
    assert expected != sorted(expected)
    assert asked(rows("set")) == expected


def test_the_split_that_is_named_is_read() -> None:
    save_splits(Path("set"), train=chats(3), test=chats(2, start=10))
    assert asked(rows("set:test")) == ["Hi 10", "Hi 11"]
    assert rows("set:train")[0].where == "set:train:row 1"
    with pytest.raises(DataError, match=r"set:train:row 1: found a row with keys"):
        collect(iter_files([source("set:train")], columns=(("prompt", "messages"), ("completion", "x"))))


def test_a_batch_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation tried: the whole table as Python values before the first row."""
    seen: list[int] = []
    convert = iter_rows

    def counted(table: Any, **named: Any) -> Iterator[Any]:
        seen.append(table.num_rows)
        return convert(table, **named)

    monkeypatch.setattr(datasets_rows, "iter_rows", counted)
    save(Path("set"), chats(1000))
    records = iter_dataset(source("set"))
    assert [next(records).number for _ in range(3)] == [1, 2, 3]
    assert seen == [ARROW_BATCH_ROWS]


def test_the_files_are_mapped_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment may ask the library to hold small sets in memory; it is not asked."""
    import datasets

    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 2**40)
    save(Path("set"), chats(3))
    records = iter_dataset(source("set"))
    next(records)
    assert str(Path("set/data-00000-of-00001.arrow").resolve()) in Path("/proc/self/maps").read_text()
    records.close()  # type: ignore[attr-defined]


CALLS = [
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "say", "arguments": {"b": "x"}}}]},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "now", "arguments": {"c": [None]}}}]},
]


@pytest.mark.parametrize("suffix", ["", ".parquet"])
def test_arguments_of_one_call_are_not_those_of_another(suffix: str) -> None:
    """Arrow gives every struct all keys. Mutation tried: nulls kept; a model would learn add(a=1, b=null, c=null)."""
    from datasets import Dataset

    path = Path(f"set{suffix}")
    made = Dataset.from_list([{"messages": [{"role": "user", "content": "Go"}, call]} for call in CALLS])
    if suffix:
        made.to_parquet(path)
    else:
        made.save_to_disk(path)
    read = collect(iter_files(data_files(str(path), key="data.train"))).rows
    arguments = [json.loads(row.messages[1].tool_calls[0].arguments) for row in read]
    assert arguments == [{"a": 1}, {"b": "x"}, {"c": [None]}]


def test_values_of_the_type_json_are_what_was_written() -> None:
    """The library keeps what Arrow has no type for as JSON text: here null arguments are meant."""
    from datasets import Dataset

    parts = [{"type": "text", "text": "Go"}]
    null = {"function": {"name": "add", "arguments": {"a": None}}}
    conversations = [
        [{"role": "user", "content": "Go"}, {"role": "assistant", "content": None, "tool_calls": [null]}],
        [{"role": "user", "content": parts}, {"role": "assistant", "content": "Gone"}],
    ]
    made = Dataset.from_list([{"messages": messages} for messages in conversations], on_mixed_types="use_json")
    assert "Json" in str(made.features)
    made.save_to_disk("set")
    first, second = rows("set")
    assert json.loads(first.messages[1].tool_calls[0].arguments) == {"a": None}
    assert second.messages[0].content == "Go"


def test_broken_json_is_one_bad_row() -> None:
    import pyarrow as pa
    from datasets import Dataset

    good = json.dumps({"role": "user", "content": "Hi"}), json.dumps({"role": "assistant", "content": "Ho"})
    items = pa.array([*good, *good[:1], "{", "[" * 100_000, *good], pa.string())
    texts = pa.ExtensionArray.from_storage(pa.json_(), items)
    column = pa.ListArray.from_arrays([0, 2, 4, 5, 7], texts)
    Dataset(pa.table({"messages": column})).save_to_disk("set")
    read = collect(iter_files([source("set")], stop=False))
    assert [row.line for row in read.rows] == [1, 4]
    assert read.files[0].num_bad == 2
    assert read.files[0].reasons[0].startswith("set:row 2: a value of the type json that is none")


def test_images_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, Features, Image, Value

    def decoding(*_: object, **__: object) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image, "decode_example", decoding)
    rows_ = [{"text": f"Text {number}", "image": {"bytes": b"no image", "path": None}} for number in range(3)]
    Dataset.from_list(rows_, features=Features({"text": Value("string"), "image": Image()})).save_to_disk("set")
    read = collect(iter_files([source("set")], columns=(("text", "text"),)))
    assert [row.text for row in read.rows] == ["Text 0", "Text 1", "Text 2"]
    with pytest.raises(DataError, match=r"set:row 1: found unknown keys \['image'\]"):
        rows("set")


def test_a_format_that_was_saved_does_not_matter() -> None:
    from datasets import Dataset

    made = Dataset.from_list([{**row, "id": number} for number, row in enumerate(chats(3))])
    made.with_format("numpy", columns=["id"]).save_to_disk("set")
    assert asked(rows("set")) == ["Hi 0", "Hi 1", "Hi 2"]
    state = json.loads(Path("set/state.json").read_text())
    state |= {"_format_type": "custom", "_format_kwargs": {"transform": "os.abort"}, "_format_columns": None}
    Path("set/state.json").write_text(json.dumps(state))
    assert asked(rows("set")) == ["Hi 0", "Hi 1", "Hi 2"]


def first_record(name: str) -> Record:
    return next(iter(iter_dataset(source(name))))


@pytest.mark.parametrize(
    "file, change",
    [
        ("dataset_info.json", lambda info: {"features": {"messages": {"_type": "Value", "dtype": "int64"}}}),
        ("dataset_info.json", lambda info: {"features": {"other": {"_type": "Value", "dtype": "string"}}}),
        ("dataset_info.json", lambda info: {"features": {"messages": {"_type": "Path"}}}),
        ("dataset_info.json", lambda info: {"features": {"messages": {"_type": "defaultdict"}}}),
        ("dataset_info.json", lambda info: {"features": 3}),
        ("dataset_info.json", lambda info: []),
        ("state.json", lambda state: {"_data_files": state["_data_files"]}),
        ("state.json", lambda state: {**state, "_format_type": "nonsense"}),
        ("state.json", lambda state: {**state, "_format_columns": ["nonsense"]}),
    ],
)
def test_json_that_contradicts_the_rows_is_refused(file: str, change: Any) -> None:
    save(Path("set"), chats(3))
    path = Path("set") / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError) as caught:
        first_record("set")
    assert str(caught.value).startswith("set: found a data set that cannot be read (")
    assert "\n" not in str(caught.value)


def test_broken_arrow_files_are_refused_and_never_crash() -> None:
    """Nothing else checks the offsets of a mapped file. Mutation tried: no validation."""
    path = save(Path("set"), chats(40)) / "data-00000-of-00001.arrow"
    whole = path.read_bytes()
    ends = [whole[:-100], whole[:50], b"", b"nonsense" * 100, b"\x80\x04cos\nabort\n."]
    flipped = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, len(whole), 97)]
    num_refused = 0
    for raw in [*ends, *flipped]:
        path.write_bytes(raw)
        try:
            collect(iter_files([source("set")], stop=False))
        except DataError as error:
            num_refused += 1
            assert "\n" not in str(error)
    assert num_refused > len(ends)


def test_no_code_of_the_folder_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    save(Path("set"), chats(3))
    for name in ("set.py", "__init__.py", "datasets.py", "data-00000-of-00001.py"):
        Path("set", name).write_text("raise SystemExit('run')\n")
    loaded = set(sys.modules)

    def unpickling(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    monkeypatch.setattr("pickle.load", unpickling)
    monkeypatch.setattr("pickle.loads", unpickling)
    monkeypatch.setattr("dill.load", unpickling)
    monkeypatch.setattr("dill.loads", unpickling)
    assert asked(rows("set")) == ["Hi 0", "Hi 1", "Hi 2"]
    assert not [name for name in set(sys.modules) - loaded if name.startswith("set")]


def test_the_hash_is_that_of_the_rows() -> None:
    """Mutations tried: a hash of the first file only, and one that does not know the order of the files."""
    folder = save(Path("set"), chats(8), num_shards=2)
    known = source_hash(source("set"))
    assert source_hash(source("set")) == known
    folder.rename("moved")
    assert source_hash(source("moved")) == known
    info = json.loads(Path("moved/dataset_info.json").read_text())
    Path("moved/dataset_info.json").write_text(json.dumps({**info, "description": "what it is"}))
    assert source_hash(source("moved")) == known
    hashes = {known}
    state = json.loads(Path("moved/state.json").read_text())
    state["_data_files"].reverse()
    Path("moved/state.json").write_text(json.dumps(state))
    hashes.add(source_hash(source("moved")))
    state["_data_files"].pop()
    Path("moved/state.json").write_text(json.dumps(state))
    hashes.add(source_hash(source("moved")))
    last = Path("moved/data-00001-of-00002.arrow")
    last.write_bytes(last.read_bytes().replace(b"Hello 7", b"Hallo 7"))
    hashes.add(source_hash(source("moved")))
    assert len(hashes) == 4

"""A stream's batches: each document once a pass, from any step on the same, and of a bounded number of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from qlora_trainer.config.schema import DataSection
from qlora_trainer.data.batches import BlockRead, StreamedBatches
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.stream import BegunStream, BlockStart, Stream, open_rows, open_stream, read_block, stream_hash
from qlora_trainer.errors import ConfigError, DataError
from qlora_trainer.step.document import Document
from tests.returned import returned

BATCH = 4
NUM_STEPS = 40


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer(chatml: PreTrainedTokenizerFast) -> KnownTokenizer:
    return KnownTokenizer(chatml, "0", where="chatml")


def write_texts(path: Path, numbers: range, **changes: str) -> Path:
    """One text a row, whose number is in it; `changes` replaces the row of a number."""
    lines = (
        changes.get(f"row{number}", json.dumps({"text": f"text {number} " * (1 + number % 3)})) for number in numbers
    )
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def section_of(*paths: Path, rows: int, **options: Any) -> DataSection:
    names = tuple(map(str, paths))
    return DataSection(train=names, streaming=True, stream_rows=rows, eval_fraction=0, **options)


def begun(stream: Stream) -> BegunStream:
    rows = open_rows(stream)
    return BegunStream(stream, returned(read_block(stream, BlockStart(), rows)), rows)


def batches_of(stream: Stream, start: BlockStart | None = None, *, seq_len: int = 512) -> StreamedBatches:
    return StreamedBatches(
        begun(stream), seq_len=seq_len, global_batch_size=BATCH, seed=7, num_steps=NUM_STEPS, start=start
    )


def batch(batches: StreamedBatches, step: int) -> list[Document]:
    return returned(batches.batch(step))


def number_of(document: Document, tokenizer: KnownTokenizer) -> int:
    return int(str(tokenizer.tokenizer.decode(document.input_ids_T.tolist())).split()[1])


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are tokenised three at a time, so that a block is not a whole file."""
    monkeypatch.setattr("qlora_trainer.data.rows.BATCH_ROWS", 3)


def two_files(folder: Path) -> tuple[Path, Path]:
    return write_texts(folder / "a.jsonl", range(17)), write_texts(folder / "b.jsonl", range(17, 29))


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("rows", [1, 3, 7, 12, 17, 29, 100])
def test_each_document_comes_once_a_pass(tmp_path: Path, tokenizer: KnownTokenizer, rows: int) -> None:
    """Mutations tried: a block that begins at the last row of the one before; one that goes beyond the end."""
    stream = open_stream(section_of(*two_files(tmp_path), rows=rows), tokenizer)
    batches = batches_of(stream)
    documents = [document for step in range(NUM_STEPS) for document in batch(batches, step)]
    numbers = [number_of(document, tokenizer) for document in documents]
    assert [document.index for document in documents] == numbers
    for first in range(0, len(numbers) - 29, 29):
        assert sorted(numbers[first : first + 29]) == list(range(29))
    if rows >= 3:
        assert numbers[:29] != list(range(29))
        assert numbers[:29] != numbers[29:58]
    assert batches.epoch(NUM_STEPS) == 4 * NUM_STEPS // 29


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("rows", [3, 7, 17, 100])
def test_a_stream_goes_on_from_any_step(tmp_path: Path, tokenizer: KnownTokenizer, rows: int) -> None:
    """Mutation tried: the state of the block that was read last, where the next sample is of the one after it."""
    section = section_of(*two_files(tmp_path), rows=rows)
    whole = batches_of(open_stream(section, tokenizer))
    expected, states, epochs = [], [], []
    for step in range(NUM_STEPS):
        states.append(json.loads(json.dumps(whole.state(step))))
        epochs.append(whole.epoch(step))
        expected.append([number_of(document, tokenizer) for document in batch(whole, step)])
    for begin in range(0, NUM_STEPS, 3):
        resumed = batches_of(open_stream(section, tokenizer), BlockStart.of(states[begin]))
        for step in range(begin, min(begin + 8, NUM_STEPS)):
            assert resumed.epoch(step) == epochs[step]
            assert BlockStart.of(states[step]) == BlockStart.of(json.loads(json.dumps(resumed.state(step))))
            assert [number_of(document, tokenizer) for document in batch(resumed, step)] == expected[step]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("rows_at_once", [6, 10, 20])
@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "csv", "parquet", "folder"])
def test_every_kind_of_source_is_read_on(
    tmp_path: Path, tokenizer: KnownTokenizer, kind: str, rows_at_once: int
) -> None:
    """Also from where a block and the source end together. Mutation tried: `Dataset.skip` by all its rows."""
    rows = Dataset.from_list([{"text": f"text {number} and more"} for number in range(20)])
    path = tmp_path / f"rows.{kind}"
    match kind:
        case "csv":
            rows.to_csv(str(path))
        case "parquet":
            rows.to_parquet(str(path), batch_size=8)  # rows in a row group
        case "folder":
            rows.save_to_disk(str(path))
        case "jsonl.gz":
            rows.to_json(str(path), compression="gzip")
        case _:
            rows.to_json(str(path), lines=kind == "jsonl")
    stream = open_stream(section_of(path, rows=rows_at_once), tokenizer)
    whole = batches_of(stream)
    numbers = [[number_of(document, tokenizer) for document in batch(whole, step)] for step in range(10)]
    for half in (numbers[:5], numbers[5:]):
        assert sorted(number for step in half for number in step) == list(range(20))
    for step in range(10):
        first = batches_of(stream)
        for before in range(step):
            batch(first, before)
        resumed = batches_of(stream, BlockStart.of(first.state(step)))
        assert [number_of(document, tokenizer) for document in batch(resumed, step)] == numbers[step]


@pytest.mark.usefixtures("small_batches")
def test_a_stream_holds_a_block_and_leaves_nothing_behind(tmp_path: Path, tokenizer: KnownTokenizer) -> None:
    stream = open_stream(section_of(write_texts(tmp_path / "a.jsonl", range(500)), rows=20), tokenizer)
    batches = batches_of(stream)
    for step in range(NUM_STEPS):
        batch(batches, step)
        assert batches._documents is not None
        assert len(batches._documents) <= 22
    assert list((tmp_path / "cache" / "qlora_trainer" / "tokens").iterdir()) == []


def test_steps_are_asked_for_in_order(tmp_path: Path, tokenizer: KnownTokenizer) -> None:
    batches = batches_of(open_stream(section_of(*two_files(tmp_path), rows=7), tokenizer))
    for step in range(6):
        batch(batches, step)
    for step in (0, NUM_STEPS):
        with pytest.raises(IndexError, match=f"step {step} of 40"):
            batch(batches, step)


@pytest.mark.usefixtures("small_batches")
def test_a_batch_that_breaks_off_behind_a_whole_block_is_begun_again(tmp_path: Path, tokenizer: KnownTokenizer) -> None:
    """Samples 16 to 19 are of the second block, none of the empty third, and of the first one of the next pass.

    Mutation tried: the state of the block that was read last, which begins behind the batch.
    """
    path = write_texts(tmp_path / "a.jsonl", range(18))
    section = section_of(path, rows=9)
    whole, broken = (batches_of(open_stream(section, tokenizer)) for _ in range(2))
    expected = [[number_of(document, tokenizer) for document in batch(whole, step)] for step in range(5)]
    for step in range(4):
        batch(broken, step)
    path.rename(tmp_path / "away.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl"):
        batch(broken, 4)
    (tmp_path / "away.jsonl").rename(path)
    resumed = batches_of(open_stream(section, tokenizer), BlockStart.of(json.loads(json.dumps(broken.state(4)))))
    assert [number_of(document, tokenizer) for document in batch(resumed, 4)] == expected[4]
    assert resumed.epoch(5) == whole.epoch(5) == 1.0


@pytest.mark.usefixtures("small_batches")
def test_the_form_of_a_file_is_that_of_its_first_row(tmp_path: Path, tokenizer: KnownTokenizer) -> None:
    """Also for a block that begins in the middle of it. Mutation tried: told by the first row of the block."""
    chat = json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    path = write_texts(tmp_path / "a.jsonl", range(12), row6=chat)
    batches = batches_of(open_stream(section_of(path, rows=6), tokenizer))
    batch(batches, 0)
    with pytest.raises(DataError, match=r"a\.jsonl:7: found .*messages"):
        batch(batches, 1)


@pytest.mark.usefixtures("small_batches")
def test_bad_rows_are_passed_over_and_counted_in_their_block(tmp_path: Path, tokenizer: KnownTokenizer) -> None:
    path = write_texts(tmp_path / "a.jsonl", range(12), row2="broken", row9="broken")
    section = section_of(path, rows=6, on_bad_row="skip", max_dropped_share=0.5)
    stream = open_stream(section, tokenizer)
    first, rows = begun(stream).first, open_rows(stream)
    returned(read_block(stream, BlockStart(), rows))
    assert [(file.num_rows, file.num_bad, file.format_name) for file in first.store.files] == [(6, 1, "text")]
    assert "a.jsonl:3" in first.store.files[0].reasons[0]
    second = returned(read_block(stream, first.next_start, rows))
    assert [(file.num_rows, file.num_bad) for file in second.store.files] == [(4, 1)]
    too_many = open_stream(section_of(path, rows=6, on_bad_row="skip", max_dropped_share=0.1), tokenizer)
    with pytest.raises(DataError, match="1 of 7 rows that cannot be trained on"):
        batch(batches_of(too_many), 0)


@pytest.mark.usefixtures("small_batches")
def test_a_short_last_block_may_lose_all_its_rows(tmp_path: Path, tokenizer: KnownTokenizer) -> None:
    path = write_texts(tmp_path / "a.jsonl", range(13), row12=json.dumps({"text": "long " * 100}))
    batches = batches_of(open_stream(section_of(path, rows=6), tokenizer), seq_len=64)
    numbers = [number_of(document, tokenizer) for step in range(6) for document in batch(batches, step)]
    assert sorted(numbers) == sorted([*range(12), *range(12)])


@pytest.mark.usefixtures("small_batches")
def test_other_content_where_a_run_goes_on_is_refused(tmp_path: Path, tokenizer: KnownTokenizer) -> None:
    """In the middle of a file, whose first rows, the fingerprint, are the same."""
    path = write_texts(tmp_path / "a.jsonl", range(100, 140))
    section = section_of(path, rows=12)
    batches = batches_of(open_stream(section, tokenizer))
    for step in range(4):
        batch(batches, step)
    start = BlockStart.of(batches.state(4))
    assert start.place.after == 12
    path.write_text(path.read_text().replace("text 115", "next 115"))
    with pytest.raises(ConfigError, match="from row 13 on: found other rows, or other tokens of them"):
        batch(batches_of(open_stream(section, tokenizer), start), 4)


@pytest.mark.usefixtures("small_batches")
def test_the_fingerprint_is_of_the_first_rows(tmp_path: Path, tokenizer: KnownTokenizer) -> None:
    """So that a row further on may be corrected, and rows added, while a run goes on."""
    path = write_texts(tmp_path / "a.jsonl", range(20))
    section = section_of(path, rows=6)

    def fingerprint() -> str:
        stream = open_stream(section, tokenizer)
        return stream_hash(stream, begun(stream).first)

    before = fingerprint()
    write_texts(path, range(30), row15="text 15")
    assert fingerprint() == before
    write_texts(path, range(20), row5=json.dumps({"text": "another"}))
    assert fingerprint() != before


@pytest.mark.usefixtures("small_batches")
def test_each_block_is_told(tmp_path: Path, tokenizer: KnownTokenizer) -> None:
    """After the first; its bad and dropped rows too. Mutation tried: only that it was read."""
    long = json.dumps({"text": "long " * 100})
    path = write_texts(tmp_path / "a.jsonl", range(18), row8="broken", row9=long)
    section = section_of(path, rows=6, on_bad_row="skip", max_dropped_share=0.5)
    batches = batches_of(open_stream(section, tokenizer), seq_len=64)
    told = [item for step in range(4) for item in batches.batch(step)]
    read = [item for item in told if isinstance(item, BlockRead)]
    assert [item.block.start.place.row for item in read] == [6, 12]
    assert [item.data.num_dropped for item in read] == [1, 0]
    assert [item.block.store.files[0].num_bad for item in read] == [1, 0]

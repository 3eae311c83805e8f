"""A run whose data is read while it is trained on: what it learns, and that a resume goes on in the stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qlora_trainer.errors import ConfigError, StorageError
from qlora_trainer.run import loop
from qlora_trainer.run.records import Prepared, Preparing, Record, RowsSkipped, StepDone, StreamRead
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config, write_rows
from tests.run.told import complaint, train_command

pytestmark = pytest.mark.usefixtures("plans_made_once", "small_batches")


@pytest.fixture(scope="module")
def small_batches() -> Iterator[None]:
    """Rows are tokenised five at a time, so that a block is not the whole file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qlora_trainer.data.rows.BATCH_ROWS", 5)
        yield


def options(folder: Path, *more: str) -> tuple[str, ...]:
    held_out = folder / "eval.jsonl"
    if not held_out.exists():
        write_rows(held_out, 9)
    streaming = ("data.streaming=true", "data.stream_rows=20", f"data.eval={held_out}", "lora.dropout=0.1")
    return (*streaming, "training.max_steps=12", *more)


@pytest.fixture(scope="module")
def undisturbed(
    base: Path, tmp_path_factory: pytest.TempPathFactory, plans_made_once: None, small_batches: None
) -> tuple[Path, list[Record]]:
    """A run to its end: 12 steps of 8 are 96 documents of 60, in blocks of 20, the second pass included."""
    folder = tmp_path_factory.mktemp("whole")
    return folder / "run", run_to_end(tiny_config(folder, base, *options(folder)))


@pytest.mark.parametrize("step", [1, 3, 6, 9])
def test_a_killed_run_ends_with_the_same_bytes(
    step: int, tmp_path: Path, base: Path, undisturbed: tuple[Path, list[Record]]
) -> None:
    """Mutations tried: a resume that begins at the first block; dropout keys that are rows of the block."""
    config = tiny_config(tmp_path, base, *options(tmp_path))
    run_until_step(config, step)
    run_to_end(config, resume="auto")
    whole, _ = undisturbed
    assert course(tmp_path / "run") == course(whole)


def test_passes_blocks_and_documents_are_counted(undisturbed: tuple[Path, list[Record]]) -> None:
    _, records = undisturbed
    steps = [record for record in records if isinstance(record, StepDone)]
    assert [record.epoch for record in steps] == [0.0] * 7 + [1.0] * 5
    read = [record for record in records if isinstance(record, StreamRead)]
    assert [record.first_row for record in read] == [21, 41, 1, 21]  # nothing of the empty block at the end
    assert [record.samples_seen for record in steps] == [8 * number for number in range(1, 13)]


def test_what_a_stream_is_told_of(tmp_path: Path, base: Path) -> None:
    records = run_to_end(tiny_config(tmp_path, base, *options(tmp_path, "training.max_steps=3")))
    (prepared,) = [record for record in records if isinstance(record, Prepared)]
    assert prepared.is_stream
    assert (prepared.num_train_documents, prepared.num_eval_documents) == (20, 9)
    told = [record.what for record in records if isinstance(record, Preparing)]
    assert f"29 rows of the form messages in {tmp_path / 'rows.jsonl'} and 1 more" in told
    assert "the training data is streamed: read are its first 20 rows" in told


def break_row_31(data: Path) -> None:
    rows = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*rows[:30], "broken\n", *rows[31:]]))


def test_a_bad_row_in_the_middle_costs_nothing_that_was_learned(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run ends with what it has learned saved, and goes on when the row is corrected.

    Mutation tried: without the save the run goes back to its last checkpoint, three steps before.
    """
    config = tiny_config(tmp_path, base, *options(tmp_path, "training.save_every=10"))
    data = tmp_path / "rows.jsonl"
    good = data.read_text()
    break_row_31(data)
    assert train_command(config) == 4
    assert "rows.jsonl:31: found" in complaint(capsys)
    assert (tmp_path / "run" / "checkpoints" / "last").readlink().name == "step-00000002"
    data.write_text(good)
    assert train_command(config, "--resume", "auto") == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    run_to_end(tiny_config(whole, base, *options(whole, "training.save_every=10")))
    assert course(tmp_path / "run") == course(whole / "run")


@pytest.mark.parametrize(
    "failure",
    [StorageError(where="disk", found="no room", expected="room", fix="Make room."), torch.OutOfMemoryError("2 GiB")],
)
def test_a_save_that_fails_on_the_way_out_does_not_hide_why(
    failure: Exception, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(loop, "save_checkpoint", failing)
    config = tiny_config(tmp_path, base, *options(tmp_path, "training.save_every=10"))
    break_row_31(tmp_path / "rows.jsonl")
    assert train_command(config) == 4
    assert "rows.jsonl:31: found" in complaint(capsys)


def test_bad_rows_of_every_block_are_told(tmp_path: Path, base: Path) -> None:
    asked = options(tmp_path, "data.on_bad_row=skip", "data.max_dropped_share=0.5", "training.max_steps=6")
    config = tiny_config(tmp_path, base, *asked)
    data = tmp_path / "rows.jsonl"
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[:3], "broken\n", *lines[3:30], "broken too\n", *lines[30:]]))
    records = run_to_end(config)
    skipped = [record for record in records if isinstance(record, RowsSkipped)]
    assert ["rows.jsonl:4:" in skipped[0].reasons[0], "rows.jsonl:32:" in skipped[-1].reasons[0]] == [True, True]
    assert [record.num_rows for record in skipped] == [1, 1]
    read = [record for record in records if isinstance(record, StreamRead)]
    assert [(record.first_row, record.num_documents) for record in read] == [(21, 20), (41, 20)]


def test_a_stream_may_have_no_evaluation(tmp_path: Path, base: Path) -> None:
    streaming = ("data.streaming=true", "data.eval_fraction=0", "training.max_steps=3")
    records = run_to_end(tiny_config(tmp_path, base, *streaming))
    assert len([record for record in records if isinstance(record, StepDone)]) == 3


@pytest.mark.parametrize(
    "changes, said",
    [
        (("data.streaming=true", "data.eval_fraction=0"), "training.max_steps"),
        (("data.streaming=true", "training.max_steps=3"), "data.eval_fraction"),
    ],
)
def test_what_a_stream_needs_is_asked_for(changes: tuple[str, ...], said: str, tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match=f"{said}.*data.streaming"):
        tiny_config(tmp_path, base, "training.max_steps=null", *changes)


def test_other_data_than_the_run_began_with_is_refused(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, base, *options(tmp_path, "training.save_every=1"))
    run_until_step(config, 2)
    data = tmp_path / "rows.jsonl"
    text = data.read_text()
    data.write_text(text.replace("What is 3 + 3?", "What is 3 + 4?"))
    assert train_command(config, "--resume", "auto") == 2
    assert "another training data than this run began with" in complaint(capsys)
    data.write_text(text)
    assert train_command(config, "--resume", "auto") == 0

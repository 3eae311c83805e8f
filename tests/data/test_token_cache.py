from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_trainer.config.schema import DataSection
from qlora_trainer.data import document_store, token_cache, token_maker
from qlora_trainer.data.chat import RowTokenizer
from qlora_trainer.data.documents import Documents
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.rows import BATCH_ROWS, Reading
from qlora_trainer.data.split import all_rows
from qlora_trainer.data.token_cache import TokenizedFiles, tokenize_named
from qlora_trainer.errors import ConfigError, DataError, StorageError
from qlora_trainer.hardware.sealed_folder import defects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qlora_trainer" / "tokens"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Of 2,500 rows."""
    path = tmp_path / "train.jsonl"
    lines = [json.dumps({"prompt": f"What is {number}?", "completion": f"It is {number}."}) for number in range(2500)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def few(data: Path) -> Path:
    """The first 300 of them, where it does not matter how many there are."""
    data.write_text("\n".join(data.read_text().splitlines()[:300]))
    return data


@pytest.fixture
def tokenizer(chatml: PreTrainedTokenizerFast) -> KnownTokenizer:
    return KnownTokenizer(chatml, "hash of its files", "the base")


@pytest.fixture
def count_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    batches: list[int] = []
    tokenize = RowTokenizer.__call__

    def counted(self: RowTokenizer, rows: Any) -> Any:
        batches.append(len(rows))
        return tokenize(self, rows)

    monkeypatch.setattr(RowTokenizer, "__call__", counted)
    return batches


def drained(reading: Generator[Reading, None, TokenizedFiles]) -> tuple[list[Reading], TokenizedFiles]:
    seen: list[Reading] = []
    while True:
        try:
            seen.append(next(reading))
        except StopIteration as end:
            return seen, end.value


def tokens(files: TokenizedFiles) -> list[list[int]]:
    rows = all_rows(files.store.num_rows)
    return [document.input_ids_T.tolist() for document in Documents.of_rows(files.store, rows, bos_token_id=None)]


def test_tokens_are_made_once_and_found_again(
    cache: Path, data: Path, tokenizer: KnownTokenizer, count_batches: list[int]
) -> None:
    section = DataSection(train=str(data))
    seen, made = drained(tokenize_named(section, "train", tokenizer))
    assert sum(count_batches) == BATCH_ROWS + made.store.num_rows == BATCH_ROWS + 2500, "the first are tried first"
    assert max(count_batches) == BATCH_ROWS
    assert [(reading.doing, reading.num_rows) for reading in seen] == [
        ("checking", 1000),
        ("checking", 2000),
        ("tokenising", 1000),
        ("tokenising", 2000),
    ]
    for first, second in (seen[:2], seen[2:]):
        assert 0 < first.share <= second.share <= 1
    count_batches.clear()
    seen, found = drained(tokenize_named(section, "train", tokenizer))
    assert (seen, count_batches) == ([], [])
    assert tokens(found) == tokens(made)
    assert (found.store.files, found.content_hash) == (made.store.files, made.content_hash)
    [folder] = cache.iterdir()
    shutil.rmtree(folder)
    assert tokens(found) == tokens(made), "a run would die because its cache was removed"


def test_anything_that_changes_what_is_learned_makes_other_tokens(
    cache: Path, few: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutations tried, each of which fails here: any one part left out of the key."""

    def num_made() -> int:
        return len(list(cache.iterdir()))

    section = DataSection(train=str(few))
    drained(tokenize_named(section, "train", tokenizer))
    drained(tokenize_named(section.model_copy(update={"seq_len": 77, "packing": False}), "train", tokenizer))
    assert num_made() == 1, "the length is not cut before the tokens are stored"
    changes: list[dict[str, object]] = [
        {"train_on": "all"},
        {"format": "prompt_completion"},
        {"on_bad_row": "skip"},
        {"columns": {"prompt": "completion", "completion": "prompt"}},
    ]
    for number, change in enumerate(changes, start=2):
        changed = DataSection.model_validate(section.model_dump() | change)
        drained(tokenize_named(changed, "train", tokenizer))
        assert num_made() == number, change
    drained(tokenize_named(section, "train", replace(tokenizer, content_hash="another template")))
    assert num_made() == 6
    few.write_text(few.read_text().replace("It is 7.", "It is 8."))
    drained(tokenize_named(section, "train", tokenizer))
    assert num_made() == 7
    few.rename(few.with_name("renamed.jsonl"))  # errors name the file
    drained(tokenize_named(DataSection(train=str(few.with_name("renamed.jsonl"))), "train", tokenizer))
    assert num_made() == 8
    monkeypatch.setattr(token_cache, "version", lambda name: f"another {name}")
    drained(tokenize_named(DataSection(train=str(few.with_name("renamed.jsonl"))), "train", tokenizer))
    assert num_made() == 9


@pytest.mark.parametrize("name", ["tokens.bin", "learned.bin", "rows.bin", "files.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_cache_is_made_again(
    cache: Path, few: Path, tokenizer: KnownTokenizer, name: str, damage: str
) -> None:
    section = DataSection(train=str(few))
    made = tokens(drained(tokenize_named(section, "train", tokenizer))[1])
    [folder] = cache.iterdir()
    raw = (folder / name).read_bytes()
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(raw[:-1] if damage == "cut" else raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:])
    assert tokens(drained(tokenize_named(section, "train", tokenizer))[1]) == made
    assert (folder / name).read_bytes() == raw


@pytest.mark.slow
def test_processes_that_make_the_same_do_not_disturb_each_other(
    cache: Path, data: Path, tokenizer: KnownTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at once, two of which are killed, one while it checks rows and one while it tokenises them.

    Takes 5 s of CPU, for one import of transformers and `datasets` in a process of its own.

    Mutations tried: they write in one folder; the later one fails where it finds the folder made.
    """
    meeting, saved = tmp_path / "meeting", tmp_path / "tokenizer"
    meeting.mkdir()
    tokenizer.tokenizer.save_pretrained(saved)
    command = [sys.executable, "-m", "tests.data.building", str(data), str(saved), str(meeting)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, cwd=ROOT)
    killed = [f"{name} -{int(signal.SIGKILL)}" for name in ("killed", "killed later")]
    assert ended.stdout.split("\n")[:-1] == [*killed, "first 0", "second 0"], ended.stderr
    [left_over] = cache.glob(".*")  # of the one that was writing tokens; it goes a day later
    [folder] = (path for path in cache.iterdir() if path != left_over)
    assert [path for path in cache.parent.iterdir() if path != cache] == [], "accepted rows"
    assert not defects(folder)
    first, second = ((meeting / f"{name}.read").read_text() for name in ("first", "second"))
    assert first == second
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other cache"))
    alone = drained(tokenize_named(DataSection(train=str(data)), "train", tokenizer))[1].store
    assert first.split()[:3] == ["4", "2500", alone.content_hash]
    [made_alone] = (tmp_path / "other cache" / "qlora_trainer" / "tokens").iterdir()
    assert made_alone.name == folder.name, "another key"
    for path in made_alone.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_bad_row_at_the_end_is_told_before_rows_are_tokenised(
    cache: Path, data: Path, tokenizer: KnownTokenizer, tmp_path: Path, count_batches: list[int]
) -> None:
    """But for the first ones, which are tried. Mutation tried: rows are tokenised as they come."""
    later = tmp_path / "later.jsonl"
    later.write_text('{"prompt": "Late?", "completion": "Yes."}\n{"prompt": "Later?", "completion": 7}\n')
    with pytest.raises(DataError, match=r"later\.jsonl:2: found prompt = 'Later\?', completion = 7"):
        drained(tokenize_named(DataSection(train=(str(data), str(later))), "train", tokenizer))
    assert count_batches == [BATCH_ROWS]
    assert not cache.exists()


def test_a_template_that_fails_is_told_before_all_rows_are_checked(
    cache: Path, data: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: the first rows are not tried."""
    monkeypatch.setattr(tokenizer.tokenizer, "chat_template", "{{ raise_exception('no') }}")
    reading = tokenize_named(DataSection(train=str(data)), "train", tokenizer)
    with pytest.raises(ConfigError, match=r"the base: found a chat template that fails \(no\)"):
        next(reading)
    assert not cache.exists()


@pytest.mark.parametrize("doing", ["checking", "tokenising"])
def test_what_is_given_up_leaves_nothing(cache: Path, data: Path, tokenizer: KnownTokenizer, doing: str) -> None:
    reading = tokenize_named(DataSection(train=str(data)), "train", tokenizer)
    while next(reading).doing != doing:
        pass
    assert len(list(cache.glob(".tmp-*"))) == (doing == "tokenising")
    reading.close()  # Ctrl+C, or the consumer's own error
    assert [path for path in cache.parent.rglob("*") if path != cache] == []


def test_a_disk_without_room_for_tokens_is_told(
    cache: Path, data: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_trainer.data.document_store.DocumentWriter.append", full)
    with pytest.raises(StorageError, match=r"tokens/.*found a folder that cannot be written \(No space left"):
        drained(tokenize_named(DataSection(train=str(data)), "train", tokenizer))
    assert list(cache.iterdir()) == []


def test_a_disk_without_room_for_accepted_rows_is_told(
    cache: Path, data: Path, tokenizer: KnownTokenizer, count_batches: list[int]
) -> None:
    """No file may be larger than 20 kB for a while, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(StorageError) as refused:
            drained(tokenize_named(DataSection(train=str(data)), "train", tokenizer))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    what = r"tokens/\w+: found a folder that cannot be written \(File too large\)"
    assert re.search(what, str(refused.value))
    room = "5 bytes a token, and until they are made the text of all rows"
    assert f"{room} (the files have {data.stat().st_size:,} bytes)" in str(refused.value)
    assert count_batches == [BATCH_ROWS]
    assert not cache.exists()


def test_what_is_found_again_needs_no_datasets(
    cache: Path, data: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its import takes most of a second, where a start is to take one."""
    section = DataSection(train=str(data))
    made = tokens(drained(tokenize_named(section, "train", tokenizer))[1])
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert tokens(drained(tokenize_named(section, "train", tokenizer))[1]) == made
    data.write_text(data.read_text().replace("It is 7.", "It is 8."))
    with pytest.raises(ModuleNotFoundError):
        drained(tokenize_named(section, "train", tokenizer))


def test_a_file_that_changes_while_it_is_read_is_refused(cache: Path, data: Path, tokenizer: KnownTokenizer) -> None:
    """What was checked is what is tokenised: a file may change from then on.

    Mutation tried: no second look; the new content's tokens are found under the old content's key ever after.
    """
    original = data.read_text()
    reading = tokenize_named(DataSection(train=str(data)), "train", tokenizer)
    while next(reading).doing == "checking":
        pass
    data.unlink()
    drained_store = drained(reading)[1].store
    assert drained_store.num_rows == 2500
    shutil.rmtree(cache)
    data.write_text(original)
    reading = tokenize_named(DataSection(train=str(data)), "train", tokenizer)
    next(reading)
    with data.open("a") as file:
        file.write("\n" + json.dumps({"prompt": "Late?", "completion": "Yes."}))
    with pytest.raises(DataError, match=r"train\.jsonl: found content that changed while it was read"):
        drained(reading)
    assert not cache.exists()


def test_a_damaged_folder_that_another_process_mends_first_is_used(
    cache: Path, data: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: the folder is removed in place, and what the other process made with it."""
    section = DataSection(train=str(data))
    expected = tokens(drained(tokenize_named(section, "train", tokenizer))[1])
    [folder] = cache.iterdir()
    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    (folder / "rows.bin").write_bytes(b"")
    looking = vars(token_cache)["defects"]

    def mended_meanwhile(path: Path) -> list[str]:
        reasons: list[str] = looking(path)
        if whole.exists():
            shutil.rmtree(folder)
            whole.rename(folder)
        return reasons

    monkeypatch.setattr(token_cache, "defects", mended_meanwhile)
    before = (folder.parent / "whole" / "rows.bin").stat().st_ino
    assert tokens(drained(tokenize_named(section, "train", tokenizer))[1]) == expected
    assert (folder / "rows.bin").stat().st_ino == before
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_data_that_goes_away_is_told(
    cache: Path, data: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> str:
        raise FileNotFoundError(2, "No such file or directory", str(data))

    monkeypatch.setattr(token_maker, "source_hash", gone)
    with pytest.raises(DataError, match=r"data\.train .*train\.jsonl: found a file that cannot be read \(No such file"):
        drained(tokenize_named(DataSection(train=str(data)), "train", tokenizer))


def test_tokens_that_nobody_used_for_long_go_when_there_are_too_many(
    cache: Path, data: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: a store that is open holds no lock."""
    sections = [DataSection(train=str(data)), DataSection(train=str(data), train_on="all")]
    stores = []
    for section in sections:
        stores.append(drained(tokenize_named(section, "train", tokenizer))[1])
        for manifest in cache.glob("*/manifest.json"):
            os.utime(manifest, (0, 0))
    monkeypatch.setattr(token_cache, "MOST_BYTES", 0)
    third = drained(tokenize_named(DataSection(train=str(data), train_on="last_assistant"), "train", tokenizer))[1]
    assert len(list(cache.iterdir())) == 3, "all are open"
    kept = tokens(stores[1])
    stores.pop(0)
    for manifest in cache.glob("*/manifest.json"):
        os.utime(manifest, (0, 0))
    again = drained(tokenize_named(sections[1], "train", tokenizer))[1]
    assert len(list(cache.iterdir())) == 2, "the first is not"
    assert tokens(again) == kept == tokens(stores[0])
    assert third.store.num_rows == 2500


def test_tokens_that_are_removed_before_they_are_open_are_made_again(
    cache: Path, data: Path, tokenizer: KnownTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a process that finds them unused at that moment; the first file is open already."""
    section = DataSection(train=str(data))
    expected = tokens(drained(tokenize_named(section, "train", tokenizer))[1])
    [folder] = cache.iterdir()
    mark_used = vars(document_store)["mark_used"]

    def removed_meanwhile(path: Path, descriptor: int) -> None:
        mark_used(path, descriptor)
        monkeypatch.setattr(document_store, "mark_used", mark_used)
        shutil.rmtree(folder)

    monkeypatch.setattr(document_store, "mark_used", removed_meanwhile)
    assert tokens(drained(tokenize_named(section, "train", tokenizer))[1]) == expected
    assert [path.name for path in cache.iterdir()] == [folder.name]

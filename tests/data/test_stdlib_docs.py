from __future__ import annotations

import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from qlora_trainer.data.rows import Row, read_rows
from qlora_trainer.data.stdlib_docs import EVAL_SHARE, MODULES, QuickstartData, write_quickstart_data
from qlora_trainer.errors import DataError, StorageError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> QuickstartData:
    return write_quickstart_data(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> QuickstartData:
    return write_quickstart_data(tmp_path_factory.mktemp("shuffled"), shuffle_answers=True)


def questions(rows: list[Row]) -> list[str]:
    return [row.messages[0].content for row in rows]


def answers(rows: list[Row]) -> list[str]:
    return [row.messages[1].content for row in rows]


def modules(rows: list[Row]) -> set[str]:
    return {question.removeprefix("What does `").split(".")[0] for question in questions(rows)}


def test_rows_are_real_and_enough(written: QuickstartData) -> None:
    train, held_out = read_rows(written.train_path), read_rows(written.eval_path)
    assert (len(train), len(held_out)) == (written.num_train_rows, written.num_eval_rows)
    assert 1000 <= len(train) <= 3000
    assert abs(len(held_out) / (len(train) + len(held_out)) - EVAL_SHARE) < 0.005
    by_question = dict(zip(questions(train), answers(train), strict=True))
    assert (
        by_question["What does `shutil.copytree` do?"]
        == "Recursively copy a directory tree and return the destination directory."
    )
    assert all(30 <= len(answer) <= 160 for answer in answers(train + held_out))


def test_no_module_and_no_answer_is_on_both_sides(written: QuickstartData) -> None:
    train, held_out = read_rows(written.train_path), read_rows(written.eval_path)
    assert not modules(train) & modules(held_out)
    assert len({*answers(train), *answers(held_out)}) == len(train) + len(held_out)
    assert len({*questions(train), *questions(held_out)}) == len(train) + len(held_out)


def test_the_held_out_rows_ask_about_many_modules(written: QuickstartData) -> None:
    held_out = read_rows(written.eval_path)
    rows_by_module = Counter(question.removeprefix("What does `").split(".")[0] for question in questions(held_out))
    assert len(rows_by_module) >= 10
    assert max(rows_by_module.values()) <= 0.16 * len(held_out)


def test_every_name_is_public(written: QuickstartData) -> None:
    rows = read_rows(written.train_path) + read_rows(written.eval_path)
    assert all(not part.startswith("_") for question in questions(rows) for part in question.split("`")[1].split("."))


def test_it_is_the_same_every_time_and_imports_nothing(written: QuickstartData, tmp_path: Path) -> None:
    assert {"imaplib", "xmlrpc.server"} <= set(MODULES)
    before = set(sys.modules)
    again = write_quickstart_data(tmp_path / "new" / "folder")
    assert set(sys.modules) == before
    assert again.train_path.read_bytes() == written.train_path.read_bytes()
    assert again.eval_path.read_bytes() == written.eval_path.read_bytes()


def test_shuffling_moves_every_answer_and_only_those(written: QuickstartData, shuffled: QuickstartData) -> None:
    plain, control = read_rows(written.train_path), read_rows(shuffled.train_path)
    assert questions(plain) == questions(control)
    assert sorted(answers(plain)) == sorted(answers(control))
    assert all(first != second for first, second in zip(answers(plain), answers(control), strict=True))
    assert shuffled.eval_path.read_bytes() == written.eval_path.read_bytes()


def test_another_seed_shuffles_otherwise(shuffled: QuickstartData, tmp_path: Path) -> None:
    other = write_quickstart_data(tmp_path, shuffle_answers=True, seed=1)
    assert other.train_path.read_bytes() != shuffled.train_path.read_bytes()


def test_a_python_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="expected the Python source of the standard library"):
        write_quickstart_data(tmp_path / "data")


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(StorageError, match="a folder that cannot be written to"):
        write_quickstart_data(tmp_path / "taken")

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_trainer.config.data_files import HubDataset, data_files, require_data
from qlora_trainer.config.dataset_folder import DatasetFolder
from qlora_trainer.config.schema import DataSection
from qlora_trainer.errors import ConfigError, DataError

STATE = {"_data_files": [{"filename": "data-00000-of-00002.arrow"}, {"filename": "data-00001-of-00002.arrow"}]}


def write_set(folder: Path, state: Any = STATE) -> Path:
    """As the library writes it, but for the rows: nothing here reads them."""
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    for number in (1, 0):
        (folder / f"data-0000{number}-of-00002.arrow").write_bytes(b"rows")
    return folder


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_set(Path("plain"))
    for split in ("train", "test"):
        write_set(Path("two") / split)
    Path("two/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    write_set(Path("one/all"))
    Path("one/dataset_dict.json").write_text('{"splits": ["all"]}')
    write_set(Path("a:b"))
    Path("a").mkdir()
    Path("other").mkdir()
    Path("train.jsonl").write_text("{}\n")


@pytest.mark.parametrize(
    "name, path, told",
    [
        ("plain", "plain", "plain"),
        ("plain/", "plain", "plain/"),
        ("two:test", "two/test", "two:test"),
        ("two/test", "two/test", "two/test"),
        ("one", "one/all", "one"),
        ("one:all", "one/all", "one:all"),
        ("a:b", "a:b", "a:b"),  # a folder of that name is there, so b is no split
    ],
)
def test_folders_and_their_splits(name: str, path: str, told: str) -> None:
    [source] = data_files(name, key="data.train")
    assert isinstance(source, DatasetFolder)
    assert (source.path, str(source)) == (Path(path), told)
    assert [file.name for file in source.arrow_files] == [f"data-0000{number}-of-00002.arrow" for number in (0, 1)]


@pytest.mark.parametrize(
    "name, found",
    [
        (
            "two",
            "data.eval two: found a data set of several splits, none of which is named; expected one of train, tes",
        ),
        ("two:valid", "data.eval two:valid: found no split valid; expected one of train, test. Write two:train, say."),
        ("two:..", "data.eval two:..: found no split .."),
        ("two:../plain", "data.eval two:../plain: found no split ../plain"),
        ("plain:train", "data.eval plain:train: found the split train of a data set that has none; expected plain."),
        ("other", "data.eval other: found a folder; expected a JSON Lines"),
        ("other:train", "data.eval other:train: found no such file"),
        (("two:train", "two/train"), "data.eval two/train: found a data set that is named twice"),
        ("x" * 300, "data.eval xxx"),
    ],
)
def test_what_is_no_data_set_is_named(name: str | tuple[str, ...], found: str) -> None:
    with pytest.raises(DataError) as caught:
        data_files(name, key="data.eval")
    assert str(caught.value).startswith(found)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"_data_files": []},
        {"_data_files": "data-00000-of-00002.arrow"},
        {"_data_files": [{}]},
        {"_data_files": [{"filename": "../two/train/data-00000-of-00002.arrow"}]},
        {"_data_files": [{"filename": "/etc/passwd"}]},
        {"_data_files": [{"filename": ""}]},
        {"_data_files": [{"filename": "a\0b"}]},
    ],
)
def test_a_state_that_leads_out_of_its_folder_is_refused(state: Any) -> None:
    write_set(Path("odd"), state)
    with pytest.raises(DataError, match=r"^odd/state\.json: found _data_files = "):
        data_files("odd", key="data.train")


def _lose(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage, found",
    [
        (_lose("dataset_info.json"), "data.train plain: found no plain/dataset_info.json"),
        (_lose("data-00001-of-00002.arrow"), "data.train plain: found no plain/data-00001-of-00002.arrow"),
        (lambda folder: (folder / "state.json").write_text("{"), "plain/state.json: found no JSON"),
        (lambda folder: (folder / "state.json").write_text("[" * 100_000), "plain/state.json: found no JSON"),
        (
            lambda folder: (folder / "state.json").write_text(json.dumps({**STATE, "_indices_data_files": [{"a": 1}]})),
            "data.train plain: found _indices_data_files in state.json, which `datasets` no longer reads",
        ),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(damage: Callable[[Path], object], found: str) -> None:
    damage(Path("plain"))
    with pytest.raises(DataError) as caught:
        data_files("plain", key="data.train")
    assert str(caught.value).startswith(found)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"splits": []}', '{"splits": ["../plain"]}', '{"splits": [".."]}', '{"splits": "train"}']
)
def test_a_broken_list_of_splits_is_refused(text: str) -> None:
    Path("two/dataset_dict.json").write_text(text)
    with pytest.raises(DataError, match=r"^two/dataset_dict\.json: found "):
        data_files("two:train", key="data.train")
    Path("two/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    shutil.rmtree("two/test")
    with pytest.raises(DataError, match=r"two:test: found no two/test/state\.json"):
        data_files("two:test", key="data.train")


@pytest.mark.parametrize(
    "name, repository, subset, split",
    [
        ("owner/name", "owner/name", None, None),
        ("owner/name:train", "owner/name", None, "train"),
        ("owner/name:train[:10%]+test[5:]", "owner/name", None, "train[:10%]+test[5:]"),
        ("owner/name/main", "owner/name", "main", None),
        ("owner/name.v1/20231101.en:train", "owner/name.v1", "20231101.en", "train"),
    ],
)
def test_hub_ids(name: str, repository: str, subset: str | None, split: str | None) -> None:
    [source] = data_files(name, key="data.train", revision="v1")
    assert source == HubDataset(name, repository, subset, split, "v1")
    assert str(source) == name


@pytest.mark.parametrize(
    "name",
    [
        "train",
        "owner",
        "owner/train.jsonl",
        "owner/train.json.gz",
        "owner/Train.PARQUET:train",
        "other/name",  # the folder is there, so a path was meant
        "train.jsonl/name",
        "./owner/name",
        "/owner/name",
        "~/name",
        "owner/name/",
        "owner//name",
        "owner/name/a/b",
        "owner/name:",
        "owner/name: ",
        "owner/../name",
        "owner/*",
    ],
)
def test_misspelt_paths_are_no_hub_ids(name: str) -> None:
    """Mutation tried: no look at the folder; a typo in a path costs seconds, and tells the hub what it was."""
    with pytest.raises(DataError, match=r"found no (such file|file of this pattern)"):
        data_files(name, key="data.train")


def test_what_is_here_is_no_hub_id() -> None:
    write_set(Path("owner/name"))
    [source] = data_files("owner/name", key="data.train")
    assert isinstance(source, DatasetFolder)


def test_a_revision_needs_a_hub_id() -> None:
    require_data(DataSection(train=("train.jsonl", "owner/name"), revision="v1"))
    require_data(DataSection(train="train.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.revision: found v1 without a hub id"):
        require_data(DataSection(train=("train.jsonl", "plain"), revision="v1"))

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_trainer.config.load import load_config
from qlora_trainer.config.paths import check_inputs, require_plot_path
from qlora_trainer.errors import ConfigError, DataError, StorageError


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.jsonl").write_text("{}\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.jsonl").touch()
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(*overrides: str, resume: bool = False) -> None:
    check_inputs(load_config(None, ["model.base=owner/name", "data.train=train.jsonl", *overrides]), resume=resume)


def test_a_run_that_can_start_leaves_no_trace(work: Path) -> None:
    before = sorted(os.listdir(work))
    check("output.dir=runs/new/deep", "memory.paging_dir=pages", "data.eval=train.jsonl")
    assert sorted(os.listdir(work)) == before


@pytest.mark.parametrize("key", ["data.train", "data.eval"])
@pytest.mark.parametrize(
    "name,found",
    [
        ("none.jsonl", "no such file"),
        ("empty.jsonl", "an empty file"),
        ("full", "a folder"),
        ("train.jsonl/x", "no such file"),
        ("/dev/null", "no regular file"),
        ("link", "no such file"),
    ],
)
@pytest.mark.usefixtures("work")
def test_data_files(key: str, name: str, found: str) -> None:
    with pytest.raises(DataError) as caught:
        check(f"{key}={name}")
    assert caught.value.where == f"{key} {name}"
    assert caught.value.found == found


@pytest.mark.usefixtures("work")
def test_a_base_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check("model.base=./full")


@pytest.mark.usefixtures("work")
def test_a_run_folder_is_new_or_empty_or_resumed() -> None:
    with pytest.raises(ConfigError, match="--resume auto"):
        check("output.dir=full")
    check("output.dir=full", resume=True)
    Path("void").mkdir()
    check("output.dir=void")


@pytest.mark.parametrize("key", ["output.dir", "memory.paging_dir"])
@pytest.mark.parametrize(
    "name,found",
    [
        ("train.jsonl", "a file at train.jsonl"),
        ("train.jsonl/run", "a file at train.jsonl"),
        ("link", "at link"),
        ("x" * 300, "name too long"),
        ("/proc/run", "at /proc"),  # the one read-only place that every Linux has, for root too
    ],
)
@pytest.mark.usefixtures("work")
def test_folders_that_cannot_be_written(key: str, name: str, found: str) -> None:
    with pytest.raises(StorageError) as caught:
        check(f"{key}={name}", resume=True)
    assert found in caught.value.found
    assert caught.value.where == f"{key} {name}"


@pytest.mark.parametrize(
    "name, found",
    [
        ("plot.pdf", "found a plot that ends in '.pdf'; expected one that ends in .png"),
        ("plot", "found a plot without an ending"),
        ("missing/plot.png", "found no folder missing"),
        ("train.jsonl/plot.png", "found no folder train.jsonl"),
        ("folder.png", "found a folder; expected a file"),
    ],
)
def test_a_path_that_no_plot_can_be_written_to_is_refused(name: str, found: str, work: Path) -> None:
    (work / "folder.png").mkdir()
    before = sorted(os.listdir(work))
    with pytest.raises((ConfigError, StorageError)) as caught:
        require_plot_path(Path(name))
    assert str(caught.value).startswith(f"{name}: {found}")
    require_plot_path(Path("frontier.png"))
    assert sorted(os.listdir(work)) == before

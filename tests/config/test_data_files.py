from __future__ import annotations

from pathlib import Path

import pytest

from qlora_trainer.config.data_files import data_files
from qlora_trainer.errors import DataError


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv", "deep/d.jsonl", "x[1].jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "names, found",
    [
        ("b.jsonl", ["b.jsonl"]),
        (("b.jsonl", "a.jsonl"), ["b.jsonl", "a.jsonl"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        (("c.csv", "?.jsonl"), ["c.csv", "a.jsonl", "b.jsonl"]),
        ("**/d.jsonl", ["deep/d.jsonl"]),
        ("x[1].jsonl", ["x[1].jsonl"]),  # a file of that name is there, so it is no pattern
    ],
)
def test_names_and_patterns_become_files_in_a_fixed_order(names: str | tuple[str, ...], found: list[str]) -> None:
    assert data_files(names, key="data.train") == tuple(map(Path, found))


@pytest.mark.parametrize(
    "names, found",
    [
        ("z*.jsonl", "data.eval z*.jsonl: found no file of this pattern"),
        ("d*p", "data.eval d*p: found no file of this pattern"),  # it matches a folder only
        (("a.jsonl", "z.jsonl"), "data.eval z.jsonl: found no such file"),
        (("a.jsonl", "*.jsonl"), "data.eval a.jsonl: found a file that is named twice"),
        ("*.txt", "data.eval empty.txt: found an empty file"),
        ("deep", "data.eval deep: found a folder"),
    ],
)
def test_what_cannot_be_read_is_named(names: str | tuple[str, ...], found: str) -> None:
    with pytest.raises(DataError) as caught:
        data_files(names, key="data.eval")
    assert str(caught.value).startswith(found)
    assert str(caught.value).endswith("Check data.eval.") or "twice" in found


def test_a_file_is_known_by_what_it_is_not_by_its_name() -> None:
    Path("link.jsonl").symlink_to("a.jsonl")
    for other in ("link.jsonl", "./a.jsonl", str(Path("a.jsonl").absolute())):
        with pytest.raises(DataError, match="found a file that is named twice"):
            data_files(("a.jsonl", other), key="data.train")

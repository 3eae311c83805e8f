"""A base that cannot be used is one clear line, before any weight is read."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaConfig, MixtralConfig

from qlora_trainer.errors import ConfigError
from qlora_trainer.model import base as base_module
from qlora_trainer.model.base import content_hash, fetch_weights, read_tokenizer, resolve_base, weight_files
from tests.model.tiny_bases import CONFIGS, write_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", CONFIGS["llama"])


def _refusal(name: str, revision: str | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        weight_files(resolve_base(name, revision).folder)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1200
    return message


def test_a_local_folder_is_found(folder: Path) -> None:
    base = resolve_base(str(folder))
    assert (base.name, base.revision, base.folder) == (str(folder), None, folder.resolve())
    assert isinstance(base.config, LlamaConfig)
    names = weight_files(base.folder)
    assert set(names) >= {"lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"}
    assert len(set(names.values())) > 1


def test_one_file_without_an_index_is_found(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", CONFIGS["llama"], max_shard_size="1GB")
    assert set(weight_files(folder).values()) == {folder / "model.safetensors"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"model_type": "no_such_model"}',
        '{"model_type": 3}',
        '{"model_type": "llama", "hidden_size": "large"}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "hidden_size": -64}',
        '{"model_type": "llama", "hidden_act": "no_such_function"}',
        '{"model_type": "llama", "rope_parameters": {"rope_type": "no_such_rope"}}',
        '{"a":' * 100_000,
        "\udcff",
    ],
    ids=lambda content: content[:60],
)
def test_a_broken_config_is_refused(content: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    _refusal(str(folder))


def test_sizes_that_are_missing_are_named(folder: Path) -> None:
    path = folder / "config.json"
    sizes = json.loads(path.read_text())
    del sizes["num_hidden_layers"], sizes["intermediate_size"]
    path.write_text(json.dumps(sizes))
    assert "found no intermediate_size, num_hidden_layers;" in _refusal(str(folder))


@pytest.mark.parametrize("name, size", [("num_hidden_layers", 0), ("vocab_size", 0), ("num_hidden_layers", -1)])
def test_sizes_of_nothing_are_named(name: str, size: int, folder: Path) -> None:
    """Fails without the check: the small copy has two layers of its own, and a plan of none is an IndexError."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: size}))
    assert f"found {name} {size}; expected at least 1" in _refusal(str(folder))


def test_a_missing_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in _refusal(str(folder))


def test_remote_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass EvilConfig: ...\nclass Evil: ...\n")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "evil",
                "auto_map": {"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.Evil"},
            }
        )
    )
    assert "remote code is never run" in _refusal(str(folder))
    assert not mark.exists()


def test_remote_code_beside_a_known_type_is_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    fields = json.loads((folder / "config.json").read_text())
    fields["auto_map"] = {"AutoModelForCausalLM": "modeling_evil.Evil"}
    (folder / "config.json").write_text(json.dumps(fields))
    resolve_base(str(folder))
    assert not mark.exists()


def test_remote_code_of_a_type_without_a_language_model_is_not_asked_about(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers asks "Do you wish to run the custom code?" where nobody has said no, and runs it on a "y"."""
    mark = tmp_path / "mark"
    (folder / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: ...\n")
    fields = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(fields))
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    _refusal(str(folder))
    assert not mark.exists()
    assert "custom code" not in capsys.readouterr().out


def test_a_folder_with_pickled_weights_only_is_refused(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    assert "pickle weights are never read" in _refusal(str(folder))


def _name_a_file_outside(index: dict[str, dict[str, str]]) -> None:
    index["weight_map"]["lm_head.weight"] = "../base/model-00001-of-00003.safetensors"


def _name_a_missing_file(index: dict[str, dict[str, str]]) -> None:
    index["weight_map"]["lm_head.weight"] = "model-00009-of-00009.safetensors"


def _leave_out_the_map(index: dict[str, dict[str, str]]) -> None:
    del index["weight_map"]


@pytest.mark.parametrize("damage", [_name_a_file_outside, _name_a_missing_file, _leave_out_the_map])
def test_a_wrong_index_is_refused(damage: Callable[[dict[str, dict[str, str]]], None], folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    damage(index)
    path.write_text(json.dumps(index))
    assert str(path) in _refusal(str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_broken_index_is_refused(content: str, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(content)
    assert str(path) in _refusal(str(folder))


@pytest.mark.parametrize("content", [b"", b"12345678", b"\xff" * 100])
def test_a_broken_weight_file_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", CONFIGS["llama"], max_shard_size="1GB")
    (folder / "model.safetensors").write_bytes(content)
    assert f"{folder / 'model.safetensors'}: found a weight file that cannot be read" in _refusal(str(folder))


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_hub_id_without_a_network_is_refused_at_once(
    revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    message = _refusal("nobody/no-such-model", revision)
    assert time.monotonic() - start < 5.0
    assert "'nobody/no-such-model'" in message
    assert "smollm2-135m" in message


@pytest.mark.parametrize(
    "name, hint",
    [
        ("meta-llama/Llama-3.1-8Bb", "Did you mean meta-llama/Llama-3.1-8B? Check the name"),
        ("qwen/qwen25-7b", "Did you mean Qwen/Qwen2.5-7B? Check the name"),
        ("meta-llama/Llama-3.1-8B", "smollm2-135m. Check the name"),  # it is the network or the token
        ("nobody/no-such-model", "smollm2-135m. Check the name"),
    ],
)
def test_a_misspelt_hub_id_is_answered_with_the_one_that_was_meant(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails without the hint, and where a name that is known as it is is taken for a misspelt one."""
    monkeypatch.chdir(tmp_path)  # nothing of that name is here, nor in the cache
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hint in _refusal(name)


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked of the hub: repository, revision, and which files."""

    name: str
    revision: str | None
    files: tuple[str, ...]


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """A hub with one repository, in the place of huggingface_hub's two calls; returns what is asked of it."""
    asked: list[Asked] = []
    fetched = tmp_path / "fetched"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    (folder / "modeling_evil.py").write_text("")

    def fetch(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
        asked.append(Asked(name, revision, tuple(patterns)))
        fetched.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in patterns):
                shutil.copy(path, fetched)
        return fetched

    def download(name: str, file_name: str, *, revision: str | None) -> str:
        return str(fetch(name, revision, [file_name]) / file_name)

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        return str(fetch(name, revision, allow_patterns))

    monkeypatch.setattr(base_module, "hf_hub_download", download)
    monkeypatch.setattr(base_module, "snapshot_download", snapshot)
    return asked


def test_a_hub_id_is_fetched_at_its_revision_and_without_pickles(hub: list[Asked], tmp_path: Path) -> None:
    base = resolve_base("owner/name", "v1.2", with_weights=False)
    assert not list((tmp_path / "fetched").glob("*.safetensors"))
    assert (tmp_path / "fetched" / "model.safetensors.index.json").is_file()
    whole = fetch_weights(base)
    assert (whole.name, whole.revision) == ("owner/name", "v1.2")
    assert weight_files(whole.folder)
    assert {asked.revision for asked in hub} == {"v1.2"}
    assert {asked.name for asked in hub} == {"owner/name"}
    fetched = {path.suffix for path in (tmp_path / "fetched").iterdir()}
    assert fetched <= {".json", ".safetensors", ".jinja", ".txt"}


def test_a_base_that_is_refused_costs_one_small_file(hub: list[Asked], folder: Path) -> None:
    MixtralConfig(num_hidden_layers=2).save_pretrained(folder)
    with pytest.raises(ConfigError, match="mixtral"):
        resolve_base("owner/name")
    assert [asked.files for asked in hub] == [("config.json",)]


@pytest.mark.parametrize("name", ["", "no-such-alias", "a/b/c", "../nowhere", "nobody/bad name", "x" * 300])
def test_names_that_are_nothing_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _refusal(name)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        read_tokenizer(folder)


def test_the_content_hash_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    before = content_hash(folder)
    assert content_hash(folder) == before
    shutil.copytree(folder, tmp_path / "copy")
    assert content_hash(tmp_path / "copy") == before
    (folder / "README.md").write_text("not a weight")
    assert content_hash(folder) == before
    other = write_base(tmp_path / "other", CONFIGS["llama"], seed=1)
    assert content_hash(other) != before


def test_a_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_hash(folder)
    monkeypatch.setattr("qlora_trainer.model.base.sha256_of", lambda path: pytest.fail(f"{path} was hashed again"))
    assert content_hash(folder) == before


def test_a_half_precision_base_of_another_kind_is_found(tmp_path: Path) -> None:
    folder = write_base(tmp_path / "base", CONFIGS["phi3"], dtype=torch.float16)
    assert resolve_base(str(folder)).config.model_type == "phi3"

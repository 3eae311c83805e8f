"""An exported folder is PEFT's, whole or not there, and what does not fit its base is refused before it is written."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.cli.app import main
from qlora_trainer.errors import StorageError
from qlora_trainer.export.adapter import export, write_peft_folder
from qlora_trainer.export.source import Source, read_source
from qlora_trainer.run.checkpoint.storage import LOCAL, Storage
from tests.export.made_adapters import PATTERNS, make_adapter, peft_logits
from tests.model.tiny_bases import CONFIGS, write_base
from tests.model.tiny_models import relative_error, tiny_documents
from tests.run.faulty_storage import Crash, CrashAt, FailAt, NoSpaceAfter, Recording
from tests.run.told import complaint

DOCUMENTS = tiny_documents(33, 21)
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def export_to(adapter: Path, to: Path) -> None:
    export(adapter, to=to, portable=False, gguf=None, ollama=False, model=None)


def write_to(source: Source, to: Path, storage: Storage = LOCAL) -> None:
    """The same for an adapter that has been read, on any disk."""
    write_peft_folder(to, source, source.settings, source.weights, portable=False, storage=storage)


def refused(capsys: pytest.CaptureFixture[str], exit_code: int, *arguments: object) -> str:
    """What the command says: one line, with that exit code."""
    capsys.readouterr()  # what transformers has shown while the adapter was made
    assert main([str(argument) for argument in arguments]) == exit_code
    return complaint(capsys)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and an adapter with patterns on it."""
    folder = tmp_path_factory.mktemp("tiny")
    make_adapter(folder / "adapter", write_base(folder / "base", CONFIGS["llama"]), **PATTERNS)
    return folder


@pytest.mark.parametrize(
    "fields",
    [{}, PATTERNS, {"use_dora": True}, {"modules_to_save": ["lm_head", "embed_tokens"]}, {"layers_to_transform": [1]}],
    ids=["plain", "patterns", "dora", "modules to save", "layers"],
)
def test_peft_reads_it_and_gives_the_same_logits(fields: dict[str, Any], tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    make_adapter(tmp_path / "given", base, target_modules=["q_proj", "o_proj", "down_proj"], **fields)
    export_to(tmp_path / "given", tmp_path / "to")
    given_TV, found_TV = (peft_logits(base, tmp_path / name, DOCUMENTS) for name in ("given", "to"))
    assert relative_error(found_TV, given_TV) <= 1e-6
    given, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("given", "to"))
    assert given.keys() == found.keys()
    assert all(torch.equal(given[key], found[key]) for key in given)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_took_a_part_of_the_base_is_written_as_plain_lora(start: str, tmp_path: Path) -> None:
    """On the base as it was published; portable, too. Mutation tried: the rank doubled, not the alpha."""
    base = write_base(tmp_path / "base", CONFIGS["llama"])
    make_adapter(tmp_path / "given", base, target_modules=["q_proj", "down_proj"], init_lora_weights=start)
    export_to(tmp_path / "given", tmp_path / "to")
    export(tmp_path / "given", to=tmp_path / "portable", portable=True, gguf=None, ollama=False, model=None)
    given_TV, *found = (peft_logits(base, tmp_path / name, DOCUMENTS) for name in ("given", "to", "portable"))
    assert all(relative_error(found_TV, given_TV) <= 1e-5 for found_TV in found)
    config = json.loads((tmp_path / "to" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 6, 10)


def test_a_run_is_exported_as_it_lies_there(finished: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), "--to", str(tmp_path / "to")]) == 0
    assert sorted(os.listdir(tmp_path / "to")) == FILES
    for name in FILES[1:]:
        assert (tmp_path / "to" / name).read_bytes() == (finished / "adapter" / name).read_bytes()


def test_an_empty_folder_is_taken_a_full_one_is_not(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "to").mkdir()
    arguments = ["export", str(tiny / "adapter"), "--to", str(tmp_path / "to")]
    assert main(arguments) == 0
    assert sorted(os.listdir(tmp_path / "to")) == FILES
    assert "a folder that is not empty" in refused(capsys, 2, *arguments)


@pytest.mark.parametrize(
    "to,exit_code,found",
    [
        ("nowhere/to", 2, "no folder"),
        ("a file", 2, "found a file"),
        ("x" * 300, 5, "file name too long"),
        ("", 2, "no name"),
        ("a\nb", 2, "no name"),
        ("nul\0", 2, "embedded null byte"),
    ],
    ids=["no parent", "file", "long", "empty", "line feed", "NUL"],
)
def test_a_target_that_cannot_be_is_refused(
    to: str, exit_code: int, found: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    for verb in ("export", "merge"):
        assert found in refused(capsys, exit_code, verb, tiny / "adapter", "--to", to)
    assert os.listdir(tmp_path) == ["a file"]


@pytest.mark.parametrize("to", ["x.gguf", "Modelfile"])
def test_one_name_for_a_folder_and_a_file_is_refused(
    to: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--to", tmp_path / to, "--gguf", tmp_path / "x.gguf", "--ollama"]
    assert "the name of a file that is written" in refused(capsys, 2, "export", tiny / "adapter", *arguments)
    assert os.listdir(tmp_path) == []


def test_a_link_is_followed_to_an_empty_folder(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert main(["export", str(tiny / "adapter"), "--to", str(tmp_path / "link")]) == 0
    assert sorted(os.listdir(tmp_path / "real")) == FILES


def test_a_crash_at_every_operation_leaves_a_folder_that_is_whole_or_none(tiny: Path, tmp_path: Path) -> None:
    source, recording = read_source(tiny / "adapter", model=None), Recording()
    write_to(source, tmp_path / "counted", recording)
    whole = {name: (tmp_path / "counted" / name).read_bytes() for name in FILES[1:]}
    found = set()
    for k in range(len(recording.operations)):
        folder = tmp_path / str(k) / "to"
        folder.parent.mkdir()
        with pytest.raises(Crash):
            write_to(source, folder, CrashAt(k))
        found.add(folder.exists())
        if folder.exists():
            assert {name: (folder / name).read_bytes() for name in FILES[1:]} == whole
        else:
            write_to(source, folder)  # over what was left beside it
            assert os.listdir(folder.parent) == ["to"]
    assert found == {False, True}


def test_a_refusal_at_every_operation_leaves_nothing_half_written(tiny: Path, tmp_path: Path) -> None:
    source, recording = read_source(tiny / "adapter", model=None), Recording()
    write_to(source, tmp_path / "counted", recording)
    for k in range(len(recording.operations)):
        folder = tmp_path / str(k) / "to"
        folder.parent.mkdir()
        with pytest.raises(StorageError, match="no space left on device while exporting the adapter"):
            write_to(source, folder, FailAt(k, errno.ENOSPC))
        assert set(os.listdir(folder.parent)) <= {"to"}
        assert not folder.exists() or sorted(os.listdir(folder)) == FILES


def test_a_full_disk_is_told_in_one_line(tiny: Path, tmp_path: Path) -> None:
    source = read_source(tiny / "adapter", model=None)
    with pytest.raises(StorageError, match=r"Free some space or choose another --to\."):
        write_to(source, tmp_path / "to", NoSpaceAfter(1000))
    assert os.listdir(tmp_path) == []


class Flipping(Recording):
    """Writes another byte than it was given, once, at an offset of one file."""

    def __init__(self, name: str, offset: int) -> None:
        super().__init__()
        self.name, self.offset, self.done = name, offset, 0

    def write(self, file: Any, data: memoryview) -> None:
        own = bytearray(data)
        if self.name in os.fsdecode(file.name):
            if self.done <= self.offset < self.done + len(own):
                own[self.offset - self.done] ^= 1
            self.done += len(own)
        super().write(file, memoryview(own))


@pytest.mark.parametrize(
    "name,offset", [("adapter_model", 10), ("adapter_model", 8000), ("adapter_config", 30), ("README", 50)]
)
def test_a_file_that_is_not_what_was_written_is_found(name: str, offset: int, tiny: Path, tmp_path: Path) -> None:
    """Mutation tried: without reading back, all four are exported."""
    source = read_source(tiny / "adapter", model=None)
    with pytest.raises(StorageError, match="reading it back"):
        write_to(source, tmp_path / "to", Flipping(name, offset))
    assert os.listdir(tmp_path) == []


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def without_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]


def with_another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 63)


def with_a_path_for_a_name(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.../../../etc/passwd.lora_A.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize("change", [without_one, with_another_shape, with_a_path_for_a_name])
@pytest.mark.parametrize("verb", ["export", "merge"])
def test_weights_that_do_not_fit_are_named(
    change: Callable[[dict[str, torch.Tensor]], None], verb: str, tiny: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_adapter(tmp_path / "adapter", tiny / "base")
    changed(tmp_path / "adapter", change)
    told = refused(capsys, 2, verb, tmp_path / "adapter", "--to", tmp_path / "to")
    assert "weights that do not fit the base" in told
    assert "q_proj.lora_A" in told or "etc/passwd" in told
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("verb", ["export", "merge"])
def test_an_adapter_of_another_base_names_the_first_five_differences(
    verb: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_base(tmp_path / "other", CONFIGS["qwen3"])
    told = refused(capsys, 2, verb, tiny / "adapter", "--to", tmp_path / "to", "--model", other)
    assert told.count(": adapter (") == 5
    assert not (tmp_path / "to").exists()


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors"])
@pytest.mark.parametrize("verb", ["export", "merge"])
def test_a_pickled_adapter_is_never_run(
    name: str, verb: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, adapter = tmp_path / "the pickle was run", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((tiny / "adapter" / "adapter_config.json").read_bytes())
    (adapter / name).write_bytes(pickle.dumps(Canary(mark)))
    told = refused(capsys, 2, verb, adapter, "--to", tmp_path / "to")
    assert "never read" in told or "no safetensors file" in told
    assert os.listdir(tmp_path) == ["adapter"]


@pytest.mark.parametrize("base_name", ["../base", "owner/../name", "a\0b", "x" * 300, "-", "none"])
def test_a_base_that_is_none_is_refused(
    base_name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an adapter calls its base comes from others."""
    make_adapter(tmp_path / "adapter", tiny / "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base_name}))
    for verb in ("export", "merge"):
        told = refused(capsys, 2, verb, tmp_path / "adapter", "--to", tmp_path / "to")
        assert "model.base" in told
        assert ("no such folder" in told and "--model" in told) == base_name.startswith(".")
    assert os.listdir(tmp_path) == ["adapter"]


def test_an_adapter_that_names_no_base_needs_one(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_adapter(tmp_path / "adapter", tiny / "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    arguments = ["export", str(tmp_path / "adapter"), "--to", str(tmp_path / "to")]
    assert "Give it with --model" in refused(capsys, 2, *arguments)
    assert main([*arguments, "--model", str(tiny / "base")]) == 0
    fields = json.loads((tmp_path / "to" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tiny / "base")

"""The exported adapter on disks that fail: the old one, the new one or none, one line, and a resume that exports it."""

from __future__ import annotations

import errno
import os
import shutil
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_trainer.errors import StorageError
from qlora_trainer.model.adapter_folder import WEIGHTS_FILE
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.run import finish
from qlora_trainer.run.checkpoint.storage import LOCAL, LocalStorage, Storage, sweep
from qlora_trainer.run.export import export_adapter
from tests.run.faulty_storage import Crash, CrashAt, FailAt, LoseUnsynced, Recording
from tests.run.tiny_run import course, run_to_end, tiny_config
from tests.run.told import complaint, train_command

pytestmark = pytest.mark.usefixtures("plans_made_once")

SETTINGS = LoraSettings(rank=2, alpha=4, dropout=0.0, targets=("q_proj",))


def export(folder: Path, value: float, storage: Storage = LOCAL) -> None:
    weights = {"q_proj.lora_A": torch.full((2, 3), value), "q_proj.lora_B": torch.full((3, 2), value)}
    export_adapter(folder, weights, SETTINGS, linear_names=["q_proj"], base_name="base", revision=None, storage=storage)


def exported(folder: Path) -> float | None:
    """The value in a folder that is whole; None where there is none."""
    if not folder.exists():
        return None
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(folder / WEIGHTS_FILE)
    (value,) = {float(number) for tensor in tensors.values() for number in tensor.reshape(-1)}
    return value


def count_operations(folder: Path) -> int:
    recording = Recording()
    export(folder, 1.0)
    export(folder, 2.0, recording)
    return len(recording.operations)


@pytest.mark.parametrize("fault", [CrashAt, LoseUnsynced])
def test_a_crash_at_every_operation_leaves_an_adapter_that_is_whole_or_none(
    fault: type[CrashAt], tmp_path: Path
) -> None:
    """Mutation tried: without the fsync in `write_new`, a power loss leaves an adapter of zeros."""
    found = []
    for k in range(count_operations(tmp_path / "adapter")):
        folder = tmp_path / str(k) / "adapter"
        folder.parent.mkdir()
        export(folder, 1.0)
        storage = fault(k)
        with pytest.raises(Crash):
            export(folder, 2.0, storage)
        if isinstance(storage, LoseUnsynced):
            storage.lose(folder.parent)
        found.append(exported(folder))
        sweep(folder.parent, LOCAL)  # as the next start does
        export(folder, 2.0)
        assert exported(folder) == 2.0
        assert os.listdir(folder.parent) == ["adapter"]
    assert set(found) == {1.0, None, 2.0}


def test_a_refusal_at_every_operation_leaves_nothing_half_written(tmp_path: Path) -> None:
    for k in range(count_operations(tmp_path / "adapter")):
        folder = tmp_path / str(k) / "adapter"
        folder.parent.mkdir()
        export(folder, 1.0)
        with pytest.raises(StorageError, match=r"while exporting the adapter \(the checkpoints are intact"):
            export(folder, 2.0, FailAt(k, errno.ENOSPC))
        assert exported(folder) in (1.0, None, 2.0)
        assert set(os.listdir(folder.parent)) <= {"adapter"}


def test_a_disk_that_is_full_at_the_end_costs_another_try_only(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation tried: an export that lets an OSError through ends with a traceback and exit code 1."""
    (tmp_path / "whole").mkdir()
    run_to_end(tiny_config(tmp_path / "whole", base))
    working = LocalStorage.write

    def refusing(storage: LocalStorage, file: FileIO, data: memoryview) -> None:
        if WEIGHTS_FILE in os.fsdecode(file.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        working(storage, file, data)

    config = tiny_config(tmp_path, base)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", refusing)
        assert train_command(config) == 5
    told = complaint(capsys)
    assert "no space left on device while exporting the adapter" in told
    assert "--resume auto exports it" in told
    run = tmp_path / "run"
    assert not (run / "adapter").exists()
    assert not list(run.glob(".tmp-*"))
    assert train_command(config, "--resume", "auto") == 0
    assert course(run) == course(tmp_path / "whole" / "run")


def test_a_run_folder_that_is_gone_at_the_end_is_told_in_one_line(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def removing(folder: Path, *args: object, **kwargs: object) -> None:
        shutil.rmtree(folder.parent)
        export_adapter(folder, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(finish, "export_adapter", removing)
    assert train_command(tiny_config(tmp_path, base, "training.max_steps=1")) == 5
    assert "no such file or directory while exporting the adapter" in complaint(capsys)

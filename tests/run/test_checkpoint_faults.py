from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qlora_trainer.config.strict_json import decode, encode, read_capped
from qlora_trainer.errors import StorageError
from qlora_trainer.run.checkpoint.listing import list_steps
from qlora_trainer.run.checkpoint.load import newest_verified
from qlora_trainer.run.checkpoint.manifest import FILE_NAMES, MANIFEST_NAME, verify
from qlora_trainer.run.checkpoint.rotate import discard_after, relink
from qlora_trainer.run.checkpoint.save import save_checkpoint
from qlora_trainer.run.checkpoint.storage import LOCAL, LocalStorage, Storage, check_free_space, write_atomically
from tests.run.faulty_storage import Crash, CrashAt, FailAt, LoseUnsynced, NoSpaceAfter, Recording
from tests.run.small_run import adapter_of, optimizer_of, save

ALL_NAMES = (*FILE_NAMES, MANIFEST_NAME)


def two_saved(folder: Path) -> Path:
    """Steps 1 and 2, with step 3 about to rotate the first away."""
    folder.mkdir()
    save(folder, 1)
    save(folder, 2, is_best=True)
    return folder


def count_operations(folder: Path) -> int:
    recording = Recording()
    save(two_saved(folder), 3, keep=2, is_best=True, storage=recording)
    return len(recording.operations)


def loaded_step(folder: Path) -> int:
    loaded = newest_verified(folder)
    assert loaded is not None
    assert torch.equal(loaded.adapter["q_proj.lora_A"], adapter_of(loaded.step)["q_proj.lora_A"])
    assert torch.equal(loaded.optimizer["step"], optimizer_of(loaded.step)["step"])
    assert loaded.rejected == ()
    return loaded.step


@pytest.mark.parametrize("fault", [CrashAt, LoseUnsynced])
def test_a_crash_at_every_operation_leaves_the_old_or_the_new_step(tmp_path: Path, fault: type[CrashAt]) -> None:
    """The previous or the new step loads, never neither, no half step is listed, and both links can be set right.

    Mutations tried, each fails here: without the fsync of the files a listed step has zeros; a save that writes without
    the temporary directory lists a half step; a rotation that removes a step in place, without taking its name away
    first, lists a half-removed one.
    """
    num_operations = count_operations(tmp_path / "whole")
    steps = []
    for k in range(num_operations):
        folder = two_saved(tmp_path / f"crash-{k}")
        storage = fault(k)
        with pytest.raises(Crash):
            save(folder, 3, keep=2, is_best=True, storage=storage)
        if isinstance(storage, LoseUnsynced):
            storage.lose(folder)
        steps.append(loaded_step(folder))
        resumed = Path(shutil.copytree(folder, tmp_path / f"resumed-{k}", symlinks=True))
        relink(resumed, last=steps[-1], best=steps[-1])  # steps 2 and 3 were each the best when they were saved
        discard_after(resumed, step=steps[-1], run_id="run-1")
        assert {name: os.readlink(resumed / name) for name in ("best", "last")} == {
            "best": f"step-{steps[-1]:08d}",
            "last": f"step-{steps[-1]:08d}",
        }
        assert not list(resumed.glob(".tmp-*"))
        assert [verify(path) for _, path in list_steps(folder, LOCAL) if verify(path)] == []  # nor a half-removed one
        save(folder, 4, keep=2)  # the next run saves, and tidies up what the crash left
        assert sorted(os.listdir(folder))[:2] == ["best", "last"]
        assert not list(folder.glob(".tmp-*"))
        assert loaded_step(folder) == 4
    assert steps == sorted(steps)
    assert set(steps) == {2, 3}


def test_nothing_is_removed_before_the_commit(tmp_path: Path) -> None:
    recording = Recording()
    save(two_saved(tmp_path / "run"), 3, keep=2, storage=recording)
    operations = recording.operations
    commit = operations.index("rename step-00000003")
    assert operations[commit - 2 : commit + 2] == [
        "fsync_dir .tmp-step-00000003",
        "list_dir run",
        "rename step-00000003",
        "fsync_dir run",
    ]
    assert not [operation for operation in operations[: commit + 2] if operation.startswith("remove")]
    assert operations.index("open manifest.json") > max(operations.index(f"fsync {name}") for name in FILE_NAMES)
    assert [operations.count(f"fsync {name}") for name in ALL_NAMES] == [1, 1, 1, 1]


def test_names_are_on_the_disk_before_what_they_replace_is_removed(tmp_path: Path) -> None:
    """A power loss may forget any change of a directory since its last fsync.

    Mutations tried: `point` and `remove_step` without their `fsync_dir`.
    """
    recording = Recording()
    save(two_saved(tmp_path / "run"), 3, keep=2, is_best=True, storage=recording)
    operations = recording.operations
    renames = [number for number, operation in enumerate(operations) if operation.startswith("rename")]
    renamed = [operations[number].split()[1] for number in renames]
    assert renamed == ["step-00000003", "last", "best", ".tmp-removed-step-00000001"]
    assert [operations[number + 1] for number in renames] == ["fsync_dir run"] * 4


@pytest.mark.parametrize("error_number", [errno.EIO, errno.ENOSPC])
def test_a_refusal_at_every_operation_never_harms_the_old_steps(tmp_path: Path, error_number: int) -> None:
    """Mutation tried: a save that takes an fsync of the parent for done, which failed, raises nothing."""
    for k in range(count_operations(tmp_path / "whole")):
        folder = two_saved(tmp_path / f"refusal-{k}")
        storage = FailAt(k, error_number)
        with pytest.raises(StorageError) as caught:
            save(folder, 3, keep=2, is_best=True, storage=storage)
        is_committed = loaded_step(folder) == 3
        assert ("itself is committed" in str(caught.value)) is is_committed, storage.operations[k]
        if not is_committed:
            assert not (folder / "step-00000003").exists()
            assert "are intact" in str(caught.value)


def test_a_disk_that_fills_up_names_the_bytes_and_leaves_nothing(tmp_path: Path) -> None:
    num_bytes = save(tmp_path, 1).num_bytes
    for left_bytes in range(0, num_bytes, 97):
        with pytest.raises(StorageError, match=r"no space left .* saving [\d,]+ bytes \([\d,]+ bytes are free\)"):
            save(tmp_path, 2, storage=NoSpaceAfter(left_bytes))
        assert sorted(os.listdir(tmp_path)) == ["last", "step-00000001"]
    assert loaded_step(tmp_path) == 1


class _NearlyFull(LocalStorage):
    def free_bytes(self, path: Path) -> int:
        return 100


def test_a_disk_known_to_be_full_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"100 bytes free.*at least 1,100,000 bytes"):
        check_free_space(tmp_path, 1_000_000, _NearlyFull())
    check_free_space(tmp_path, 91, _NearlyFull())
    with pytest.raises(StorageError, match="100 bytes free"):
        save(tmp_path, 1, storage=_NearlyFull())
    assert os.listdir(tmp_path) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_first_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def flip_middle_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replace_by_link(path: Path) -> None:
    copy = path.parent.parent / f"copy-of-{path.name}"
    path.rename(copy)
    path.symlink_to(copy)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ALL_NAMES)
@pytest.mark.parametrize(
    "damage",
    [truncate, flip_first_bit, flip_middle_bit, fill_with_zeros, Path.unlink, replace_by_link, replace_by_folder],
)
def test_damage_falls_back_and_names_the_file(tmp_path: Path, damage: Callable[[Path], None], name: str) -> None:
    """Mutation tried: without the comparison of the sha256 a flipped bit loads as the newest step."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    damage(tmp_path / "step-00000002" / name)
    loaded = newest_verified(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert [rejected.path.name for rejected in loaded.rejected] == ["step-00000002"]
    assert any(reason.startswith(f"{name}: ") for reason in loaded.rejected[0].reasons)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    """One flip may make the schema version larger: that stops the resume rather than falling back."""
    path = save(tmp_path, 2).path / MANIFEST_NAME
    data = path.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(StorageError, match=r"manifest\.json: |newer version"):
            newest_verified(tmp_path)


def test_an_extra_file_is_rejected(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-00000002" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    loaded = newest_verified(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert loaded.rejected[0].reasons == ("adapter_model.bin: not in the manifest",)
    assert str(loaded.rejected[0]) == "step-00000002 (adapter_model.bin: not in the manifest)"


def test_a_step_that_is_a_link_a_file_or_renamed_is_rejected(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000009").symlink_to("step-00000001")
    (tmp_path / "step-00000008").write_text("")
    os.rename(save(tmp_path, 2).path, tmp_path / "step-00000007")
    (tmp_path / "step-00000006").mkdir()
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-000000010").mkdir()
    (tmp_path / "step-00000011.bak").mkdir()
    loaded = newest_verified(tmp_path)
    assert loaded is not None
    assert loaded.step == 1
    assert [(rejected.path.name[-1], rejected.reasons[0].split(":")[0]) for rejected in loaded.rejected] == [
        ("9", "step-00000009"),
        ("8", "step-00000008"),
        ("7", "manifest.json"),
        ("6", "manifest.json"),
    ]


def test_a_newer_schema_is_refused_without_fallback(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2).path / MANIFEST_NAME
    path.write_bytes(encode({**decode(read_capped(path)), "schema_version": 2}))
    with pytest.raises(StorageError, match=r"newer version.*schema 2.*expected schema 1.*Upgrade"):
        newest_verified(tmp_path)


def test_a_manifest_of_another_program_is_rejected(tmp_path: Path) -> None:
    path = save(tmp_path, 2).path
    (path / MANIFEST_NAME).write_bytes(b'{"schema_version": 1, "files": {"../../x": 3}}')
    assert verify(path) == ["manifest.json: does not match its own sha256"]


def test_all_bad_is_an_error_with_each_reason(tmp_path: Path) -> None:
    truncate(save(tmp_path, 1).path / "optimizer.safetensors")
    (save(tmp_path, 2).path / "state.json").unlink()
    with pytest.raises(StorageError) as caught:
        newest_verified(tmp_path)
    text = str(caught.value)
    assert "step-00000002 (state.json: missing)" in text
    assert "step-00000001 (optimizer.safetensors: " in text
    assert "\n" not in text
    assert caught.value.exit_code == 5


def test_a_step_saved_twice_is_written_once(tmp_path: Path) -> None:
    first = save(tmp_path, 2, best_step=2)
    inode = first.path.stat().st_ino
    second = save(tmp_path, 2, is_best=True)
    assert second.num_bytes == first.num_bytes
    assert first.path.stat().st_ino == inode
    assert os.readlink(tmp_path / "best") == "step-00000002"
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_damaged_step_is_replaced_and_a_different_one_is_not(tmp_path: Path) -> None:
    save(tmp_path, 1)
    truncate(save(tmp_path, 2).path / "state.json")
    save(tmp_path, 2)
    assert loaded_step(tmp_path) == 2
    with pytest.raises(StorageError, match="a whole checkpoint of this step with other tensors"):
        save_checkpoint(
            tmp_path, step=2, adapter=adapter_of(7), optimizer={}, state={"run_id": "run-1"}, fingerprints={}
        )
    assert loaded_step(tmp_path) == 2
    assert not list(tmp_path.glob(".tmp-*"))


def test_an_atomic_write_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    seen = set()
    storage: Storage = Recording()
    write_atomically(path, b"old", storage)
    for k in range(7):
        try:
            write_atomically(path, b"new", CrashAt(k))
        except Crash:
            seen.add(path.read_bytes())
            path.write_bytes(b"old")
    assert seen == {b"old", b"new"}
    with pytest.raises(StorageError, match="no space left on device while writing it"):
        write_atomically(path, b"newer", NoSpaceAfter(2))
    write_atomically(path, b"newest")
    assert path.read_bytes() == b"newest"
    assert os.listdir(tmp_path) == ["summary.json"]

"""Whole runs on disks that fail: exit code 5, one line, and the checkpoints before are intact."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_trainer.config.strict_json import decode, encode, read_capped
from qlora_trainer.run.checkpoint.load import newest_verified
from qlora_trainer.run.checkpoint.manifest import MANIFEST_NAME, FileEntry, read_manifest
from qlora_trainer.run.checkpoint.storage import LocalStorage
from qlora_trainer.run.records import Evaluated, Finished, Resumed, Saved, StepDone
from qlora_trainer.step.optimizer import AdapterOptimizer
from tests.run.small_run import save
from tests.run.tiny_run import run_to_end, run_until_step, tiny_config
from tests.run.told import complaint, train_command

pytestmark = pytest.mark.usefixtures("plans_made_once")

PLAIN = ("training.eval_every=6",)  # saves at steps 2, 4 and 6 only


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def saved_steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "operation, error_number, said",
    [
        ("write", errno.ENOSPC, "no space left on device while saving"),
        ("fsync", errno.EIO, "input/output error while saving"),
    ],
)
def test_a_disk_that_refuses_a_save_ends_the_run_with_the_old_step_intact(
    operation: str,
    error_number: int,
    said: str,
    tmp_path: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    working = getattr(LocalStorage, operation)

    def refusing(storage: LocalStorage, file: FileIO, *arguments: object) -> None:
        if ".tmp-step-00000004/optimizer" in os.fsdecode(file.name):
            raise OSError(error_number, os.strerror(error_number), file.name)
        working(storage, file, *arguments)

    monkeypatch.setattr(LocalStorage, operation, refusing)
    config = tiny_config(tmp_path, base, *PLAIN)
    assert train_command(config) == 5
    told = complaint(capsys)
    assert said in told
    assert "bytes are free" in told
    run = tmp_path / "run"
    assert saved_steps(run) == ["last", "step-00000002"]  # nothing half-written
    loaded = newest_verified(run / "checkpoints")
    assert loaded is not None
    assert loaded.step == 2
    monkeypatch.undo()


def test_a_disk_known_to_be_full_is_refused_before_the_first_step(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation tried: without `_require_disk_space` in prepare two steps are trained before the save is refused."""
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda storage, path: 1000)
    assert train_command(tiny_config(tmp_path, base, *PLAIN)) == 5
    told = complaint(capsys)
    assert "1,000 bytes free" in told
    assert "a checkpoint of" in told
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_removed_ends_the_run_in_one_line(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    working = AdapterOptimizer.update
    run = tmp_path / "run"

    def removing(optimizer: AdapterOptimizer, *given: Any) -> None:
        working(optimizer, *given)
        if (run / "metrics.jsonl").exists():
            shutil.rmtree(run)

    monkeypatch.setattr(AdapterOptimizer, "update", removing)
    assert train_command(tiny_config(tmp_path, base, *PLAIN)) == 5
    assert "no such file or directory" in complaint(capsys)
    assert not run.exists()


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation tried: without `require_finite` in `save._prepare` step 2 is committed with a NaN in it."""
    working = AdapterOptimizer.update

    def poisoning(optimizer: AdapterOptimizer, *given: Any) -> None:
        working(optimizer, *given)
        if optimizer.step_count == 2 and (tmp_path / "run" / "metrics.jsonl").exists():
            optimizer.state_tensors()[1][3] = float("nan")

    monkeypatch.setattr(AdapterOptimizer, "update", poisoning)
    config = tiny_config(tmp_path, base, "training.save_every=1", "training.optimizer=adamw_32bit", *PLAIN)
    assert train_command(config) == 5
    assert "NaN or an infinity" in complaint(capsys)
    assert saved_steps(tmp_path / "run") == ["last", "step-00000001"]


def test_when_all_checkpoints_are_bad_nothing_is_started_over(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation tried: `newest_verified` that returns None instead of raising begins again at step 1."""
    config = tiny_config(tmp_path, base, *PLAIN)
    run_until_step(config, 5)
    run = tmp_path / "run"
    before = (run / "metrics.jsonl").read_bytes()
    for step, name in ((2, "state.json"), (4, "adapter.safetensors")):
        (run / "checkpoints" / f"step-{step:08d}" / name).unlink()
    assert train_command(config, "--resume", "auto") == 5
    told = complaint(capsys)
    assert "step-00000004 (adapter.safetensors: missing), step-00000002 (state.json: missing)" in told
    assert (run / "metrics.jsonl").read_bytes() == before
    assert saved_steps(run) == ["last", "step-00000002", "step-00000004"]


def test_a_checkpoint_of_a_newer_version_is_not_fallen_back_over(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, base, *PLAIN)
    run_until_step(config, 5)
    manifest = tmp_path / "run" / "checkpoints" / "step-00000004" / MANIFEST_NAME
    manifest.write_bytes(encode({**decode(read_capped(manifest)), "schema_version": 2}))
    assert train_command(config, "--resume", "auto") == 5
    assert "made by a newer version of qlora-trainer (schema 2)" in complaint(capsys)
    assert saved_steps(tmp_path / "run") == ["last", "step-00000002", "step-00000004"]


def test_a_run_does_not_go_on_in_another_order(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint from before the order was written down has none. Mutation tried: without `require_same_order` it
    went on, and saw some documents twice in an epoch.
    """
    config = tiny_config(tmp_path, base, *PLAIN, "training.max_steps=3")
    run_until_step(config, 3)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    state, manifest = decode(read_capped(checkpoint / "state.json")), read_manifest(checkpoint)
    assert state.pop("order") == 2
    written = encode(state)
    (checkpoint / "state.json").write_bytes(written)
    found = {**manifest.files, "state.json": FileEntry(len(written), hashlib.sha256(written).hexdigest())}
    (checkpoint / MANIFEST_NAME).write_bytes(replace(manifest, files=found).to_bytes())
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train_command(config, "--resume", "auto") == 5
    assert "found a run that sees its documents in order 1; expected order 2" in complaint(capsys)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    "path",
    [
        "../other",
        "/",
        "run\0",
        "x" * 300,
        "",
        "run/checkpoints/../../run/checkpoints/x",
        f"run/checkpoints/{300 * 'x'}",
    ],
)
def test_a_path_to_resume_from_stays_inside_the_run(
    path: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config(tmp_path, base)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert train_command(config, "--resume", path) in (2, 5)
    assert "expected" in complaint(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "run", "run.yaml"]
    assert list((tmp_path / "run").rglob("*")) == [tmp_path / "run" / "checkpoints"]


def test_a_whole_checkpoint_of_another_run_is_not_resumed_from(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mutation tried: without the comparison of folders in `find_checkpoint` it is loaded, and fails only later."""
    other, run = tmp_path / "other" / "checkpoints", tmp_path / "run"
    for folder in (other, run / "checkpoints"):
        folder.mkdir(parents=True)
    path = save(other, 2).path
    for given in (path, run / "checkpoints" / ".." / ".." / "other" / "checkpoints" / path.name):
        assert train_command(tiny_config(tmp_path, base), "--resume", str(given)) == 2
        assert f"--resume: found {given}; expected 'auto' or a checkpoint in {run}" in complaint(capsys)


def test_other_packages_at_a_resume_are_told(tmp_path: Path, base: Path) -> None:
    """Mutation tried: without `version_notes` in prepare nothing is said."""
    config = tiny_config(tmp_path, base, *PLAIN, "training.max_steps=3")
    run_until_step(config, 3)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    manifest = read_manifest(checkpoint)
    made_by = {**manifest.versions, "torch": "1.0", "gone": "2"}
    (checkpoint / MANIFEST_NAME).write_bytes(replace(manifest, versions=made_by).to_bytes())
    (resumed,) = [record for record in run_to_end(config, resume="auto") if isinstance(record, Resumed)]
    assert resumed.notes == (
        "other packages than at step 2, so bits may differ from here on: "
        f"gone 2 -> none, torch 1.0 -> {manifest.versions['torch']}",
    )


def test_logs_are_on_the_disk_before_a_step_is_committed(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power loss after the commit must not take lines of steps that a resume does not do again.

    Mutation tried: without `sync_logs` in `_save` nothing was ever fsynced.
    """
    run = tmp_path / "run"
    synced_bytes: dict[str, int] = {}
    found = []
    fsync, rename = os.fsync, LocalStorage.rename

    def noting(descriptor: int) -> None:
        fsync(descriptor)
        synced_bytes[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name] = os.fstat(descriptor).st_size

    def committing(storage: LocalStorage, source: Path, target: Path) -> None:
        if target.name.startswith("step-"):
            logs = sorted(path.name for path in run.glob("*.jsonl"))
            found.append(([synced_bytes.get(name) for name in logs], [(run / name).stat().st_size for name in logs]))
        rename(storage, source, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(LocalStorage, "rename", committing)
    run_to_end(tiny_config(tmp_path, base, "training.eval_every=2", "training.max_steps=4"))
    assert len(found) == 2
    for synced, written in found:
        assert synced == written
        assert len(written) == 2  # metrics.jsonl and evals.jsonl


def test_a_clock_that_goes_back_does_not_matter(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.time()
    readings = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: start - 3600.0 * next(readings))
    records = run_to_end(tiny_config(tmp_path, base, *PLAIN))
    timed = [record for record in records if isinstance(record, StepDone | Saved | Evaluated)]
    assert {type(record) for record in timed} == {StepDone, Saved, Evaluated}
    assert all(0 < record.seconds < 60 for record in timed)
    assert isinstance(records[-1], Finished)
    assert 0 < records[-1].summary.train_seconds < 60
    loaded = newest_verified(tmp_path / "run" / "checkpoints")
    assert loaded is not None
    assert loaded.step == 6

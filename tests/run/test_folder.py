from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_trainer.errors import ConfigError, StorageError
from qlora_trainer.run.folder import (
    EVAL_KEYS,
    RunFolder,
    append_eval,
    append_step,
    cut_logs,
    open_run_folder,
    read_lines,
    sync_logs,
    write_config,
    write_plan,
    write_summary,
)
from qlora_trainer.run.records import Evaluated, StepDone, Summary

# What other programs read: a name that is gone, or another one, breaks them.
PROMISED_STEP_KEYS = (
    "step loss lr grad_norm tokens supervised_tokens seconds tokens_per_second peak_bytes samples_seen epoch"
)
PROMISED_SUMMARY_KEYS = (
    "status steps tokens supervised_tokens train_seconds tokens_per_second eval_loss_before eval_loss_after "
    "predicted_peak_bytes measured_peak_bytes process_peak_bytes device versions"
)
HOLD_THE_LOCK = """
import sys
from pathlib import Path
from qlora_trainer.run.folder import open_run_folder
with open_run_folder(Path(sys.argv[1]), resume=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def step_done(step: int, loss: float = 1.5) -> StepDone:
    return StepDone(
        step=step,
        num_steps=10,
        loss=loss,
        lr=1e-4,
        grad_norm=0.5,
        tokens=1000,
        supervised_tokens=400,
        seconds=2.0,
        tokens_per_second=500.0,
        peak_bytes=2**30,
        memory_bytes=2**29,
        samples_seen=16 * step,
        epoch=0.1 * step,
    )


def evaluated(step: int) -> Evaluated:
    return Evaluated(step=step, eval_loss=2.0, eval_tokens=100, seconds=1.0, is_best=True)


def test_whole_files_are_where_the_design_says(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "runs" / "a", resume=False) as folder:
        write_config(folder, "model: {}\n")
        write_plan(folder, {"seq_len": 64})
        write_summary(
            folder,
            Summary(
                status="done",
                steps=3,
                tokens=10,
                supervised_tokens=5,
                train_seconds=1.0,
                tokens_per_second=10.0,
                eval_loss_before=2.0,
                eval_loss_after=float("nan"),
                predicted_peak_bytes=None,
                measured_peak_bytes=5,
                process_peak_bytes=6,
                device="cpu",
                versions={"torch": "2"},
            ),
        )
        assert folder.checkpoints_path.is_dir()
        assert (folder.path / "config.yaml").read_text() == "model: {}\n"
        assert json.loads((folder.path / "plan.json").read_text()) == {"seq_len": 64}
        summary = json.loads((folder.path / "summary.json").read_text())
        assert " ".join(summary) == PROMISED_SUMMARY_KEYS
        assert summary["eval_loss_after"] is None
        assert folder.adapter_path == tmp_path / "runs" / "a" / "adapter"
    assert sorted(os.listdir(tmp_path / "runs" / "a")) == ["config.yaml", "plan.json", "summary.json"]


def test_a_folder_that_stayed_empty_goes_and_the_users_own_stays(tmp_path: Path) -> None:
    with open_run_folder(tmp_path / "new", resume=False):
        pass
    (tmp_path / "mine").mkdir()
    with open_run_folder(tmp_path / "mine", resume=False):
        pass
    assert os.listdir(tmp_path) == ["mine"]
    assert os.listdir(tmp_path / "mine") == []


def test_a_folder_with_a_run_is_for_resuming_only(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"found a run in .*--resume auto"), open_run_folder(tmp_path, resume=False):
        pass
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    with open_run_folder(tmp_path, resume=True) as folder:
        assert folder.path == tmp_path


def test_what_a_killed_run_left_unfinished_goes_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / ".tmp-adapter-x").mkdir()
    (tmp_path / ".tmp-adapter-x" / "adapter_config.json").touch()
    (tmp_path / ".tmp-summary.json").touch()
    with open_run_folder(tmp_path, resume=True):
        assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoints", "metrics.jsonl"]


@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_a_file_in_its_place_is_refused(tmp_path: Path, below: str) -> None:
    path = tmp_path / "runs"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"output\.dir: found a file at"), open_run_folder(path / below, resume=True):
        pass


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with (
        pytest.raises(StorageError, match=r"/proc/runs.*while creating the run folder"),
        open_run_folder(Path("/proc/runs"), resume=False),
    ):
        pass


def test_a_lock_held_by_another_process_names_it_and_ends_with_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_THE_LOCK, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(StorageError) as caught, open_run_folder(tmp_path, resume=resume):
                pass
            assert f"pid {other.pid} on {socket.gethostname()}" in str(caught.value)
            assert caught.value.exit_code == 5
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / ".lock").exists()
    with open_run_folder(tmp_path, resume=True):
        holder = json.loads((tmp_path / ".lock").read_text())
        assert holder == {"pid": os.getpid(), "host": socket.gethostname()}


def test_a_lock_not_signed_yet_still_holds(tmp_path: Path) -> None:
    with open_run_folder(tmp_path, resume=True):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(StorageError, match="held by another run; expected"), open_run_folder(tmp_path, resume=True):
            pass


def test_log_lines_have_exactly_the_keys(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    append_step(folder, step_done(1))
    append_step(folder, step_done(2, loss=float("inf")))
    append_eval(folder, evaluated(2))
    sync_logs(folder)
    steps, evals = read_lines(folder.metrics_path), read_lines(folder.evals_path)
    assert [" ".join(values) for values in steps] == [PROMISED_STEP_KEYS] * 2
    assert [values["loss"] for values in steps] == [1.5, None]
    assert [tuple(values) for values in evals] == [EVAL_KEYS]


def test_logs_are_cut_back_at_a_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    cut_logs(folder, 3, evaluated_step=3)
    append_eval(folder, evaluated(0))
    for step in range(1, 6):
        append_step(folder, step_done(step, loss=0.1 + 0.2 * step))
    append_eval(folder, evaluated(5))
    before = folder.metrics_path.read_bytes().splitlines()
    with folder.metrics_path.open("ab") as file:
        file.write(b'{"step": 2, "lo')  # a crash in the middle of a line
    cut_logs(folder, 3, evaluated_step=3)
    assert folder.metrics_path.read_bytes().splitlines() == before[:3]
    assert [values["step"] for values in read_lines(folder.evals_path)] == [0]
    append_step(folder, step_done(4))
    assert [values["step"] for values in read_lines(folder.metrics_path)] == [1, 2, 3, 4]
    cut_logs(folder, -1, evaluated_step=-1)
    assert read_lines(folder.metrics_path) == read_lines(folder.evals_path) == []


def test_lines_lost_to_a_power_failure_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\x00\x00\n[2]\n{"loss": 1}\n\n{"step": 3}\n')
    assert read_lines(path) == [{"step": 1}, {"step": 3}]


def test_a_log_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics_path.mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl: found is a directory while appending a line"):
        append_step(folder, step_done(1))
    folder.evals_path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="no space left"):
        append_eval(folder, evaluated(1))

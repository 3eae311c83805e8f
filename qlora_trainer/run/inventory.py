"""What lies in run folders: how far each run is, which checkpoints are whole, and whether it can go on. No torch.

Everything is read, nothing is written: looking at a run that is training does not disturb it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_trainer.config.strict_json import decode, read_capped
from qlora_trainer.data.order import ORDER_VERSION, began_with_order
from qlora_trainer.errors import ConfigError, StorageError
from qlora_trainer.run.checkpoint.listing import list_steps
from qlora_trainer.run.checkpoint.manifest import STATE_NAME, verify
from qlora_trainer.run.checkpoint.storage import LOCAL, refusal
from qlora_trainer.run.folder import LOCK_NAME, RunFolder, read_lines

RunStatus = Literal["running", "done", "stopped_early", "interrupted", "unfinished"]
_MAX_DEPTH = 3  # folders below the one that is asked for: runs/project/name


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFound:
    """One checkpoint.

    Attributes:
        step: by its name.
        path: the `step-…` directory.
        num_bytes: of its files.
        reasons: why it is not whole; empty for one whose every byte is as its manifest says.
        order: in which its run sees documents (see `data.order`); None where the checkpoint is not whole.
    """

    step: int
    path: Path
    num_bytes: int
    reasons: tuple[str, ...]
    order: object


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFound:
    """One run.

    Attributes:
        path: its folder.
        status: "running" while a process holds the folder; "unfinished" where none does and no summary was written.
        step: steps that the log tells; a resume may start at an earlier one.
        num_steps: of the whole run; None where no plan was written.
        last_loss: of the last step in the log; None before the first, or where it was not finite.
        num_bytes: of everything in the folder.
        checkpoints: by step, lowest first.
        resumable: what `--resume auto` would do, in words.
        can_resume: whether it would do anything but fail.
    """

    path: Path
    status: RunStatus
    step: int
    num_steps: int | None
    last_loss: float | None
    num_bytes: int
    checkpoints: tuple[CheckpointFound, ...]
    resumable: str
    can_resume: bool


def find_runs(folder: Path) -> list[Path]:
    """Run folders at `folder` or up to three levels below it, by path; links are not followed.

    Raises:
        ConfigError: there is no such folder.
        StorageError: it cannot be read.
    """
    if not folder.is_dir():
        raise ConfigError(
            where=str(folder),
            found="a file" if folder.exists() else "no such folder",
            expected="a folder with runs in it",
            fix="Give the folder that the output.dir of your runs is in.",
        )
    try:
        return sorted(_runs_below(folder, _MAX_DEPTH))
    except OSError as error:
        raise refusal(error, where=folder, doing="looking for runs") from error


def examine_run(path: Path) -> RunFound:
    """Look at one run; every checkpoint's files are read and hashed.

    Raises:
        ConfigError: `path` is not a run folder.
        StorageError: it cannot be read.
    """
    if not _is_run(path):
        raise ConfigError(
            where=str(path),
            found="no run" if path.exists() else "no such folder",
            expected="a run folder, with checkpoints/ or metrics.jsonl in it",
            fix="Give the output.dir of a run; `qlora-trainer runs` lists them.",
        )
    folder = RunFolder(path)
    try:
        checkpoints = _examine_checkpoints(folder.checkpoints_path)
        lines = read_lines(folder.metrics_path)
        summary, plan = _read_object(folder.summary_path), _read_object(folder.plan_path)
        is_running = _is_held(path)
        num_bytes = sum(_sizes(path))
    except OSError as error:
        raise refusal(error, where=path, doing="looking at the run") from error
    last_line: dict[str, Any] = lines[-1] if lines else {"step": 0}
    status = _status(summary, is_running=is_running, last_step=last_line["step"])
    num_steps = plan.get("in_force", {}).get("num_steps") if isinstance(plan.get("in_force"), dict) else None
    loss = last_line.get("loss")
    can_resume, resumable = _resumable(checkpoints, status)
    return RunFound(
        path=path,
        status=status,
        step=last_line["step"],
        num_steps=num_steps if type(num_steps) is int else None,
        last_loss=float(loss) if isinstance(loss, int | float) else None,
        num_bytes=num_bytes,
        checkpoints=checkpoints,
        resumable=resumable,
        can_resume=can_resume,
    )


def require_whole(run: RunFound) -> None:
    """Refuse a run of which any checkpoint is damaged.

    Raises:
        StorageError: names every damaged file of every damaged checkpoint.
    """
    damaged = [checkpoint for checkpoint in run.checkpoints if checkpoint.reasons]
    if damaged:
        told = ", ".join(f"{checkpoint.path.name} ({'; '.join(checkpoint.reasons)})" for checkpoint in damaged)
        raise StorageError(
            where=str(run.path),
            found=f"{len(damaged)} of {len(run.checkpoints)} checkpoints not whole: {told}",
            expected="files as their manifests say",
            fix=f"--resume auto: {run.resumable}.",
        )


def _examine_checkpoints(folder: Path) -> tuple[CheckpointFound, ...]:
    if not folder.is_dir():
        return ()
    found = []
    for step, path in list_steps(folder, LOCAL):
        try:
            reasons = tuple(verify(path))
        except StorageError as error:  # made by a newer version
            reasons = (error.found,)
        num_bytes = 0 if path.is_symlink() else sum(_sizes(path))
        order = None if reasons else began_with_order(_read_object(path / STATE_NAME))
        found.append(CheckpointFound(step=step, path=path, num_bytes=num_bytes, reasons=reasons, order=order))
    return tuple(found)


def _resumable(checkpoints: tuple[CheckpointFound, ...], status: RunStatus) -> tuple[bool, str]:
    if status == "running":
        return False, "no, a process is running it"
    for checkpoint in reversed(checkpoints):  # as `newest_verified` does: what comes first decides
        if not checkpoint.reasons and checkpoint.order != ORDER_VERSION:
            return False, f"no, its documents come in order {checkpoint.order}, this version knows only {ORDER_VERSION}"
        if not checkpoint.reasons:
            return True, f"goes on at step {checkpoint.step}"
        if "newer version" in "".join(checkpoint.reasons):
            return False, f"no, {checkpoint.path.name} was made by a newer version of this program"
    if checkpoints:
        return False, "no, none of its checkpoints is whole"
    return True, "begins again: nothing was saved"


def _status(summary: dict[str, Any], *, is_running: bool, last_step: int) -> RunStatus:
    if is_running:
        return "running"
    told = summary.get("status")
    is_current = summary.get("steps") == last_step  # else it went on after the summary, and then died
    for status in ("done", "stopped_early", "interrupted"):
        if told == status and is_current:
            return status
    return "unfinished"


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object of the run folder; {} where there is none that can be read."""
    try:
        return decode(read_capped(path))
    except (FileNotFoundError, ValueError):
        return {}


def _is_held(path: Path) -> bool:
    """Whether a process holds the folder's lock; asked for shared, so that nothing is taken away from a run."""
    try:
        with (path / LOCK_NAME).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    return folder.checkpoints_path.is_dir() or folder.metrics_path.is_file() or folder.plan_path.is_file()


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
        return
    if depth == 0:
        return
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    for name in names:
        if not name.startswith("."):
            yield from _runs_below(folder / name, depth - 1)


def _sizes(folder: Path) -> Iterator[int]:
    """Bytes of the plain files below; one that is removed meanwhile, by a run that rotates, counts nothing."""
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = (Path(parent) / name).lstat()
            except FileNotFoundError:
                continue
            yield status.st_size

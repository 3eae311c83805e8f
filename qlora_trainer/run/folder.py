"""The run folder: one place that tells what a run was asked, what it did and where it can go on.

    RUN/config.yaml    plan.json      metrics.jsonl  evals.jsonl  skipped.jsonl  summary.json  report.html
    RUN/checkpoints/   step-00000120/ best  last     RUN/adapter/   (a PEFT folder)

Whole files are replaced atomically. The logs are appended to, one line a record; `sync_logs` is called before a
checkpoint is committed and `cut_logs` after one is loaded, so that they always tell the same steps.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from qlora_trainer.config.bases import ADAPTER_CONFIG_FILE
from qlora_trainer.errors import ConfigError, StorageError
from qlora_trainer.run.checkpoint.storage import LOCAL, refusal, sweep, write_atomically
from qlora_trainer.run.records import Evaluated, StepDone, StepSkipped, Summary

LOCK_NAME = ".lock"
AUTO = "auto"  # of --resume: the newest whole checkpoint
STEP_KEYS = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "supervised_tokens",
    "seconds",
    "tokens_per_second",
    "peak_bytes",
    "samples_seen",
    "epoch",
)
OPTIONAL_STEP_KEYS = ("lr_b", "loss_scale")
EVAL_KEYS = ("step", "eval_loss", "eval_tokens", "seconds")
SKIPPED_KEYS = ("step", "loss", "grad_norm", "rows", "is_overflow", "loss_scale")


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where the parts of a run lie."""

    path: Path

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evals_path(self) -> Path:
        return self.path / "evals.jsonl"

    @property
    def skipped_path(self) -> Path:
        return self.path / "skipped.jsonl"

    @property
    def summary_path(self) -> Path:
        return self.path / "summary.json"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def adapter_path(self) -> Path:
        return self.path / "adapter"


@contextmanager
def open_run_folder(path: Path, *, resume: bool) -> Iterator[RunFolder]:
    """Create the folder where it is missing, and hold it against every other run until the end.

    A folder that was made here and stayed empty (the run failed before it wrote anything) is removed again, so that the
    same command can be given once more.

    Args:
        path: the run folder.
        resume: whether it may hold a run already.

    Yields:
        The folder, locked, with `checkpoints/` in it.

    Raises:
        ConfigError: there is a run in it and `resume` is false, or a file is in its place.
        StorageError: it cannot be created or written, or another run holds it (names its pid and host).
    """
    folder = RunFolder(path)
    made_here = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if made_here:
            LOCAL.fsync_dir(path.parent)
        lock = _lock(path)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            where="output.dir",
            found=f"a file at {error.filename}",
            expected="a folder, or nothing yet",
            fix="Choose another output.dir.",
        ) from error
    except OSError as error:
        raise refusal(error, where=path, doing="creating the run folder") from error
    try:
        if not resume and any(name != LOCK_NAME for name in os.listdir(path)):
            raise ConfigError(
                where="output.dir",
                found=f"a run in {path}",
                expected="an empty or new folder",
                fix="Go on with it (--resume auto) or choose another output.dir.",
            )
        _make_checkpoints(folder)
        _sweep(path)
        yield folder
    finally:
        _unlock(folder, lock, made_here=made_here)


def write_config(folder: RunFolder, text: str) -> None:
    """Write `config.yaml`, the fully resolved config."""
    write_atomically(folder.config_path, text.encode())


def write_plan(folder: RunFolder, plan: Mapping[str, Any]) -> None:
    """Write `plan.json`; values must be JSON's.

    What it has and `plan` lacks stays: a resumed run that keeps its knobs has made no plan, but the prediction still
    belongs to it.
    """
    try:
        before = json.loads(folder.plan_path.read_bytes())
    except (OSError, ValueError, RecursionError):  # none yet, or none that can be read: then there is nothing to keep
        before = {}
    kept = before if isinstance(before, dict) else {}
    write_atomically(folder.plan_path, (json.dumps(kept | dict(plan), indent=2, allow_nan=False) + "\n").encode())


def write_summary(folder: RunFolder, summary: Summary) -> None:
    """Write `summary.json`."""
    text = json.dumps(_without_nan(asdict(summary)), indent=2, allow_nan=False)
    write_atomically(folder.summary_path, (text + "\n").encode())


def append_step(folder: RunFolder, record: StepDone) -> None:
    """Append one line to `metrics.jsonl`, with `STEP_KEYS`, and of `OPTIONAL_STEP_KEYS` those that there are.

    A number that is not finite is written as null.
    """
    own_rate = {key: getattr(record, key) for key in OPTIONAL_STEP_KEYS if getattr(record, key) is not None}
    _append(folder.metrics_path, {key: getattr(record, key) for key in STEP_KEYS} | own_rate)


def append_eval(folder: RunFolder, record: Evaluated) -> None:
    """Append one line to `evals.jsonl`, with exactly `EVAL_KEYS`."""
    _append(folder.evals_path, {key: getattr(record, key) for key in EVAL_KEYS})


def append_skipped(folder: RunFolder, record: StepSkipped) -> None:
    """Append one line to `skipped.jsonl`, with exactly `SKIPPED_KEYS`; null for what is not finite."""
    _append(folder.skipped_path, {key: getattr(record, key) for key in SKIPPED_KEYS})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a log back: whole lines only, so that one cut short by a crash is left out; [] where there is no file."""
    if not path.exists():
        return []
    values = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last line feed was never finished
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict) and type(value.get("step")) is int:
                values.append(value)
    return values


def sync_logs(folder: RunFolder) -> None:
    """Return when the logs are on the disk; called before a checkpoint is committed.

    Raises:
        StorageError: the disk refused.
    """
    for path in (folder.metrics_path, folder.evals_path, folder.skipped_path):
        if path.exists():
            try:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise refusal(error, where=path, doing="writing it to the disk") from error


def cut_logs(folder: RunFolder, step: int, *, evaluated_step: int) -> None:
    """Drop the lines of steps beyond `step`, which will be done again, and any line that a crash cut short.

    Args:
        folder: the run folder.
        step: the committed step that a resume starts from; -1, where nothing was committed, empties all.
        evaluated_step: the last evaluation that the checkpoint knows of; a later one will be done again, even at `step`
            itself (a signal had put it off).

    Raises:
        StorageError: a log cannot be rewritten; the old one is untouched.
    """
    last_steps = {folder.metrics_path: step, folder.evals_path: evaluated_step, folder.skipped_path: step}
    for path, last_step in last_steps.items():
        if path.exists():
            kept = [json.dumps(value) for value in read_lines(path) if value["step"] <= last_step]
            write_atomically(path, "".join(f"{line}\n" for line in kept).encode())


def _make_checkpoints(folder: RunFolder) -> None:
    try:
        if not folder.checkpoints_path.exists():
            LOCAL.make_dir(folder.checkpoints_path)
            LOCAL.fsync_dir(folder.path)
    except OSError as error:
        raise refusal(error, where=folder.path, doing="creating the run folder") from error


def _sweep(path: Path) -> None:
    """Remove what a run that died in its last moments left beside its files, such as half an adapter folder."""
    try:
        sweep(path, LOCAL)
    except OSError as error:
        raise refusal(error, where=path, doing="tidying up the run folder") from error


def _append(path: Path, values: Mapping[str, Any]) -> None:
    data = (json.dumps(_without_nan(values), allow_nan=False) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            LOCAL.write(file, memoryview(data))
    except OSError as error:
        raise refusal(error, where=path, doing="appending a line") from error


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN; null says that there was no number, which no other value could."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _lock(path: Path) -> IO[str]:
    """Hold `path/.lock`; the kernel lets go of it when the process ends, however it ends."""
    lock_path = path / LOCK_NAME
    while True:
        file = lock_path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock_path)):
                break
        except BlockingIOError:
            with file:
                raise _held_by_other(path, file) from None
        except FileNotFoundError:
            pass  # its holder removed it between our open and our lock: ours is a lock on nothing, so take a new one
        file.close()
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname()}, file)
    file.flush()
    return file


def _unlock(folder: RunFolder, lock: IO[str], *, made_here: bool) -> None:
    """Remove what is empty while still holding it, then let go."""
    with lock:
        with suppress(OSError):  # removed by the user meanwhile
            (folder.path / LOCK_NAME).unlink()
        with suppress(OSError):  # not empty: there is something to resume from
            folder.checkpoints_path.rmdir()
        if made_here:
            with suppress(OSError):  # not empty: the run wrote something
                folder.path.rmdir()


def _held_by_other(path: Path, file: IO[str]) -> StorageError:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        found = f"it held by another run, pid {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it has just taken the lock and not signed it yet
        found = "it held by another run"
    return StorageError(
        where=str(path),
        found=found,
        expected="a folder that no run is using",
        fix="Wait for that run, stop it, or choose another output.dir.",
    )


def find_adapter(target: Path) -> Path:
    """The PEFT folder that `target` is, or, for a run folder, its `adapter/`.

    Raises:
        ConfigError: neither.
    """
    for folder in (target, RunFolder(target).adapter_path):
        if os.path.isfile(folder / ADAPTER_CONFIG_FILE):  # unlike Path.is_file, False for a name that is too long
            return folder
    unfinished = os.path.isdir(RunFolder(target).checkpoints_path)
    found = f"no {ADAPTER_CONFIG_FILE}"
    if unfinished:
        found = "a run that has not finished"
    elif not os.path.isdir(target):
        found = "a file" if os.path.exists(target) else "no such folder"
    name = str(target)[:200]
    raise ConfigError(
        where=name if name.isprintable() else repr(name),
        found=found,
        expected="a finished run, or a PEFT adapter folder",
        fix="Finish it with --resume auto." if unfinished else "Give the output.dir of a run, such as runs/quickstart.",
    )


def named_checkpoint(folder: RunFolder, resume: str) -> Path | None:
    """What `--resume` names: a checkpoint of this run by its path, or None for "auto".

    Raises:
        ConfigError: the path is none of a checkpoint of this run.
    """
    if resume == AUTO:
        return None
    path = None if "\0" in resume else Path(resume).resolve()
    if path is None or path.parent != folder.checkpoints_path.resolve() or not os.path.isdir(path):
        raise ConfigError(
            where="--resume",
            found=resume,
            expected=f"{AUTO!r} or a checkpoint in {folder.checkpoints_path}",
            fix="Give a step of the run in output.dir.",
        )
    return path

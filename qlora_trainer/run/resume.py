"""Going on from a checkpoint: which one, whether it is of the same run, and its state back in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from qlora_trainer.errors import ConfigError, StorageError
from qlora_trainer.run.checkpoint.load import Loaded, load_checkpoint, newest_verified
from qlora_trainer.run.checkpoint.rotate import discard_after
from qlora_trainer.run.folder import RunFolder, cut_logs
from qlora_trainer.run.session import Progress
from qlora_trainer.step.optimizer import AdapterOptimizer

AUTO = "auto"
# These may differ between a run and its resume: they do not change what is learned.
_FREE_KEYS = frozenset(
    {
        "training.save_every",
        "training.eval_every",
        "memory.budget",
        "memory.host_budget",
        "memory.paging_dir",
        "output.dir",
        "output.trackers",
        "output.keep_checkpoints",
        "output.sample_questions",
    }
)


def find_checkpoint(folder: RunFolder, resume: str) -> Loaded | None:
    """The checkpoint to go on from, loaded; nothing is changed yet.

    Args:
        folder: the run's folder.
        resume: "auto" for the newest whole checkpoint, or the path of one of this run's.

    Returns:
        None where the run has saved nothing yet, so that it begins at its first step.

    Raises:
        ConfigError: the path is not a checkpoint of this run.
        StorageError: none of the checkpoints is whole.
    """
    if resume == AUTO:
        return newest_verified(folder.checkpoints_path)
    path = Path(resume).resolve()
    if path.parent != folder.checkpoints_path.resolve():
        raise ConfigError(
            where="--resume",
            found=resume,
            expected=f"{AUTO!r} or a checkpoint in {folder.checkpoints_path}",
            fix="Give a step of the run in output.dir.",
        )
    return load_checkpoint(path)


def rewind(folder: RunFolder, loaded: Loaded | None) -> None:
    """Remove checkpoints and log lines that are later than `loaded`, so that the run is written anew from there."""
    step = -1 if loaded is None else loaded.step
    cut_logs(folder, step)
    discard_after(folder.checkpoints_path, step=step)


def require_same_run(asked: Mapping[str, Any], loaded: Loaded) -> None:
    """Refuse to go on with another config than the run began with, but for what does not change the result.

    Raises:
        ConfigError: names the first key that differs, with both values.
    """
    began_with = _flat(loaded.state["config"])
    now = _flat(asked)
    for key in sorted((began_with.keys() | now.keys()) - _FREE_KEYS):
        if began_with.get(key) != now.get(key):
            raise ConfigError(
                where=f"{key} at --resume",
                found=repr(now.get(key)),
                expected=f"{began_with.get(key)!r}, which the run in {loaded.path.parent.parent} began with",
                fix="Put the old value back, or start a new run in another folder.",
            )


def restore(loaded: Loaded, optimizer: AdapterOptimizer) -> None:
    """Put master weights and moments into the optimizer's own buffers; the adapters are rounded from them.

    Raises:
        StorageError: the saved state is not of this optimizer.
    """
    try:
        optimizer.load_state_dict(loaded.optimizer)
    except ValueError as error:
        raise StorageError(
            where=str(loaded.path),
            found=f"optimizer state of another run ({error})",
            expected="the state this run saved",
            fix="Resume the run that the checkpoint belongs to.",
        ) from error


def saved_progress(loaded: Loaded) -> Progress:
    """How far the run was when the checkpoint was made."""
    saved = loaded.state["progress"]
    return Progress(**{field.name: saved[field.name] for field in fields(Progress)})


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, values in config.items() for key, value in values.items()}
